"""One step of a scheduler as sums: what is read, drawn, kept and changed, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg.compiler.step import Given, Sum, TracedStep, UntraceableError, Write, trace_step
from fastcfg.frontends._fused import steps
from fastcfg.frontends._fused.subclass import STATE
from fastcfg.frontends.diffusers import fuse

pytestmark = pytest.mark.quick
X, M = torch.linspace(-2, 2, 96).view(2, 3, 4, 4), torch.linspace(1, -1, 96).view(2, 3, 4, 4) ** 2


class Own:
    """A scheduler of the protocol, whose step is a function of it and its tensors."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        vars(self).update(attributes)
        self.config, self.timesteps, self.run = {}, torch.tensor([2, 1, 0]), function
        self.calls = 0

    def set_timesteps(self, steps: int) -> None:
        """Nothing."""


def scheduler(function: Callable[..., Any], **attributes: Any) -> Any:
    """One of a class of its own: classes share what was traced."""

    class Scheduler(Own):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None) -> Any:
            return (function(self, model_output, timestep, sample, generator),)

    made = Scheduler(None, **attributes)  # type: ignore[arg-type]
    del made.run
    return made


def trace(own: Any, timestep: Any = 1, output: Tensor = M, sample: Tensor = X, **options: Any) -> TracedStep:
    return trace_step(own, type(own).step, output, timestep, sample, options)


def test_a_step_is_read_as_sums() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        self.past.append(output)
        self.past = self.past[-2:]
        self.calls += 1
        return 0.9 * x - self.levels[t] * (output + 0.25 * self.past[0])

    own = scheduler(step, levels=[0.1, 0.2, 0.3], past=[M.clone(), M.clone()], unused=np.ones(3))
    traced = trace(own)
    assert traced.reads == {"past", "levels", "calls"}
    assert traced.sources == (("sample",), ("output",), ("state", "past", 1))
    assert traced.combination is not None
    np.testing.assert_allclose(traced.combination.coefficients, [[0.9, -0.2, -0.05]])
    assert traced.result.parts == (Sum(0),)  # type: ignore[union-attr]
    assert [write.source for write in traced.writes] == [("state", "past"), ("state", "calls")]
    kept = traced.writes[0].part
    assert kept.parts == (Given(("state", "past", 1)), Given(("output",)))  # type: ignore[union-attr]
    assert own.calls == 0
    assert len(own.past) == 2


def double_in_place(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    x += 0.5 * output
    return x


def kept_in_place(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    if self.total is None:
        self.total = output * 0.5
    else:
        self.total += 0.5 * output
    return x - 0.1 * self.total


def list_in_place(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    for i in range(len(self.past) - 1):
        self.past[i] = self.past[i + 1]
    self.past[-1] = x - output
    return x - 0.1 * sum(one for one in self.past if one is not None)


def in_a_dictionary(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    self.cache.setdefault("first", output)
    self.cache["last"] = {"x": x, "t": t}
    return x - 0.1 * self.cache["first"]


def draws(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    first = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.randn(x.shape, generator=generator)  # thrown away
    return (x - 0.1 * output + 0.3 * first).to(x.dtype) + 0.1 * torch.randn_like(x)


def of_its_size(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    self.size, self.count = x.shape[2:], x.numel()
    return 0.5 * (x - output)


def by_a_scalar(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    self.dt = self.sigmas[t] * 2
    return x - self.dt * output


def nothing_new(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    self.kept = output
    return x


def nan_times_zero(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x + (0.0 if t == 1 else 0.1) * (output / (0.0 if t == 5 else 1.0))


STEPS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (double_in_place, {}),
    (kept_in_place, {"total": None}),
    (list_in_place, {"past": [None, None, None]}),
    (in_a_dictionary, {"cache": {}}),
    (draws, {}),
    (of_its_size, {}),
    (by_a_scalar, {"sigmas": torch.tensor([0.1, 0.2, 0.3])}),
    (nothing_new, {"kept": None}),
    (nan_times_zero, {}),
]


def copies(value: Any) -> Any:
    return (
        value.clone() if isinstance(value, Tensor) else type(value)(value) if isinstance(value, list | dict) else value
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "attributes"), STEPS, ids=lambda value: getattr(value, "__name__", ""))
def test_steps_of_every_kind_are_the_original_s(
    function: Callable[..., Any], attributes: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    original = scheduler(function, **{name: copies(value) for name, value in attributes.items()})
    ours = fuse(scheduler(function, **{name: copies(value) for name, value in attributes.items()}))
    state = torch.get_rng_state()
    x, y, output = X.to(dtype), X.to(dtype), M.to(dtype)
    results = []
    for own, sample in ((original, x), (ours, y)):
        torch.set_rng_state(state)
        generator = torch.Generator().manual_seed(3)
        for t in range(3):
            sample = own.step(output, t, sample, generator=generator)[0]
        results.append((sample, generator.get_state(), torch.get_rng_state()))
    assert ours._fastcfg_state.last is not None
    (want, *states), (got, *own_states) = results
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, states, own_states))
    for name, value in vars(original).items():
        assert name in vars(ours)
        torch.testing.assert_close(vars(ours)[name], value, rtol=1e-5, atol=1e-6) if name != "cache" else None
    if function is nothing_new:
        assert ours.kept is output


def test_nan_passes_where_the_original_multiplies_it_by_zero() -> None:
    ours, original = fuse(scheduler(nan_times_zero)), scheduler(nan_times_zero)
    output = M.clone()
    output[0, 0, 0, 0] = torch.nan
    for t in (0, 1):
        want, got = original.step(output, t, X)[0], ours.step(output, t, X)[0]
        assert torch.equal(got.isnan(), want.isnan())
        assert ours._fastcfg_state.last is not None


def mixes_pixels(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output.mean(dim=-1, keepdim=True)


def mixes_channels(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output.mean(dim=1, keepdim=True)


def scales_channels(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output * torch.arange(x.shape[1]).view(-1, 1, 1)


def squares(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output**2


def clamps(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output.clamp(-300, 300)


def adds_one(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - output + 1


def draws_with_numpy(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - np.random.rand() * output  # noqa: NPY002


def draws_the_number_that_waits(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    # Once: a second number would be another draw.
    return x - output * (np.random.randn() if x.dtype == torch.float64 else 1)  # noqa: NPY002


def draws_with_python(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - random.random() * output


def draws_uniforms(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - torch.rand_like(x)


def draws_one_for_all(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - torch.randn(1, *x.shape[1:], generator=generator)


def draws_with_its_own(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - torch.randn(x.shape, generator=torch.Generator().manual_seed(5))


def reads_its_dictionary(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - len(vars(self)) * output


def calls_a_function(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    return x - self.scale(t) * output


def forgets(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
    vars(type(self))  # nothing
    if hasattr(self, "once"):
        del self.once
    return x - output


@pytest.mark.parametrize(
    ("function", "attributes", "reason"),
    [
        (mixes_pixels, {}, "sums over elements"),
        (mixes_channels, {}, "not linear"),
        (scales_channels, {}, "differ by channel"),
        (squares, {}, "not linear"),
        (clamps, {}, "not linear"),
        (adds_one, {}, "without inputs its result is not 0"),
        (draws_with_numpy, {}, "draws random numbers by another function"),
        (draws_with_python, {}, "draws random numbers by another function"),
        (draws_uniforms, {}, "draws random numbers by another function"),
        (draws_one_for_all, {}, "noise has another shape"),
        (draws_with_its_own, {}, "a generator of its own"),
        (reads_its_dictionary, {}, "reads its __dict__"),
        (
            calls_a_function,
            {"scale": lambda t, count=[1.0]: count[0] + random.random()},
            "attribute scale is a function",
        ),
        (forgets, {"once": 1}, "deletes once"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_steps_run_as_the_original_with_the_same_result(
    function: Callable[..., Any], attributes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UntraceableError, match=reason):
        trace(scheduler(function, **attributes))
    generator = torch.Generator().manual_seed(1)
    results = []
    for own in (scheduler(function, **attributes), fuse(scheduler(function, **attributes))):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        generator.manual_seed(1)
        results.append((own.step(M, 1, X, generator)[0], torch.get_rng_state(), generator.get_state(), random.random()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_failing_steps_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, calls = fuse(scheduler(squares)), []
    traced = steps.trace_step
    monkeypatch.setattr(steps, "trace_step", lambda *args: calls.append(1) or traced(*args))
    for _ in range(4):
        ours.step(M, 1, X)
    assert len(calls) == 1
    ours.levels = 3  # not read, but a new name
    ours.step(M, 1, X)
    assert len(calls) == 2


def test_what_the_caller_changes_is_a_write_in_place() -> None:
    traced = trace(scheduler(double_in_place))
    assert traced.writes == (Write(("sample",), Sum(0), "copy"),)
    assert traced.result.parts == (Given(("sample",)),)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", ["sample", "output", "both"])
def test_results_have_the_original_s_layout(layout: str) -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        self.kept, self.other = output * 2, x * 2
        return output - 0.5 * x

    original, ours = scheduler(step), fuse(scheduler(step))
    x = X.contiguous(memory_format=torch.channels_last) if layout != "output" else X
    m = M.contiguous(memory_format=torch.channels_last) if layout != "sample" else M
    want, got = original.step(m, 0, x)[0], ours.step(m, 0, x)[0]
    assert ours._fastcfg_state.last is not None
    for a, b in ((want, got), (original.kept, ours.kept), (original.other, ours.other)):
        assert a.stride() == b.stride()
        torch.testing.assert_close(b, a)


def test_instances_with_methods_of_their_own_are_not_served_by_the_class_s() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        return x - self.factor() * output

    def factor(self: Any) -> float:
        return 0.5

    ours = fuse(scheduler(step))
    type(ours).__mro__[1].factor = factor
    assert torch.equal(ours.step(M, 0, X)[0], X - 0.5 * M)
    ours.factor = lambda: 2.0
    torch.testing.assert_close(ours.step(M, 0, X)[0], X - 2.0 * M)
    del ours.factor
    torch.testing.assert_close(ours.step(M, 0, X)[0], X - 0.5 * M)


def test_functions_replaced_around_a_scheduler_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        return x - self.factor() * output + 0.1 * torch.randn(x.shape, generator=generator)

    original, ours = scheduler(step), fuse(scheduler(step))
    kinds = type(original), type(ours).__mro__[1]

    def check() -> None:
        torch.manual_seed(0)
        want = original.step(M, 0, X)[0]
        torch.manual_seed(0)
        torch.testing.assert_close(ours.step(M, 0, X)[0], want)

    for kind in kinds:
        kind.factor = lambda self: 0.5
    check()
    for kind in kinds:
        kind.factor = lambda self: 0.75
    check()
    monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.ones(*size))
    check()
    for kind in kinds:
        inner = kind.step
        kind.step = lambda self, *args, inner=inner, **options: (2 * inner(self, *args, **options)[0],)
    check()


counted = 0


def test_steps_that_change_their_class_or_module_run_as_the_original() -> None:
    class Counting(Own):
        calls = 0

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
            Counting.calls += 1
            return (sample - model_output,)

    class CountingOutside(Own):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
            global counted
            counted += 1
            return (sample - model_output,)

    for kind in (Counting, CountingOutside):
        ours = fuse(kind(None))  # type: ignore[arg-type]
        for _ in range(3):
            assert torch.equal(ours.step(M, 0, X)[0], X - M)
    assert Counting.calls == 3
    assert counted == 3


def test_gradients_of_what_is_kept_and_of_levels_come_through_the_original() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        return x - self.levels[t] * output + self.past

    for name in ("levels", "past"):
        own = scheduler(step, levels=torch.tensor([0.1, 0.2, 0.3]), past=M.clone())
        ours = fuse(own)
        getattr(ours, name).requires_grad_()
        with torch.no_grad():
            ours.step(M, 0, X)
        assert ours._fastcfg_state.last is not None
        assert ours.step(M, 0, X)[0].requires_grad
        with torch.no_grad():
            assert not ours.step(M, 0, X)[0].requires_grad
        assert ours._fastcfg_state.last is not None


def test_noise_like_a_tensor_of_another_layout_is_the_original_s() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        return x - output + torch.randn_like(output)

    original, ours = scheduler(step), fuse(scheduler(step))
    for x, m in ((X, M), (X, M.contiguous(memory_format=torch.channels_last))):
        torch.manual_seed(0)
        want = original.step(m, 0, x)[0]
        torch.manual_seed(0)
        torch.testing.assert_close(ours.step(m, 0, x)[0], want)


def test_results_that_differ_in_nothing_but_the_place_of_a_constant_are_told_apart() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Any:
        total = 0.5 * x + output
        return (total, 0) if self.first else (0, total)

    own = fuse(scheduler(step, first=True))
    for own.first in (True, False, True):
        (result,) = own.step(M, 1, X)
        place = 0 if own.first else 1
        assert torch.equal(result[place], 0.5 * X + M)
        assert result[1 - place] == 0
        assert getattr(own, STATE).last is not None


def test_what_a_step_sets_without_reading_it_is_set_whatever_it_was() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        self.state = 5
        return x - output

    ours = fuse(scheduler(step, state=5))
    ours.step(M, 0, X)
    ours.state = 7
    ours.step(M, 0, X)
    assert ours._fastcfg_state.last is not None
    assert ours.state == 5


def test_a_draw_of_a_number_that_waits_in_numpy_s_generator_is_noticed_and_taken_back() -> None:
    np.random.seed(0)  # noqa: NPY002
    np.random.randn()  # noqa: NPY002 (draws two)
    before: Any = np.random.get_state()  # noqa: NPY002
    with pytest.raises(UntraceableError, match="draws random numbers by another function"):
        trace(scheduler(draws_the_number_that_waits))
    after: Any = np.random.get_state()  # noqa: NPY002
    assert before[3] == 1
    assert before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])


def test_what_a_step_changes_of_its_class_or_module_is_put_back() -> None:
    def step(self: Any, output: Tensor, t: Any, x: Tensor, generator: Any) -> Tensor:
        type(self).__mro__[1].count = 2
        return x - output

    own = scheduler(step)
    type(own).count = 1
    with pytest.raises(UntraceableError, match="its step changes count"):
        trace(own)
    assert type(own).count == 1
