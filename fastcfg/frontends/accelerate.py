"""`accelerate`: a drop-in for whatever object samples."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from ._fused.subclass import ORIGINAL, STATE
from ._gaussian import own
from ._gaussian.process import Process

__all__ = ["accelerate", "is_fused", "report"]

Object = TypeVar("Object")


def accelerate(obj: Object, **options: Any) -> Object:
    """A drop-in for an object that samples, with the same methods, arguments and results. The object is not changed.

    Args:
        obj: one of
            - a `GaussianDiffusion` or `SpacedDiffusion` of guided-diffusion or GLIDE: returns an object of the class of
              the same name in `fastcfg.frontends`;
            - a scheduler or guider of diffusers, or of its protocol: `fastcfg.frontends.diffusers.fuse`;
            - a sampling function, (model, x, ...) in any order: `fastcfg.frontends.k_diffusion.fuse`;
            - an object that samples with its model in it, such as CompVis' `DDIMSampler`, dpm_solver_pytorch's
              `DPM_Solver` or denoising-diffusion-pytorch's `GaussianDiffusion`: returns an object of a subclass.
        **options: for a sampling function, backend and graph as for `Sampler`; none for the others.

    Raises:
        TypeError: another object or option; where it is known, the message says what to give instead.

    Example:
        >>> diffusion = accelerate(diffusion)               # guided_diffusion.respace.SpacedDiffusion
        >>> pipeline.scheduler = accelerate(pipeline.scheduler)
        >>> sample_heun = accelerate(k_diffusion.sampling.sample_heun, graph=False)
    """
    from . import _doors, diffusers, k_diffusion

    door: Any
    known: tuple[str, ...] = ()
    if isinstance(obj, Process) or own.is_diffusion(obj):
        door = _gaussian
    elif diffusers.is_component(obj):
        door = diffusers.fuse
    elif _doors.is_function(obj):
        door, known = k_diffusion.fuse, ("backend", "graph")
    elif (door := _doors.door_of(obj)) is None:
        raise TypeError(f"obj: got {type(obj).__name__}, expected {_doors.expected(obj)}")
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


def report(accelerated: object) -> dict[str, Any]:
    """How the last call of an accelerated diffusion object's loop, or of a sampling function, ran.

    Returns:
        "run": "engine"; "stepped" (its own loop, with the engine's steps); "stepped, then the original"; or "the
        original". "reason": why not the one before. Empty before the first call.

    Raises:
        TypeError: another object.
    """
    from . import _doors

    ours = is_fused(accelerated) and not isinstance(accelerated, type)
    if ours and (own.is_diffusion(accelerated) or _doors.door_of(accelerated)) and not isinstance(accelerated, Process):
        state = getattr(accelerated, STATE, None)
        return {} if state is None else state.report()
    found = getattr(accelerated, "report", None)
    if not ours or not callable(found):
        got = type(accelerated).__name__
        raise TypeError(f"accelerated: got {got}, expected a diffusion object or sampling function of accelerate")
    return found()


def _gaussian(obj: Any) -> Any:
    return obj if isinstance(obj, Process) or is_fused(obj) else own.accelerated(obj)
