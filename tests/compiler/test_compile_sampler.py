"""k-diffusion's sampling functions compiled, and functions of a user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.sampler_cases import CASES, denoise
from torch import Tensor

from benchmarks.suite.foreign import load_k_diffusion
from fastcfg import Sampler
from fastcfg.compiler import Compiled, compile_sampler, trace_sampler
from fastcfg.compiler.patching import drawing

pytestmark = pytest.mark.quick

loaded: Any = load_k_diffusion()
sampling: Any = loaded and loaded[0]
needs_k_diffusion = pytest.mark.skipif(sampling is None, reason="k-diffusion is not installed")


def check(function: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any]) -> Compiled:
    """The compiled function's samples are the original's, of the original's draws."""
    compiled = trace_sampler(function, sigmas, **options)
    table = compiled.table
    x = torch.randn(2, 3, 6, 5, generator=torch.manual_seed(0), dtype=torch.float64) * sigmas[0]
    generator, drawn, seen = torch.manual_seed(1), list[list[Tensor]]([[]]), list[Tensor]()

    def model(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        drawn.append([])
        return denoise(x, sigma, **given)

    def draw(*_: Any) -> Tensor:
        drawn[-1].append(torch.empty_like(x).normal_(generator=generator))
        return drawn[-1][-1]

    filled = {"disable": True, "callback": lambda state: seen.append(state["x"]), "noise_sampler": draw}
    known = inspect.signature(function).parameters
    given = {name: value for name, value in filled.items() if name in known} | options
    with drawing(function, draw):
        want = function(model, x, sigmas, **given)
    x_T, *noise = (
        sum((c * z for c, z in zip(coefficients, values, strict=True)), torch.zeros_like(x))
        for coefficients, values in zip([compiled.start_draws, *compiled.draws], drawn, strict=True)
    )
    x_T = compiled.start * x + x_T
    unit = torch.stack(noise) / torch.from_numpy(np.where(table["s"] > 0, table["s"], 1.0)).view(-1, 1, 1, 1, 1)
    sampler = Sampler(denoise, table, backend="reference", graph=False, dtype=torch.float64, state_dtype=torch.float64)
    steps = list(sampler.iterate(tuple(x.shape), x_T=x_T, noise=unit if table.uses_noise else None))
    # Measured: 2.2e-14; the saved tensors stand for others.
    torch.testing.assert_close(steps[-1].x, want, rtol=1e-12, atol=1e-12)
    assert table.num_steps == len(sigmas) - 1
    assert len(seen) in (0, table.num_steps)
    return compiled


@needs_k_diffusion
@pytest.mark.parametrize("count", [1, 2, 7, 25])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_compiled_function_is_the_original(name: str, options: dict[str, Any], count: int) -> None:
    if count == 1 and name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        pytest.skip("the original does not run")
    sigmas = sampling.get_sigmas_karras(count, 0.03, 14.6).double()
    compiled = check(getattr(sampling, name), sigmas, options)
    if "s_churn" not in options:
        assert compiled.table.initial_scale == sigmas[0]


@needs_k_diffusion
def test_sigmas_need_not_end_at_zero_nor_be_tensors() -> None:
    check(sampling.sample_heun, torch.tensor([5.0, 2.0, 0.7, 0.3], dtype=torch.float64), {})
    assert len(compile_sampler(sampling.sample_euler, [5.0, 2.0, 0.0])) == 2


@needs_k_diffusion
def test_saved_tensors_are_as_few_as_the_method_needs() -> None:
    want = {"euler": 0, "euler_ancestral": 0, "heun": 1, "dpmpp_2m": 1, "dpmpp_sde": 1, "dpmpp_3m_sde": 2, "lms": 3}
    sigmas = sampling.get_sigmas_karras(12, 0.03, 14.6)
    got = {name: compile_sampler(getattr(sampling, f"sample_{name}"), sigmas).num_history for name in want}
    assert got == want


@needs_k_diffusion
def test_draws_are_told_with_those_whose_value_is_not_used() -> None:
    sigmas = [4.0, 2.0, 1.0, 0.0]
    plain, churned = (trace_sampler(sampling.sample_euler, sigmas, s_churn=churn) for churn in (0.0, 0.3))
    assert (plain.start, plain.start_draws, plain.draws) == (1.0, (0.0,), ((0.0,), (0.0,), ()))
    want = [sigma * math.sqrt(1.1**2 - 1) for sigma in sigmas]
    assert churned.start_draws == pytest.approx(want[:1])
    assert churned.draws[0] == pytest.approx(want[1:2])
    assert churned.table.initial_scale == pytest.approx(4.4)
    assert churned.table["t"].tolist() == pytest.approx([4.4, 2.2, 1.1])


@needs_k_diffusion
def test_dpm_fast_is_taken_through_a_function_of_sigmas() -> None:
    def dpm_fast(model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        return sampling.sample_dpm_fast(model, x, sigmas[-1], sigmas[0], 9, disable=True)

    table = compile_sampler(dpm_fast, [14.6, 0.03])
    assert (len(table), table.num_history) == (9, 2)


@needs_k_diffusion
def test_the_worked_example_of_the_reduction() -> None:
    table = compile_sampler(sampling.sample_dpmpp_2m, [4.0, 2.0, 1.0])
    assert table.num_history == 1
    first, second = ({name: float(table[name][row]) for name in ("a_x", "a_0", "a_h0")} for row in (0, 1))
    assert first == pytest.approx({"a_x": 0.5, "a_0": 0.5, "a_h0": 0.0})
    ways = {"outputs": {"a_x": 0.5, "a_0": 0.75, "a_h0": -0.25}, "states": {"a_x": 0.0, "a_0": 0.75, "a_h0": 0.25}}
    assert second == pytest.approx(ways["states" if table["k_x"][0] else "outputs"])


# What is no table


def euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """A sampler of one's own."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def squared(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) + 1e-3 * x**2


def halving(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    while x.abs().max() > 0.4:
        x = 0.25 * model(x, sigmas[:1].expand(len(x)))
    return x


def branching(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) * (1.5 if len(x) > 1 else 1.0)


def restless(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, 0.5 * x + torch.randn_like(x) - 2 * torch.randn_like(x), sigmas)


def anchored(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return euler(model, x + noise, sigmas) + 0.1 * noise


def forgetless(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    kept = []
    for i, sigma in enumerate(sigmas[:-1]):
        kept.append(model(x, sigma.expand(len(x))))
        x = x + sum(m / (1 + (i + j) ** 2) for j, m in enumerate(kept[-6:]))
    return x


def mixed(saved: int) -> Callable[..., Tensor]:
    """A function that saves sums of state and output in proportions of its own, and adds the last few."""

    def function(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
        kept: list[Tensor] = []
        for i, sigma in enumerate(sigmas[:-1]):
            m = model(x, sigma.expand(len(x)))
            callback({"x": x})
            past, share = kept[max(0, i - saved) :], 0.3 + 0.1 * i % 0.7
            kept.append(share * x + (1 - share) * m)
            x = (0.9 - 0.05 * (i % 3)) * x - 0.2 * m + sum(h * 0.3 / (2 + j + i % 2) for j, h in enumerate(past))
        return x

    return function


@pytest.mark.parametrize("count", [4, 7, 24])
@pytest.mark.parametrize("saved", [1, 2, 3])
def test_saved_tensors_of_any_proportions_are_found(saved: int, count: int) -> None:
    levels = torch.linspace(5.0, 0.0, count + 1, dtype=torch.float64)
    check(mixed(saved), levels, {})
    if count > 5:
        assert compile_sampler(mixed(saved), levels).num_history == saved


def test_a_function_of_ones_own_is_a_table() -> None:
    table = compile_sampler(euler, [4.0, 2.0, 1.0, 0.0])
    assert table.name == "euler"
    assert table["t"].tolist() == [4.0, 2.0, 1.0]
    assert table["a_0"].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert table["a_x"].tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_what_is_added_before_the_first_model_call_is_the_start() -> None:
    compiled = check(restless, torch.linspace(4.0, 0.0, 6, dtype=torch.float64), {})
    assert (compiled.start, compiled.start_draws) == (0.5, (1.0, -2.0))
    assert compiled.table.initial_scale == pytest.approx(3.0)  # of 2, 1 and 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (squared, "step 11 has coefficients"),
        (halving, "with model calls that depend on the samples"),
        (branching, "its table differs by .* in row 11"),
        (anchored, "reuses the noise drawn before its first model call"),
        (lambda model, x, sigmas: euler(model, 0 * x, sigmas), "first model input that lacks x"),
        (forgetless, "needs 5 saved tensors, expected at most 3"),
        (lambda model, x: x, "does not run on basis vectors"),
    ],
    ids=["a square", "a loop", "a branch", "early noise again", "no start", "five saved tensors", "another form"],
)
def test_what_is_no_table_is_refused_and_why(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_sampler(function, torch.linspace(10, 0, 13))


@needs_k_diffusion
def test_adaptive_steps_are_refused() -> None:
    def adaptive(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return sampling.sample_dpm_adaptive(model, x, sigmas[-1], sigmas[0], disable=True)

    with pytest.raises(ValueError, match="sample_fn: got"):
        compile_sampler(adaptive, [14.6, 0.03])


@pytest.mark.parametrize("sigmas", [[1.0], [[1.0, 0.5]], [1.0, -0.5, 0.0], []])
def test_bad_sigmas(sigmas: Any) -> None:
    with pytest.raises(ValueError, match="sigmas: got"):
        compile_sampler(euler, sigmas)


@pytest.mark.parametrize("sigmas", ["ab", None])
def test_what_is_no_sigmas(sigmas: Any) -> None:
    with pytest.raises(TypeError, match=r"sigmas: got .*, expected numbers"):
        compile_sampler(euler, sigmas)


def test_a_function_without_model_calls() -> None:
    def idle(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match="sample_fn: got idle, which calls no model, expected linear steps"):
        compile_sampler(idle, [1.0, 0.0])


def test_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="sample_fn: got str, expected a function"):
        compile_sampler("euler", [1.0, 0.0])  # type: ignore[arg-type]
