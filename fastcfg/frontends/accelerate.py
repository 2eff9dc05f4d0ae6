"""`accelerate`: a drop-in for whatever object samples."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from . import glide, guided_diffusion
from ._gaussian.schedules import make_schedule

__all__ = ["accelerate"]

Object = TypeVar("Object")

_GAUSSIAN = ("betas", "num_timesteps", "alphas_cumprod", "posterior_mean_coef1")
_TYPES = ("model_mean_type", "model_var_type", "loss_type")
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

    given: Any = obj
    known: set[str] = set()
    if isinstance(given, glide.GaussianDiffusion | guided_diffusion.GaussianDiffusion):
        result = given
    elif all(hasattr(given, name) for name in _GAUSSIAN):
        result = _gaussian(given)
    elif diffusers.is_component(given):
        result = diffusers.fuse(given)
    elif callable(given) and _has_arguments(given, _SAMPLER_ARGUMENTS):
        known = {"backend", "graph"}
        result = None
    else:
        raise TypeError(
            f"obj: got {type(given).__name__}, expected a GaussianDiffusion or SpacedDiffusion of guided-diffusion or "
            "GLIDE, a scheduler or guider of diffusers' protocol, or a sampling function (model, x, sigmas, ...)"
        )
    if unknown := sorted(set(options) - known):
        expected = "backend or graph" if known else "no options"
        raise TypeError(f"options: got {', '.join(unknown)} for a {type(given).__name__}, expected {expected}")
    accelerated: Object = k_diffusion.fuse(given, **options) if known else result
    return accelerated


def _gaussian(obj: Any) -> Any:
    spaced = all(hasattr(obj, name) for name in _SPACED)
    schedule = make_schedule(obj.betas, obj.timestep_map if spaced else None, obj.original_num_steps if spaced else 0)
    module: Any = guided_diffusion if all(hasattr(obj, name) for name in _TYPES) else glide
    kind = module.SpacedDiffusion if spaced else module.GaussianDiffusion
    result = kind.__new__(kind)
    result._adopt(obj, schedule)
    for name in _SPACED if spaced else ():
        setattr(result, name, getattr(obj, name))
    return result


def _has_arguments(function: Any, names: tuple[str, ...]) -> bool:
    try:
        return set(names) <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
