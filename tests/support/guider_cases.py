"""diffusers' guiders that are fused, what a model predicts for them, and one beside the other."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg.frontends._fused import guider as module

load_diffusers()
from diffusers import guiders  # noqa: E402

STEPS = 8
PREDICTIONS = ("pred_cond", "pred_uncond", "pred_cond_skip", "pred_cond_seg")
SKIPPED = {"skip_layer_guidance_layers": 1, "skip_layer_guidance_start": 0.13, "skip_layer_guidance_stop": 0.7}
SMOOTHED = {"seg_guidance_layers": 1, "seg_guidance_start": 0.13, "seg_guidance_stop": 0.7}
PROJECTED = {"adaptive_projected_guidance_rescale": 5.0, "eta": 0.3}
WITH_MOMENTUM: list[tuple[str, dict[str, Any]]] = [
    ("AdaptiveProjectedGuidance", PROJECTED | {"adaptive_projected_guidance_momentum": -0.5}),
    ("AdaptiveProjectedMixGuidance", PROJECTED | {"adaptive_projected_guidance_start_step": 3}),
]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ClassifierFreeGuidance", {}),
    ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 2}),
    ("AdaptiveProjectedGuidance", PROJECTED),
    *WITH_MOMENTUM,
    ("TangentialClassifierFreeGuidance", {}),
    ("MagnitudeAwareGuidance", {"alpha": 2.0}),
    ("AutoGuidance", {"auto_guidance_layers": 1, "dropout": 0.1}),
    ("SkipLayerGuidance", SKIPPED),
    ("PerturbedAttentionGuidance", {name.replace("skip_layer", "perturbed"): value for name, value in SKIPPED.items()}),
    ("SmoothedEnergyGuidance", SMOOTHED),
]


def make(name: str, options: dict[str, Any]) -> Any:
    """A guider of diffusers' by its class's name."""
    kind = getattr(guiders, name)
    return kind(**options)


def predictions(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 4, 30)) -> list[dict[str, Tensor]]:
    """What a model predicts at every step."""
    numbers = torch.randn((STEPS, len(PREDICTIONS), *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers += 0.5 * numbers[:, 1:2]
    return [dict(zip(PREDICTIONS, row, strict=True)) for row in numbers]


def guide(guider: Any, step: int, row: dict[str, Tensor], steps: int | None = STEPS) -> Any:
    """The `GuiderOutput` of one step, through the calls that a modular pipeline makes."""
    guider.set_state(step, steps, None)
    states = guider.prepare_inputs({"latents": (row["pred_cond"],) * 2})
    for state in states:
        state.noise_pred = row[getattr(state, guider._identifier_key)]
    return guider(states)


def guide_exactly(guider: Any, step: int, row: dict[str, Tensor]) -> Any:
    """The `GuiderOutput` of one step of an original in float64, also where it asks for float32."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return guide(guider, step, {key: value.double() for key, value in row.items()})


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number; NaN in one alone is infinite."""
    assert got.shape == want.shape
    if not want.numel() or not torch.equal(got.isnan(), want.isnan()):
        return 0.0 if not want.numel() else float("inf")
    got, want = got.double().nan_to_num(0), want.double().nan_to_num(0)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


class Blends:
    """How many blends ran fused, and how many were made for it."""

    def __init__(self, monkeypatch: Any) -> None:
        self.ran = self.made = 0
        module._blends.cache_clear()
        monkeypatch.setattr(module, "_blend", self._counting("ran", module._blend))
        monkeypatch.setattr(module, "RowBlends", self._counting("made", module.RowBlends))

    def _counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            setattr(self, name, getattr(self, name) + 1)
            return result

        return counted
