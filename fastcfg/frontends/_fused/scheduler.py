"""Subclasses of schedulers with a fused `step`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from .fall_through import FallThroughError, log_once
from .steps import FusedSteps
from .subclass import STATE, subclass


@functools.cache
def fused_class(original: type) -> type:
    """The subclass of a scheduler class."""
    base: Any = original
    step_names = list(inspect.signature(base.step).parameters)[4:]  # after self, output, timestep, sample

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        _steps_of(self, base).look(self)
        return result

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) <= len(step_names):
            options = dict(zip(step_names, args, strict=False)) | kwargs
            try:
                return _steps_of(self, base).step(self, model_output, timestep, sample, options)
            except FallThroughError as error:
                log_once(original.__name__, str(error))
        return base.step(self, model_output, timestep, sample, *args, **kwargs)

    return subclass(original, {"set_timesteps": set_timesteps, "step": step}, fused_class)


def _steps_of(scheduler: Any, original: Any) -> FusedSteps:
    steps: FusedSteps | None = vars(scheduler).get(STATE)
    if steps is None:
        steps = vars(scheduler)[STATE] = FusedSteps(original.step)
    return steps
