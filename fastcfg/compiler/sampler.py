"""`compile_sampler`: the table of a function of k-diffusion's form, `sample_*(model, x, sigmas, ...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..table import StepTable
from ..utils.checks import check_one_of
from .assembly import Compiled, columns, refused, verify, with_rounding
from .branches import Weights, blended, mixed
from .clamps import bound_of, clamped_x0
from .draws import first_uses, regrouped
from .prediction import PREDICTIONS, predicted_x0
from .probe import MAX_DRAWS, Recording, Response, basis_vector
from .reduction import reduce
from .stand_ins import FormError
from .subject import Subject
from .told import check_alike, check_others, others_of, take_constants
from .trial import Trial

__all__ = ["compile_sampler", "trace_sampler"]

_MAX_CALLS = 3  # of the model, per step
_LEAST = 64  # calls and draws always allowed in a run
_TAKES = ("callback", "noise_sampler")


def compile_sampler(
    sample_fn: Callable[..., Tensor],
    sigmas: ArrayLike | Tensor,
    *,
    model: Any = None,
    prediction: str | None = None,
    **options: Any,
) -> StepTable:
    """The table of a sampling function, with the arguments its user gives it: one row per model call.

    The table's model is the function's, called as model(x, t): what else the function gives it is left to the
    conditioning of `Sampler.sample`. Its state starts as the first model input: x with deviation `sigmas[0]` (1 if
    sigmas are integers, or v or flow is predicted) plus noise the function adds before (churn in the first step); their
    joint deviation is the table's initial_scale. A table has one draw of noise per row; `trace_sampler` also returns
    the function's own draws, which make the images of its seeds.

    The function may work in place, draw at any time, turn gradients on, and call back anywhere. It guides by itself, or
    doubles the batch: refused; leave guidance to the `Sampler`.

    Args:
        sample_fn: called as sample_fn(model, x, sigmas, **options). `disable`, `callback` and `noise_sampler` are
            supplied if it takes them.
        sigmas: noise levels, the last usually 0, or what the function takes for them: a tensor or array of integers
            stays one.
        model: the model, if the function reads its attributes. It is not called.
        prediction: what the model predicts, so that `clip` limits x0 and previews show it: "denoised" (x0), "v",
            "epsilon", or "flow" (noise - x0). None finds it: "v" and "epsilon" where a deterministic function's
            coefficients fit them and not x0, else "denoised".
        **options: such as eta, s_churn, order, solver_type.

    Raises:
        TypeError: sample_fn is not callable, or sigmas are no numbers.
        ValueError: its steps are not linear, need more than three saved tensors, or the table does not reproduce them;
            it does not fit the prediction; it calls its model in another form.

    Example:
        >>> from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m
        >>> table = compile_sampler(sample_dpmpp_2m, get_sigmas_karras(20, 0.03, 14.6))
    """
    if prediction is not None:
        check_one_of("prediction", prediction, PREDICTIONS)
    subject, levels = _subject(sample_fn, sigmas, model, options)
    return _traced(subject, levels, 4, prediction, hooked=False).table


def trace_sampler(
    sample_fn: Callable[..., Tensor], sigmas: ArrayLike | Tensor, *, model: Any = None, **options: Any
) -> Compiled:
    """`compile_sampler` with the function's draws of noise, for a model that predicts x0; same arguments and
    exceptions."""
    subject, levels = _subject(sample_fn, sigmas, model, options)
    return _traced(subject, levels, 4, "denoised", hooked=False)


def trace_subject(subject: Subject, levels: Tensor, ndim: int, like: Trial) -> tuple[Compiled, Subject]:
    """The table of a function as it is called, for samples of `ndim` dimensions, float64 or integer levels. Where the
    function has a hook that is told a second output, this is the first draw of every row. `like` is another run of it.

    Returns:
        The table, and the subject, whose `uncond_first` says which of the two outputs the table's is.

    Raises:
        ValueError: as `compile_sampler`.
    """
    try:
        return _traced(subject, levels, ndim, "denoised", hooked=True, like=like), subject
    except _SecondOutputError:
        subject = Subject(**{**vars(subject), "uncond_first": True})
        return _traced(subject, levels, ndim, "denoised", hooked=True, like=like), subject


class _SecondOutputError(ValueError):
    """A function with a hook does not compile; with its outputs exchanged it may."""


def _subject(sample_fn: Any, sigmas: Any, model: Any, options: dict[str, Any]) -> tuple[Subject, Tensor]:
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    try:
        levels = torch.as_tensor(sigmas).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sigmas: got {sigmas!r}, expected numbers") from error
    integers = isinstance(sigmas, Tensor | np.ndarray) and not levels.is_floating_point()
    levels = levels if integers else levels.double()
    if levels.ndim != 1 or len(levels) < 2 or not (levels[:-1] > 0).all():
        raise ValueError(f"sigmas: got {levels.tolist()}, expected positive levels, of which the last may be 0")
    takes = tuple(name for name in _TAKES if name in inspect.signature(sample_fn).parameters and name not in options)
    return Subject(sample_fn, options, model=model, takes=takes), levels


def _traced(
    subject: Subject, levels: Tensor, ndim: int, prediction: str | None, hooked: bool, like: Trial | None = None
) -> Compiled:
    sample_fn = subject.sample_fn
    name = getattr(sample_fn, "__name__", type(sample_fn).__name__)
    what = f"sample_fn: got {name}"
    with refused(what):
        long, short = (_respond(subject, levels, ndim, length, like) for length in (1.0, 0.3))
    if not long.calls:
        raise ValueError(f"{what}, which calls no model, expected linear steps")
    times = [_time(call.time) for call in long.calls]
    if times != [_time(call.time) for call in short.calls]:
        raise ValueError(f"{what} with model calls that depend on the samples, expected linear steps")
    check_alike(what, long, short)
    has_hook = any(call.passed.hook is not None for call in long.calls)
    if not hooked and (has_hook or len({call.passed.summary() for call in long.calls}) > 1):
        raise ValueError(
            f"{what}, which calls its model with a hook or with arguments of its own, expected one without "
            "guidance of its own: leave it to the Sampler, as guidance=CFG(scale)"
        )
    constants = [0.0]
    if like is not None:
        with refused(what):
            constants = take_constants(_respond(subject, levels, ndim, 0.0, like), (long, short), what)
    try:
        return _assembled(subject, levels, ndim, prediction, long, short, like, constants, name)
    except ValueError as error:
        if has_hook and not subject.uncond_first:
            raise _SecondOutputError(str(error)) from error
        raise


def _assembled(
    subject: Subject,
    levels: Tensor,
    ndim: int,
    prediction: str | None,
    long: Trial,
    short: Trial,
    like: Trial | None,
    constants: Sequence[float],
    name: str,
) -> Compiled:
    what = f"sample_fn: got {name}"
    (response, start, start_draws, blend), (shorter, *_) = _response(long, 1.0), _response(short, 0.3)
    if response.states.shape != shorter.states.shape:
        raise ValueError(f"{what} with draws that depend on the samples, expected linear steps")
    calls, told = len(long.calls), len(long.calls) + 1 + len(long.latest)
    others = others_of(response, calls, long.latest, constants[1:])
    clip = bound_of(long.bounded, calls)
    clamped = response.states[told:]
    response, shorter = (replace(each, states=each.states[: calls + 1]) for each in (response, shorter))
    response = with_rounding(response, shorter, what)
    if clip is None:
        prediction, p_x, p_m = predicted_x0(response, prediction)
    else:
        response, p_x, p_m = clamped_x0(response, clamped, [before for before, *_ in long.bounded])
        prediction = "clamped"
    unit = not levels.is_floating_point() or not len(levels) or prediction in ("v", "flow")
    initial_scale = math.hypot(start * (1.0 if unit else float(levels[0])), *start_draws)
    rows = reduce(response, clipped=prediction != "denoised", start=initial_scale)
    table = StepTable.from_columns(
        t=response.times,
        integer_time=response.integer_time,
        initial_scale=initial_scale,
        steps=_steps(len(long.calls), long.callbacks),
        name=name,
        **columns(rows, p_x, p_m),
    )
    rng, batch = np.random.default_rng(0), 2 if like is None else len(like.result)

    def normal(*_: Any) -> Tensor:
        return torch.from_numpy(rng.standard_normal((batch, 3, 4, 5, 3, 2)[:ndim]))

    def noise(_: int, like: Tensor) -> Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(like.shape)))

    trial = Trial(subject, normal, noise, wide=True)
    with torch.no_grad(), refused(what):
        trial.run(normal() * initial_scale, levels.clone())
    if len(trial.calls) != len(table) or list(map(len, trial.drawn)) != list(map(len, long.drawn)):
        raise ValueError(f"{what} with model calls that depend on the samples, expected linear steps")
    compiled = Compiled(table, rows.draws, start, start_draws, blend, others, clip, constants[0])
    states = [x.double() for x in (*trial.inputs, trial.result - compiled.offset)]
    recording = Recording(outputs=mixed(trial.outputs, blend), states=states, drawn=regrouped(trial.drawn, compiled))
    verify(table, rows.draws, recording, clip, response.rounding, what)
    check_others(compiled, recording, trial, [] if like is None else like.sums, 50 * response.rounding, what)
    return compiled


def _respond(subject: Subject, levels: Tensor, ndim: int, length: float, like: Trial | None) -> Trial:
    """A run on basis vectors [batch, 1, ..., size], alike for every sample; the batch is that of `like`, or 1."""
    calls, draws = (max(most * len(levels), _LEAST) for most in (_MAX_CALLS, MAX_DRAWS + 1))
    if like is not None:
        calls, draws = sum(map(len, like.outputs)), sum(map(len, like.drawn))
    size, batch = 1 + calls + draws, 1 if like is None else len(like.result)

    def vector(index: int, batch: int = batch) -> Tensor:
        one = basis_vector(size, index, length).reshape(1, *[1] * (ndim - 2), size)
        return one.repeat(batch, *[1] * (ndim - 1))

    def of_one(x: Tensor) -> Tensor:
        """A vector without the coordinates of outputs and draws that were not asked for."""
        if len(x) != batch or not torch.equal(x, x[:1].expand_as(x)):
            raise FormError("sample_fn: got one that treats its samples differently, expected alike")
        return x[0].double().reshape(-1)[used]

    def output(index: int) -> Tensor:
        if index >= calls:
            raise FormError(f"sample_fn: got more than {calls} model calls, expected at most that")
        return vector(1 + index)

    def noise(index: int, like: Tensor) -> Tensor:
        if index >= draws:
            raise FormError(f"sample_fn: got more than {draws} draws of noise, expected at most that")
        if like.numel() == len(like):  # one number for many: a vector stands for it, which broadcasts as far
            return vector(1 + calls + index)
        if like.numel() != size * len(like) or len(like) not in (1, batch):
            raise FormError(f"sample_fn: got one that draws noise of shape {tuple(like.shape)}, expected x's")
        return vector(1 + calls + index, len(like)).reshape(like.shape)

    with torch.no_grad():
        run = Trial(subject, output, noise, wide=True, unbounded=like is not None).run(vector(0), levels.clone())
    outputs = sum(map(len, run.outputs))
    used = [*range(1 + outputs), *range(1 + calls, 1 + calls + sum(map(len, run.drawn)))]
    told = [] if like is None else like.sums
    run.inputs, run.result = list(map(of_one, run.inputs)), of_one(run.result)
    run.others = [of_one(x) for x in (*run.outcome.others, *(run.told[key] for key in told))]
    run.others += [of_one(x) for _, _, x in run.bounded]
    run.latest = [len(run.inputs)] * len(run.outcome.others) + [run.row_told(position) for position, _ in told]
    return run


def _response(run: Trial, length: float) -> tuple[Response, float, tuple[float, ...], Weights]:
    """The response of a run on basis vectors from its first model input on, with the states followed by what it returns
    beside them; what that input consists of: the share of x and the coefficients of the draws before it; and the
    weights of branches."""
    states, blend = blended(
        torch.stack([*run.inputs, run.result, *run.others]).numpy() / length, list(map(len, run.outputs))
    )
    calls = len(run.inputs)
    counts = first_uses(states, run)
    early = slice(1 + calls, 1 + calls + counts[0])
    start, added = float(states[0, 0]), states[0, early].copy()
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
    kinds = {isinstance(_time(call.time), int) for call in run.calls}
    if len(kinds) > 1:
        raise ValueError("sample_fn: got model times of which some are integers, expected all or none")
    times = np.array([float(_time(call.time)) for call in run.calls])
    response = Response(states, states[:calls], times, kinds.pop(), drawn, outputs)
    return response, start, tuple(added.tolist()), blend


def _time(time: Any) -> int | float:
    """A model call's time as a number, 0 if it is one of its other arguments."""
    if time is None:
        return 0.0
    if isinstance(time, Tensor):
        values = time.flatten()
        if not len(values) or not bool((values == values[0]).all()):
            raise ValueError(f"sample_fn: got model times {time.tolist()}, expected the same one for all samples")
        time = values[0].item()
    if isinstance(time, bool) or not isinstance(time, int | float):
        raise ValueError(f"sample_fn: got a model time of type {type(time).__name__}, expected a number")
    return time


def _steps(calls: int, callbacks: Sequence[int]) -> list[int]:
    """The step of every model call, by the callbacks: one follows the first call of every step (k-diffusion), or
    precedes it, or follows the step's last."""
    marks = sorted(set(callbacks))
    if not marks:
        return list(range(calls))
    # A first step of several calls ends with its callback.
    ahead = 1 if marks[0] == 1 else 0
    first = 0 if marks[0] > 1 else 1
    return [max(sum(mark <= call + ahead for mark in marks) - first, 0) for call in range(calls)]
