"""The state of an unfinished run, complete enough that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..utils.files import replacing
from .config import TrainConfig
from .recipes import make_recipe

_FORMAT = "fastcfg-training-state"
# The length of a run may change on resuming, as long as the learning rate has not begun to fall.
_LENGTH = {"steps", "decay_steps"}


def save_state(
    path: str | os.PathLike[str],
    config: TrainConfig,
    fingerprint: str,
    step: int,
    seconds: float,
    parts: Mapping[str, Any],
) -> None:
    """Write a run's state, whole or not at all. Random numbers are not saved: they depend on seed and step only.

    `fingerprint` identifies the run's data; `step` and `seconds` are the number of steps made and the time they took;
    `parts` are objects with `state_dict` and `load_state_dict`, by name.
    """
    state: dict[str, Any] = {"format": _FORMAT, "config": dataclasses.asdict(config), "fingerprint": fingerprint}
    state |= {"step": step, "seconds": seconds, **{name: part.state_dict() for name, part in parts.items()}}
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(
    path: str | os.PathLike[str], config: TrainConfig, fingerprint: str, parts: Mapping[str, Any]
) -> tuple[int, float]:
    """Restore a run's state in place; returns the number of steps made and the seconds they took.

    Arguments as for `save_state`; ValueError if that did not write the file, for another recipe (apart from its length)
    or other data.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise KeyError("format")
    except OSError:
        raise
    except Exception as error:  # torch.load passes on any exception of its unpickler
        problem = f"resume: got {path}, which is not a training state, expected one written by fastcfg"
        raise ValueError(problem) from error
    _check_same_run(make_recipe(state["config"]), config, state["step"])
    if (saved := state.get("fingerprint", "")) != fingerprint:
        why = "pictures or captions were added, removed or changed"
        raise ValueError(f"resume: got data of {fingerprint}, expected the state's {saved}: {why}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["seconds"]


def _check_same_run(saved: TrainConfig, config: TrainConfig, step: int) -> None:
    """Raise ValueError unless `config` would have led to the same state."""
    if type(saved) is not type(config):
        got, expected = type(config).__name__, type(saved).__name__
        raise ValueError(f"resume: got a {got}, expected the state's {expected}")
    for start in {start for start in saved.starts() | config.starts() if start < max(step, 1)}:
        old, new = dataclasses.asdict(saved.at(start)), dataclasses.asdict(config.at(start))
        for name in new:
            if old[name] != new[name] and name not in _LENGTH | config.FREE:
                got, expected = f"a recipe with {name} = {new[name]!r}", f"the state's {old[name]!r}"
                raise ValueError(f"resume: got {got}, expected {expected}")
    longer = any(getattr(saved, name) != getattr(config, name) for name in _LENGTH)
    if longer and any(step > max(c.steps - c.decay_steps, 0) for c in (saved, config)):
        expected = f"the state's steps = {saved.steps} and decay_steps = {saved.decay_steps}"
        got = f"a run of another length at step {step}"
        raise ValueError(f"resume: got {got}, expected {expected}, because the decay has begun")
