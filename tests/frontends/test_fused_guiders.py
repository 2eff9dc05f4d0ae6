"""diffusers' guiders with their blend fused, beside themselves, and modular pipelines that run them."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.frontends import diffusers as fused
from fastcfg.frontends.diffusers import fuse

diffusers: Any = load_diffusers()
guiders: Any = pytest.importorskip("diffusers.guiders")
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]

STEPS, SHAPE = 8, (3, 4, 30)
PREDICTIONS = ("pred_cond", "pred_uncond", "pred_cond_skip", "pred_cond_seg")
SKIPPED = {"skip_layer_guidance_layers": 1, "skip_layer_guidance_start": 0.13, "skip_layer_guidance_stop": 0.7}
SMOOTHED = {"seg_guidance_layers": 1, "seg_guidance_start": 0.13, "seg_guidance_stop": 0.7}
PROJECTED = {"adaptive_projected_guidance_rescale": 5.0, "eta": 0.3}
GUIDERS: list[tuple[str, dict[str, Any]]] = [
    ("ClassifierFreeGuidance", {}),
    ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2}),
    ("AdaptiveProjectedGuidance", PROJECTED),
    ("AdaptiveProjectedGuidance", PROJECTED | {"adaptive_projected_guidance_momentum": -0.5}),
    ("AdaptiveProjectedMixGuidance", PROJECTED | {"adaptive_projected_guidance_start_step": 3}),
    ("TangentialClassifierFreeGuidance", {}),
    ("MagnitudeAwareGuidance", {"alpha": 2.0}),
    ("AutoGuidance", {"auto_guidance_layers": 1, "dropout": 0.1}),
    ("SkipLayerGuidance", SKIPPED),
    ("PerturbedAttentionGuidance", {name.replace("skip_layer", "perturbed"): value for name, value in SKIPPED.items()}),
    ("SmoothedEnergyGuidance", SMOOTHED),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance_rescale": 0.7, "start": 0.26, "stop": 0.8},
    {"use_original_formulation": True, "guidance_scale": 3.0},
    {"guidance_scale": 1.0},
    {"enabled": False},
]


def outputs(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What a model predicts at every step."""
    numbers = torch.randn((STEPS, len(PREDICTIONS), *SHAPE), generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers += 0.5 * numbers[:, 1:2]
    return [dict(zip(PREDICTIONS, row, strict=True)) for row in numbers]


def guide(guider: Any, rows: list[dict[str, Tensor]], steps: int | None = STEPS) -> Tensor:
    """[R, B, ...]: the guided predictions, through the calls that a modular pipeline makes."""
    guided = []
    for step, row in enumerate(rows):
        guider.set_state(step, steps, None)
        states = guider.prepare_inputs({"latents": (row["pred_cond"],) * 2})
        for state in states:
            state.noise_pred = row[getattr(state, guider._identifier_key)]
        guided.append(guider(states).pred)
    return torch.stack(guided)


def errors(got: Tensor, want: Tensor) -> Tensor:
    """[R]: relative to the largest number of a row."""
    size = want.abs().amax(dim=(1, 2, 3)).clamp_min(1e-30)
    return (got.double() - want).abs().amax(dim=(1, 2, 3)) / size


@pytest.fixture
def told(caplog: Any, monkeypatch: Any) -> Any:
    """What the log says of guiders that are not fused."""
    monkeypatch.setattr("fastcfg.frontends._fused.fall_through._logged", set())
    caplog.set_level(logging.WARNING, logger="fastcfg")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "fastcfg"]


def make(name: str, options: dict[str, Any]) -> Any:
    kind = getattr(guiders, name)
    return kind(**options)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("name", "options"), GUIDERS, ids=str)
def test_guiders_guide_as_they_did(name: str, options: dict[str, Any], setting: dict[str, Any], told: Any) -> None:
    theirs = make(name, options | setting)
    ours = fuse(make(name, options | setting))
    assert type(ours).__name__ == name
    assert isinstance(ours, type(theirs))
    for dtype, least in ((torch.float32, 1e-6), (torch.float16, 6e-4)):
        rows = outputs(dtype)
        want = guide(theirs, [{key: value.double() for key, value in row.items()} for row in rows])
        got, own = guide(ours, rows), guide(theirs, rows)
        assert got.dtype == dtype
        # They divide by the standard deviation of zeros.
        assert not got[want.isnan()].nan_to_num(0).any()
        want, got, own = (guided.nan_to_num(0) for guided in (want, got, own))
        error, own = errors(got, want), errors(own, want)
        # Measured: at most 8.3e-7 and 5.2e-4.
        assert (error <= torch.maximum(own, torch.tensor(least))).all(), (dtype, error, own)
    assert not told()
    third = "Skip" in name or "Perturbed" in name or "Smoothed" in name
    blends = "enabled" not in setting and (third or setting != {"guidance_scale": 1.0})
    assert (vars(ours)["_fastcfg_state"]._blender is not None) == blends


def test_momentum_goes_on_through_a_change_and_ends_with_a_run() -> None:
    options = {"adaptive_projected_guidance_momentum": -0.5, "start": 0.2}
    rows, runs = outputs(torch.float32), []
    for guider in (make("AdaptiveProjectedGuidance", options), fuse(make("AdaptiveProjectedGuidance", options))):
        guided = [guide(guider, rows[:4])]
        for step, row in enumerate(rows):
            guider.guidance_scale = 4.0 + (step > 4)
            guided.append(guide_one(guider, step, row))
        runs.append(guided)
    for got, want in zip(runs[1][1:], runs[0][1:], strict=True):
        assert torch.allclose(got, want, rtol=0, atol=6e-6)  # measured: 3.8e-6


def guide_one(guider: Any, step: int, row: dict[str, Tensor]) -> Tensor:
    guider.set_state(step, STEPS, None)
    names = [getattr(state, guider._identifier_key) for state in guider.prepare_inputs({})]
    prediction: Tensor = guider.forward(*(row[name] for name in names)).pred
    return prediction


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
        (lambda: make("ClassifierFreeGuidance", {}), None, torch.float32, "number of steps"),
        (lambda: make("ClassifierFreeGuidance", {}), STEPS, torch.float64, "float64"),
        (lambda: make("ClassifierFreeGuidance", {"guidance_scale": float("nan")}), STEPS, None, "scale"),
    ],
    ids=["method", "own", "norms", "steps", "float64", "nan"],
)
def test_what_has_no_counterpart_guides_as_it_did(guider: Any, steps: Any, dtype: Any, reason: str, told: Any) -> None:
    original = guider()
    rows = outputs(dtype or torch.float32)
    got = guide(fuse(copy.deepcopy(original)), rows, steps)
    torch.testing.assert_close(got, guide(original, rows, steps), rtol=0, atol=0, equal_nan=True)
    (line,) = told()
    assert reason in line


def test_gradients_go_through_the_original() -> None:
    row = outputs(torch.float32)[0]
    cond = row["pred_cond"].requires_grad_()
    guider = fuse(make("ClassifierFreeGuidance", {"guidance_scale": 3.0}))
    guider.set_state(0, STEPS, None)
    guider.forward(cond, row["pred_uncond"]).pred.sum().backward()
    assert torch.equal(cond.grad, torch.full(SHAPE, 3.0))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("ClassifierFreeGuidance", ((3, 4, 5), (1, 4, 5))),
        ("MagnitudeAwareGuidance", ((3, 40), (3, 40))),
        ("ClassifierFreeZeroStarGuidance", ((3, 40), (3, 40))),
    ],
)
def test_predictions_of_other_forms_are_left_to_the_original(name: str, shapes: Any, told: Any) -> None:
    given = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    original = make(name, {})
    guided = []
    for guider in (original, fuse(copy.deepcopy(original))):
        guider.set_state(2, STEPS, None)
        guided.append(guider.forward(*given).pred)
    assert torch.equal(*guided)
    assert len(told()) == 1


def test_predictions_that_are_not_wanted_are_left_to_the_original(told: Any) -> None:
    row = outputs(torch.float32)[0]
    guider = fuse(make("ClassifierFreeGuidance", {"stop": 0.5}))
    guider.set_state(STEPS - 1, STEPS, None)
    assert torch.equal(guider.forward(row["pred_cond"], row["pred_uncond"]).pred, row["pred_cond"])
    assert told() == [f"ClassifierFreeGuidance is not fused: step {STEPS - 1} is given pred_cond, pred_uncond"]


def test_fused_guiders_are_made_saved_and_copied_as_theirs(tmp_path: Any) -> None:
    guider = fused.ClassifierFreeGuidance(guidance_scale=3.0)
    rows = outputs(torch.float32)
    want = guide(guider, rows)
    guider.save_pretrained(tmp_path)
    loaded = guiders.ClassifierFreeGuidance.from_pretrained(tmp_path)
    assert loaded.guidance_scale == 3.0
    assert fuse(guider) is guider
    for other in (guider.new(), copy.deepcopy(guider), pickle.loads(pickle.dumps(guider)), fuse(loaded)):
        assert type(other) is type(guider)
        assert "_fastcfg_state" not in vars(other)
        assert torch.equal(guide(other, rows), want)
    with pytest.raises(TypeError, match="expected a scheduler or guider"):
        fuse(guiders.ClassifierFreeGuidance)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_start", None, "has no attribute _start"),
        ("_stop", "late", "its attribute _stop is a str, expected a number"),
        ("_num_inference_steps", None, "has no attribute _num_inference_steps"),
        ("_step", None, "has no attribute _step"),
    ],
)
def test_a_guider_without_an_attribute_runs_its_own_forward(name: str, value: Any, reason: str, told: Any) -> None:
    class Renamed(diffusers.ClassifierFreeGuidance):  # type: ignore[misc, name-defined]
        """As a version of diffusers with another private attribute."""

        def _is_cfg_enabled(self) -> bool:
            return True

    ours, theirs = fuse(Renamed()), Renamed()
    row = outputs(torch.float32)[0]
    results = []
    for guider in (theirs, ours):
        guider.set_state(0, STEPS, None)
        if value is None:
            delattr(guider, name)
        else:
            setattr(guider, name, value)
        results.append(guider.forward(row["pred_cond"], row["pred_uncond"]).pred)
    assert torch.equal(*results)
    assert len(told()) == 1
    assert reason in told()[0]
