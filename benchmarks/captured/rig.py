"""A small model and samplers of it, for the checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.captured.registry import require
from fastcfg import APG, CFG, AdaptiveCFG, CFGZeroStar, Compose, Guidance, Sampler, Schedule, StepTable, solvers
from fastcfg.engine.loop import Run

SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(5)

TABLES: dict[str, StepTable] = {
    "ddim": solvers.ddim(SCHEDULE, eta=0.5),
    "ddim_extrapolated": solvers.ddim_extrapolated(SCHEDULE),
    "ddim_reverse": solvers.ddim_reverse(SCHEDULE),
    "ddpm": solvers.ddpm(SCHEDULE),
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde([14.6, 4.0, 1.2, 0.4, 0.0]),
    "heun": solvers.heun([14.6, 4.0, 1.2, 0.0]),
    "langevin": solvers.langevin(SCHEDULE, step_size=0.1),
    "plms": solvers.plms(SCHEDULE),
    "predictor_corrector": solvers.predictor_corrector(solvers.ddpm(SCHEDULE), SCHEDULE, step_size=0.5),
    "prk": solvers.prk(SCHEDULE),
    "sgld": solvers.sgld(SCHEDULE, 3, 5),
}

# Rows like those above, one family a module: heun and dpmpp_3m_sde, with two stages and with two saved tensors, stand
# for all of noise-level space, ddim for distilled models. (tests/support/captured_cases.py has a_u of CFG++.)
_FAMILIES = ("cfg_pp", "consistency", "deis", "sa", "sigma", "sigma_multistep", "unipc")
REPRESENTED = {
    name for name in solvers.__all__ if getattr(solvers, name).__module__.removeprefix("fastcfg.solvers.") in _FAMILIES
}
REPRESENTED |= {"Denoiser"}

_PLAIN = solvers.ddim(SCHEDULE)

GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "cfg": CFG(3.0),
    "interval": CFG(3.0, interval=(0.2, 0.7)),
    "compose": Compose({"cond": 2.0, "image": 1.5}),
    "adaptive": AdaptiveCFG(3.0, threshold=0.9),
    "apg": APG(3.0, momentum=-0.5, rescale=0.5),
    "zero star": CFGZeroStar(3.0, (0.0, 0.7)),
}

_VALUES = {"cond": (0.8, -0.5), "uncond": (0.0, 0.0), "image": (0.3, 0.2)}


class Conv(nn.Module):
    """Two or more convolutions and a linear layer, sensitive to all that they are given; the same weights every time.

    Args:
        variance: whether the output has variance channels.
        width: channels inside.
        depth: convolutions of that width between the first and the last.
    """

    def __init__(self, variance: bool = False, width: int = 8, depth: int = 0) -> None:
        super().__init__()
        self.time = nn.Linear(4, width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)))
        self.last = nn.Conv2d(width, 6 if variance else 3, 3, padding=1)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.01]))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """ε, and variance channels if it has them: x [B, 3, H, W], t [B], y [B]."""
        times = t[:, None].to(x.dtype) * self.frequencies.to(x.dtype)
        embedded = self.time(torch.cos(times)) + y[:, None].to(x.dtype)
        inner = torch.tanh(self.first(x) + embedded[:, :, None, None])
        return torch.tanh(self.last(self.middle(inner)))


def conv(device: torch.device, table: StepTable | None = None, **options: Any) -> Conv:
    """The model for a table (without variances if there is none), in eval mode on a device."""
    return Conv(table is not None and table.learned_variance, **options).to(device).eval()


def shape_on(device: torch.device) -> tuple[int, ...]:
    """Samples small enough for a CPU, or large enough for several programs each on a GPU."""
    return (4, 3, 64, 64) if device.type == "cuda" else (2, 3, 8, 8)


def build(device: torch.device, model: Any = None, table: StepTable | None = None, **options: Any) -> Sampler:
    """A sampler of DDIM without noise with a graph (`graph=True`), CFG(3) and clip 1, unless told otherwise."""
    table = _PLAIN if table is None else table
    given: dict[str, Any] = {"guidance": CFG(3.0), "clip": 1.0, "graph": True, "device": device, **options}
    return Sampler(conv(device, table) if model is None else model, table, **given)


def conditions(sampler: Sampler, batch: int) -> dict[str, dict[str, Tensor]]:
    """The argument `branches` of `Sampler.sample`: a y for each sample of each branch."""
    values = {name: torch.tensor(_VALUES[name]).repeat(-(-batch // 2))[:batch] for name in sampler.guidance.branches}
    return {name: {"y": value.to(sampler.device, sampler.dtype)} for name, value in values.items()}


def draw(sampler: Sampler, seed: int = 0, shape: tuple[int, ...] | None = None, **options: Any) -> Tensor:
    """Samples of a seed."""
    shape = shape_on(sampler.device) if shape is None else shape
    given: Mapping[str, Any] = {"branches": conditions(sampler, shape[0]), "seed": seed, **options}
    return sampler.sample(shape, **given)


def prepare(sampler: Sampler, seed: int = 0, keep_x0: bool = False) -> Run:
    """A run whose rows have not begun."""
    shape = shape_on(sampler.device)
    return sampler._prepare(shape, keep_x0, branches=conditions(sampler, shape[0]), seed=seed)


def require_captured(sampler: Sampler) -> None:
    """Raise AssertionError unless every set of branches was run by a graph."""
    kind = "cuda" if sampler.device.type == "cuda" else "stand-in"
    for program in sampler.report()["programs"]:
        require(program["graph"] == kind, f"graph {program['graph']!r} in place of {kind!r}: {program['reason']}")


@contextmanager
def no_eager_runs() -> Iterator[None]:
    """Context in which a model that is not captured raises AssertionError, with the reason."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="running eagerly")
        try:
            yield
        except UserWarning as warning:
            raise AssertionError(str(warning)) from warning
