"""What `accelerate` does with objects and functions that are neither a diffusion of guided-diffusion's form nor
diffusers' nor k-diffusion's: by interface, a door or what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ._fused.arguments import is_sampling_function
from ._fused.held import accelerated, model_name

# Of modules that have their network in them.
_LOOPS = ("p_sample_loop", "ddim_sample")

# What an object looks like, by what its class and itself have, and what to do with it. The first that fits.
_INSTEAD = (
    (("sample_ode", "sample_sde"), "the function that it makes: fastcfg.accelerate(sampler.sample_ode())"),
    (("apply_model", "num_timesteps"), "a sampler of it: fastcfg.accelerate(DDIMSampler(model))"),
    (("denoiser", "sampler", "first_stage_model"), "its sampler: engine.sampler = fastcfg.accelerate(engine.sampler)"),
    (
        ("denoise", "sigma_data", "sigma_max"),
        "a sampling function: fastcfg.accelerate(sample_heun), with a model that calls its denoise",
    ),
    (("super_resolution", "denoise_fn"), "fastcfg.Sampler with fastcfg.solvers.ddpm and a model that has its image"),
    (("round_sigma",), "its sampling function: fastcfg.accelerate(edm_sampler)"),
)
_LOOPS_WITH_MODEL = ("ddim_sample_loop", "p_sample_loop", "sample_loop", "sample")
_GENERAL = (
    "a diffusion of guided-diffusion's form, a scheduler or guider of diffusers' protocol, a sampling function (model, "
    "x, ...), or an object that samples with the model in it"
)


def door_of(obj: Any) -> Callable[..., Any] | None:
    """What makes a drop-in of an object; None if nothing does."""
    if isinstance(obj, type) or inspect.isroutine(obj):
        return None
    held = model_name(obj)
    if held and hasattr(type(obj), "sample") and (held != "model" or not isinstance(obj, nn.Module)):
        return lambda given: accelerated(given, ("sample",))
    methods = tuple(name for name in _LOOPS if _takes_shape(getattr(type(obj), name, None)))
    if isinstance(obj, nn.Module) and held and methods:
        return lambda given: accelerated(given, methods)
    return None


def _takes_shape(method: Any) -> bool:
    """Whether a method is a loop that draws its start itself, in a shape that it is given."""
    names = list(inspect.signature(method).parameters) if inspect.isfunction(method) else []
    return "shape" in names and "model" not in names


def is_function(obj: Any) -> bool:
    """Whether an object is a function, method or callable object that takes a model and samples."""
    return callable(obj) and not isinstance(obj, type | nn.Module) and is_sampling_function(obj)


def expected(obj: Any) -> str:
    """What `accelerate` takes, for a TypeError that names what to do with an object that it does not."""
    for attributes, instead in _INSTEAD:
        if not isinstance(obj, type) and all(hasattr(obj, name) for name in attributes):
            return f"{instead} (docs/descendants.md)"
    for name in _LOOPS_WITH_MODEL:
        if not isinstance(obj, type) and is_function(getattr(obj, name, None)):
            return f"its sampling method: fastcfg.accelerate(obj.{name}) (docs/descendants.md)"
    return _GENERAL
