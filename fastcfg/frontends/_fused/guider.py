"""Subclasses of diffusers' guiders with `forward` run as one blend.

Everything that a guider reads and writes stays where the original has it: options, step, and the momentum in
`momentum_buffer`, which every blend takes from there and replaces by a new tensor. Ours is only a cache of blends by
their options, shared by all guiders. Whether a prediction takes part is asked of the guider's own methods.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import guidance
from ...guidance import Guidance
from ...ops.blender import RowBlends
from ...ops.checks import LOADED_DTYPES
from ...ops.gram import gram
from ...utils._torch_private import in_function_transform
from .fall_through import FallThroughError, log_once
from .subclass import subclass

# The row of the blends that runs: a perturbed branch takes no part in row 0.
_ROW = 1
_NUMBERS = (int, float, np.number)


class _Spec:
    """A spec whose fields are attributes of a guider."""

    def __init__(self, kind: type[Guidance], scale: str = "guidance_scale", **names: str) -> None:
        self.kind = kind
        names = {"scale": scale, "rescale": "guidance_rescale", "formulation": "use_original_formulation"} | names
        self.fields, self.attributes = tuple(names), tuple(names.values())

    def options(self, values: tuple[Any, ...], decay: float | None) -> dict[str, Any]:
        """The spec's arguments for values of the attributes."""
        options = dict(zip(self.fields, values, strict=True))
        options["formulation"] = "original" if options["formulation"] else "standard"
        if self.kind is guidance.APG:
            options["momentum"] = decay
        elif self.kind is guidance.PerturbedCFG:
            options["perturbed_interval"] = (0.0, 1.0)
        return options


_CFG = _Spec(guidance.CFG)
_APG, _APG_OF_MIX = (
    _Spec(guidance.APG, scale, eta="eta", norm_threshold="adaptive_projected_guidance_rescale")
    for scale in ("guidance_scale", "adaptive_projected_guidance_scale")
)

_Given = Mapping[str, Any]  # predictions by the names of `forward`'s parameters
# (guider, predictions) to `GuiderOutput`'s fields; None where there is nothing to blend.
_Method = Callable[[Any, _Given], dict[str, Tensor] | None]


def is_guider(candidate: object) -> bool:
    """Whether an object has the protocol of diffusers' guiders."""
    return all(hasattr(candidate, name) for name in ("set_state", "prepare_inputs", "forward"))


@functools.cache
def fused_guider(original: type) -> type:
    """The subclass of a guider class."""
    base: Any = original
    theirs = base.forward
    names = list(inspect.signature(theirs).parameters)[1:]
    owner = next(kind for kind in original.__mro__ if "forward" in vars(kind))
    scope, helpers = _helpers(theirs)
    is_known = all(function.__module__.startswith("diffusers.") for function in (owner, *helpers.values()))
    method = _METHODS.get(owner.__name__) if is_known else None

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch.compile fuses the original as it is. Arguments that do not fit are the original's to refuse.
        fits = len(args) <= len(names) and all(name in names[len(args) :] for name in kwargs)
        replaced = base.forward != theirs or any(scope[name] is not helper for name, helper in helpers.items())
        if fits and not replaced and not torch.compiler.is_compiling():
            try:
                fields = (method or _unknown)(self, dict(zip(names, args, strict=False)) | kwargs)
            except (FallThroughError, AttributeError, TypeError, ValueError) as error:
                # What is not as expected, also in other versions of diffusers, raises again where the original does.
                log_once(original.__name__, str(error))
            else:
                if fields is not None:
                    return _output()(**fields)
        return base.forward(self, *args, **kwargs)

    return subclass(original, {"forward": forward}, fused_guider)


def _helpers(function: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A function's globals, and those of them that are functions which it calls."""
    scope = getattr(function, "__globals__", {})
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return scope, {name: scope[name] for name in names if inspect.isfunction(scope.get(name))}


@functools.cache
def _output() -> Any:
    from diffusers.guiders.guider_utils import GuiderOutput

    return GuiderOutput


def _unknown(guider: Any, given: _Given) -> None:
    if sum(prediction is not None for prediction in given.values()) > 1:
        raise FallThroughError("fastcfg has no counterpart of its method")


def _pair(spec: _Spec, enabled: str) -> _Method:
    """The method of a class that blends pred_cond and pred_uncond if its method `enabled` says so."""

    def method(guider: Any, given: _Given) -> dict[str, Tensor] | None:
        if not _ask(guider, enabled):
            return None
        cond, uncond = _predictions(given, "pred_cond", "pred_uncond")
        return _fields(_blend(guider, spec, cond=cond, uncond=uncond), cond, uncond)

    return method


def _perturbed(enabled: str, third: str, scale: str) -> _Method:
    """The method of a class with a third prediction and its scale."""
    both, alone = _Spec(guidance.PerturbedCFG, perturbed_scale=scale), _Spec(guidance.CFG, scale)

    def method(guider: Any, given: _Given) -> dict[str, Tensor] | None:
        guided, perturbed = _ask(guider, "_is_cfg_enabled"), _ask(guider, enabled)
        if guided and perturbed:
            cond, uncond, other = _predictions(given, "pred_cond", "pred_uncond", third)
            pred = _blend(guider, both, cond=cond, uncond=uncond, perturbed=other)
        elif guided or perturbed:
            cond, other = _predictions(given, "pred_cond", "pred_uncond" if guided else third)
            pred = _blend(guider, _CFG if guided else alone, cond=cond, uncond=other)
        else:
            return None
        return _fields(pred, given["pred_cond"], given.get("pred_uncond"))

    return method


def _zero_star(guider: Any, given: _Given) -> dict[str, Tensor] | None:
    """CFG-Zero*, which returns its multiple of pred_uncond in place of it."""
    if not guider._enabled:
        return None
    if guider._step < guider.zero_init_steps:
        if not guider.guidance_rescale > 0:
            return None
        # The original divides by the standard deviation of zeros.
        (cond,) = _predictions(given, "pred_cond")
        return _fields(torch.zeros_like(cond), cond, given.get("pred_uncond"))
    if not _ask(guider, "_is_cfg_enabled"):
        return None
    cond, uncond = _predictions(given, "pred_cond", "pred_uncond")
    _refuse_autocast(cond)
    with torch.no_grad():
        products, _ = gram(torch.cat([cond, uncond]), 2, base=1)
        square = products[:, 1, 1]
        alpha = (square + products[:, 0, 1]) / (square + 1e-8)
        uncond = uncond * alpha.to(uncond.dtype).view(-1, *[1] * (uncond.ndim - 1))
    return _fields(_blend(guider, _CFG, cond=cond, uncond=uncond), cond, uncond)


def _projected(guider: Any, given: _Given) -> dict[str, Tensor] | None:
    """APG."""
    if not _ask(guider, "_is_apg_enabled"):
        return None
    cond, uncond = _predictions(given, "pred_cond", "pred_uncond")
    if guider.adaptive_projected_guidance_norm_dim is not None:
        raise FallThroughError("its norms are over some of the dimensions only")
    return _fields(_project(guider, _APG, cond, uncond), cond, uncond)


def _projected_mix(guider: Any, given: _Given) -> dict[str, Tensor] | None:
    """CFG in the first steps, APG after them."""
    if not _ask(guider, "_is_cfg_enabled"):
        return None
    cond, uncond = _predictions(given, "pred_cond", "pred_uncond")
    if _ask(guider, "_is_apg_enabled"):
        return _fields(_project(guider, _APG_OF_MIX, cond, uncond), cond, uncond)
    pred = _blend(guider, _CFG, cond=cond, uncond=uncond)
    if guider.momentum_buffer is not None:
        guider.momentum_buffer.update(cond - uncond)
    return _fields(pred, cond, uncond)


_METHODS: dict[str, _Method] = {
    "AdaptiveProjectedGuidance": _projected,
    "AdaptiveProjectedMixGuidance": _projected_mix,
    "AutoGuidance": _pair(_CFG, "_is_ag_enabled"),
    "ClassifierFreeGuidance": _pair(_CFG, "_is_cfg_enabled"),
    "ClassifierFreeZeroStarGuidance": _zero_star,
    "MagnitudeAwareGuidance": _pair(_Spec(guidance.MagnitudeAwareCFG, alpha="alpha"), "_is_mambo_g_enabled"),
    "PerturbedAttentionGuidance": _perturbed("_is_slg_enabled", "pred_cond_skip", "skip_layer_guidance_scale"),
    "SkipLayerGuidance": _perturbed("_is_slg_enabled", "pred_cond_skip", "skip_layer_guidance_scale"),
    "SmoothedEnergyGuidance": _perturbed("_is_seg_enabled", "pred_cond_seg", "seg_guidance_scale"),
    "TangentialClassifierFreeGuidance": _pair(_Spec(guidance.TangentialCFG), "_is_tcfg_enabled"),
}


def _ask(guider: Any, name: str) -> bool:
    """What a guider's own method says."""
    return bool(getattr(guider, name)())


def _fields(pred: Tensor, cond: Tensor, uncond: Any) -> dict[str, Any]:
    return {"pred": pred, "pred_cond": cond, "pred_uncond": uncond}


def _predictions(given: _Given, *names: str) -> list[Tensor]:
    """The predictions of these names, which one blend takes."""
    found: list[Any] = [given.get(name) for name in names]
    first, with_gradients = found[0], torch.is_grad_enabled()
    for prediction in found:
        if type(prediction) is not Tensor or prediction.layout is not torch.strided:
            got = "None" if prediction is None else f"a {type(prediction).__name__}"
            raise FallThroughError(f"a prediction is {got}, expected a plain tensor")
        if prediction is not first and not _alike(prediction, first):
            raise FallThroughError("its predictions differ in shape, layout, dtype or device")
        if with_gradients and prediction.requires_grad:
            raise FallThroughError("its blend must let gradients through")
    if first.ndim < 2 or not first.numel() or first.dtype not in LOADED_DTYPES or first.is_meta:
        got = f"{first.dtype} with {first.ndim} dimensions on {first.device.type}"
        expected = "elements in 2 or more dimensions of float32, float16 or bfloat16"
        raise FallThroughError(f"its predictions are {got}, expected {expected}")
    if in_function_transform():
        raise FallThroughError("its blend must let the transforms of torch.func through")
    return found


def _alike(one: Any, other: Any) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())


def _refuse_autocast(like: Tensor) -> None:
    # Under autocast the originals' norms and products run in other dtypes.
    if torch.is_autocast_enabled(like.device.type):
        raise FallThroughError("autocast is on")


def _project(guider: Any, spec: _Spec, cond: Tensor, uncond: Tensor) -> Tensor:
    """The blend of APG, with the momentum of the guider's buffer if it has one."""
    buffer = guider.momentum_buffer
    if buffer is None:
        return _blend(guider, spec, cond=cond, uncond=uncond)
    update = buffer.update
    if update.__qualname__ != "MomentumBuffer.update" or not update.__module__.startswith("diffusers."):
        raise FallThroughError("its momentum is updated in another way")
    average, decay = buffer.running_average, _number(buffer, "momentum")
    if decay is None:
        raise FallThroughError("its momentum is None, expected a number")
    dense: dict[str, Any] = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
    if type(average) is Tensor and _alike(average, _laid_out(cond)):
        if average.requires_grad and torch.is_grad_enabled():
            raise FallThroughError("its momentum must let gradients through")
        momentum = average.detach().to(copy=True, **dense)
    elif isinstance(average, int | float) and average == 0:
        momentum = torch.zeros_like(cond, **dense)
    else:
        raise FallThroughError("its running average differs from the predictions in shape, layout, dtype or device")
    pred = _blend(guider, spec, decay, momentum, cond=cond, uncond=uncond)
    if cond.dtype == torch.float32:
        buffer.running_average = _as(cond, momentum)
    else:
        # Rounded where the original rounds, so that its errors are not added to ours.
        with torch.no_grad():
            buffer.update(cond - uncond)
    return pred


def _blend(
    guider: Any, spec: _Spec, decay: float | None = None, momentum: Tensor | None = None, **outputs: Tensor
) -> Tensor:
    """The blend of predictions by branch."""
    values = tuple([_number(guider, name) for name in spec.attributes])
    cond = outputs["cond"]
    blends = _blends(spec, values, decay, len(cond), cond.device)
    if isinstance(blends, str):
        raise FallThroughError(blends)
    if len(blends.branches(_ROW)) != len(outputs):
        raise FallThroughError("its scale leaves a prediction out")
    if blends.uses_outputs(_ROW):
        _refuse_autocast(cond)
    pred = _as(cond, blends(_ROW, outputs, momentum))
    # The original's pred_uncond comes out of a product of matrices, and what is added to it lies as it does.
    return pred.contiguous() if spec.kind is guidance.TangentialCFG and not guider.use_original_formulation else pred


@functools.lru_cache(maxsize=256)
def _blends(
    spec: _Spec, values: tuple[Any, ...], decay: float | None, batch: int, device: torch.device
) -> RowBlends | str:
    """What blends with these options, or why nothing does."""
    try:
        return RowBlends(spec.kind(**spec.options(values, decay)), _ROW + 1, batch, device)
    except (TypeError, ValueError) as error:
        return str(error)


def _laid_out(like: Tensor) -> Tensor:
    """A tensor in the layout of elementwise results for a prediction."""
    return like if like.is_contiguous() else torch.empty_like(like)


def _as(like: Tensor, result: Tensor) -> Tensor:
    """A result in the dtype and layout that the original's has for predictions like these."""
    wanted = _laid_out(like)
    if result.dtype == like.dtype and result.stride() == wanted.stride():
        return result
    return result.to(like.dtype) if wanted is like else wanted.copy_(result)


def _number(owner: Any, name: str) -> Any:
    """An attribute that is a number or None."""
    value = getattr(owner, name)
    if value is not None and not isinstance(value, _NUMBERS):
        raise FallThroughError(f"its attribute {name} is a {type(value).__name__}, expected a number")
    return value
