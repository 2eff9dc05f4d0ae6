"""`accelerate`: a drop-in for whatever object samples."""

from __future__ import annotations

import enum
import inspect
from typing import Any, TypeVar

from . import glide, guided_diffusion
from ._fused.subclass import ORIGINAL
from ._gaussian.process import Process
from ._gaussian.schedules import make_schedule

__all__ = ["accelerate", "is_fused"]

Object = TypeVar("Object")

_GAUSSIAN = ("betas", "num_timesteps", "alphas_cumprod", "posterior_mean_coef1")
_TYPES: dict[str, type[enum.Enum]] = {
    "model_mean_type": guided_diffusion.ModelMeanType,
    "model_var_type": guided_diffusion.ModelVarType,
    "loss_type": guided_diffusion.LossType,
}
_SPACED = ("use_timesteps", "timestep_map", "original_num_steps")
_SAMPLER_ARGUMENTS = ("model", "x", "sigmas")


def accelerate(obj: Object, **options: Any) -> Object:
    """A drop-in for an object that samples, with the same methods, arguments and results. The object is not changed.

    Args:
        obj: one of
            - a `GaussianDiffusion` or `SpacedDiffusion` of guided-diffusion or GLIDE: returns an object of the class of
              the same name in `fastcfg.frontends`;
            - a scheduler or guider of diffusers, or of its protocol: `fastcfg.frontends.diffusers.fuse`;
            - a sampling function of k-diffusion's form, (model, x, sigmas, ...): `fastcfg.frontends.k_diffusion.fuse`.
        **options: for a sampling function, backend and graph as for `Sampler`; none for the others.

    Raises:
        TypeError: another object or option.

    Example:
        >>> diffusion = accelerate(diffusion)               # guided_diffusion.respace.SpacedDiffusion
        >>> pipeline.scheduler = accelerate(pipeline.scheduler)
        >>> sample_heun = accelerate(k_diffusion.sampling.sample_heun, graph=False)
    """
    from . import diffusers, k_diffusion

    door: Any
    known: tuple[str, ...] = ()
    if all(hasattr(obj, name) for name in _GAUSSIAN):
        door = _gaussian
    elif diffusers.is_component(obj):
        door = diffusers.fuse
    elif callable(obj) and _has_arguments(obj, _SAMPLER_ARGUMENTS):
        door, known = k_diffusion.fuse, ("backend", "graph")
    else:
        raise _unknown(type(obj).__name__)
    if unknown := sorted(set(options) - set(known)):
        expected = " or ".join(known) or "none"
        raise TypeError(f"options: got {', '.join(unknown)} for a {type(obj).__name__}, expected {expected}")
    accelerated: Object = door(obj, **options)
    return accelerated


def is_fused(obj: object) -> bool:
    """Whether an object, class or function is a drop-in such as `accelerate` returns.

    Example:
        >>> sample = lambda model, x, sigmas: x
        >>> is_fused(sample), is_fused(accelerate(sample))
        (False, True)
    """
    kind = obj if isinstance(obj, type) else type(obj)
    return issubclass(kind, Process) or inspect.getattr_static(obj, ORIGINAL, None) is not None


def _unknown(got: str) -> TypeError:
    return TypeError(
        f"obj: got {got}, expected a GaussianDiffusion or SpacedDiffusion of guided-diffusion or GLIDE, "
        "a scheduler or guider of diffusers' protocol, or a sampling function (model, x, sigmas, ...)"
    )


def _gaussian(obj: Any) -> Any:
    if isinstance(obj, Process):
        return obj
    spaced, typed = (all(hasattr(obj, name) for name in names) for names in (_SPACED, _TYPES))
    module: Any = guided_diffusion if typed else glide
    kind = module.SpacedDiffusion if spaced else module.GaussianDiffusion
    options = {name: getattr(obj, name) for name in _TYPES} if typed else {}
    for name, value in options.items():
        # point-e's are strings, and other projects have further ones.
        known = _TYPES[name].__members__
        if getattr(value, "name", None) not in known:
            raise _unknown(f"{type(obj).__name__} with {name} {value!r} (not one of {', '.join(known)})")
    if typed and not hasattr(obj, "rescale_timesteps"):
        raise _unknown(f"{type(obj).__name__} without rescale_timesteps")
    options |= {"rescale_timesteps": obj.rescale_timesteps} if typed else {}
    result = kind.__new__(kind)
    module.GaussianDiffusion.__init__(result, betas=obj.betas, **options)
    if spaced:
        result._set_schedule(make_schedule(obj.betas, obj.timestep_map, obj.original_num_steps))
        for name in _SPACED:
            setattr(result, name, getattr(obj, name))
    return result


def _has_arguments(function: Any, names: tuple[str, ...]) -> bool:
    try:
        return set(names) <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
