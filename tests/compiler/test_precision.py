"""Errors of compiled steps in float32 against float64, beside the originals' own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.precision import Bounds, assert_no_larger, mean_square
from support.scheduler_cases import CASES, CLIPPED_AT_2, KARRAS, THRESHOLDED, V
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.compiler import compile_timesteps, scheduler_clip
from fastcfg.compiler.patching import drawing, in_float64
from fastcfg.ops.stepper import Stepper

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The `scale_model_input`"),
]

# Measured, but for what is named below: 1.09 and 1.17 (FlowMapEuler, which computes in float64), 1.06 and 1.05, 1.01
# and 1.21; medians 0.76 to 0.82.
BOUNDS = {(1, 2, 3): (1.12, 1.22), (5, 8, 12, 20): (1.1, 1.1), (30, 50): (1.02, 1.25)}
# The first step's x0 has 157 times the rounding of the output, and so few are luck: from 5 steps on it is at most 1.01.
# Heun's second stage has its first output from two states, one of them rounded: it saves one tensor, originals two.
EXCEPTIONS: list[tuple[str, dict[str, Any], Bounds]] = [
    ("DDIMScheduler", CLIPPED_AT_2, {(1, 2, 3): (1.4, 1.35)}),  # measured: 1.36, 1.29
    ("DPMSolverMultistepScheduler", THRESHOLDED, {(1, 2, 3): (1.6, 1.5)}),  # 1.53, 1.46
    ("HeunDiscreteScheduler", {}, {(30, 50): (1.2, 1.4)}),  # 1.15, 1.34
    ("HeunDiscreteScheduler", {**KARRAS, **V}, {(30, 50): (1.17, 1.3)}),  # 1.12, 1.23
    ("FlowMatchHeunDiscreteScheduler", {}, {(30, 50): (0.7, 1.42)}),  # 0.67, 1.37
]


def denoise(x: Tensor, t: Tensor, learned: bool) -> Tensor:
    output = torch.tanh(0.8 * x + torch.sin(0.01 * t.double())) + 0.1 * x
    return (torch.cat([output, torch.cos(x)], dim=1) if learned else output).float()


def stepped(scheduler: Any, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    return scheduler.step(output, t, x).prev_sample


def errors(original: Any) -> list[list[float]]:
    """Mean squares of a scheduler's run in float32, the compiled and the original one's: of steps from the original's
    samples, and of whole runs with the same outputs."""
    compiled, clip = compile_timesteps(original), scheduler_clip(original)
    table = compiled.table
    x = torch.randn(2, 3, 12, 10, generator=torch.manual_seed(0)) * table.initial_scale
    generator, drawn = torch.manual_seed(1), list[Tensor]()
    by_step, whole = [0.0, 0.0], [0.0, 0.0]
    ours_by_step, ours = (Stepper(table, x, clip) for _ in range(2))
    exact_by_step, exact = (copy.deepcopy(original) for _ in range(2))

    def draw(_: Tensor | None) -> Tensor:
        drawn.append(torch.empty(x.shape).normal_(generator=generator))
        return drawn[-1]

    theirs, got, want = x, x, x.double()
    for row, t in enumerate(original.timesteps):
        output = denoise(want * float(table["c_in"][row]), t, table.learned_variance)
        before = theirs
        drawn.clear()
        with drawing(original, draw):
            theirs = stepped(original, output, t, before)
        wanted = []
        for scheduler, state in ((exact_by_step, before.double()), (exact, want)):
            again = [z.double() for z in drawn]
            with drawing(scheduler, lambda _, left=again: left.pop(0)), in_float64():
                wanted.append(stepped(scheduler, output.double(), t, state))
        total = math.hypot(*compiled.draws[row])
        weighted = [z * (weight / total) for z, weight in zip(drawn, compiled.draws[row], strict=True) if total]
        noise = sum(weighted[1:], start=weighted[0]) if weighted else None
        by_step[0] += mean_square(ours_by_step(row, output, before, noise)[0], wanted[0])
        by_step[1] += mean_square(theirs, wanted[0])
        got, want = ours(row, output, got, noise)[0], wanted[1]
        whole[0] += mean_square(got, want)
        whole[1] += mean_square(theirs, want)
    return [by_step, whole]


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_errors_are_no_larger_than_the_original_s(name: str, config: dict[str, Any]) -> None:
    def squares(count: int) -> list[list[float]] | None:
        original = getattr(diffusers, name)(**config)
        try:
            original.set_timesteps(count)
        except (IndexError, ZeroDivisionError, ValueError):
            assert count < 5  # some need more
            return None
        return errors(original)

    exceptions = [bounds for *case, bounds in EXCEPTIONS if case == [name, config]]
    assert_no_larger(squares, BOUNDS | (exceptions[0] if exceptions else {}))
