"""Whether an object's own step is the one that the engine would make.

The first step of a call is made by the object, with the caller's functions, and made again by the other step from what
these returned. Steps at other times are compared on random samples and outputs. Both must ask the same of the model,
draw the same and return the same, up to the rounding of their largest terms.
"""

from __future__ import annotations

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
from .recording import DifferentError, OwnStepError, RandomState, Recorder, kept, same, with_tensors
from .side_effects import Conversions, Surroundings
from .view import copied, version

_RESULT = ("sample", "pred_xstart")
_FUNCTIONS = ("model", "cond_fn", "denoised_fn")
_MOST_TIMES, _SMALL = 128, 3
# Of a step's largest terms. Measured on guided-diffusion's steps beside forks of other orders of operations: 3e-7.
_ROUNDING = 2e-6


class StepCall:
    """A call of an object's step (model, x, t, ...): its arguments by name."""

    def __init__(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.bound = signature.bind(*args, **kwargs)
        self.bound.apply_defaults()
        self.arguments = self.bound.arguments

    def get(self, name: str, default: Any = None) -> Any:
        """An argument; the default where the step has no such one."""
        return self.arguments.get(name, default)

    def made_by(self, step: Callable[..., Any], **others: Any) -> Any:
        """The result of a step with some arguments replaced."""
        bound = inspect.BoundArguments(self.bound.signature, dict(self.arguments))
        bound.arguments.update(others)
        return step(*bound.args, **bound.kwargs)

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
    attributes, kwargs, x_before = copied(vars(owner)), copied(call.get("model_kwargs")), version(x)
    before = RandomState(x.device)
    recorders = {name: Recorder(call.get(name), x.device) for name in _FUNCTIONS if name in call.arguments}
    with ExitStack() as stack:
        functions = {name: stack.enter_context(recorder.open()) for name, recorder in recorders.items()}
        try:
            result = call.made_by(own, **functions)
        except Exception as error:
            if any(recorder.failed for recorder in recorders.values()):
                raise
            raise OwnStepError(error) from error
    after = RandomState(x.device)
    problem = _problem(result, x)
    if not problem and not same(attributes, copied(vars(owner))):
        problem = "its step changes the object's attributes"
    if not problem and (version(x) != x_before or not same(kwargs, copied(call.get("model_kwargs")))):
        problem = "its step changes what it is given in place"
    if not problem and (name := around.changed()):
        problem = f"its step changes {name}, outside the object"
    if not problem and before.others != after.others:
        problem = "its step draws by other means than torch"
    return FirstStep(call, recorders, before, after, result, kept(result), problem)


def _problem(result: Any, x: Tensor) -> str:
    if type(result) is not dict or set(result) != set(_RESULT):
        said = f"{', '.join(map(str, result))}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        return f"its step returns {said}"
    for value in result.values():
        if not isinstance(value, Tensor) or value.shape != x.shape:
            return "its step returns samples of another shape"
        if value.requires_grad:
            return "its step lets gradients through"
    if result["sample"].dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
        return f"its step returns {result['sample'].dtype}"
    return ""


def check_first(first: FirstStep, other: OtherStep) -> None:
    """Make the same step by the other one. DifferentError where it does something else."""
    first.before.put_back()
    try:
        result = _replayed(first.call, first.recorders, other)
        if first.after.moved():
            raise DifferentError("its step draws other noise")
        _compare(result, first.kept, other, first.call, first.recorders["model"])
    finally:
        first.after.put_back()


def _replayed(call: StepCall, recorders: Mapping[str, Recorder], other: OtherStep) -> Mapping[str, Any]:
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


def check_times(own: Callable[..., Any], call: StepCall, given: Any, other: OtherStep, num_timesteps: int) -> None:
    """Compare the steps at other times, on random numbers. `own` is the step of a copy of the object, and `given` what
    the model returned.

    The times are the first two, the last two and two between them, with the caller's arguments, and all others where
    the step makes numbers of tensors, on which it may branch; and where these arguments have no tensors, up to 128 of
    them at once, on small samples.

    Raises:
        DifferentError: where they differ, or the own step fails.
    """
    x, last = call.get("x"), num_timesteps - 1
    state, generator = RandomState(x.device), torch.Generator().manual_seed(0)
    try:
        times = dict.fromkeys(t for t in (last, last - 1, 2 * last // 3, last // 3, 1, 0) if t >= 0)
        left = [t for t in range(num_timesteps) if t not in times]
        conversions = Conversions()

        def watched(*args: Any, **kwargs: Any) -> Any:
            with conversions:
                return own(*args, **kwargs)

        for index in (*times, *left):
            if index not in times and not conversions.seen:
                break
            t = torch.full_like(call.get("t"), index)
            _check_at(watched if index in times else own, call, other, _normals(x, generator), t, given, generator)
        shape = (min(num_timesteps, _MOST_TIMES), *x.shape[1:2], *(min(size, _SMALL) for size in x.shape[2:]))
        small = _small_outputs(given, x, shape)
        if other.any_shape and small is not None and not _has_tensors(call.others):
            t = torch.linspace(0, last, shape[0]).round().to(call.get("t"))
            many = torch.empty(shape, dtype=x.dtype, device=x.device)
            _check_at(own, call, other, _normals(many, generator), t, small, generator)
    finally:
        state.put_back()


def _check_at(
    own: Callable[..., Any],
    call: StepCall,
    other: OtherStep,
    x: Tensor,
    t: Tensor,
    given: Any,
    generator: torch.Generator,
) -> None:
    answers: dict[str, Callable[..., Any]] = {
        "model": lambda *_, **__: with_tensors(given, lambda value: _normals(value, generator)),
        "cond_fn": lambda *_, **__: _normals(x, generator),
        "denoised_fn": lambda x0, *_: 0.5 * x0 + 0.25,
    }
    recorders = {
        name: Recorder(call.get(name), x.device, answers[name]) for name in _FUNCTIONS if name in call.arguments
    }
    here = StepCall.__new__(StepCall)
    here.bound, here.arguments = call.bound, {**call.arguments, "x": x, "t": t}
    kept_x, before = x.clone(), RandomState(x.device)
    with ExitStack() as stack:
        functions = {name: stack.enter_context(recorder.open()) for name, recorder in recorders.items()}
        try:
            # A step may write into the arguments of the model, which are the caller's.
            want = here.made_by(own, **functions, model_kwargs=copied(call.get("model_kwargs"))) if (
                "model_kwargs" in call.arguments
            ) else here.made_by(own, **functions)  # fmt: skip
        except Exception as error:
            raise DifferentError(f"its step fails on an example ({type(error).__name__}: {error})") from error
    if (problem := _problem(want, x)) or not torch.equal(x, kept_x):
        raise DifferentError(problem or "its step changes what it is given in place")
    after = RandomState(x.device)
    before.put_back()
    result = _replayed(here, recorders, other)
    if after.moved():
        raise DifferentError("its step draws other noise")
    _compare(result, want, other, here, recorders["model"])


def _compare(
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


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return like
    values = torch.randn(tuple(like.shape), generator=generator, dtype=torch.float64)
    return torch.empty_like(like, requires_grad=False).copy_(values)


def _small_outputs(given: Any, x: Tensor, shape: tuple[int, ...]) -> Any:
    """What a model returned, for samples of another shape; None if that cannot be told."""
    fits = True

    def small(tensor: Tensor) -> Tensor:
        nonlocal fits
        ratios = [a / b for a, b in zip(tensor.shape, x.shape, strict=False)]
        fits = fits and tensor.ndim == x.ndim and all(ratio in (1, 2) for ratio in ratios)
        sizes = [int(size * ratio) for size, ratio in zip(shape, ratios, strict=False)]
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    made = with_tensors(given, small)
    return made if fits else None


def _has_tensors(value: Any) -> bool:
    found = []
    with_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return bool(found)
