"""A scheduler's `scale_model_input`, which divides the sample by a number: the number is kept, the division repeated.

diffusers computes it from the levels at every step, in several operations on single numbers that cost more than a fused
step of few elements. What such a call reads and changes is traced like a step; its result has the original's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import Constant, Sum, TracedStep, Write
from ...utils._torch_private import TorchDispatchMode
from .fall_through import FallThroughError
from .ready import ReadyStep, StepForms
from .steps import UNKNOWN, FusedSteps

_OPERATIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    torch.ops.aten.div.Tensor: torch.div,
    torch.ops.aten.mul.Tensor: torch.mul,
}
_MOST_FAILURES = 8


class Scaling:
    """A class's `scale_model_input` in the place of its `step`."""

    def __init__(self, base: Any) -> None:
        self.base, self.function = base, base.scale_model_input
        self.__globals__ = getattr(self.function, "__globals__", {})

    def __call__(self, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return self.function(scheduler, sample, timestep)


class FusedScaling(FusedSteps):
    """Runs the `scale_model_input` of a scheduler."""

    def __init__(self, scaling: Scaling, steps: FusedSteps) -> None:
        super().__init__(SimpleNamespace(step=scaling))
        self._scaling, self._contents = scaling, steps._contents
        self._failures = 0

    def scale(self, scheduler: Any, sample: Any, timestep: Any) -> Any:
        """What the original returns, with its changes made; `UNKNOWN`, and no change, if it must run."""
        if self._failures == _MOST_FAILURES or self._scaling.base.scale_model_input is not self._scaling.function:
            return UNKNOWN
        try:
            result = self.follow(scheduler, sample, timestep, sample, {})
            return self.step(scheduler, sample, timestep, sample, {}) if result is UNKNOWN else result
        except FallThroughError:
            self._failures += 1
            return UNKNOWN

    def _ready(
        self, forms: StepForms, traced: TracedStep, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor
    ) -> ReadyStep | str:
        sets, found = _constants(traced.writes), None
        if sets is not None and isinstance(traced.result, Sum) and not traced.draws and sample.is_cpu:
            found = self._operation(scheduler, timestep, sample)
        if found is None or sets is None:
            self._failures = _MOST_FAILURES - 1  # and this one: most return the sample
            return "it does not divide by a number"
        operation, number = found

        def program(ready: Any, state: dict[str, Any], output: Any, t: Any, x: Tensor, options: Any) -> Any:
            result = operation(x, number)
            state.update(sets)
            return result

        kind = type(scheduler)
        others = [(kind, name, value) for name, value in traced.of_class.items()]
        form: Any = SimpleNamespace(others=others, program=program)
        return ReadyStep(form, (), None)

    def _operation(
        self, scheduler: Any, timestep: Any, sample: Tensor
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor] | None:
        """The operation that scales a sample, and its number, seen in a call of the original on a copy; None if this is
        not all it does."""
        twin: Any = object.__new__(self._scaling.base)
        vars(twin).update(vars(scheduler))
        example = torch.empty_like(sample).uniform_(-2, 2, generator=torch.Generator())
        with torch.inference_mode(False), torch.no_grad():
            with _Seen(example) as seen:
                result = self._scaling.function(twin, example, timestep)
            if len(seen.calls) != 1:
                return None
            function, arguments, made = seen.calls[0]
            number, operation = arguments[-1], _OPERATIONS.get(function)
            scales = len(arguments) == 2 and arguments[0] is example and isinstance(number, Tensor) and not number.ndim
            if operation is None or not scales or made is not result:
                return None
            number = number.detach().clone()
            return (operation, number) if torch.equal(operation(example, number), result) else None


class _Seen(TorchDispatchMode):
    """Keeps the operations on a tensor: functions, arguments and results."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor, self.calls = tensor, list[tuple[Any, tuple[Any, ...], Any]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(argument is self.tensor for argument in (*args, *(kwargs or {}).values())):
            self.calls.append((function, () if kwargs else tuple(args), result))
        return result


def _constants(writes: Sequence[Write]) -> dict[str, Any] | None:
    """The new values of attributes that are given nothing but constants; None where more is changed."""
    found: dict[str, Any] = {}
    for write in writes:
        if write.how != "set" or len(write.source) != 2 or not isinstance(write.part, Constant):
            return None
        found[write.source[1]] = write.part.value
    return found
