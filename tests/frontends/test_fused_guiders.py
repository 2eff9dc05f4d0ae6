"""diffusers' guiders with their blend fused, beside themselves: the same numbers, fields and state, whatever is read,
edited, copied or changed between two steps."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.guider_cases import (
    CASES,
    PREDICTIONS,
    STEPS,
    WITH_MOMENTUM,
    Blends,
    error,
    guide,
    guide_exactly,
    guiders,
    make,
    predictions,
)
from torch import Tensor

from fastcfg.frontends import diffusers as fused
from fastcfg.frontends.diffusers import fuse
from fastcfg.utils._torch_private import TorchDispatchMode

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance_rescale": 0.7, "start": 0.26, "stop": 0.8},
    {"use_original_formulation": True, "guidance_scale": 3.0},
    {"guidance_scale": 1.0},
    {"enabled": False},
]
CLASSES = dict(CASES[:2] + WITH_MOMENTUM + CASES[5:])


@pytest.fixture
def told(caplog: Any, monkeypatch: Any) -> Any:
    """What the log says of guiders that are not fused."""
    monkeypatch.setattr("fastcfg.frontends._fused.fall_through._logged", set())
    caplog.set_level(logging.WARNING, logger="fastcfg")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "fastcfg"]


@pytest.fixture
def blends(monkeypatch: Any) -> Blends:
    return Blends(monkeypatch)


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The original and the fused one."""
    return make(name, options), fuse(make(name, options))


def preds(guider: Any, rows: list[dict[str, Tensor]], steps: int | None = STEPS) -> Tensor:
    """[R, B, ...]: the guided predictions of a run."""
    return torch.stack([guide(guider, step, row, steps).pred for step, row in enumerate(rows)])


def outcome(guider: Any, step: int, row: dict[str, Tensor]) -> Any:
    """A step's output, or the type of what it raised."""
    try:
        return guide(guider, step, row)
    except Exception as raised:
        return type(raised)


def assert_same(ours: Any, theirs: Any, least: float = 2e-6) -> None:
    """That two outcomes are the same: `GuiderOutput`s in values, dtypes and strides, or one type of exception."""
    if isinstance(theirs, type):
        assert ours == theirs
        return
    for field in ("pred", "pred_cond", "pred_uncond"):
        got, want = ours[field], theirs[field]
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.dtype, got.stride()) == (want.dtype, want.stride()), field
            assert error(got, want) <= least, field


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_guiders_guide_as_they_did(
    name: str, options: dict[str, Any], setting: dict[str, Any], told: Any, blends: Blends
) -> None:
    theirs, ours = pair(name, options | setting)
    assert type(ours).__name__ == name
    assert isinstance(ours, type(theirs))
    for dtype, least in ((torch.float32, 1e-6), (torch.float16, 6e-4)):
        reference = copy.deepcopy(theirs)
        for step, row in enumerate(predictions(dtype)):
            exact, own, got = guide_exactly(reference, step, row), guide(theirs, step, row), guide(ours, step, row)
            assert got.pred.dtype == dtype
            # The original divides by the standard deviation of zeros.
            assert not got.pred[own.pred.isnan()].nan_to_num(0).any()
            for guided in (exact, own):
                guided.pred = guided.pred.nan_to_num(0)
            # Measured: at most 8.3e-7 and 5.2e-4.
            assert error(got.pred, exact.pred) <= max(error(own.pred, exact.pred), least), (dtype, step)
            assert got.pred_cond is row["pred_cond"]
            assert error(got.pred_uncond, own.pred_uncond) <= 2 * least if own.pred_uncond is not None else True
    assert not told()
    third = "Skip" in name or "Perturbed" in name or "Smoothed" in name
    expected = "enabled" not in setting and (third or setting != {"guidance_scale": 1.0})
    assert (blends.ran > 0) == expected


# What users do to a guider's past between two steps: (guider, another guider of its class with its own past) to the
# guider that continues.


def _reset(guider: Any, other: Any) -> Any:
    guider.momentum_buffer = None
    return guider


def _new_buffer(guider: Any, other: Any) -> Any:
    guider.momentum_buffer = type(other.momentum_buffer)(-0.25)
    return guider


def _cleared(guider: Any, other: Any) -> Any:
    guider.momentum_buffer.running_average = 0
    return guider


def _edited_in_place(guider: Any, other: Any) -> Any:
    guider.momentum_buffer.running_average.mul_(0.5)[0] = 1.0
    return guider


def _replaced(guider: Any, other: Any) -> Any:
    guider.momentum_buffer.running_average = guider.momentum_buffer.running_average.flip(0).mul(3.0)
    return guider


def _decay(guider: Any, other: Any) -> Any:
    guider.momentum_buffer.momentum = 0.5
    return guider


def _option_of_the_next_run(guider: Any, other: Any) -> Any:
    guider.adaptive_projected_guidance_momentum = 0.9
    return guider


def _swapped(guider: Any, other: Any) -> Any:
    guider.momentum_buffer, other.momentum_buffer = other.momentum_buffer, guider.momentum_buffer
    return guider


def _shared(guider: Any, other: Any) -> Any:
    guider.momentum_buffer = other.momentum_buffer
    return guider


def _whole_state_swapped(guider: Any, other: Any) -> Any:
    mine = dict(vars(guider))
    vars(guider).clear()
    vars(guider).update(vars(other))
    vars(other).clear()
    vars(other).update(mine)
    return guider


def _deep_copied(guider: Any, other: Any) -> Any:
    return copy.deepcopy(guider)


def _copied(guider: Any, other: Any) -> Any:
    return copy.copy(guider)


def _pickled(guider: Any, other: Any) -> Any:
    return pickle.loads(pickle.dumps(guider))


def _restored(guider: Any, other: Any) -> Any:
    saved = copy.deepcopy(vars(guider))
    for step in range(2):
        guide(guider, step, predictions()[step])
    vars(guider).update(saved)
    return guider


def _other_step(guider: Any, other: Any) -> Any:
    guide(guider, 5, predictions()[0])
    return guider


def _ran_again(guider: Any, other: Any) -> Any:
    guide(guider, 0, predictions()[0])
    return guider


CHANGES: list[Callable[[Any, Any], Any]] = [
    *(_reset, _new_buffer, _cleared, _edited_in_place, _replaced, _decay, _option_of_the_next_run),
    *(_swapped, _shared, _whole_state_swapped, _deep_copied, _copied, _pickled, _restored, _other_step, _ran_again),
]


@pytest.mark.parametrize("at", [1, 4, 6])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "options"), WITH_MOMENTUM, ids=str)
def test_the_past_is_the_originals(
    name: str, options: dict[str, Any], change: Callable[[Any, Any], Any], at: int, told: Any, blends: Blends
) -> None:
    rows, results = predictions(), []
    for guider, other in zip(pair(name, options), pair(name, options), strict=True):
        run = []
        for step, row in enumerate(rows):
            guide(other, step, rows[-1 - step])
            guider = change(guider, other) if step == at else guider
            run.append(guide(guider, step, row).pred)
        for one in (guider, other):
            average = one.momentum_buffer.running_average if one.momentum_buffer is not None else None
            run.append(average if isinstance(average, Tensor) else torch.zeros(1))
        results.append(run)
    for theirs, ours in zip(*results, strict=True):
        assert error(ours, theirs) <= 2e-6
    assert not told()
    assert blends.ran >= 2 * STEPS


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_every_step_leaves_a_new_average(dtype: torch.dtype, least: float) -> None:
    for name, options in WITH_MOMENTUM:
        kept, averages = [], []
        theirs, ours = pair(name, options)
        for step, row in enumerate(predictions(dtype)):
            for guider in (theirs, ours):
                guide(guider, step, row)
            average, want = (guider.momentum_buffer.running_average for guider in (ours, theirs))
            assert error(average, want) <= least
            assert (average.dtype, average.stride()) == (want.dtype, want.stride())
            kept.append(average)
            averages.append(average.clone())
        assert torch.equal(torch.stack(kept), torch.stack(averages))
        assert len({average.data_ptr() for average in kept}) == STEPS


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_fused_guider_has_no_other_state(name: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(name, options)
    for step, row in enumerate(predictions()[:3]):
        guide(theirs, step, row)
        guide(ours, step, row)
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours.get_state().keys() == theirs.get_state().keys()
    if getattr(theirs, "momentum_buffer", None) is None:
        assert repr(ours) == repr(theirs)


OPTIONS: dict[str, list[tuple[str, Any]]] = {
    "": [
        ("guidance_scale", 2.5),
        ("guidance_scale", 1.0),
        ("guidance_scale", 0.0),
        ("guidance_scale", torch.tensor(2.5)),
        ("guidance_scale", torch.tensor([1.5, 2.5, 4.0]).view(3, 1, 1)),
        ("guidance_scale", np.float32(2.5)),
        ("guidance_scale", np.float64(2.5)),
        ("guidance_scale", np.int64(3)),
        ("guidance_scale", Fraction(5, 2)),
        ("guidance_scale", float("nan")),
        ("guidance_scale", True),
        ("guidance_scale", None),
        ("guidance_scale", "7.5"),
        ("guidance_rescale", 0.4),
        ("guidance_rescale", 1.5),
        ("guidance_rescale", -0.5),
        ("use_original_formulation", True),
        ("_enabled", False),
        ("_start", 0.9),
        ("_stop", 0.1),
        ("_start", None),
        ("extra", 3),
    ],
    "Projected": [
        ("eta", 0.9),
        ("adaptive_projected_guidance_rescale", 0.5),
        ("adaptive_projected_guidance_rescale", 0.0),
        ("adaptive_projected_guidance_rescale", -1.0),
        ("adaptive_projected_guidance_norm_dim", (-1,)),
        ("adaptive_projected_guidance_start_step", 1),
        ("adaptive_projected_guidance_start_step", 99),
        ("adaptive_projected_guidance_scale", 2.0),
        ("adaptive_projected_guidance_scale", 1.0),
    ],
    "ZeroStar": [("zero_init_steps", 0), ("zero_init_steps", 99), ("zero_init_steps", None)],
    "Magnitude": [("alpha", 0.1), ("alpha", -1.0)],
    "Skip": [("skip_layer_guidance_scale", 0.0), ("skip_layer_guidance_scale", 1.5), ("skip_layer_guidance_stop", 1)],
    "Perturbed": [("skip_layer_guidance_scale", 1.5), ("skip_layer_guidance_start", 0.6)],
    "Smoothed": [("seg_guidance_scale", 1.5), ("seg_guidance_start", 0.6)],
}


@pytest.mark.parametrize("name", CLASSES)
def test_options_are_heard_between_steps(name: str) -> None:
    rows = predictions()
    for key, value in [change for part, changes in OPTIONS.items() if part in name for change in changes]:
        theirs, ours = pair(name, CLASSES[name])
        for step, row in enumerate(rows):
            if step == 3:
                setattr(theirs, key, value)
                setattr(ours, key, value)
            assert_same(outcome(ours, step, row), outcome(theirs, step, row))


def test_what_is_enabled_and_disabled_between_steps() -> None:
    for name, options in CASES:
        theirs, ours = pair(name, options)
        for step, row in enumerate(predictions()):
            for guider in (theirs, ours):
                guider.disable() if step == 4 else guider.enable()
            assert_same(outcome(ours, step, row), outcome(theirs, step, row))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "change",
    [
        lambda row: {key: value.half() for key, value in row.items()},
        lambda row: {key: value.double() for key, value in row.items()},
        lambda row: {key: value[:2] for key, value in row.items()},
        lambda row: {key: value[:1] for key, value in row.items()},
        lambda row: {key: value[..., :7] for key, value in row.items()},
        lambda row: {key: value.transpose(1, 2) for key, value in row.items()},
        lambda row: row | {"pred_uncond": row["pred_uncond"].half()},
        lambda row: row | {"pred_uncond": row["pred_uncond"][:1]},
    ],
    ids=["half", "double", "two", "one", "narrow", "turned", "mixed", "broadcast"],
)
def test_predictions_may_change_their_form(name: str, change: Any, told: Any) -> None:
    for at in (range(3, 5), range(5, STEPS)):
        theirs, ours = pair(name, CLASSES[name])
        for step, row in enumerate(predictions()):
            row = change(row) if step in at else row
            half = any(value.dtype == torch.float16 for value in row.values())
            assert_same(outcome(ours, step, row), outcome(theirs, step, row), 3e-3 if half else 2e-6)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "MagnitudeAwareGuidance"])  # it raises for images
@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], dim=1).chunk(2, dim=1)[0],
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[..., :1].expand(x.shape),
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda x: torch.cat([x, x], dim=1)[:1, : x.shape[1]],
    ],
    ids=["last", "split", "strided", "turned", "expanded", "batch last", "first of many"],
)
def test_results_lie_in_memory_as_theirs(name: str, lay: Callable[[Tensor], Tensor], blends: Blends) -> None:
    theirs, ours = pair(name, CLASSES[name])
    reference = copy.deepcopy(theirs)
    for step, row in enumerate(predictions(shape=(2, 4, 6, 5))):
        row = {key: lay(value) for key, value in row.items()}
        exact, own, got = guide_exactly(reference, step, row), guide(theirs, step, row), guide(ours, step, row)
        # The original's singular vectors in float32 are 3e-6 off where all columns are equal.
        assert_same(got, own, max(2e-6, 1.1 * error(own.pred, exact.pred)))
        if getattr(theirs, "momentum_buffer", None) is not None:
            got, want = (guider.momentum_buffer.running_average for guider in (ours, theirs))
            assert got.stride() == want.stride()
    assert blends.ran >= STEPS - 3


@pytest.mark.parametrize("name", CLASSES)
def test_one_step_with_gradients_hands_the_past_on(name: str, told: Any) -> None:
    theirs, ours = pair(name, CLASSES[name])
    gradients = []
    for guider in (theirs, ours):
        leaf, losses = torch.zeros(3, 4, 30, requires_grad=True), []
        for step, row in enumerate(predictions()):
            if step == 4:
                row = row | {"pred_cond": row["pred_cond"] + leaf}
            with torch.set_grad_enabled(step != 6):
                losses.append(guide(guider, step, row).pred.square().sum())
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert error(gradients[1], gradients[0]) <= 1e-5
    assert len(told()) == 1 + (name in dict(WITH_MOMENTUM))
    assert all("gradients" in line for line in told())


@pytest.mark.parametrize("name", CLASSES)
def test_inference_mode_may_come_and_go(name: str, told: Any) -> None:
    theirs, ours = pair(name, CLASSES[name])
    for step, row in enumerate(predictions()):
        with torch.inference_mode(step % 3 != 1):
            got, want = guide(ours, step, row), guide(theirs, step, row)
        assert_same(got, want)
        assert got.pred.is_inference() == want.pred.is_inference()
    assert not told()


@pytest.mark.parametrize("name", CLASSES)
def test_transforms_and_autocast_are_left_to_the_original(name: str) -> None:
    theirs, ours = pair(name, CLASSES[name])
    rows = predictions(torch.bfloat16)
    for step, row in enumerate(rows):
        with torch.autocast("cpu", enabled=step in (3, 5)):
            assert_same(guide(ours, step, row), guide(theirs, step, row), 5e-2)

    row = predictions()[5]

    def guided(guider: Any, scale: Tensor) -> Tensor:
        """Of a copy, which may keep what the transform gave it."""
        pred: Tensor = guide(copy.deepcopy(guider), 5, {key: scale * value for key, value in row.items()}).pred
        return pred

    theirs, ours = pair(name, CLASSES[name])
    scales = torch.tensor([[1.0], [2.0]])
    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        got, want = (transform(functools.partial(guided, guider))(scales[0]) for guider in (ours, theirs))
        assert got.abs().max() > 0
        assert error(got, want) <= 2e-6


@pytest.mark.parametrize("name", ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance"])
def test_compiled_around(name: str) -> None:
    theirs, ours = pair(name, CLASSES[name])
    compiled = torch.compile(lambda guider, **given: guider.forward(**given)["pred"], backend="eager")
    for step, row in enumerate(predictions()[:4]):
        given = {key: row[key] for key in PREDICTIONS[:2]}
        for guider in (theirs, ours):
            guider.set_state(step, STEPS, None)
            guider.prepare_inputs({})
        got = compiled(ours, **given) if step % 2 else ours.forward(**given).pred
        assert error(got, theirs.forward(**given).pred) <= 2e-6


class ClassifierFreeGuidance(guiders.ClassifierFreeGuidance):  # type: ignore[misc]
    """A user's own, of a name that is known."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        return super().forward(pred_cond / 2, pred_uncond)


@pytest.mark.parametrize(
    ("guider", "steps", "dtype", "reason"),
    [
        (lambda: make("LTX2Guidance", {"guidance_scale": 3.0}), STEPS, None, "no counterpart"),
        (ClassifierFreeGuidance, STEPS, torch.float32, "no counterpart"),
        (lambda: make("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_norm_dim": 1}), STEPS, None, "norms"),
        (lambda: make("ClassifierFreeGuidance", {}), STEPS, torch.float64, "float64"),
        (lambda: make("ClassifierFreeGuidance", {"guidance_scale": float("nan")}), STEPS, None, "scale"),
        (lambda: make("ClassifierFreeGuidance", {"guidance_scale": torch.tensor(2.0)}), STEPS, None, "is a Tensor"),
    ],
    ids=["method", "own", "norms", "float64", "nan", "tensor"],
)
def test_what_has_no_counterpart_guides_as_it_did(guider: Any, steps: Any, dtype: Any, reason: str, told: Any) -> None:
    original = guider()
    rows = predictions(dtype or torch.float32)
    got = preds(fuse(copy.deepcopy(original)), rows, steps)
    torch.testing.assert_close(got, preds(original, rows, steps), rtol=0, atol=0, equal_nan=True)
    (line,) = told()
    assert reason in line


def test_a_run_without_a_number_of_steps(blends: Blends) -> None:
    for name, options in CASES:
        theirs, ours = pair(name, options)
        rows = predictions()
        assert error(preds(ours, rows, None), preds(theirs, rows, None)) <= 2e-6
    assert blends.ran > STEPS * len(CASES) / 2


@pytest.mark.parametrize("name", CLASSES)
def test_steps_in_any_order_and_beyond_the_last(name: str) -> None:
    theirs, ours = pair(name, CLASSES[name])
    rows = predictions()
    for step in (5, 5, 2, 0, 7, -1, 8, 12, 3):
        assert_same(outcome(ours, step, rows[step % STEPS]), outcome(theirs, step, rows[step % STEPS]))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "change",
    [
        lambda row: {key: value.flatten(1) for key, value in row.items()},
        lambda row: {key: value[0, 0] for key, value in row.items()},
        lambda row: {key: value[:0] for key, value in row.items()},
        lambda row: {key: value[..., :0] for key, value in row.items()},
        lambda row: {key: value.long() for key, value in row.items()},
        lambda row: {key: value.to(torch.complex64) for key, value in row.items()},
        lambda row: {key: torch.nn.Parameter(value, requires_grad=False) for key, value in row.items()},
        lambda row: {key: value.numpy() for key, value in row.items()},
        lambda row: {key: float(value[0, 0, 0]) for key, value in row.items()},
        lambda row: row | {"pred_uncond": None},
        lambda row: row | {"pred_cond": None},
        lambda row: {key: value.to("meta") for key, value in row.items()},
    ],
)
def test_predictions_of_other_forms_are_left_to_the_original(name: str, change: Any) -> None:
    theirs, ours = pair(name, CLASSES[name])
    for step in (3, 5):
        got, want = (outcome(guider, step, change(predictions()[step])) for guider in (ours, theirs))
        if isinstance(want, type) or not isinstance(want.pred, Tensor) or want.pred.is_meta:
            assert got is want or (got.pred is None) == (want.pred is None)
        else:
            assert_same(got, want)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_that_do_not_fit_are_the_originals_to_refuse(name: str) -> None:
    theirs, ours = pair(name, CLASSES[name])
    cond = predictions()[0]["pred_cond"]
    for args, kwargs in [
        ((), {}),
        ((cond, cond, cond, cond), {}),
        ((cond,), {"pred_cond": cond}),
        ((cond, cond), {"pred_other": cond}),
        ((), {"pred_uncond": cond}),
    ]:
        for guider in (theirs, ours):
            guider.set_state(5, STEPS, None)
            with pytest.raises(TypeError):
                guider.forward(*args, **kwargs)


def test_predictions_that_are_not_wanted_pass_through(told: Any) -> None:
    row = predictions()[0]
    for name, options in CASES:
        for guider in pair(name, options | {"stop": 0.5}):
            guider.set_state(STEPS - 1, STEPS, None)
            output = guider.forward(row["pred_cond"], row["pred_uncond"])
            assert output.pred is row["pred_cond"]
            assert output.pred_uncond is row["pred_uncond"]
    assert not told()


def test_fused_guiders_are_made_saved_and_copied_as_theirs(tmp_path: Any) -> None:
    guider = fused.ClassifierFreeGuidance(guidance_scale=3.0)
    rows = predictions()
    want = preds(guider, rows)
    guider.save_pretrained(tmp_path)
    loaded = guiders.ClassifierFreeGuidance.from_pretrained(tmp_path)
    assert loaded.guidance_scale == 3.0
    assert fuse(guider) is guider
    for other in (guider.new(), copy.deepcopy(guider), pickle.loads(pickle.dumps(guider)), fuse(loaded)):
        assert type(other) is type(guider)
        assert torch.equal(preds(other, rows), want)
    with pytest.raises(TypeError, match="expected a scheduler or guider"):
        fuse(guiders.ClassifierFreeGuidance)


def test_a_subclass_that_decides_by_itself_is_heard(blends: Blends) -> None:
    class Alternating(guiders.ClassifierFreeGuidance):  # type: ignore[misc]
        def _is_cfg_enabled(self) -> bool:
            return bool(self._step % 2)

    for step, row in enumerate(predictions()):
        got, want = (
            guider.forward(row["pred_cond"], row["pred_uncond"])
            for guider in (fuse(Alternating()), Alternating())
            if guider.set_state(step, STEPS, None) is None
        )
        assert_same(got, want)
    assert blends.ran == STEPS / 2
    theirs, ours = pair("AdaptiveProjectedGuidance", {})
    for guider in (theirs, ours):
        guider._is_apg_enabled = lambda: False
        assert guide(guider, 3, predictions()[0]).pred is not None
    assert blends.ran == STEPS / 2


def test_a_method_or_buffer_replaced_later_is_heard(monkeypatch: Any, told: Any) -> None:
    row = predictions()[0]
    theirs, ours = pair("ClassifierFreeGuidance", {})
    guide(ours, 3, row)
    monkeypatch.setattr(guiders.ClassifierFreeGuidance, "forward", lambda self, *args, **kwargs: "replaced")
    assert guide(theirs, 3, row) == guide(ours, 3, row) == "replaced"

    class Buffer:
        """Keeps another average."""

        running_average: Any = 0
        momentum = -0.5

        def update(self, value: Tensor) -> None:
            self.running_average = value + 0.1 * self.running_average

    def replace_buffer(buffer: Any) -> Any:
        return Buffer()

    def replace_update(buffer: Any) -> Any:
        buffer.update = functools.partial(Buffer.update, buffer)
        return buffer

    def replace_method(buffer: Any) -> Any:
        monkeypatch.setattr(type(buffer), "update", Buffer.update)
        return buffer

    for name, options in WITH_MOMENTUM:
        for replace in (replace_buffer, replace_update, replace_method):
            theirs, ours = pair(name, options)
            for guider in (theirs, ours):
                guide(guider, 0, row)
                guider.momentum_buffer = replace(guider.momentum_buffer)
            for step in range(1, STEPS):
                assert_same(guide(ours, step, row), guide(theirs, step, row))


@pytest.mark.parametrize(
    ("name", "options", "helper"),
    [
        ("ClassifierFreeGuidance", {"guidance_rescale": 0.5}, "rescale_noise_cfg"),
        ("AdaptiveProjectedGuidance", {}, "normalized_guidance"),
        ("TangentialClassifierFreeGuidance", {}, "normalized_guidance"),
        ("ClassifierFreeZeroStarGuidance", {}, "cfg_zero_star_scale"),
        ("MagnitudeAwareGuidance", {}, "mambo_guidance"),
    ],
)
def test_a_helper_that_is_replaced_is_heard(
    name: str, options: dict[str, Any], helper: str, monkeypatch: Any, blends: Blends
) -> None:
    rows = predictions()
    theirs, ours = pair(name, options)
    guide(ours, 3, rows[3])
    assert blends.ran == 1
    scope = type(theirs).forward.__globals__
    own = scope[helper]
    monkeypatch.setitem(scope, helper, lambda *args, **kwargs: 2 * own(*args, **kwargs))
    want = guide(theirs, 4, rows[4])
    assert_same(guide(ours, 4, rows[4]), want)

    class Later(type(theirs)):  # type: ignore[misc]
        """Fused when it is replaced already."""

    assert_same(guide(fuse(Later(**options)), 4, rows[4]), want)
    assert blends.ran == 1


@pytest.mark.parametrize(
    "average",
    [0, 0.0, -0.0, 1.0, None, "", torch.tensor(0.0), torch.ones(3, 4, 30).double(), torch.ones(4, 30), torch.ones(2)],
    ids=str,
)
@pytest.mark.parametrize("momentum", [0.5, None, float("inf"), torch.tensor(-0.5)], ids=str)
def test_a_buffer_may_hold_anything(average: Any, momentum: Any) -> None:
    for name, options in WITH_MOMENTUM:
        theirs, ours = pair(name, options)
        for step, row in enumerate(predictions()):
            for guider in (theirs, ours):
                if step == 5:
                    guider.momentum_buffer.running_average = copy.deepcopy(average)
                    guider.momentum_buffer.momentum = momentum
            got, want = outcome(ours, step, row), outcome(theirs, step, row)
            assert_same(got, want)
            if isinstance(got, type):
                break


@pytest.mark.parametrize("name", ["_start", "_num_inference_steps", "_step", "momentum_buffer", "_enabled"])
def test_a_guider_without_an_attribute_raises_as_the_original(name: str) -> None:
    theirs, ours = pair(*WITH_MOMENTUM[0])
    row = predictions()[5]
    for guider in (theirs, ours):
        guide(guider, 5, row)
        delattr(guider, name)
        with pytest.raises(AttributeError, match=name):
            guider.forward(row["pred_cond"], row["pred_uncond"])


def test_options_in_the_config_are_heard_where_the_original_reads_them(blends: Blends) -> None:
    """diffusers' objects give what their config has for an attribute that they lack."""
    rows = predictions()
    theirs, ours = pair("ClassifierFreeGuidance", {"guidance_scale": 3.0})
    for change in (
        lambda guider: guider.register_to_config(guidance_scale=5.0),  # not read: the attribute is there
        lambda guider: delattr(guider, "guidance_scale"),
        lambda guider: guider.register_to_config(guidance_scale=2.0),
        lambda guider: guider.register_to_config(guidance_rescale=0.5),
        lambda guider: delattr(guider, "guidance_rescale"),
    ):
        for guider in (theirs, ours):
            change(guider)
        assert_same(guide(ours, 3, rows[3]), guide(theirs, 3, rows[3]))
    assert blends.ran == 5


@pytest.mark.parametrize("missing", ["_is_cfg_enabled", "guidance_scale", "_start", "_step"])
def test_a_class_of_another_version_is_left_to_itself(missing: str, told: Any) -> None:
    class Other(guiders.ClassifierFreeGuidance):  # type: ignore[misc]
        """Reads other attributes."""

        def __getattribute__(self, name: str) -> Any:
            if name == missing:
                raise AttributeError
            return super().__getattribute__(name)

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"there is no {name}")

        def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
            return pred_cond - pred_uncond

    Other.__module__, Other.__name__ = "diffusers.guiders.another", "ClassifierFreeGuidance"
    guider, row = fuse(Other()), predictions()[3]
    guider.set_state(3, STEPS, None)
    assert torch.equal(guider.forward(row["pred_cond"], row["pred_uncond"]), row["pred_cond"] - row["pred_uncond"])
    assert told() == [f"ClassifierFreeGuidance is not fused: there is no {missing}"]


class Recorded(TorchDispatchMode):
    """The operations that run, with the devices and kinds of what they copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_an_unchanged_step_builds_and_reads_nothing(name: str, options: dict[str, Any], blends: Blends) -> None:
    ours, rows, seen = fuse(make(name, options | {"guidance_scale": 4.25})), predictions(), []
    for step in range(STEPS):
        row = {key: value for key, value in rows[step].items() if key in ours._input_predictions}
        ours.set_state(step, STEPS, None)
        ours.prepare_inputs({})
        with Recorded() as recorded:
            ours.forward(**row)
        seen.append(recorded.names)
    # Each kind of row once: with and without the third prediction, before and after the first projected step.
    assert 1 <= blends.made <= 3
    assert blends.ran >= STEPS - 3
    last = seen[-1]
    assert last == seen[-2]
    # Nothing is read back, and no host values become tensors.
    assert not [one for one in last if any(part in one for part in ("item", "_local_scalar", "lift", "scalar_tensor"))]
    for guider in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        guide(guider, STEPS - 1, rows[-1])
    made = blends.made
    guide(ours, STEPS - 1, rows[-1])
    assert blends.made == made


@pytest.mark.parametrize(("name", "options"), WITH_MOMENTUM, ids=str)
def test_a_guider_fused_in_mid_run_continues_and_is_not_changed(name: str, options: dict[str, Any]) -> None:
    rows, theirs = predictions(), make(name, options)
    for step in range(4):
        guide(theirs, step, rows[step])
    ours = fuse(theirs)
    got = [guide(ours, step, rows[step]) for step in range(4, STEPS)]
    for step, output in zip(range(4, STEPS), got, strict=True):
        assert_same(output, guide(theirs, step, rows[step]))


def test_copies_and_twins_share_what_is_built(blends: Blends) -> None:
    rows, guider = predictions(), make("AdaptiveProjectedGuidance", {"guidance_scale": 4.125})
    for one in (fuse(guider), fuse(copy.deepcopy(guider)), copy.deepcopy(fuse(guider))):
        preds(one, rows)
    assert blends.made == 1
