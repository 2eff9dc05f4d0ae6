"""Solvers, guidance and a model for tests of captured programs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg import APG, CFG, AdaptiveCFG, Compose, Guidance, Sampler, Schedule, StepTable, solvers

# By model.
_LOGS: WeakKeyDictionary[nn.Module, SimpleNamespace] = WeakKeyDictionary()

B, SHAPE = 2, (2, 3, 4, 4)
SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(5)


def history_table() -> StepTable:
    ramp = np.linspace(0.1, 0.6, 6)
    columns = {"p_x": ramp, "p_m": -ramp, "a_x": ramp, "a_0": ramp, "k_0": ramp, "k_m": ramp, "a_m": ramp, "a_u": ramp}
    return StepTable.from_columns(
        t=np.linspace(90.5, 3.0, 6), steps=np.arange(6) // 2, slot=[0, 1, 2, 0, 1, -1], a_h0=[0, 1, 1, 1, 1, 1],
        a_h1=[0, 0, 1, 1, 1, 1], a_h2=[0, 0, 0, 1, 1, 1], c_in=ramp + 1, s=ramp, integer_time=False, **columns,
    )  # fmt: skip


TABLES = {
    "ddpm learned_range": solvers.ddpm(SCHEDULE),
    "ddpm learned": solvers.ddpm(SCHEDULE, variance="learned"),
    "ddpm fixed_small": solvers.ddpm(SCHEDULE, variance="fixed_small"),
    "ddpm fixed_large v": solvers.ddpm(SCHEDULE, variance="fixed_large", prediction="v"),
    "ddim": solvers.ddim(SCHEDULE),
    "ddim eta x0": solvers.ddim(SCHEDULE, eta=0.7, prediction="x0"),
    "ddim_reverse": solvers.ddim_reverse(SCHEDULE),
    "ddim_extrapolated": solvers.ddim_extrapolated(SCHEDULE),
    "plms": solvers.plms(SCHEDULE),
    "prk": solvers.prk(SCHEDULE),
    "langevin": solvers.langevin(SCHEDULE, step_size=0.1),
    "sgld": solvers.sgld(SCHEDULE, 3, 5),
    "predictor_corrector": solvers.predictor_corrector(solvers.ddpm(SCHEDULE), SCHEDULE, step_size=0.5),
    "history": history_table(),
}
GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "cfg": CFG(3.0),
    "original": CFG(2.0, formulation="original", order=("uncond", "cond")),
    "sum per sample": CFG([0.5, 3.0], formulation="sum"),
    "interval": CFG(3.0, interval=(0.2, 0.7)),
    "by progress": CFG(lambda progress: 4 * (1 - progress)),
    "compose": Compose({"cond": 2.0, "image": 1.5}, interval=(0.0, 0.6)),
    "adaptive": AdaptiveCFG(3.0, threshold=0.9),
    "apg": APG(3.0, interval=(0.0, 0.7), momentum=-0.5, rescale=0.5),
    "adaptive rescaled": AdaptiveCFG(3.0, threshold=0.9, rescale=0.5),
}
# Not with tables that add the unconditional output.
UNADDED = ("none", "adaptive", "adaptive rescaled")
CONDITIONS = {"cond": [1.0, -0.5], "uncond": [0.0, 0.0], "image": [0.3, 0.2]}


def conditioning(guidance: Guidance | None, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """The argument `branches` of `sample`."""
    names = ("cond",) if guidance is None else guidance.branches
    return {name: {"y": torch.tensor(CONDITIONS[name], dtype=dtype)} for name in names}


class Model(nn.Module):
    """Sensitive to all that it is given, with parameters and a buffer."""

    def __init__(self, variance: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        self.register_buffer("shift", torch.tensor(0.1))
        self.variance = variance
        self.to(dtype)

    @property
    def log(self) -> SimpleNamespace:
        """Its calls, kept where a search for the model's state does not come: a model that counts is not captured."""
        return _LOGS.setdefault(self, SimpleNamespace(calls=0, sizes=[]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.log.calls += 1
        self.log.sizes.append(len(x))
        ones = [1] * (x.ndim - 1)
        m = torch.tanh(self.conv(x) + y.view(-1, *ones) + self.shift) - 0.002 * t.to(x.dtype).view(-1, *ones)
        return torch.cat([m, torch.sin(3 * x)], dim=1) if self.variance else m


def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad((-0.5 * (x - y.view(-1, 1, 1, 1)).square()).sum(), x)[0]


def halve(x0: Tensor) -> Tensor:
    return 0.5 * x0


def build(guidance: Guidance | None = None, table: str = "ddim eta x0", **options: Any) -> tuple[Sampler, Model]:
    model = Model(TABLES[table].learned_variance)
    guidance = CFG(3.0) if guidance is None else guidance
    return Sampler(
        model, TABLES[table], guidance=guidance, **{"clip": 1.0, "graph": True, "noise_source": "torch", **options}
    ), model


def draw(sampler: Sampler, seed: int = 1, **options: Any) -> Tensor:
    return sampler.sample(SHAPE, **{"branches": conditioning(sampler.guidance), "seed": seed, **options})
