"""A small network, samplers of it on any device, and what tests of the captured loop assert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcfg import (
    APG,
    CFG,
    AdaptiveCFG,
    CFGZeroStar,
    Compose,
    Guidance,
    Sampler,
    StateFunction,
    StepTable,
    inpaint,
    solvers,
)
from fastcfg.engine.loop import Run
from support.captured_cases import SCHEDULE

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

# Modules whose rows resemble those of a table above: heun (two rows a step) and dpmpp_3m_sde (two saved tensors) stand
# for all noise-level solvers, ddim for distilled models. support/captured_cases.py has the column a_u of CFG++.
_FAMILIES = ("cfg_pp", "consistency", "deis", "sa", "sigma", "sigma_multistep", "unipc")
REPRESENTED = {
    name for name in solvers.__all__ if getattr(solvers, name).__module__.removeprefix("fastcfg.solvers.") in _FAMILIES
}
REPRESENTED |= {"Denoiser"}

GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "cfg": CFG(3.0),
    "interval": CFG(3.0, interval=(0.2, 0.7)),
    "compose": Compose({"cond": 2.0, "image": 1.5}),
    "channels": CFG(3.0, channels=2),
    "adaptive": AdaptiveCFG(3.0, threshold=0.9),
    "apg": APG(3.0, momentum=-0.5, rescale=0.5),
    "zero star": CFGZeroStar(3.0, (0.0, 0.7)),
}

_PLAIN = solvers.ddim(SCHEDULE)
_VALUES = {"cond": (0.8, -0.5), "uncond": (0.0, 0.0), "image": (0.3, 0.2)}


class Conv(nn.Module):
    """Convolutions and a linear layer, sensitive to all inputs; the same weights every time.

    Args:
        variance: whether the output has variance channels.
        width: inner channels.
        depth: convolutions between the first and the last.
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

    def embed(self, t: Tensor) -> Tensor:
        """[B, 4] of the times [B]."""
        return torch.cos(t[:, None].to(self.frequencies.dtype) * self.frequencies)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """ε, and variance channels if it has them: x [B, 3, H, W], t [B], y [B]."""
        embedded = self.time(self.embed(t)) + y[:, None].to(x.dtype)
        inner = torch.tanh(self.first(x) + embedded[:, :, None, None])
        return torch.tanh(self.last(self.middle(inner)))


def conv(device: torch.device, table: StepTable | None = None, **options: Any) -> Conv:
    """The network for a table (without variance channels if there is none), in eval mode on a device."""
    return Conv(table is not None and table.learned_variance, **options).to(device).eval()


def shape_on(device: torch.device) -> tuple[int, ...]:
    """Samples small enough for a CPU, or large enough for several programs each on a GPU."""
    return (4, 3, 64, 64) if device.type == "cuda" else (2, 3, 8, 8)


def build(
    device: torch.device,
    model: Any = None,
    table: StepTable | None = None,
    rows_per_graph: int = 1,
    noise_source: str = "philox",
    **options: Any,
) -> Sampler:
    """A captured sampler of DDIM without noise, with CFG(3) and clip 1, unless options say otherwise."""
    table = _PLAIN if table is None else table
    given: dict[str, Any] = {"guidance": CFG(3.0), "clip": 1.0, "graph": True, "device": device, **options}
    given |= {"rows_per_graph": rows_per_graph, "noise_source": noise_source}
    return Sampler(conv(device, table) if model is None else model, table, **given)


def conditions(sampler: Sampler, batch: int) -> dict[str, dict[str, Tensor]]:
    """The argument `branches` of `Sampler.sample`: a y for each sample of each branch."""
    values = {name: torch.tensor(_VALUES[name]).repeat(-(-batch // 2))[:batch] for name in sampler.guidance.branches}
    return {name: {"y": value.to(sampler.device, sampler.dtype)} for name, value in values.items()}


def draw(sampler: Sampler, seed: int = 0, shape: tuple[int, ...] | None = None, **options: Any) -> Tensor:
    """Samples of a seed."""
    shape = shape_on(sampler.device) if shape is None else shape
    return sampler.sample(shape, **{"branches": conditions(sampler, shape[0]), "seed": seed, **options})


def prepare(sampler: Sampler, seed: int = 0, keep_x0: bool = False) -> Run:
    """A run whose rows have not begun."""
    shape = shape_on(sampler.device)
    return sampler._prepare(shape, keep_x0, branches=conditions(sampler, shape[0]), seed=seed)


def assert_captured(sampler: Sampler) -> None:
    """Assert that a graph ran every set of branches."""
    kind = "cuda" if sampler.device.type == "cuda" else "stand-in"
    programs = sampler.report()["programs"]
    assert [program["graph"] for program in programs] == [kind] * len(programs), [p["reason"] for p in programs]


def assert_same(got: Tensor, want: Tensor, what: str = "") -> None:
    """Assert that two tensors are finite and equal bit for bit."""
    assert want.isfinite().all(), f"{what}: values that are not finite"
    torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")


def assert_captured_equals_eager(device: torch.device, table: StepTable, **options: Any) -> None:
    """Assert that two captured runs have the bits and the numbers of branches of eager ones."""
    model = conv(device, table)
    eager, captured = (build(device, model, table, **options, graph=graph) for graph in (False, True))
    for seed in (5, 6):
        assert_same(draw(captured, seed), draw(eager, seed), f"{options}, seed {seed}")
    assert_captured(captured)
    counts = [sampler.report()["branches"] for sampler in (captured, eager)]
    assert counts[0] == counts[1], f"{options}: branches {counts[0]} captured, {counts[1]} eager"


def toward_x0(x: Tensor, x0: Tensor, row: Tensor) -> Tensor:
    """A `state_fn` that uses all that it is given."""
    return torch.lerp(x, x0, 0.1 / (1 + row))


def assert_what_is_done_between_rows_agrees(device: torch.device, backend: str) -> None:
    """Assert that captured runs with changes of the state, checks and log-probabilities equal eager ones."""
    table, shape = TABLES["ddpm"], shape_on(device)
    model = conv(device, table)
    samplers = [build(device, model, table, backend=backend, graph=graph) for graph in (False, True)]
    image = torch.linspace(-1, 1, 3 * shape[-1], device=device).view(1, 3, 1, -1).expand(1, *shape[1:])
    mask = torch.linspace(0, 1, shape[-1], device=device).view(1, 1, 1, -1)
    changes: dict[str, Any] = {"after": toward_x0, "before": StateFunction(toward_x0, "before")}
    changes |= {noise: inpaint(mask, image, noise=noise) for noise in ("fixed", "fresh", "row")}
    for name, change in changes.items():
        eager, captured = (draw(sampler, state_fn=change) for sampler in samplers)
        assert_same(captured, eager, name)
        assert_captured(samplers[1])
    runs: list[Any] = [draw(sampler, log_prob=True, trajectory=True) for sampler in samplers]
    for part in ("samples", "log_prob", "states"):
        assert_same(getattr(runs[1], part), getattr(runs[0], part), part)
    by_reference: Any = draw(build(device, model, table, backend="reference", graph=False), log_prob=True)
    torch.testing.assert_close(runs[1].log_prob, by_reference.log_prob, rtol=1e-6, atol=1e-6 * image.numel())
    for sampler in samplers:
        checked = build(device, model, table, backend=backend, graph=sampler.config.graph, check_finite="raise")
        assert_same(draw(checked), draw(sampler), "check_finite")
        with pytest.raises(FloatingPointError, match="row 0 "):
            draw(checked, guidance=CFG(3.0), clip=None, x_T=torch.full(shape, 3e38, device=device))
