"""Engine-backed equivalents of objects of the originals, which are recognised by their attributes."""

from __future__ import annotations

from typing import Any

from . import glide, guided_diffusion
from ._gaussian.schedules import make_schedule

__all__ = ["accelerate"]

_GAUSSIAN = ("betas", "num_timesteps", "alphas_cumprod", "posterior_mean_coef1")
_TYPES = ("model_mean_type", "model_var_type", "loss_type")
_SPACED = ("use_timesteps", "timestep_map", "original_num_steps")


def accelerate(obj: Any) -> glide.GaussianDiffusion | guided_diffusion.GaussianDiffusion:
    """The engine-backed equivalent of a diffusion object of guided-diffusion or GLIDE.

    Args:
        obj: their `GaussianDiffusion` or `SpacedDiffusion`. It stays as it is.

    Returns:
        An object of the class of the same name in `fastcfg.frontends`, with the same tables, methods and results.

    Raises:
        TypeError: something else.

    Example:
        >>> diffusion = accelerate(diffusion)               # guided_diffusion.respace.SpacedDiffusion
        >>> diffusion.p_sample_loop(model, (16, 3, 64, 64))
    """
    if isinstance(obj, glide.GaussianDiffusion | guided_diffusion.GaussianDiffusion):
        return obj
    if not all(hasattr(obj, name) for name in _GAUSSIAN):
        raise TypeError(
            f"obj: got {type(obj).__name__}, expected a GaussianDiffusion or SpacedDiffusion of guided-diffusion or "
            f"GLIDE (an object with {', '.join(_GAUSSIAN)})"
        )
    spaced = all(hasattr(obj, name) for name in _SPACED)
    schedule = make_schedule(obj.betas, obj.timestep_map if spaced else None, obj.original_num_steps if spaced else 0)
    module: Any = guided_diffusion if all(hasattr(obj, name) for name in _TYPES) else glide
    kind = module.SpacedDiffusion if spaced else module.GaussianDiffusion
    result: glide.GaussianDiffusion | guided_diffusion.GaussianDiffusion = kind.__new__(kind)
    result._adopt(obj, schedule)
    for name in _SPACED if spaced else ():
        setattr(result, name, getattr(obj, name))
    return result
