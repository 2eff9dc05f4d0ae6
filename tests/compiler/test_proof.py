"""The proof measures every row by its own terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.compiler import compile_scheduler
from fastcfg.compiler.assembly import UnprovedError, verify
from fastcfg.compiler.patching import drawing, in_float64
from fastcfg.compiler.probe import Original
from fastcfg.reference.plain import PlainTable
from fastcfg.step import StepSpec
from fastcfg.table import COLUMNS, StepTable

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

# Ends at alpha_cumprod 4e-40: the first x0 is 1e20 times the noise, and every state a hundred times the one before.
STEEP = {"beta_start": 0.01, "beta_end": 0.2, "beta_schedule": "scaled_linear"}
NO_CLIP = {"clip_sample": False}
GROWING = [
    ("DDIMScheduler", {**STEEP, **NO_CLIP}),
    ("DDIMScheduler", {**STEEP, **NO_CLIP, "prediction_type": "sample"}),
    ("DDPMScheduler", {**STEEP, **NO_CLIP}),
    ("DDPMScheduler", {**STEEP, **NO_CLIP, "variance_type": "fixed_large"}),
    ("DDIMParallelScheduler", {**STEEP, **NO_CLIP}),
    ("LCMScheduler", STEEP),
    ("TCDScheduler", STEEP),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", **NO_CLIP}),
]


def normal(seed: int) -> Tensor:
    return torch.empty(2, 3, 4, 4, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [4, 10, 40])
@pytest.mark.parametrize(("name", "config"), GROWING, ids=lambda value: str(value).replace(" ", ""))
def test_a_run_may_begin_at_any_row(name: str, config: dict[str, Any], count: int) -> None:
    table = compile_scheduler(getattr(diffusers, name)(**config), count)
    assert table.num_history == 0
    spec = replace(StepSpec.of(table, clip=False), noise_source="tensor")
    for row in range(0, count, max(1, count // 8)):
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(count)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(row)
        with drawing(scheduler, lambda _: normal(3)), in_float64():
            want = scheduler.step(normal(2), scheduler.timesteps[row], normal(1)).prev_sample
        got = PlainTable(table, want)(row, normal(1), normal(2), spec, noise=normal(3))["x"]
        terms = abs(table["a_x"][row]) + abs(table["a_0"][row] * table["p_x"][row]) + abs(table["a_m"][row])
        assert float((got - want).abs().max()) < 1e-12 * max(terms, float(want.abs().max())), row


@pytest.mark.parametrize(
    ("name", "config"),
    [*GROWING[:3], ("LCMScheduler", STEEP), ("DPMSolverMultistepScheduler", {}), ("EulerDiscreteScheduler", {})],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_an_error_in_any_term_of_any_row_is_found_and_named(name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**config)
    table = compile_scheduler(scheduler, 10)
    scheduler.set_timesteps(10)
    start = float(scheduler.init_noise_sigma)
    original = Original(scheduler)
    trial = original.record_numbers(start)
    response = original.respond(np.cumsum([0, *map(len, trial.drawn)]).tolist())
    calls = response.calls
    draws = [response.states[i + 1, slice(*(1 + calls + n for n in response.drawn[i : i + 2]))] for i in range(calls)]
    verify(table, draws, trial, None, 1e-12, "scheduler: got it")
    for row in range(10):
        for column in ("a_x", "a_0", "a_m", "a_h0"):
            if abs(table[column][row]) < 1e-6:  # next to a_x: some are below the rounding of float64
                continue
            rows = table.rows.copy()
            rows[row, COLUMNS.index(column)] *= 1 + 1e-3
            wrong = StepTable(rows, initial_scale=table.initial_scale, integer_time=table.integer_time)
            with pytest.raises(UnprovedError, match=f"its table differs by .* in row {row}, expected"):
                verify(wrong, draws, trial, None, 1e-12, "scheduler: got it")


@pytest.mark.parametrize("row", [0, 5, 9])
def test_a_step_that_is_not_linear_where_states_have_grown_is_refused(row: int) -> None:
    class Squares(diffusers.DDIMScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            if timestep == self.timesteps[row]:
                model_output = model_output * (1 + 0.1 * torch.tanh(model_output.abs().mean() / sample.abs().mean()))
            return super().step(model_output, timestep, sample, **options)

    with pytest.raises(ValueError, match=r"scheduler: got Squares.*step \d+ has|scheduler: got Squares.*in row \d+"):
        compile_scheduler(Squares(**STEEP, **NO_CLIP), 10)


class Shrinks:
    """Its third step makes everything 1e14 times smaller, and what the next one adds is as small."""

    factors = (0.9, 0.8, 1e-14, 0.7)
    adds = (0.1, 0.2, 1e-14, 1e-14)
    timesteps = torch.arange(4, 0, -1)

    def set_timesteps(self, count: int) -> None:
        self.index = 0

    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Any:
        factor, add = self.factors[self.index], self.adds[self.index]
        self.index += 1
        return factor * sample + add * output


def test_terms_of_rows_whose_values_are_small() -> None:
    class Squares(Shrinks):
        def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Any:
            return super().step(output + (0.1 * output.square() if self.index == 3 else 0.0), timestep, sample)

    table = compile_scheduler(Shrinks(), 4)
    np.testing.assert_allclose(table["a_x"], Shrinks.factors, rtol=1e-12)
    np.testing.assert_allclose(table["a_m"], Shrinks.adds, rtol=1e-12)
    with pytest.raises(ValueError, match="scheduler: got Squares: step 3 has coefficients that depend on the sample"):
        compile_scheduler(Squares(), 4)
    original = Original(Shrinks())
    original.scheduler.set_timesteps(4)
    trial = original.record_numbers(1.0)
    verify(table, [()] * 4, trial, None, 1e-12, "scheduler: got it")
    for row in range(4):
        rows = table.rows.copy()
        rows[row, COLUMNS.index("a_m")] *= 1 + 1e-6
        with pytest.raises(UnprovedError, match=f"differs by .* in row {row}, expected"):
            verify(StepTable(rows), [()] * 4, trial, None, 1e-12, "scheduler: got it")
