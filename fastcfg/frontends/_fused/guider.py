"""Subclasses of diffusers' guiders with `forward` run as one blend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ... import guidance
from ...guidance import Guidance
from ...ops.blender import Blender
from .fall_through import FallThroughError, falling_through, log_once
from .subclass import STATE, subclass

# Attributes of diffusers' guiders by field of our specs, for each of its classes with a `forward` of its own.
_COMMON: dict[str, Any] = {"scale": "guidance_scale", "interval": ("_start", "_stop"), "rescale": "guidance_rescale"}
_COMMON |= {"formulation": "use_original_formulation"}
_APG_NAME = "adaptive_projected_guidance"
_APG = _COMMON | {"eta": "eta", "momentum": f"{_APG_NAME}_momentum", "norm_threshold": f"{_APG_NAME}_rescale"}
_APG_MIX = _APG | {"apg_scale": f"{_APG_NAME}_scale", "apg_start_step": f"{_APG_NAME}_start_step"}
_SKIPPED, _SMOOTHED = (
    _COMMON | {"perturbed_scale": f"{name}_scale", "perturbed_interval": (f"{name}_start", f"{name}_stop")}
    for name in ("skip_layer_guidance", "seg_guidance")
)
_METHODS: dict[str, tuple[type[Guidance], dict[str, Any]]] = {
    "AdaptiveProjectedGuidance": (guidance.APG, _APG),
    "AdaptiveProjectedMixGuidance": (guidance.APGMix, _APG_MIX),
    "AutoGuidance": (guidance.AutoGuidance, _COMMON),
    "ClassifierFreeGuidance": (guidance.CFG, _COMMON),
    "ClassifierFreeZeroStarGuidance": (guidance.CFGZeroStar, _COMMON | {"zero_init_steps": "zero_init_steps"}),
    "MagnitudeAwareGuidance": (guidance.MagnitudeAwareCFG, _COMMON | {"alpha": "alpha"}),
    "PerturbedAttentionGuidance": (guidance.PerturbedCFG, _SKIPPED),
    "SkipLayerGuidance": (guidance.PerturbedCFG, _SKIPPED),
    "SmoothedEnergyGuidance": (guidance.PerturbedCFG, _SMOOTHED),
    "TangentialClassifierFreeGuidance": (guidance.TangentialCFG, _COMMON),
}


def is_guider(candidate: object) -> bool:
    """Whether an object has the protocol of diffusers' guiders."""
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
        blend: _FusedBlend | None = vars(self).get(STATE)
        if blend is None:
            blend = vars(self)[STATE] = _FusedBlend(original)
        try:
            pred = blend(self, given)
        except FallThroughError as error:
            log_once(original.__name__, str(error))
            pred = None
        if pred is None:
            return base.forward(self, *args, **kwargs)
        from diffusers.guiders.guider_utils import GuiderOutput

        return GuiderOutput(pred=pred, pred_cond=given["pred_cond"], pred_uncond=given.get("pred_uncond"))

    return subclass(original, {"forward": forward}, fused_guider)


class _FusedBlend:
    """The blend of a guider: a `Blender` for its attributes and the predictions' shape, rebuilt when they change."""

    def __init__(self, original: type) -> None:
        owner = next(kind for kind in original.__mro__ if "forward" in vars(kind))
        self._method = _METHODS.get(owner.__name__) if owner.__module__.startswith("diffusers.") else None
        self._key: Any = None
        self._blender: Blender | None = None
        self._momentum: Tensor | None = None  # of a copied guider, until a blender takes it

    def midway(self) -> tuple[type, dict[str, Any]] | None:
        """What a copy of the guider needs to continue; None if nothing."""
        momentum = self._momentum if self._blender is None else self._blender.momentum
        return None if momentum is None else (type(self), {"momentum": momentum.clone()})

    @classmethod
    def resumed(cls, guider: Any, original: type, momentum: Tensor) -> _FusedBlend:
        """The blend of a copy, from what `midway` returned."""
        blend = cls(original)
        blend._momentum = momentum
        return blend

    def __call__(self, guider: Any, predictions: Mapping[str, Tensor]) -> Tensor | None:
        """The guided prediction; None if there is nothing to blend."""
        step = _number(guider, "_step")
        if step == 0:
            self._momentum = None
            if self._blender is not None:
                self._blender.begin()
        if len(predictions) < 2:
            return None
        if self._method is None:
            raise FallThroughError("fastcfg has no counterpart of its method")
        if torch.is_grad_enabled() and any(prediction.requires_grad for prediction in predictions.values()):
            raise FallThroughError("its blend must let gradients through")
        kinds = {(given.shape, given.dtype, given.device) for given in predictions.values()}
        if len(kinds) > 1 or predictions["pred_cond"].ndim < 3:
            raise FallThroughError("its predictions differ in shape or dtype, or have less than three dimensions")
        steps = _number(guider, "_num_inference_steps")
        if steps is None:
            raise FallThroughError("its number of steps is not set")
        blender = self._blender_of(guider, steps, predictions["pred_cond"])
        # The third prediction has several names.
        second = next(name for name in blender.guidance.branches if name not in ("cond", "perturbed"))
        known = {"pred_cond": "cond", "pred_uncond": second}
        outputs = {known.get(name, "perturbed"): prediction for name, prediction in predictions.items()}
        if not 0 <= step < steps or set(outputs) != set(blender.branches(step)):
            raise FallThroughError(f"step {step} is given {', '.join(predictions)}")
        return blender(step, outputs)

    def _blender_of(self, guider: Any, steps: int, like: Tensor) -> Blender:
        if getattr(guider, "adaptive_projected_guidance_norm_dim", None) is not None:
            raise FallThroughError("its norms are over some of the dimensions only")
        kind, names = self._method  # type: ignore[misc]
        options: dict[str, Any] = {field: _number(guider, name) for field, name in names.items()}
        options["formulation"] = "original" if options["formulation"] else "standard"
        key = (options, steps, like.shape, like.dtype, like.device)
        if self._blender is None or key != self._key:
            before = self._momentum if self._blender is None else self._blender.momentum
            with falling_through(TypeError, ValueError):
                self._blender = Blender(kind(**options), steps, like)
            self._key, momentum = key, self._blender.momentum
            # The momentum continues if attributes change in the middle of a run.
            if before is not None and momentum is not None and before.shape == momentum.shape:
                momentum.copy_(before)
        return self._blender


def _number(guider: Any, name: str | tuple[str, str]) -> Any:
    """A guider's attribute, or a pair. Some are private, and other versions of diffusers may lack them."""
    if isinstance(name, tuple):
        return tuple(_number(guider, one) for one in name)
    value = getattr(guider, name, guider)
    if value is guider:
        raise FallThroughError(f"it has no attribute {name}")
    if not isinstance(value, Real | None):
        raise FallThroughError(f"its attribute {name} is a {type(value).__name__}, expected a number")
    return value
