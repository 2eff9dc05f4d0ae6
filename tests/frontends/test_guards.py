"""A step that follows as it did in earlier runs is known by a guard, which hears every change that keys hear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcfg
from benchmarks.suite.foreign import load_diffusers
from fastcfg.frontends._fused import steps

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]
diffusers: Any = load_diffusers()
if diffusers is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)
SHAPE = (2, 4, 5, 3)
STEPS, AT = 8, 4
CLASSES = ["DDIM", "EulerDiscrete", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete", "DEISMultistep"]
CLASSES += ["SASolver", "IPNDM", "HeunDiscrete"]


def through_numpy(s: Any) -> None:
    s.timesteps.numpy()[AT + 1] += 7


def longer_past(s: Any) -> None:
    for name in ("model_outputs", "ets", "derivatives"):
        if items := getattr(s, name, None):
            items.append(items[-1])


def method_of_its_own(s: Any) -> None:
    if hasattr(s, "convert_model_output"):
        original = s.convert_model_output
        s.convert_model_output = lambda *args, **options: 2 * original(*args, **options)


def other_levels(s: Any) -> None:
    name = next(name for name in ("sigmas", "alphas_cumprod", "betas") if hasattr(s, name))
    other = 0.98 * getattr(s, name)
    if fastcfg.is_fused(s):
        s._fastcfg_state._contents.of(other)
    setattr(s, name, other)


EDITS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda s: None,
    "levels in place": lambda s: [getattr(s, n).mul_(0.99) for n in ("sigmas", "alphas_cumprod") if hasattr(s, n)],
    "timesteps through numpy": through_numpy,
    "other timesteps": lambda s: setattr(s, "timesteps", s.timesteps.clone()),
    "an option": lambda s: s.register_to_config(prediction_type="v_prediction"),
    "an attribute of the config": lambda s: object.__setattr__(s.config, "prediction_type", "sample"),
    "the index": lambda s: setattr(s, "_step_index", 5) if getattr(s, "_step_index", None) is not None else None,
    "the order": lambda s: setattr(s, "lower_order_nums", 0) if hasattr(s, "lower_order_nums") else None,
    "the past's dtype": lambda s: past(s, Tensor.double),
    "the past's layout": lambda s: past(s, lambda x: x.to(memory_format=torch.channels_last)),
    "no past": lambda s: past(s, lambda x: None),
    "a longer past": longer_past,
    "a method of its own": method_of_its_own,
    "known other levels": other_levels,
    "a function": lambda s: setattr(s, "tau_func", lambda t: 0.5) if hasattr(s, "tau_func") else None,
    "an array in place": lambda s: s.prk_timesteps.__iadd__(1) if hasattr(s, "prk_timesteps") else None,
}


def past(s: Any, change: Callable[[Tensor], Any]) -> None:
    for name in ("model_outputs", "ets", "derivatives"):
        if items := getattr(s, name, None):
            items[-1] = items[-1] if items[-1] is None else change(items[-1])


def run(s: Any, edit: Callable[[Any], Any] = lambda s: None, stop: int = STEPS, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    s.set_timesteps(STEPS)
    x, results = torch.linspace(-2, 2, 120).view(SHAPE), []
    for number, t in enumerate(list(s.timesteps)[:stop]):
        if number == AT:
            edit(s)
            t = list(s.timesteps)[number]
        try:
            x = s.step(torch.tanh(x / 8), t, x, **options).prev_sample
        except Exception as error:
            return [*results, type(error)]
        results.append(x)
    return results


def warmed(kind: Any) -> Any:
    """A fused scheduler whose steps have guards, with another run before it."""
    ours = fastcfg.accelerate(kind())
    for _ in range(3):
        run(ours)
    run(ours, stop=AT)
    assert ours._fastcfg_state.last.following.guarded is not None
    return fastcfg.accelerate(kind())


@pytest.mark.parametrize("name", CLASSES)
def test_guards_hear_what_keys_hear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_MOST_GUARDS", 10**6)  # every edit finds one
    kind = getattr(diffusers, f"{name}Scheduler")
    for what, edit in EDITS.items():
        theirs, ours = kind(), warmed(kind)
        want, got = run(theirs, edit), run(ours, edit)
        assert len(want) == len(got), what
        for a, b in zip(want, got, strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * float(a.abs().max()), msg=what, equal_nan=True)
            else:
                assert a == b, what


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("DPMSolverMultistep", "convert_model_output"),
        ("PNDM", "_get_prev_sample"),
        ("SASolver", "convert_model_output"),
    ],
)
@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_guards_hear_other_methods_of_the_class(
    name: str, method: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(diffusers, f"{name}Scheduler")
    original = getattr(kind, method)

    def edit(s: Any) -> None:
        if how == "replaced":
            monkeypatch.setattr(kind, method, lambda *args, **options: 0.5 * original(*args, **options))
        else:
            monkeypatch.delattr(kind, method)

    ours = warmed(kind)
    want = run(kind(), edit)
    monkeypatch.undo()
    got = run(ours, edit)
    assert len(want) == len(got) == (AT + 1 if how == "removed" else STEPS)
    for a, b in zip(want, got, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * float(a.abs().max()))
        else:
            assert a is b is AttributeError


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("change", ["dtype", "shape", "layout", "gradient", "timestep", "tuple"])
def test_guards_hear_other_arguments(name: str, change: str) -> None:
    kind = getattr(diffusers, f"{name}Scheduler")
    ours, theirs, results = warmed(kind), kind(), []
    for s in (theirs, ours):
        x = run(s, stop=AT)[-1]
        torch.manual_seed(1)
        t = s.timesteps[AT + (change == "timestep")]
        if change == "dtype":
            x = x.double()
        elif change == "shape":
            x = x[:1]
        elif change == "layout":
            x = x.to(memory_format=torch.channels_last)
        elif change == "gradient":
            x = x.clone().requires_grad_()
        try:
            options = {"return_dict": False} if change == "tuple" else {}
            out = s.step(torch.tanh(x / 8), t, x, **options)
            assert isinstance(out, tuple) == (change == "tuple")
            results.append(out[0])
        except Exception as error:
            results.append(type(error))
    a, b = results
    if not isinstance(a, Tensor):
        assert a == b
        return
    assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "HeunDiscrete", "IPNDM", "UniPCMultistep", "LCM"])
def test_runs_like_those_before_ask_for_no_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor that is sample and output, a generator, levels in tensors of their own, and a long past."""
    ours, sample = fastcfg.accelerate(getattr(diffusers, f"{name}Scheduler")()), torch.linspace(-2, 2, 120).view(SHAPE)
    options = {} if name in ("HeunDiscrete", "IPNDM", "UniPCMultistep") else {"generator": torch.Generator()}
    monkeypatch.setattr(steps, "_MOST_GUARDS", 10**6)  # other tests have had theirs
    asked, find = [], steps._KnownSteps.find
    monkeypatch.setattr(steps._KnownSteps, "find", lambda *args: (asked.append(1), find(*args))[1])
    for _ in range(5):
        ours.set_timesteps(18)
        asked.clear()
        for t in ours.timesteps:
            ours.step(sample, t, sample, **options)
    assert not asked


def test_guards_hear_other_generators() -> None:
    """A list of them, and none."""
    kind, x = diffusers.DDPMScheduler, torch.linspace(-2, 2, 120).view(SHAPE)
    ours, found = fastcfg.accelerate(kind()), []
    for _ in range(4):
        run(ours, generator=torch.Generator().manual_seed(1))
    for s in (kind(), ours):
        s.set_timesteps(STEPS)
        given = [torch.Generator().manual_seed(seed) for seed in range(2)]
        found.append([s.step(x, s.timesteps[0], x, generator=g).prev_sample for g in (given, given[0])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_guards_hear_a_change_far_back_in_a_long_past() -> None:
    ours, theirs, found = fastcfg.accelerate(diffusers.IPNDMScheduler()), diffusers.IPNDMScheduler(), []
    x = torch.linspace(-2, 2, 120).view(SHAPE)
    for s, runs in ((theirs, 1), (ours, 4)):
        for number in range(runs):
            s.set_timesteps(20)
            for index, t in enumerate(s.timesteps):
                if index == 18 and number == runs - 1:
                    s.ets[-2] = s.ets[-2].double()
                result = s.step(x, t, x).prev_sample
        found.append(result)
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_guards_hear_a_level_between_the_halves_of_a_step() -> None:
    found, x = [], torch.linspace(-2, 2, 120).view(SHAPE)
    for s, runs in ((diffusers.HeunDiscreteScheduler(), 1), (fastcfg.accelerate(diffusers.HeunDiscreteScheduler()), 4)):
        for number in range(runs):
            s.set_timesteps(STEPS)
            for index, t in enumerate(s.timesteps):
                if index == 5 and number == runs - 1:
                    s.dt = 1.5 * s.dt
                result = s.step(x, t, x).prev_sample
                if index == 5:
                    break
        found.append(result)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
