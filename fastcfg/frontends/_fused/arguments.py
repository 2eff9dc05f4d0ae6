"""Which arguments of a sampling function are its model, x and noise levels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...compiler.stand_ins import is_torchs
from .fall_through import FallThroughError

# What functions of this form call their model and x.
MODELS = ("model", "net", "denoiser", "model_fn", "distiller")
SAMPLES = ("x", "latents", "noise", "init", "img", "x_T", "x_init")
# And their noise levels, if they take them.
LEVELS = ("sigmas", "steps", "timesteps", "levels")
# The model of a method that has it in its object, among the arguments; no function has an argument of that name.
HELD = "the object's model"
_OTHERS = ("extra_args", "callback", "noise_sampler")


def is_sampling_function(candidate: Any) -> bool:
    """Whether a function, method or callable object takes a model and samples, by name."""
    try:
        names = set(inspect.signature(candidate).parameters)
    except (TypeError, ValueError):
        return False
    return any(name in names for name in MODELS) and any(name in names for name in SAMPLES)


def main_arguments(signature: inspect.Signature, given: Mapping[str, Any]) -> tuple[str, str, str]:
    """The names of model, x and sigmas in a call; "" for sigmas if it has none, and for x if a method draws it. Where
    they have names of their own, the model is the first argument that can be called, and x the first floating tensor of
    two dimensions or more.

    Raises:
        FallThroughError: there is no model or x.
    """
    parameters = signature.parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        raise FallThroughError("it takes any number of arguments by position")
    names = list(parameters)
    if {"model", "x", "sigmas"} <= set(names) and given.get("sigmas") is not None:
        return "model", "x", "sigmas"
    if len(names) > 2 and "x" not in names and (names[0], names[2]) == ("model", "sigmas"):
        return names[0], names[1], names[2]
    candidates = {name: value for name, value in given.items() if name not in _OTHERS}
    floating = {n: v for n, v in candidates.items() if isinstance(v, Tensor) and v.is_floating_point()}
    model = _first(MODELS, [name for name, value in candidates.items() if callable(value) and not is_torchs(value)])
    found = [name for name, value in floating.items() if value.ndim > 1]
    named = [name for name in SAMPLES if name in parameters]
    if named or (HELD in given and "shape" in parameters):  # else the function draws x, in that shape
        found = [name for name in found if name in named]
    x = _first(SAMPLES, found)
    if HELD in given:
        model = HELD
    elif not model or not x:
        raise FallThroughError(f"it is given no {'x' if model else 'model'}")
    return model, x, next((name for name in LEVELS if name in floating and floating[name].ndim == 1), "")


def _first(usual: tuple[str, ...], found: list[str]) -> str:
    return next((name for name in (*usual, *found) if name in found), "")
