"""Subclasses of schedulers with `step` run by a compiled table."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

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
        before: FusedSteps | None = vars(self).pop(STATE, None)
        result = base.set_timesteps(self, *args, **kwargs)
        try:
            _steps_of(self, before.options if before is not None else {}).compile(before)
        except FallThroughError as error:
            log_once(original.__name__, str(error))
        return result

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = dict(zip(step_names, args, strict=False)) | kwargs
        if getattr(self, "num_inference_steps", 0) is not None and hasattr(self, "timesteps"):
            try:
                return _steps_of(self).step(model_output, timestep, sample, options)
            except FallThroughError as error:
                log_once(original.__name__, str(error))
        return base.step(self, model_output, timestep, sample, *args, **kwargs)

    names: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    if hasattr(base, "scale_model_input"):

        @functools.wraps(base.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            try:
                return _steps_of(self).scale(sample, args[0] if args else kwargs.get("timestep"))
            except FallThroughError:
                return base.scale_model_input(self, sample, *args, **kwargs)

        names["scale_model_input"] = scale_model_input

    return subclass(original, names, fused_class)


def _steps_of(scheduler: Any, options: Mapping[str, Any] | None = None) -> FusedSteps:
    steps: FusedSteps | None = vars(scheduler).get(STATE)
    if steps is None or steps.timesteps is not scheduler.timesteps:
        steps = FusedSteps(scheduler, type(scheduler)._fastcfg_original, options or {})
        vars(scheduler)[STATE] = steps
    return steps
