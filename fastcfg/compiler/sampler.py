"""`compile_sampler`: a function of k-diffusion's form, `sample_*(model, x, sigmas, ...)`, as a table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..table import StepTable
from .assembly import columns, of_known_rounding, verify
from .probe import Response, drawing, in_float64
from .recipe import Compiled
from .reduction import reduce

__all__ = ["compile_sampler", "trace_sampler"]

_CALLS, _DRAWS, _FEWEST = 3, 4, 64  # of one step, at most; and of a whole run, whatever its steps


def compile_sampler(sample_fn: Callable[..., Tensor], sigmas: ArrayLike | Tensor, **options: Any) -> StepTable:
    """The table of a sampling function, with the arguments that its user gives it.

    The table's model is the function's: a denoiser D(x, sigma), called with float times. Its state starts as the first
    model input: x with the deviation `sigmas[0]` and what the function adds before (churn in the first step), whose
    joint deviation is the table's initial_scale. A table's noise is one draw a row; for the function's own draws, and
    so the images of its seeds, see `trace_sampler`.

    Args:
        sample_fn: called as sample_fn(model, x, sigmas, **options); of its further arguments `disable`, `callback` and
            `noise_sampler` are filled in where it has them.
        sigmas: noise levels, the last usually 0.
        **options: such as eta, s_churn, order, solver_type.

    Returns:
        A table of as many rows as it calls the model.

    Raises:
        TypeError: sample_fn is not callable.
        ValueError: its steps are not linear, need more than three saved tensors, or the table does not reproduce them.

    Example:
        >>> from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m
        >>> table = compile_sampler(sample_dpmpp_2m, get_sigmas_karras(20, 0.03, 14.6))
    """
    return trace_sampler(sample_fn, sigmas, **options).table


def trace_sampler(sample_fn: Callable[..., Tensor], sigmas: ArrayLike | Tensor, **options: Any) -> Compiled:
    """`compile_sampler`'s table with the function's draws of noise, those whose value it does not use included.

    Args:
        sample_fn, sigmas, **options: as of `compile_sampler`.

    Raises:
        TypeError, ValueError: as `compile_sampler`.
    """
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not (levels[:-1] > 0).all():
        raise ValueError(f"sigmas: got {levels.tolist()}, expected positive levels, the last of which may be 0")
    name = getattr(sample_fn, "__name__", type(sample_fn).__name__)
    what = f"sample_fn: got {name}"
    try:
        long, short = (_respond(sample_fn, levels, options, length) for length in (1.0, 0.3))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{what}, which does not run on basis vectors ({type(error).__name__}: {error}), expected linear steps"
        ) from error
    if len(short.times) != len(long.times):
        raise ValueError(f"{what}, whose model calls depend on the samples, expected one whose steps are linear")
    (response, start, start_draws), (shorter, _, _) = long.response(1.0), short.response(0.3)
    response = of_known_rounding(response, shorter, what)
    initial_scale = math.hypot(start * float(levels[0]), *start_draws)
    rows, ones = reduce(response, limited=False, start=initial_scale), np.ones(response.calls)
    table = StepTable.from_columns(
        t=response.times,
        integer_time=False,
        initial_scale=initial_scale,
        steps=long.steps(),
        name=name,
        **columns(rows, 0 * ones, ones),
    )
    random = _random_run(sample_fn, levels, options, table)
    if len(random.times) != len(table):
        raise ValueError(f"{what}, whose model calls depend on the samples, expected one whose steps are linear")
    verify(table, rows.draws, random.outputs, random.drawn[1:], random.states, None, response.rounding, what)
    return Compiled(table, rows.draws, start, start_draws)


@dataclass(eq=False)
class _Run:
    """A run of a sampling function, recorded.

    Attributes:
        output: what the model returns, by number of the call.
        noise: what is drawn, by number of the draw.
        states, times, outputs: what the model was given and returned; in the end states holds the result as well.
        drawn: draws before the first model call, and after every one.
        events: "call" and "callback", in their order.
    """

    output: Callable[[int], Tensor]
    noise: Callable[[int], Tensor]
    states: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    drawn: list[list[Tensor]] = field(default_factory=lambda: [[]])
    events: list[str] = field(default_factory=list)

    def __call__(self, sample_fn: Callable[..., Tensor], x: Tensor, sigmas: Tensor, options: dict[str, Any]) -> _Run:
        filled = {"disable": True, "callback": self._callback, "noise_sampler": lambda *_: self._draw(None)}
        known = inspect.signature(sample_fn).parameters
        given = {name: value for name, value in filled.items() if name in known} | options
        with drawing(sample_fn, self._draw), in_float64(), torch.no_grad():
            self.states.append(sample_fn(self._model, x, sigmas, **given).double())
        return self

    def _model(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        self.states.append(x.double())
        self.times.append(float(sigma.flatten()[0]))
        self.outputs.append(self.output(len(self.outputs)))
        self.drawn.append([])
        self.events.append("call")
        return self.outputs[-1]

    def _callback(self, _: Any) -> None:
        self.events.append("callback")

    def _draw(self, _: Tensor | None) -> Tensor:
        self.drawn[-1].append(self.noise(sum(map(len, self.drawn))))
        return self.drawn[-1][-1]

    def steps(self) -> list[int]:
        """The step of every call: a step's first call is followed by its callback, its further ones come after."""
        if "callback" not in self.events:
            return list(range(len(self.times)))
        steps, done = [], 0
        for event, following in zip(self.events, [*self.events[1:], ""], strict=True):
            if event == "callback":
                done += 1
            else:
                steps.append(done if following == "callback" else done - 1)
        return steps

    def response(self, length: float) -> tuple[Response, float, tuple[float, ...]]:
        """Of a run on basis vectors of a length, from its first model input on; and what that is made of: the share of
        x and those of the draws before it."""
        states = torch.stack([state.reshape(-1) for state in self.states]).numpy() / length
        counts, calls = np.cumsum([len(drawn) for drawn in self.drawn]), len(self.times)
        early = slice(1 + calls, 1 + calls + counts[0])
        start, added = float(states[0, 0]), states[0, early]
        if not start:
            raise ValueError("sample_fn: got one whose first model input is without x, expected one that starts from x")
        states[:, 0] /= start
        if np.abs(states[:, early] - np.outer(states[:, 0], added)).max(initial=0.0) > 1e-9 * np.abs(states).max():
            raise ValueError(
                "sample_fn: got one that uses what it draws before its first model call again after it, expected not"
            )
        states = np.delete(states, early, axis=1)
        outputs = np.eye(states.shape[1])[1 : 1 + calls]
        drawn = tuple((counts - counts[0]).tolist())
        response = Response(states, states[:-1], np.array(self.times), False, drawn, outputs)
        return response, start, tuple(added.tolist())


def _respond(sample_fn: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any], length: float) -> _Run:
    calls, draws = (max(most * len(sigmas), _FEWEST) for most in (_CALLS, _DRAWS))
    size = 1 + calls + draws

    def basis(index: int) -> Tensor:
        if index >= size:
            raise ValueError(f"sample_fn: got more than {draws} draws of noise, expected fewer")
        vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
        vector[..., index] = length
        return vector

    def output(call: int) -> Tensor:
        if call >= calls:
            raise ValueError(f"sample_fn: got more than {calls} model calls, expected fewer")
        return basis(1 + call)

    run = _Run(output, lambda draw: basis(1 + calls + draw))
    run(sample_fn, basis(0), sigmas, options)
    # The outputs that were not needed are no coordinates.
    kept = [*range(1 + len(run.times)), *range(1 + calls, size)]
    run.states = [state[..., kept] for state in run.states]
    return run


def _random_run(sample_fn: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any], table: StepTable) -> _Run:
    generator = torch.Generator().manual_seed(0)

    def normal(_: int = 0) -> Tensor:
        return torch.empty(2, 3, 4, 4, dtype=torch.float64).normal_(generator=generator)

    return _Run(normal, normal)(sample_fn, normal() * table.initial_scale, sigmas, options)
