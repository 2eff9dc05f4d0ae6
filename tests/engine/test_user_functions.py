"""A user's functions inside the step: denoised_fn on x0, and the gradient of a cond_fn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcfg import CFG, Sampler, Schedule, StepTable, solvers
from fastcfg.ops import triton_problem

SHAPE = (2, 3, 4, 5)
SCHEDULE = Schedule.named("squaredcos_cap_v2").respace(4)
TABLES = {
    "ddpm": solvers.ddpm(SCHEDULE),
    "fixed": solvers.ddpm(SCHEDULE, variance="fixed_large"),
    "ddim": solvers.ddim(SCHEDULE, eta=0.5),
}
CONDITIONING = {"cond": {"y": torch.tensor([0.3, -1.0])}, "uncond": {"y": torch.zeros(2)}}

BACKENDS = [
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(bool(triton_problem(torch.device("cpu"))), reason="needs the Triton interpreter"),
    ),
    "reference",
]


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    eps = torch.tanh(x * 0.7 + y.view(-1, 1, 1, 1)) + 1e-3 * t.view(-1, 1, 1, 1)
    return torch.cat([eps, torch.sin(3 * x)], dim=1)


def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Of -(x - y)²/2, by autograd as a classifier's cond_fn does it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        log_probability = -0.5 * (x - y.view(-1, 1, 1, 1)).square().sum() - 1e-3 * (x * t.view(-1, 1, 1, 1)).sum()
        return torch.autograd.grad(log_probability, x)[0]


def halve(x0: Tensor) -> Tensor:
    return 0.5 * x0


def sample(name: str = "ddpm", *, guidance: Any = None, seed: int = 0, **options: Any) -> Tensor:
    guidance = CFG(2.0) if guidance is None else guidance
    sampler = Sampler(model, TABLES[name], guidance=guidance, **{"clip": 1.0, **options})
    return sampler.sample(SHAPE, **CONDITIONING, seed=seed)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_that_changes_nothing_changes_no_bit(name: str, backend: str) -> None:
    want = sample(name, backend=backend)
    assert torch.equal(sample(name, denoised_fn=lambda x0: x0, backend=backend), want)
    zero = sample(name, cond_fn=lambda x, t, y: torch.zeros_like(x), backend=backend)
    assert torch.equal(zero, want)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("functions", [{"denoised_fn": halve}, {"cond_fn": gradient}], ids=lambda f: next(iter(f)))
def test_kernels_reference_and_replay_agree(name: str, functions: dict[str, Any]) -> None:
    want = sample(name, **functions)
    assert not torch.equal(want, sample(name))
    assert torch.equal(sample(name, **functions, graph=True), want)
    if not triton_problem(torch.device("cpu")):
        # exp2 of numpy and torch differ by up to 2 ulp.
        fused = sample(name, **functions, backend="triton")
        torch.testing.assert_close(fused, want, rtol=2e-6, atol=2e-6)
        assert torch.equal(sample(name, **functions, backend="triton", graph=True), fused)


def test_both_functions_at_once_and_in_float64() -> None:
    want = sample(denoised_fn=halve, cond_fn=gradient, state_dtype=torch.float64, dtype=torch.float64)
    got = sample(denoised_fn=halve, cond_fn=gradient)
    # Measured: 1.1e-6.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_a_gradient_moves_the_last_step_by_its_variance() -> None:
    """condition_mean at t = 0, where no noise is added."""
    pull = sample("fixed", cond_fn=lambda x, t, y: (t == 0).view(-1, 1, 1, 1) * torch.ones_like(x))
    last = float(SCHEDULE.fixed_large_variance[0])
    torch.testing.assert_close(pull - sample("fixed"), torch.full(SHAPE, last), rtol=0, atol=1e-6)


def test_a_gradient_moves_x0_of_ddim_beyond_the_clip() -> None:
    table = solvers.ddim(SCHEDULE)
    steps = list(
        Sampler(model, table, clip=1.0, cond_fn=lambda x, t, y: torch.ones_like(x)).iterate(
            SHAPE, cond=CONDITIONING["cond"], seed=0
        )
    )
    ᾱ = SCHEDULE.alphas_cumprod[-1]
    assert float(steps[0].x0.max()) == pytest.approx(1 + (1 - ᾱ) / math.sqrt(ᾱ), rel=1e-5)


def test_cond_fn_gets_the_conditional_branch_and_the_models_time() -> None:
    seen: list[tuple[Any, ...]] = []

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((tuple(x.shape), t.clone(), y.clone(), torch.is_grad_enabled()))
        return torch.zeros_like(x)

    sample(cond_fn=cond_fn)
    assert [int(t[0]) for _, t, _, _ in seen] == SCHEDULE.timestep_map[::-1].tolist()
    for shape, t, y, grad in seen:
        assert shape == SHAPE
        assert t.shape == (2,)
        assert t.dtype == torch.int64
        assert torch.equal(y, CONDITIONING["cond"]["y"])
        assert not grad


def test_a_replaced_function_or_conditioning_is_not_stale_in_a_replay() -> None:
    sampler = Sampler(model, TABLES["ddpm"], guidance=CFG(2.0), clip=1.0, cond_fn=gradient, graph=True)
    other = {"cond": {"y": torch.tensor([2.0, 1.0])}, "uncond": {"y": torch.zeros(2)}}
    sampler.sample(SHAPE, **CONDITIONING, seed=0)
    fresh = Sampler(model, TABLES["ddpm"], guidance=CFG(2.0), clip=1.0, cond_fn=gradient).sample(SHAPE, **other, seed=0)
    assert torch.equal(sampler.sample(SHAPE, **other, seed=0), fresh)
    sampler.cond_fn, sampler.denoised_fn = None, halve
    assert torch.equal(sampler.sample(SHAPE, **CONDITIONING, seed=0), sample(denoised_fn=halve))


def test_a_model_that_can_computes_its_conditioning_once() -> None:
    calls: list[str] = []

    class Model:
        def precompute(self, y: Tensor) -> dict[str, Tensor]:
            calls.append("precompute")
            return {"twice": 2 * y}

        def __call__(self, x: Tensor, t: Tensor, twice: Tensor) -> Tensor:
            calls.append("model")
            return model(x, t, 0.5 * twice)

    got = Sampler(Model(), TABLES["ddpm"], guidance=CFG(2.0), clip=1.0).sample(SHAPE, **CONDITIONING, seed=0)
    assert torch.equal(got, sample())
    assert calls == ["precompute"] * 2 + ["model"] * 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"denoised_fn": 3}, TypeError, "denoised_fn: got int, expected a function or None"),
        ({"cond_fn": "y"}, TypeError, "cond_fn: got str, expected a function or None"),
        (
            {"denoised_fn": lambda x0: x0[:1]},
            ValueError,
            r"denoised_fn: got shape \(1, 3, 4, 5\) from it, expected .*\(2, 3",
        ),
        ({"denoised_fn": lambda x0: None}, ValueError, "denoised_fn: got NoneType from it"),
        ({"cond_fn": lambda x, t, y: x[:, :1]}, ValueError, r"cond_fn: got shape \(2, 1, 4, 5\) from it, expected"),
    ],
)
def test_bad_functions_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(**options)


def test_a_table_without_the_terms_is_refused() -> None:
    raw = StepTable.from_columns(t=[1, 0], p_m=1.0, a_m=1.0, name="raw")
    with pytest.raises(ValueError, match="denoised_fn: got a function with the table raw, expected None"):
        Sampler(model, raw, denoised_fn=halve).sample(SHAPE, cond=CONDITIONING["cond"], seed=0)
    with pytest.raises(ValueError, match="cond_fn: got a function with the table raw, expected None"):
        Sampler(model, raw, cond_fn=gradient).sample(SHAPE, cond=CONDITIONING["cond"], seed=0)
