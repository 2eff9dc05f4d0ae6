"""Whether an object's own step is the one that the engine would make.

The first step of a call is made by the object, with the caller's functions, and made again by the other step from what
these returned. Steps at other times are compared on random samples and outputs. Both must ask the same of the model,
draw the same and return the same, up to the rounding of their largest terms.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...engine.model_output import output_tensor
from .loops import Orders, memory_order
from .manner import USUAL, Manner, called, manner_of
from .recording import DifferentError, OwnStepError, RandomState, Recorder, kept
from .side_effects import Surroundings
from .view import Contents, version

_RESULT = ("sample", "pred_xstart")
FUNCTIONS = ("model", "cond_fn", "denoised_fn")
# Of a step's largest terms. Measured on guided-diffusion's steps beside forks of other orders of operations: 3e-7.
_ROUNDING = 2e-6


class StepCall:
    """A call of an object's step (model, x, t, ...): its arguments by name."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        given = list(bound.arguments)
        bound.apply_defaults()
        self.arguments: Mapping[str, Any] = bound.arguments
        self._by_position, self._by_name = given[: len(args)], given[len(args) :]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument; the default where the step has no such one."""
        return self.arguments.get(name, default)

    def with_others(self, **others: Any) -> StepCall:
        """The call with some arguments replaced."""
        twin = copy.copy(self)
        twin.arguments = {**self.arguments, **others}
        return twin

    def made_by(self, step: Callable[..., Any], **others: Any) -> Any:
        """The result of a step with some arguments replaced: given by position or by name as they were."""
        values = {**self.arguments, **others}
        more = [name for name, value in others.items() if value is not self.arguments.get(name)]
        named = {name: values[name] for name in (*self._by_name, *more) if name not in self._by_position}
        return step(*(values[name] for name in self._by_position), **named)

    @property
    def others(self) -> dict[str, Any]:
        """The arguments but for x and t."""
        return {name: value for name, value in self.arguments.items() if name not in ("x", "t")}


@dataclass(frozen=True, eq=False)
class OtherStep:
    """The step that an object's own is compared with.

    Attributes:
        make: called with the own step's arguments by name, and the functions to ask; returns sample and pred_xstart.
        terms: [T], the size of the largest terms of these results, in those of the state and the model's output.
        any_shape: whether it takes samples of another shape than the call's, at different times.
        manner: how the own step calls the model.
    """

    make: Callable[..., Mapping[str, Any]]
    terms: Mapping[str, NDArray[np.float64]]
    any_shape: bool = True
    manner: Manner = USUAL


@dataclass(frozen=True, eq=False)
class FirstStep:
    """A step that the object made.

    Attributes:
        call: with the caller's own functions.
        recorders: what was asked of these, by name.
        before, after: the generators.
        result: what the step returned; `kept` is a copy.
        problem: why no other step can be like it; empty if one may.
    """

    call: StepCall
    recorders: Mapping[str, Recorder]
    before: RandomState
    after: RandomState
    result: Any
    kept: Any
    problem: str

    @property
    def manners(self) -> list[Manner]:
        """How it may have called the model: as guided-diffusion's does, and as it looks."""
        asked, call = self.recorders["model"].calls, self.call
        if len(asked) != 1:
            return [USUAL]
        seen = manner_of(asked[0].args, asked[0].kwargs, call.get("model_kwargs") or {}, call.get("x"))
        return list(dict.fromkeys((USUAL, seen)))

    @property
    def orders(self) -> Orders:
        """The memory orders of the model's output, and of the sample and x0 made of it."""
        sample, x0 = (memory_order(self.kept[name]) for name in _RESULT)
        return memory_order(_output(self.recorders["model"])), sample, x0


def make_first(own: Callable[..., Any], call: StepCall, owner: Any, around: Surroundings) -> FirstStep:
    """Make a step of an object, as its caller would; `around` is what its code refers to. Raises `OwnStepError` where
    the step itself fails."""
    x: Tensor = call.get("x")
    attributes, given, x_before = Contents(vars(owner)), Contents(call.others), version(x)
    before = RandomState(x.device)
    recorders = {name: Recorder(call.get(name), x.device) for name in FUNCTIONS if name in call.arguments}
    with ExitStack() as stack:
        functions = {name: stack.enter_context(recorder.open()) for name, recorder in recorders.items()}
        try:
            result = call.made_by(own, **functions)
        except Exception as error:
            if any(recorder.failed for recorder in recorders.values()):
                raise
            raise OwnStepError(error) from error
    after = RandomState(x.device)
    problem = problem_of(result, x)
    if not problem and not attributes.is_current(vars(owner)):
        problem = "its step changes the object's attributes"
    if not problem and (version(x) != x_before or not given.is_current(call.others)):
        problem = "its step changes what it is given in place"
    if not problem and (name := around.changed()):
        problem = f"its step changes {name}, outside the object"
    if not problem and before.others != after.others:
        problem = "its step draws by other means than torch"
    if not problem and (drawing := [name for name, recorder in recorders.items() if recorder.draws]):
        # The engine would find out after its first row, and ask them again.
        problem = f"its {drawing[0]} draws random numbers"
    return FirstStep(call, recorders, before, after, result, kept(result), problem)


def problem_of(result: Any, x: Tensor) -> str:
    if type(result) is not dict or set(result) != set(_RESULT):
        said = f"{', '.join(map(str, result))}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        return f"its step returns {said}"
    for value in result.values():
        if not isinstance(value, Tensor) or value.shape != x.shape:
            return "its step returns samples of another shape"
        if value.requires_grad:
            return "its step lets gradients through"
        if value.dtype != result["sample"].dtype:
            return f"its step returns {value.dtype} and {result['sample'].dtype}"
    if result["sample"].dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
        return f"its step returns {result['sample'].dtype}"
    return ""


def check_first(first: FirstStep, other: OtherStep) -> None:
    """Make the same step by the other one. DifferentError where it does something else."""
    first.before.put_back()
    try:
        result = replayed(first.call, first.recorders, other)
        if first.after.moved():
            raise DifferentError("its step draws other noise")
        compare(result, first.kept, other, first.call, first.recorders["model"])
    finally:
        first.after.put_back()


def replayed(call: StepCall, recorders: Mapping[str, Recorder], other: OtherStep) -> Mapping[str, Any]:
    """The other step, of functions that answer as recorded."""
    answers = {
        name: recorder.replay({"model": "the model"}.get(name, name), output_tensor if name == "model" else _as_it_is)
        for name, recorder in recorders.items()
    }
    asked = recorders["model"].calls
    if len(asked) != 1:
        raise DifferentError(f"its step calls the model {len(asked)} times")
    answers["model"] = called(answers["model"], other.manner)
    return other.make(**{**call.arguments, **answers})


def _as_it_is(value: Any) -> Any:
    return value


def _output(model: Recorder) -> Tensor:
    return output_tensor(model.calls[0].returned)


def compare(
    result: Mapping[str, Any], want: Mapping[str, Any], other: OtherStep, call: StepCall, model: Recorder
) -> None:
    given = max(float(value.abs().max()) for value in (call.get("x"), _output(model)))
    times = call.get("t").cpu().numpy()
    for name in _RESULT:
        got, wanted = (value[name].double().flatten(1) for value in (result, want))
        terms = torch.from_numpy(other.terms[name][times] * given).to(wanted.device)
        slack = _ROUNDING * (wanted.abs().amax(dim=1) + terms)
        near = (got - wanted).abs() <= slack[:, None]
        if not bool((near | (got == wanted) | (got.isnan() & wanted.isnan())).all()):
            raise DifferentError(f"its step returns another {name}")
