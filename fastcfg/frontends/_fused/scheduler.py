"""Subclasses of schedulers with a fused `step`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .fall_through import FallThroughError, log_once
from .scaling import FusedScaling, Scaling
from .steps import UNKNOWN, FusedSteps
from .subclass import STATE, subclass


@functools.cache
def fused_class(original: type) -> type:
    """The subclass of a scheduler class."""
    base: Any = original
    names = list(inspect.signature(base.step).parameters)[1:]
    scaling = Scaling(base) if hasattr(base, "scale_model_input") else None
    in_order = names[1:3] == ["timestep", "sample"]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.set_timesteps(self, *args, **kwargs)
        steps = _steps_of(self, base)
        steps.look(self)
        if scaling is not None:
            if steps.scaling is None:
                steps.scaling = FusedScaling(scaling, steps)
            steps.scaling.last = None
        return result

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) <= len(names):
            steps = _steps_of(self, base)
            try:
                if in_order and len(args) == 3:
                    options = kwargs
                    output, timestep, sample = args
                else:
                    options = dict(zip(names, args, strict=False)) | kwargs
                    output, timestep, sample = (options.pop(name, None) for name in (names[0], "timestep", "sample"))
                result = steps.follow(self, output, timestep, sample, options)
                return steps.step(self, output, timestep, sample, options) if result is UNKNOWN else result
            except FallThroughError as error:
                log_once(original.__name__, str(error))
        return base.step(self, *args, **kwargs)

    methods: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    if hasattr(base, "scale_model_input"):

        @functools.wraps(base.scale_model_input)
        def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                steps = _steps_of(self, base)
                if len(args) == 1 and not kwargs and steps.scaling is not None:
                    result = steps.scaling.scale(self, sample, args[0])
                    if result is not UNKNOWN:
                        return result
                steps.find_index(self, args[0] if args else kwargs.get("timestep"))
            return base.scale_model_input(self, sample, *args, **kwargs)

        methods["scale_model_input"] = scale_model_input
    return subclass(original, methods, fused_class)


def _steps_of(scheduler: Any, original: Any) -> FusedSteps:
    steps: FusedSteps | None = getattr(scheduler, STATE, None)
    if steps is None:
        steps = FusedSteps(original)
        setattr(scheduler, STATE, steps)
    return steps
