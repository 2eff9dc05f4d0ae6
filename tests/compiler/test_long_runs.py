"""Runs of hundreds of steps: what they cost, and that short coordinates change nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.compiler import compile_scheduler, compile_timesteps, coordinates, probe, scheduler
from fastcfg.compiler.quadrature import integrating_at_once

diffusers: Any = load_diffusers()
integrate = pytest.importorskip("scipy.integrate")
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("IPNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("KDPM2AncestralDiscreteScheduler", {}),
]


@pytest.mark.parametrize(("name", "config"), CLASSES, ids=lambda value: str(value).replace(" ", ""))
def test_short_coordinates_change_nothing(name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        prepared = getattr(diffusers, name)(**config)
        prepared.set_timesteps(40)
        monkeypatch.setattr(scheduler, "_compiled", type(scheduler._compiled)(1))
        return compile_timesteps(prepared).table.rows

    whole = rows()
    monkeypatch.setattr(coordinates, "_ROWS", 5)
    monkeypatch.setattr(coordinates, "_OLD", 0)
    short = rows()
    assert ((whole != 0) == (short != 0)).all()
    # Measured: 1e-9 (SASolver); else 1e-11.
    np.testing.assert_allclose(short, whole, rtol=0, atol=1e-8 * max(1.0, np.abs(whole).max() / 1e3))


@pytest.mark.parametrize(("name", "config"), CLASSES, ids=lambda value: str(value).replace(" ", ""))
def test_a_long_run_is_proved(name: str, config: dict[str, Any]) -> None:
    table = compile_scheduler(getattr(diffusers, name)(**config), 150)
    assert 150 <= table.num_steps <= 151
    assert table.num_history == compile_scheduler(getattr(diffusers, name)(**config), 20).num_history


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_is_run_four_times_at_most_and_copied_as_often_for_any_number_of_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = dict.fromkeys(("steps", "copies"), 0)

    class Counted(getattr(diffusers, name)):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            counts["steps"] += 1
            return super().step(*args, **kwargs)

    def host_copy(original: Any, copied: Any = probe.host_copy) -> Any:
        counts["copies"] += 1
        return copied(original)

    monkeypatch.setattr(probe, "host_copy", host_copy)
    found = []
    for count in (10, 40):
        counts |= dict.fromkeys(counts, 0)
        rows = compile_scheduler(Counted(), count).num_rows
        found.append((counts["steps"] / rows, counts["copies"]))
    assert found[0] == found[1]
    assert found[0][0] in (3, 4)
    assert found[0][1] <= 8


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler"])
def test_a_run_without_finite_samples_is_given_up_where_they_begin(name: str) -> None:
    steps = list[int]()

    class Counted(getattr(diffusers, name)):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            return super().step(*args, **kwargs)

    with pytest.raises(ValueError, match=r"with samples that are not finite \(from step 500 on\)"):
        compile_scheduler(Counted(), 1000)
    assert len(steps) == 501


@pytest.mark.quick
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_the_progress_bar_counts_the_steps_on_a_terminal(
    name: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    ticks: list[int] = []

    def bar(show: Any, *, total: int, **options: Any) -> Any:
        shown.append((show, total, options["delay"]))
        made = original(False, total=total)
        monkeypatch.setattr(made, "update", lambda: ticks.append(1))
        return made

    original = scheduler.progress_bar
    monkeypatch.setattr(scheduler, "progress_bar", bar)
    monkeypatch.setattr("sys.stderr", type("Stream", (io.StringIO,), {"isatty": lambda self: terminal})())
    compile_scheduler(getattr(diffusers, name)(num_train_timesteps=999 - terminal), 17)
    assert shown == [(f"compile {name}" if terminal else False, 4 * 17, 1.0)]
    assert 3 * 17 <= sum(ticks) <= 4 * 17


# scipy's quad at once


@pytest.mark.quick
@pytest.mark.parametrize("count", [3, 20, 1000])
def test_integrals_at_once_are_quad_s(count: int) -> None:
    prepared = diffusers.LMSDiscreteScheduler()
    prepared.set_timesteps(count)
    for t in range(0, count, max(1, count // 9)):
        for order in range(1, min(t + 1, 4) + 1):
            arguments = order, t, order - 1
            want = prepared.get_lms_coefficient(*arguments)
            with integrating_at_once():
                got = prepared.get_lms_coefficient(*arguments)
            assert float(got) == pytest.approx(float(want), rel=2e-15)  # measured: 6e-16


@pytest.mark.quick
def test_other_integrands_are_left_to_quad() -> None:
    calls = list[Any]()

    def noted(function: Any) -> Any:
        def integrand(tau: Any) -> Any:
            calls.append(tau)
            return function(tau)

        return integrand

    level = torch.tensor(0.3)
    functions: list[Any] = [
        lambda tau: 1.0,
        lambda tau: float(tau) ** 2,
        lambda tau: (tau - level) / (tau.max() if isinstance(tau, Tensor) else 1.0),
        lambda tau: (tau - level).abs(),
        lambda tau: (tau - level.double()) ** 2,
    ]
    for function in functions:
        want = integrate.quad(function, 0.0, 1.0, epsrel=1e-6)
        with integrating_at_once():
            assert integrate.quad(noted(function), 0.0, 1.0, epsrel=1e-6) == want
    assert len(calls) > 21 * len(functions)
    calls.clear()
    with integrating_at_once():
        for _ in range(20):
            integrate.quad(noted(lambda tau: (tau - level) ** 2), 0.0, 1.0, epsrel=1e-4)
    assert len(calls) == 8 * 22 + 12
