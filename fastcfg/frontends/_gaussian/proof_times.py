"""An object's own steps at all times, on random numbers, beside those that the engine would make."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .proof import FUNCTIONS, DifferentError, OtherStep, StepCall, compare, problem_of, replayed
from .recording import RandomState, Recorder, kept, with_tensors
from .side_effects import Conversions
from .view import tensors_in

_SMALL = 3
_SIZES = (0.01, 100.0)  # of samples beyond the limits that a step may have


class FailedError(DifferentError):
    """An object's own step fails on an example."""


def check_times(own: Callable[..., Any], call: StepCall, given: Any, other: OtherStep, num_timesteps: int) -> None:
    """Compare the steps at other times, on random numbers. `own` is the step of a copy of the object, and `given` what
    the model returned.

    With the caller's arguments: at the first two times, the last two and two between them, the samples once a hundred
    times as large and as small; and then every time, at once on small samples where the step takes them so.

    Raises:
        DifferentError: where they differ, or the own step fails, or what it does depends on numbers in its samples.
    """
    x, last = call.get("x"), num_timesteps - 1
    state, generator = RandomState(x.device), torch.Generator().manual_seed(0)
    conversions = Conversions(tensors_in(vars(owner)) if (owner := _owner(own)) is not None else ())
    check = partial(_check_at, call=call, other=other, generator=generator)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with conversions:
            return own(*args, **kwargs)

    try:
        times = dict.fromkeys(t for t in (last, last - 1, 2 * last // 3, last // 3, 1, 0) if t >= 0)
        for index in times:
            t = torch.full_like(call.get("t"), index)
            conversions.know(t)
            check(watched, x=_normals(x, generator), t=t, given=given)
            if conversions.of_data:
                raise DifferentError(f"its step depends on numbers in its samples ({conversions.of_data})")
        for index, size in itertools.product((last, last // 3, 0), _SIZES):
            check(own, x=size * _normals(x, generator), t=torch.full_like(call.get("t"), index), given=given, size=size)
        if other.any_shape:
            left = [index for index in range(num_timesteps) if conversions.seen and index not in times]
            for index in left:
                check(own, x=_normals(x, generator), t=torch.full_like(call.get("t"), index), given=given)
            _check_all(check, own, call, given, num_timesteps, generator)
    finally:
        state.put_back()


def _check_all(
    check: Any, own: Any, call: StepCall, given: Any, num_timesteps: int, generator: torch.Generator
) -> None:
    """Compare the steps at every time: at once, or as many as the caller's batch has samples."""
    x, t = call.get("x"), torch.arange(num_timesteps, device=call.get("x").device).to(call.get("t").dtype)
    shape = (num_timesteps, *x.shape[1:2], *(min(size, _SMALL) for size in x.shape[2:]))
    small = _small_outputs(given, x, shape)
    if small is not None:
        try:
            many = torch.empty(shape, dtype=x.dtype, device=x.device)
            for size in (1.0, *_SIZES):
                check(own, x=size * _normals(many, generator), t=t, given=small, size=size)
            return
        except FailedError:
            if not _has_tensors(call.others):
                raise
    for begin in range(0, num_timesteps, len(x)):
        times = t[[min(begin + i, num_timesteps - 1) for i in range(len(x))]]
        check(own, x=_normals(x, generator), t=times, given=given)


def _owner(own: Callable[..., Any]) -> Any:
    return own.args[0] if isinstance(own, partial) and own.args else None


def _check_at(
    own: Callable[..., Any],
    call: StepCall,
    other: OtherStep,
    x: Tensor,
    t: Tensor,
    given: Any,
    generator: torch.Generator,
    size: float = 1.0,
) -> None:
    answers: dict[str, Callable[..., Any]] = {
        "model": lambda *_, **__: with_tensors(given, lambda value: _scaled(_normals(value, generator), x, size)),
        "cond_fn": lambda *_, **__: _normals(x, generator),
        "denoised_fn": lambda x0, *_: 0.5 * x0 + 0.25,
    }
    recorders = {
        name: Recorder(call.get(name), x.device, answers[name]) for name in FUNCTIONS if name in call.arguments
    }
    here = call.with_others(x=x, t=t)
    kept_x, before = x.clone(), RandomState(x.device)
    with ExitStack() as stack:
        functions = {name: stack.enter_context(recorder.open()) for name, recorder in recorders.items()}
        # A step may write into the arguments of the model, which are the caller's.
        kwargs = {name: kept(call.get(name)) for name in ("model_kwargs",) if name in call.arguments}
        try:
            want = here.made_by(own, **functions, **kwargs)
        except Exception as error:
            raise FailedError(f"its step fails on an example ({type(error).__name__}: {error})") from error
    if (problem := problem_of(want, x)) or not torch.equal(x, kept_x):
        raise DifferentError(problem or "its step changes what it is given in place")
    after = RandomState(x.device)
    before.put_back()
    result = replayed(here, recorders, other)
    if after.moved():
        raise DifferentError("its step draws other noise")
    compare(result, want, other, here, recorders["model"])


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return like
    values = torch.randn(tuple(like.shape), generator=generator, dtype=torch.float64)
    return torch.empty_like(like, requires_grad=False).copy_(values)


def _scaled(output: Tensor, x: Tensor, size: float) -> Tensor:
    """A model's output, its first half scaled alone where it has twice the channels: the others are variances."""
    dims = [dim for dim in range(x.ndim) if output.ndim == x.ndim and output.shape[dim] == 2 * x.shape[dim]]
    if size != 1.0 and output.is_floating_point():
        (output.narrow(dims[0], 0, x.shape[dims[0]]) if dims else output).mul_(size)
    return output


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
