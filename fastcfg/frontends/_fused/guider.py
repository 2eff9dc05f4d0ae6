"""Subclasses of diffusers' guiders whose `forward` is one blend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...guidance import (
    APG,
    CFG,
    APGMix,
    AutoGuidance,
    CFGZeroStar,
    Guidance,
    MagnitudeAwareCFG,
    PerturbedCFG,
    TangentialCFG,
)
from ...ops.blender import Blender
from .fall_through import FallThroughError, log_once
from .subclass import STATE, subclass

__all__ = ["fused_guider", "is_guider"]

# Our fields by their attributes, for each of their classes that has a `forward` of its own.
_COMMON: dict[str, Any] = {
    "scale": "guidance_scale",
    "interval": ("_start", "_stop"),
    "rescale": "guidance_rescale",
    "formulation": "use_original_formulation",
}
_APG = _COMMON | {
    "eta": "eta",
    "momentum": "adaptive_projected_guidance_momentum",
    "norm_threshold": "adaptive_projected_guidance_rescale",
}
_APG_MIX = _APG | {
    "apg_scale": "adaptive_projected_guidance_scale",
    "apg_start_step": "adaptive_projected_guidance_start_step",
}
_SKIPPED, _SMOOTHED = (
    _COMMON | {"perturbed_scale": f"{name}_scale", "perturbed_interval": (f"{name}_start", f"{name}_stop")}
    for name in ("skip_layer_guidance", "seg_guidance")
)
_METHODS: dict[str, tuple[type[Guidance], dict[str, Any]]] = {
    "AdaptiveProjectedGuidance": (APG, _APG),
    "AdaptiveProjectedMixGuidance": (APGMix, _APG_MIX),
    "AutoGuidance": (AutoGuidance, _COMMON),
    "ClassifierFreeGuidance": (CFG, _COMMON),
    "ClassifierFreeZeroStarGuidance": (CFGZeroStar, _COMMON | {"zero_init_steps": "zero_init_steps"}),
    "MagnitudeAwareGuidance": (MagnitudeAwareCFG, _COMMON | {"alpha": "alpha"}),
    "PerturbedAttentionGuidance": (PerturbedCFG, _SKIPPED),
    "SkipLayerGuidance": (PerturbedCFG, _SKIPPED),
    "SmoothedEnergyGuidance": (PerturbedCFG, _SMOOTHED),
    "TangentialClassifierFreeGuidance": (TangentialCFG, _COMMON),
}


def is_guider(candidate: object) -> bool:
    """Whether an object has diffusers' guiders' protocol."""
    return all(hasattr(candidate, name) for name in ("set_state", "prepare_inputs", "forward"))


@functools.cache
def fused_guider(original: type) -> type:
    """The subclass of a guider class."""
    base: Any = original
    names = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        predictions = dict(zip(names, args, strict=False)) | kwargs
        given = {name: value for name, value in predictions.items() if value is not None}
        run: _GuidedRun | None = vars(self).get(STATE)
        if run is None:
            run = vars(self)[STATE] = _GuidedRun(original)
        try:
            pred = run(self, given)
        except FallThroughError as error:
            log_once(original.__name__, str(error))
            pred = None
        if pred is None:
            return base.forward(self, *args, **kwargs)
        from diffusers.guiders.guider_utils import GuiderOutput

        return GuiderOutput(pred=pred, pred_cond=given["pred_cond"], pred_uncond=given.get("pred_uncond"))

    return subclass(original, {"forward": forward}, fused_guider)


class _GuidedRun:
    """The blends of a guider: a blender for its attributes and the predictions' shape, made anew when they change.

    Args:
        original: the guider's class before it was fused.
    """

    def __init__(self, original: type) -> None:
        owner = next(kind for kind in original.__mro__ if "forward" in vars(kind))
        self._method = _METHODS.get(owner.__name__) if owner.__module__.startswith("diffusers.") else None
        self._key: Any = None
        self._blender: Blender | None = None

    def __call__(self, guider: Any, predictions: Mapping[str, Tensor]) -> Tensor | None:
        """What is predicted; None where there is nothing to blend.

        Raises:
            FallThroughError: the original must blend.
        """
        if guider._step == 0 and self._blender is not None:
            self._blender.begin()
        if len(predictions) < 2:
            return None
        if self._method is None:
            raise FallThroughError("its method has no counterpart here")
        if torch.is_grad_enabled() and any(prediction.requires_grad for prediction in predictions.values()):
            raise FallThroughError("gradients through its blend are wanted")
        kinds = {(given.shape, given.dtype, given.device) for given in predictions.values()}
        if len(kinds) > 1 or predictions["pred_cond"].ndim < 3:
            raise FallThroughError("its predictions differ in shape or dtype, or have less than three dimensions")
        blender = self._blender_of(guider, predictions["pred_cond"])
        # Their third prediction has several names.
        second = next(name for name in blender.guidance.branches if name not in ("cond", "perturbed"))
        known = {"pred_cond": "cond", "pred_uncond": second}
        outputs = {known.get(name, "perturbed"): prediction for name, prediction in predictions.items()}
        if not 0 <= guider._step < guider._num_inference_steps or set(outputs) != set(blender.branches(guider._step)):
            raise FallThroughError(f"step {guider._step} is given {', '.join(predictions)}")
        return blender(guider._step, outputs)

    def _blender_of(self, guider: Any, like: Tensor) -> Blender:
        if getattr(guider, "adaptive_projected_guidance_norm_dim", None) is not None:
            raise FallThroughError("its norms are over some of the dimensions")
        if guider._num_inference_steps is None:
            raise FallThroughError("it is not told the number of steps")
        kind, names = self._method  # type: ignore[misc]
        options = {field: _attribute(guider, name) for field, name in names.items()}
        options["formulation"] = "original" if options["formulation"] else "standard"
        key = (options, guider._num_inference_steps, like.shape, like.dtype, like.device)
        if self._blender is None or key != self._key:
            before = None if self._blender is None else self._blender.momentum
            try:
                self._blender = Blender(kind(**options), guider._num_inference_steps, like)
            except (TypeError, ValueError) as error:
                raise FallThroughError(str(error)) from error
            self._key, momentum = key, self._blender.momentum
            # Attributes may change in the middle of a run, whose momentum goes on.
            if before is not None and momentum is not None and before.shape == momentum.shape:
                momentum.copy_(before)
        return self._blender


def _attribute(guider: Any, name: str | tuple[str, ...]) -> Any:
    return getattr(guider, name) if isinstance(name, str) else tuple(getattr(guider, one) for one in name)
