"""Errors of compiled sampling functions in float32 against float64, beside k-diffusion's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.precision import Bounds, assert_no_larger, mean_square
from support.sampler_cases import CASES, denoise
from torch import Tensor

from benchmarks.suite.foreign import load_k_diffusion
from fastcfg.compiler import trace_sampler
from fastcfg.compiler.assembly import distance
from fastcfg.compiler.patching import drawing
from fastcfg.ops.stepper import Stepper

loaded: Any = load_k_diffusion()
sampling: Any = loaded and loaded[0]
pytestmark = pytest.mark.skipif(sampling is None, reason="k-diffusion is not installed")

# Measured, but for what is named below: 0.80 and 0.97, 1.04 and 1.04 (LMS), 1.01 and 0.99; medians by step 0.06, 0.64
# and 0.61. With few steps originals lose digits where they take the state away from itself.
BOUNDS = {(1, 2, 3): (0.85, 1.02), (5, 8, 12, 20): (1.08, 1.08), (30, 50): (1.05, 1.05)}
# Heun as in test_precision. The last row of LMS multiplies state and x0 by -4 and 5, where the original multiplies
# their difference.
EXCEPTIONS: list[tuple[str, dict[str, Any], Bounds]] = [
    ("sample_heun", {}, {(30, 50): (1.12, 1.3)}),  # measured: 1.08, 1.24
    ("sample_lms", {}, {(30, 50): (2.3, 1.25)}),  # 2.21, 1.20
    ("sample_lms", {"order": 2}, {(30, 50): (1.52, 1.08)}),  # 1.46, 1.03
]


def run(
    function: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    options: dict[str, Any],
    output: Callable[[int, Tensor, Tensor], Tensor],
    draws: Sequence[Tensor],
) -> list[Tensor]:
    """The samples that a function gives its model, which is told the number of the call, and its result."""
    states, left = list[Tensor](), iter(draws)

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        states.append(x)
        return output(len(states) - 1, x, sigma)

    def draw(*_: Any) -> Tensor:
        return next(left).to(x.dtype)

    known = inspect.signature(function).parameters
    given = {name: value for name, value in (("disable", True), ("noise_sampler", draw)) if name in known} | options
    with drawing(function, draw):
        states.append(function(model, x, sigmas, **given))
    return states


def errors(name: str, options: dict[str, Any], count: int) -> tuple[list[list[float]], float, float]:
    """Mean squares of a function's run in float32, the compiled and the original one's: of steps from the original's
    samples, and of whole runs with the same outputs. And the largest distances of a compiled step, in shares of the
    largest value: from float64, and from the original's."""
    function, sigmas = getattr(sampling, name), sampling.get_sigmas_karras(count, 0.03, 14.6)
    compiled = trace_sampler(function, sigmas.double(), **options)
    x = torch.randn(2, 3, 12, 10, generator=torch.manual_seed(0)) * sigmas[0]
    generator = torch.manual_seed(1)
    draws = [torch.randn(x.shape, generator=generator) for _ in range(4 * count + 8)]
    outputs = list[Tensor]()

    def record(_: int, x: Tensor, sigma: Tensor) -> Tensor:
        outputs.append(denoise(x, sigma).float())
        return outputs[-1].double()

    exact = run(function, x.double(), sigmas.double(), options, record, draws)
    theirs = run(function, x, sigmas, options, lambda call, *_: outputs[call], draws)

    left = [z.double() for z in draws]

    def joined(weights: Sequence[float]) -> Tensor:
        terms, left[:] = [weight * z for weight, z in zip(weights, left, strict=False)], left[len(weights) :]
        return sum(terms, torch.zeros(1, dtype=torch.float64))

    got = (compiled.start * x.double() + joined(compiled.start_draws)).float()
    by_step, whole, largest, apart = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0
    ours, ours_by_step, exact_by_step = (Stepper(compiled.table, like) for like in (x, x, x.double()))
    for row, weights in enumerate(compiled.draws):
        total = math.hypot(*weights)
        noise = joined(weights)
        noise = noise / total if total else None
        rounded = None if noise is None else noise.float()
        before, after = theirs[row : row + 2]
        step, _ = ours_by_step(row, outputs[row], before, rounded)
        want, _ = exact_by_step(row, outputs[row].double(), before.double(), noise)
        largest, apart = max(largest, distance(step.double(), want)), max(apart, distance(step, after))
        by_step[0] += mean_square(step, want)
        by_step[1] += mean_square(after, want)
        got, _ = ours(row, outputs[row], got, rounded)
        whole[0] += mean_square(got, exact[row + 1])
        whole[1] += mean_square(after, exact[row + 1])
    return [by_step, whole], largest, apart


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_errors_are_no_larger_than_the_original_s(name: str, options: dict[str, Any]) -> None:
    def squares(count: int) -> list[list[float]] | None:
        if count == 1 and name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
            return None
        found, largest, apart = errors(name, options, count)
        assert largest <= 1e-6  # measured: 8.3e-7
        if count >= 5:  # measured: 1.4e-6; with fewer the original is up to 3e-3 from float64
            assert apart <= 2e-6
        return found

    exceptions = [bounds for *case, bounds in EXCEPTIONS if case == [name, options]]
    assert_no_larger(squares, BOUNDS | (exceptions[0] if exceptions else {}))
