"""What was compiled serves schedulers that behave the same, and no others."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.suite.foreign import load_diffusers
from fastcfg.compiler import Compiled, compile_scheduler, compile_timesteps, scheduler_clip

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


def prepared(name: str, assigned: tuple[tuple[str, Any], ...] = (), **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    for option, value in assigned:
        setattr(scheduler.config, option, value)  # diffusers' steps read attributes; the item keeps its value
    scheduler.set_timesteps(9)
    return scheduler


# A class, an option of its config and two values of it.
OPTIONS = [
    ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver++", "sde-dpmsolver++"),
    ("DPMSolverMultistepScheduler", "solver_order", 2, 3),
    ("DDIMScheduler", "prediction_type", "epsilon", "v_prediction"),
    ("DDIMScheduler", "clip_sample", True, False),
    ("DDPMScheduler", "thresholding", False, True),
    ("UniPCMultistepScheduler", "prediction_type", "epsilon", "sample"),
    ("EulerDiscreteScheduler", "prediction_type", "epsilon", "v_prediction"),
]


@pytest.mark.parametrize(("name", "option", "usual", "other"), OPTIONS)
def test_an_option_assigned_as_an_attribute(name: str, option: str, usual: Any, other: Any) -> None:
    want = {value: compile_timesteps(prepared(name, **{option: value})) for value in (usual, other)}
    for ours, assigned in ((usual, other), (other, usual)):
        changed = prepared(name, ((option, assigned),), **{option: ours})
        compiled = compile_timesteps(changed)
        np.testing.assert_array_equal(compiled.table.rows, want[assigned].table.rows)
        assert scheduler_clip(changed) == scheduler_clip(prepared(name, **{option: assigned}))
        np.testing.assert_array_equal(
            compile_timesteps(prepared(name, **{option: ours})).table.rows, want[ours].table.rows
        )


def test_an_option_that_only_the_item_has_changed() -> None:
    class ByItem(diffusers.DDIMScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            result.prev_sample = result.prev_sample * (2 if self.config["prediction_type"] == "sample" else 1)
            return result

    tables = []
    for value in ("epsilon", "sample", "epsilon"):
        scheduler = ByItem(clip_sample=False)
        dict.__setitem__(scheduler.config, "prediction_type", value)
        tables.append(compile_scheduler(scheduler, 9))
    assert np.allclose(tables[1]["a_x"], 2 * tables[0]["a_x"])
    np.testing.assert_array_equal(tables[0].rows, tables[2].rows)


@pytest.mark.parametrize("assigned", [False, True], ids=["edited in place", "attribute assigned"])
def test_a_nested_list_in_a_config(assigned: bool) -> None:
    class Listed(diffusers.EulerDiscreteScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().step(*args, **kwargs)
            result.prev_sample = result.prev_sample * self.config.levels[1][0]
            return result

    def compiled(level: float | None = None) -> Any:
        scheduler = Listed()
        scheduler.register_to_config(levels=[0.0, [1.0]])
        if level is not None and assigned:
            scheduler.config.levels = [0.0, [level]]
        elif level is not None:
            scheduler.config["levels"][1][0] = level
        return compile_scheduler(scheduler, 9)

    plain = compiled()
    np.testing.assert_allclose(compiled(1.5)["a_x"], 1.5 * plain["a_x"], rtol=1e-12)
    np.testing.assert_array_equal(compiled().rows, plain.rows)


class Scaled:
    """A scheduler whose steps depend on one attribute, of whatever kind."""

    timesteps = torch.arange(6, 0, -1)
    scale: Any = 0.5

    def set_timesteps(self, count: int) -> None:
        pass

    def factor(self) -> float:
        return float(self.scale)

    def step(self, output: Any, timestep: Any, sample: Any) -> Any:
        return sample + self.factor() * output


def with_attribute(value: Any, read: Callable[[Any], float]) -> Any:
    scheduler: Any = type("Reads", (Scaled,), {"factor": lambda self: float(read(self.value))})()
    scheduler.value = value
    return scheduler


def set_nested(value: Any) -> None:
    value["levels"][1][0] = 0.7


@pytest.mark.parametrize(
    ("value", "read", "edit"),
    [
        (torch.tensor([0.1, 0.2]), lambda v: v[1], lambda v: v.mul_(2)),
        (np.array([0.1, 0.2]), lambda v: v[1], lambda v: v.__imul__(2)),
        ([0.1, [0.2]], lambda v: v[1][0], lambda v: v[1].__setitem__(0, 0.5)),
        ({"levels": [0, [0.2]]}, lambda v: v["levels"][1][0], set_nested),
        (types.SimpleNamespace(level=0.2), lambda v: v.level, lambda v: setattr(v, "level", 0.6)),
    ],
    ids=["tensor", "array", "nested list", "nested mapping", "object"],
)
def test_attributes_edited_in_place(value: Any, read: Any, edit: Any) -> None:
    scheduler = with_attribute(value, read)
    before = compile_timesteps(scheduler).table["a_m"][0]
    edit(scheduler.value)
    after = compile_timesteps(scheduler).table["a_m"][0]
    assert before == pytest.approx(0.2)
    assert after == pytest.approx(float(read(scheduler.value))) != before


def test_class_attributes_and_methods_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_m() -> float:
        return float(compile_timesteps(Scaled()).table["a_m"][0])

    assert a_m() == 0.5
    monkeypatch.setattr(Scaled, "scale", 0.25)
    assert a_m() == 0.25
    monkeypatch.setattr(Scaled, "factor", lambda self: 3.0)
    assert a_m() == 3.0
    monkeypatch.undo()
    assert a_m() == 0.5


def closing_over(scheduler: Any) -> Any:
    old = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = old(*args, **kwargs)
        result.prev_sample = result.prev_sample * 1.25
        return result

    return step


def referring_by_name(scheduler: Any) -> Any:
    variables: dict[str, Any] = {"the_scheduler": scheduler, "old": scheduler.step}
    exec(
        "def step(*args, **kwargs):\n"
        "    result = old(*args, **kwargs)\n"
        "    assert the_scheduler.num_inference_steps == 9\n"
        "    result.prev_sample = result.prev_sample * 1.25\n"
        "    return result\n",
        variables,
    )
    return variables["step"]


def bound(scheduler: Any) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = type(self).step(self, *args, **kwargs)
        result.prev_sample = result.prev_sample * 1.25
        return result

    return types.MethodType(step, scheduler)


@pytest.mark.parametrize("replaced", [closing_over, referring_by_name, bound])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_methods_replaced_on_the_instance(name: str, replaced: Any) -> None:
    plain = compile_scheduler(getattr(diffusers, name)(), 9)
    scheduler = getattr(diffusers, name)()
    scheduler.step = replaced(scheduler)
    before = copy.copy(vars(scheduler))
    for _ in range(2):
        table = compile_scheduler(scheduler, 9)
        if name == "EulerDiscreteScheduler":
            np.testing.assert_allclose(table["a_x"], 1.25 * plain["a_x"], rtol=1e-12)
        assert not np.allclose(table.rows, plain.rows)
    assert vars(scheduler) == before
    np.testing.assert_array_equal(compile_scheduler(getattr(diffusers, name)(), 9).rows, plain.rows)


def test_a_method_that_reaches_the_object_by_a_detour_is_refused_and_the_object_left_as_it_was() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    holder = [scheduler]

    def step(*args: Any, **kwargs: Any) -> Any:
        holder[0].further = holder[0].step
        return Scaled().step(*args[:3])

    scheduler.step = step
    before = dict(vars(scheduler))
    with pytest.raises(ValueError, match="with a method of its own that changes its further where a copy runs"):
        compile_scheduler(scheduler, 4)
    assert vars(scheduler) == before


def test_the_same_scheduler_gets_the_same_table() -> None:
    def twice(make: Callable[[], Any]) -> list[Compiled]:
        return [compile_timesteps(make()) for _ in range(2)]

    first, again = twice(lambda: prepared("UniPCMultistepScheduler"))
    assert first is again
    first, again = twice(Scaled)
    assert first is again

    def unlike() -> Any:
        scheduler = Scaled()
        scheduler.step = types.MethodType(Scaled.step, scheduler)  # type: ignore[method-assign]
        return scheduler

    first, again = twice(unlike)
    assert first is not again
