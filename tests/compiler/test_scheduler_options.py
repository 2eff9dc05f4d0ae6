"""Schedulers of diffusers compiled with every pair of their options, beside themselves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.pairwise import pairwise
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.compiler import compile_timesteps, scheduler_clip
from fastcfg.compiler.patching import drawing
from fastcfg.ops.stepper import Stepper

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

FACTORS: dict[str, tuple[Any, ...]] = {
    "name": (
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
    ),
    "steps": (1, 2, 7, 20, 50),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "sigmas": ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    "solver_order": (1, 2, 3),
    "final_sigmas_type": ("zero", "sigma_min"),
    "thresholding": (False, True),
    "rescale_betas_zero_snr": (False, True),
    "begin": (0, 1),
}
CASES = pairwise(FACTORS)
# Between a step in float32 and the original's, in shares of the largest value, beside twice the original's own error;
# and the fused step's largest error in the original's, where it is above the floor. Measured: 3.1e-7, and 1.66.
FLOAT32, FACTOR, FLOOR = 6e-7, 2.0, 1e-7


def made(case: dict[str, Any]) -> Any:
    """The scheduler with those of a case's options that its class has."""
    kind = getattr(diffusers, case["name"])
    options = {k: v for k, v in case.items() if k not in ("name", "steps", "sigmas", "begin")}
    if case["sigmas"]:
        options[case["sigmas"]] = True
    known = inspect.signature(kind).parameters
    return kind(**{k: v for k, v in options.items() if k in known})


def refusal(case: dict[str, Any]) -> str:
    """Why a case falls through; empty for those that compile."""
    if case["name"] == "DEISMultistepScheduler" and case["thresholding"]:
        return "its table differs"  # it converts the limited x0 back to noise, and tells neither
    ends_in_noise = case["rescale_betas_zero_snr"] and case["timestep_spacing"] != "leading" and not case["begin"]
    if case["name"] == "DDPMScheduler" and ends_in_noise and case["prediction_type"] == "epsilon":
        return "not finite"  # but for the clip
    return ""


def normal(seed: int) -> Tensor:
    return torch.empty(2, 3, 6, 5).normal_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_step_is_the_original_s_and_no_farther_from_float64(case: dict[str, Any]) -> None:
    first = case["begin"] * (case["steps"] // 3)
    try:
        scheduler = made(case)
        scheduler.set_timesteps(case["steps"])
        scheduler_of_table = made(case)
        scheduler_of_table.set_timesteps(case["steps"])
        if first and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
            scheduler_of_table.set_begin_index(first)
        states, outputs = [normal(0) * float(scheduler.init_noise_sigma)], []
        with drawing(scheduler, lambda like: normal(len(states))):
            for t in scheduler.timesteps[first:]:
                outputs.append(torch.tanh(scheduler.scale_model_input(states[-1], t) + normal(100)))
                states.append(scheduler.step(outputs[-1], t, states[-1]).prev_sample)
    except (ValueError, IndexError, ZeroDivisionError, NotImplementedError) as error:
        pytest.skip(f"the original does not run: {type(error).__name__}: {str(error)[:60]}")
    if not all(torch.isfinite(state).all() for state in states):
        pytest.skip("the original's samples are not finite")
    if reason := refusal(case):
        with pytest.raises(ValueError, match=reason):
            compile_timesteps(scheduler_of_table, first)
        return
    compiled, clip = compile_timesteps(scheduler_of_table, first), scheduler_clip(scheduler)
    ours, exact = (Stepper(compiled.table, state, clip) for state in (states[0], states[0].double()))
    apart = error = theirs = 0.0
    for row, (output, x, want) in enumerate(zip(outputs, states, states[1:], strict=False)):
        drawn = normal(row + 1) if any(compiled.draws[row]) else None
        got, _ = ours(row, output, x, drawn)
        truth, _ = exact(row, output.double(), x.double(), None if drawn is None else drawn.double())
        size = max(1.0, float(truth.abs().max()))
        apart = max(apart, float((got - want).abs().max()) / size)
        error = max(error, float((got - truth).abs().max()) / size)
        theirs = max(theirs, float((want - truth).abs().max()) / size)
    assert apart < FLOAT32 + 2 * theirs
    assert error <= max(FACTOR * theirs, FLOOR)
