"""The whole state of a run under way, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from fastcfg.training.config import TrainConfig
from fastcfg.training.ema import EMA
from fastcfg.training.recipes import make_recipe
from fastcfg.utils.files import replacing

_FORMAT = "fastcfg-training-state"
# What may change on resuming, as long as the steps already made would have been the same: the run's length, while the
# learning rate does not yet fall, and the stages that lie ahead.
_LENGTH = {"steps", "decay_steps"}


def save_state(
    path: str | os.PathLike[str],
    config: TrainConfig,
    fingerprint: str,
    step: int,
    seconds: float,
    model: nn.Module,
    heads: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a run's state, whole or not at all. Random numbers need no saving: each step's depend on seed and step.

    Args:
        path: the file to write.
        config: the recipe.
        fingerprint: what identifies its data.
        step: steps made.
        seconds: time they took.
        model: the network.
        heads: the heads of its other tasks.
        ema: its average.
        optimizer: the optimizer.

    Raises:
        OSError: the file cannot be written.
    """
    state = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "fingerprint": fingerprint,
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(
    path: str | os.PathLike[str],
    config: TrainConfig,
    fingerprint: str,
    model: nn.Module,
    heads: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Restore a run's state in place.

    Args:
        path: a file that ``save_state`` wrote.
        config: the recipe to go on with: that of the state, but for its length.
        fingerprint: what identifies its data.
        model: the network.
        heads: the heads of its other tasks.
        ema: its average.
        optimizer: the optimizer.

    Returns:
        Steps made and the seconds they took.

    Raises:
        ValueError: not such a file, or of another recipe or other data.
        OSError: the file cannot be read.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != _FORMAT:
            raise KeyError("format")
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever its unpickler meets in a foreign file
        raise ValueError(
            f"resume: got {path}, which is not a training state, expected one written by fastcfg"
        ) from error
    _check_same_run(make_recipe(state["config"]), config, state["step"])
    if state.get("fingerprint", "") != fingerprint:
        raise ValueError(
            f"resume: got data that are not those of the state ({fingerprint}), expected {state.get('fingerprint')}: "
            "pictures or captions were added, removed or changed"
        )
    model.load_state_dict(state["model"])
    heads.load_state_dict(state["heads"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _check_same_run(saved: TrainConfig, config: TrainConfig, step: int) -> None:
    """Raise ValueError unless ``config`` would have led to the same state."""
    if type(saved) is not type(config):
        got, expected = type(config).__name__, type(saved).__name__
        raise ValueError(f"resume: got a {got}, expected the state's {expected}")
    starts = saved.starts() | config.starts()
    pairs = [
        tuple(dataclasses.asdict(c.at(start)) for c in (saved, config)) for start in starts if start < max(step, 1)
    ]
    other = [
        (name, new[name], old[name])
        for old, new in pairs
        for name in new
        if old[name] != new[name] and name not in _LENGTH | config.FREE
    ]
    longer = any(getattr(saved, name) != getattr(config, name) for name in _LENGTH)
    if other:
        name, got, expected = other[0]
        raise ValueError(f"resume: got a recipe with {name} = {got!r}, expected the state's {expected!r}")
    if longer and any(step > max(c.steps - c.decay_steps, 0) for c in (saved, config)):
        raise ValueError(
            f"resume: got a run of another length at step {step}, expected the state's steps = {saved.steps} and "
            f"decay_steps = {saved.decay_steps}, because the decay has begun"
        )
