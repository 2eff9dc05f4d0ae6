"""Read another project's diffusion object: its schedule, what its model predicts, its variance and its times."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import numpy as np
from torch import Tensor

from ...reference import originals
from .process import Process, SpacedProcess
from .schedules import make_schedule

# Attributes by which guided-diffusion's descendants say what they are. GLIDE's have none.
_TYPES = ("model_mean_type", "model_var_type", "loss_type")
_SPACED = ("timestep_map", "original_num_steps")
_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "noise", "prednoise", "predepsilon"), "epsilon"),
    **dict.fromkeys(("startx", "xstart", "x0", "predx0", "predxstart"), "x0"),
    **dict.fromkeys(("previousx", "xprevious", "xprev", "prevx"), "previous_x"),
}
_VARIANCES = {name.replace("_", ""): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")}
_ANY = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
# What a step is called with, in any order.
_STEP_ARGUMENTS = {"model", "x", "t"}
STEPS = {"p_sample": "ddpm", "ddim_sample": "ddim", "ddim_reverse_sample": "ddim_reverse"}
# The loops, and the step that each repeats.
LOOPS = {
    "p_sample_loop": "p_sample",
    "p_sample_loop_progressive": "p_sample",
    "ddim_sample_loop": "ddim_sample",
    "ddim_sample_loop_progressive": "ddim_sample",
    "ddim_reverse_sample_loop": "ddim_reverse_sample",
}


class UnreadError(ValueError):
    """An object is no process that the solvers know; the message says why."""


class Twin(Process):
    """The process that an object's attributes describe."""

    _takes_tuples = True

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return originals.predict_xstart_from_xprev(self._arrays(), x_t, t, xprev)


class SpacedTwin(SpacedProcess, Twin):
    """The same, of the kept steps of another process."""


def is_diffusion(candidate: Any) -> bool:
    """Whether an object has betas and steps (model, x, t, ...) such as guided-diffusion's."""
    kind = type(candidate)
    return hasattr(candidate, "betas") and hasattr(candidate, "num_timesteps") and any(own_steps(kind))


def own_steps(kind: Any) -> list[str]:
    """The names of a class's steps."""
    return [name for name in STEPS if step_signature(kind, name) is not None]


@functools.cache
def step_signature(kind: Any, name: str) -> inspect.Signature | None:
    """The arguments of a class's step but for the object; None if it has no such step. One that takes any arguments has
    also those of the one that it overrides."""
    found: list[inspect.Parameter] = []
    by_name = False
    for base in kind.__mro__:
        if not (parameters := _parameters(vars(base).get(name))[1:]):
            continue
        kinds = {parameter.kind for parameter in parameters}
        known = {parameter.name for parameter in found}
        for parameter in parameters:
            if parameter.name not in known and parameter.kind not in _ANY:
                found.append(parameter.replace(kind=parameter.KEYWORD_ONLY) if by_name else parameter)
        by_name = by_name or inspect.Parameter.VAR_POSITIONAL not in kinds
        if not kinds & _ANY:
            break
    if not {parameter.name for parameter in found} >= _STEP_ARGUMENTS:
        return None
    return inspect.Signature(sorted(found, key=lambda parameter: parameter.kind))


def twin_of(diffusion: Any) -> Process:
    """The process with an object's betas, respacing and types, whatever spelling these have. Absent types are GLIDE's
    where all three are, and absent `rescale_timesteps` is False.

    Raises:
        UnreadError: types of another kind, or betas that are no process.
    """
    spaced = all(hasattr(diffusion, name) for name in _SPACED)
    twin: Process = object.__new__(SpacedTwin if spaced else Twin)
    attributes: dict[str, Any] = vars(twin)
    if any(hasattr(diffusion, name) for name in _TYPES):
        attributes["_prediction"] = _known(diffusion, "model_mean_type", _PREDICTIONS)
        attributes["_variance"] = _known(diffusion, "model_var_type", _VARIANCES)
        attributes["_rescale"] = bool(getattr(diffusion, "rescale_timesteps", False))
    betas = diffusion.betas
    betas = betas.detach().cpu().numpy() if isinstance(betas, Tensor) else betas
    try:
        betas = np.array(betas, dtype=np.float64)
        kept = (list(diffusion.timestep_map), int(diffusion.original_num_steps)) if spaced else (None, 0)
        twin._set_schedule(make_schedule(betas, *kept))
    except (TypeError, ValueError, IndexError) as error:
        raise UnreadError(f"its betas are no process ({error})") from None
    if twin.num_timesteps != diffusion.num_timesteps:
        raise UnreadError(f"it has {twin.num_timesteps} betas for {diffusion.num_timesteps} timesteps")
    if spaced:
        vars(twin).update(timestep_map=kept[0], original_num_steps=kept[1])
    return twin


class _Type(str):
    """A type that is a string, with the name that guided-diffusion's has."""

    @property
    def name(self) -> str:
        """Its name."""
        plain = "".join(filter(str.isalnum, self)).lower()
        known = {"epsilon": "EPSILON", "x0": "START_X", "previous_x": "PREVIOUS_X"}
        return known.get(_PREDICTIONS.get(plain, ""), _VARIANCES.get(plain, self).upper())


def named_types(diffusion: Any) -> Any:
    """An object whose types have names: itself, or a copy with the strings it has replaced."""
    strings = {name: value for name in _TYPES if type(value := getattr(diffusion, name, None)) is str}
    if not strings:
        return diffusion
    named = copy.copy(diffusion)
    vars(named).update({name: _Type(value) for name, value in strings.items()})
    return named


def _known(diffusion: Any, attribute: str, names: dict[str, str]) -> str:
    value = getattr(diffusion, attribute, None)
    said = str(getattr(value, "name", value))
    plain = "".join(filter(str.isalnum, said)).lower()
    if plain not in names:
        raise UnreadError(f"its {attribute} is {said}")
    return names[plain]


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
