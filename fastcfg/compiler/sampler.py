"""`compile_sampler`: the table of a function of k-diffusion's form, `sample_*(model, x, sigmas, ...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..table import StepTable
from .assembly import Compiled, columns, refused, verify, with_rounding
from .patching import drawing, in_float64
from .probe import MAX_DRAWS, Recording, Response, basis_vector, normal_sample
from .reduction import reduce

__all__ = ["compile_sampler", "trace_sampler"]

_MAX_CALLS = 3  # of the model, per step
_LEAST = 64  # calls and draws always allowed in a run


def compile_sampler(sample_fn: Callable[..., Tensor], sigmas: ArrayLike | Tensor, **options: Any) -> StepTable:
    """The table of a sampling function, with the arguments its user gives it: one row per model call.

    The table's model is the function's: a denoiser D(x, sigma), called with float times. Its state starts as the first
    model input: x with deviation `sigmas[0]` plus noise the function adds before (churn in the first step); their
    joint deviation is the table's initial_scale. A table has one draw of noise per row; `trace_sampler` also returns
    the function's own draws, which make the images of its seeds.

    Args:
        sample_fn: called as sample_fn(model, x, sigmas, **options). `disable`, `callback` and `noise_sampler` are
            supplied if it takes them.
        sigmas: noise levels, the last usually 0.
        **options: such as eta, s_churn, order, solver_type.

    Raises:
        TypeError: sample_fn is not callable.
        ValueError: its steps are not linear, need more than three saved tensors, or the table does not reproduce them.

    Example:
        >>> from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m
        >>> table = compile_sampler(sample_dpmpp_2m, get_sigmas_karras(20, 0.03, 14.6))
    """
    return trace_sampler(sample_fn, sigmas, **options).table


def trace_sampler(sample_fn: Callable[..., Tensor], sigmas: ArrayLike | Tensor, **options: Any) -> Compiled:
    """`compile_sampler` with the function's draws of noise; same arguments and exceptions."""
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    try:
        levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sigmas: got {sigmas!r}, expected numbers") from error
    if levels.ndim != 1 or len(levels) < 2 or not (levels[:-1] > 0).all():
        raise ValueError(f"sigmas: got {levels.tolist()}, expected positive levels, of which the last may be 0")
    name = getattr(sample_fn, "__name__", type(sample_fn).__name__)
    what = f"sample_fn: got {name}"
    with refused(what):
        long, short = (_respond(sample_fn, levels, options, length) for length in (1.0, 0.3))
    if not long.times:
        raise ValueError(f"{what}, which calls no model, expected linear steps")
    if len(short.times) != len(long.times):
        raise ValueError(f"{what} with model calls that depend on the samples, expected linear steps")
    (response, start, start_draws), (shorter, _, _) = long.response(1.0), short.response(0.3)
    response = with_rounding(response, shorter, what)
    initial_scale = math.hypot(start * float(levels[0]), *start_draws)
    rows, ones = reduce(response, clipped=False, start=initial_scale), np.ones(response.calls)
    table = StepTable.from_columns(
        t=response.times,
        integer_time=False,
        initial_scale=initial_scale,
        steps=long.steps(),
        name=name,
        **columns(rows, 0 * ones, ones),
    )
    generator = torch.Generator().manual_seed(0)
    trial = _Recording(*[lambda _: normal_sample(generator)] * 2)
    trial.run(sample_fn, normal_sample(generator) * initial_scale, levels, options)
    if len(trial.times) != len(table):
        raise ValueError(f"{what} with model calls that depend on the samples, expected linear steps")
    verify(table, rows.draws, trial, None, response.rounding, what)
    return Compiled(table, rows.draws, start, start_draws)


def taken_by(sample_fn: Callable[..., Tensor], **offered: Any) -> dict[str, Any]:
    """The arguments that a function has."""
    known = inspect.signature(sample_fn).parameters
    return {name: value for name, value in offered.items() if name in known}


class _Recording(Recording):
    """A recorded run of a sampling function, with the model's outputs and the draws returned by number.

    States are the model's inputs and the result; `drawn` begins with the draws before the first model call. `times` are
    the model's, and `callbacks` the number of model calls before every callback.
    """

    def __init__(self, output: Callable[[int], Tensor], noise: Callable[[int], Tensor]) -> None:
        super().__init__(drawn=[[]])
        self._output, self._noise = output, noise
        self.times: list[float] = []
        self.callbacks: list[int] = []

    def run(self, sample_fn: Callable[..., Tensor], x: Tensor, sigmas: Tensor, options: dict[str, Any]) -> _Recording:
        offered: dict[str, Any] = {"disable": True, "callback": lambda _: self.callbacks.append(len(self.times))}
        given = taken_by(sample_fn, noise_sampler=lambda *_: self._draw(None), **offered) | options
        with drawing(sample_fn, self._draw), in_float64(), torch.no_grad():
            self.states.append(sample_fn(self._model, x, sigmas, **given).double())
        return self

    def _model(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        self.states.append(x.double())
        self.times.append(float(sigma.flatten()[0]))
        self.outputs.append(self._output(len(self.outputs)))
        self.drawn.append([])
        return self.outputs[-1]

    def _draw(self, _: Tensor | None) -> Tensor:
        self.drawn[-1].append(self._noise(sum(map(len, self.drawn))))
        return self.drawn[-1][-1]

    def steps(self) -> list[int]:
        """The step of every call. A step's first call is followed by its callback; its other calls come after it."""
        calls, done = range(len(self.times)), self.callbacks
        return [sum(n <= call for n in done) - (call + 1 not in done) if done else call for call in calls]

    def response(self, length: float) -> tuple[Response, float, tuple[float, ...]]:
        """The response of a run on basis vectors from its first model input on, and what that input consists of: the
        share of x and the coefficients of the draws before it."""
        states = torch.stack([state.reshape(-1) for state in self.states]).numpy() / length
        counts, calls = np.cumsum([len(drawn) for drawn in self.drawn]), len(self.times)
        early = slice(1 + calls, 1 + calls + counts[0])
        start, added = float(states[0, 0]), states[0, early]
        if not start:
            raise ValueError("sample_fn: got a first model input that lacks x, expected one that contains it")
        states[:, 0] /= start
        if np.abs(states[:, early] - np.outer(states[:, 0], added)).max(initial=0.0) > 1e-9 * np.abs(states).max():
            raise ValueError(
                "sample_fn: got one that reuses the noise drawn before its first model call, expected fresh draws"
            )
        states = np.delete(states, early, axis=1)
        outputs = np.eye(states.shape[1])[1 : 1 + calls]
        drawn = tuple((counts - counts[0]).tolist())
        response = Response(states, states[:-1], np.array(self.times), False, drawn, outputs)
        return response, start, tuple(added.tolist())


def _respond(sample_fn: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any], length: float) -> _Recording:
    """A recording on basis vectors."""
    calls, draws = (max(most * len(sigmas), _LEAST) for most in (_MAX_CALLS, MAX_DRAWS))
    size = 1 + calls + draws

    def vector(index: int, first: int, most: int, what: str) -> Tensor:
        if index >= most:
            raise ValueError(f"sample_fn: got more than {most} {what}, expected at most that")
        return basis_vector(size, first + index, length)

    output = partial(vector, first=1, most=calls, what="model calls")
    noise = partial(vector, first=1 + calls, most=draws, what="draws of noise")
    run = _Recording(output, noise).run(sample_fn, basis_vector(size, 0, length), sigmas, options)
    # Drop the coordinates of outputs that were not asked for.
    used = [*range(1 + len(run.times)), *range(1 + calls, size)]
    run.states = [state[..., used] for state in run.states]
    return run
