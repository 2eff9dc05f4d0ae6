"""`compile_scheduler`: a scheduler of diffusers' protocol as a table."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..table import NO_NOISE, StepTable
from ..utils.identity import NoValueError, value_key, view_index
from ..utils.lru import LRU
from ..utils.progress import progress_bar
from .assembly import TOLERANCE, Clip, Compiled, UnprovedError, columns, distance, refused, rounding_of, verify
from .levels import Rebuild, noise_levels
from .probe import CHANNELS, MAX_DRAWS, Array, Original, Recording, Response
from .protocol import NextTimestep, check_protocol, host_copy, option, set_timesteps, unchanged
from .reduction import reduce

__all__ = ["NextTimestep", "StepWithOptions", "compile_scheduler", "compile_timesteps", "scheduler_clip"]

_compiled: LRU[Compiled] = LRU(64)
_SATURATED = 1e4
# Algorithms whose `convert_model_output` returns x0.
_X0_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "data_prediction")
_BAR_AFTER = 1.0  # seconds


def compile_scheduler(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    step_options: Mapping[str, Any] | None = None,
    clipped: bool = False,
    **set_timesteps_options: Any,
) -> StepTable:
    """The table of a scheduler object, in the configuration its user gave it: one row per timestep.

    The clip of x0 is not in the table: give `scheduler_clip(scheduler)` to the sampler as `clip`.

    Args:
        scheduler: an object of diffusers' protocol: `set_timesteps`, `timesteps`, `step`, and optionally `config`,
            `scale_model_input`, `init_noise_sigma`, `convert_model_output`. Its `step` returns an object with
            `prev_sample`, a tuple, or the next sample. It is not changed. Of a drop-in, the original is compiled.
        num_inference_steps: as its `set_timesteps` takes it. With timesteps or sigmas of your own (below) None or their
            number.
        step_options: further arguments of its `step`, the same in every step, such as eta of DDIM. The value
            `NextTimestep` stands for the following timestep, and None in the last step (prev_timestep of UnCLIP).
        clipped: whether the sampler will clip x0 although the scheduler does not. Other tables avoid x0: rows over
            state and output round less often.
        **set_timesteps_options: further arguments of `set_timesteps`, such as `timesteps` or `sigmas`.

    Raises:
        ValueError: its steps are not linear, need more than three saved tensors, or the table does not reproduce them.

    Example:
        >>> from diffusers import DPMSolverMultistepScheduler
        >>> table = compile_scheduler(DPMSolverMultistepScheduler(), 20)
        >>> table.num_history
        1
        >>> compile_scheduler(DPMSolverMultistepScheduler(), timesteps=[999, 850, 545, 124]).num_rows
        4
    """
    check_protocol(scheduler)
    with unchanged(scheduler):
        with refused(f"scheduler: got {type(scheduler).__name__}"):
            prepared = set_timesteps(scheduler, num_inference_steps, set_timesteps_options)
        return compile_timesteps(prepared, step_options=step_options, clipped=clipped).table


def compile_timesteps(
    scheduler: Any, first: int = 0, step_options: Mapping[str, Any] | None = None, clipped: bool = False
) -> Compiled:
    """`compile_scheduler` for a scheduler with timesteps set, together with its draws of noise.

    A result is kept for schedulers of the same class and attributes, in the same version of their library, whose steps
    return the same on random numbers. One with methods of its own is compiled every time.

    `first` is the index of the timestep the run begins with, above 0 for image-to-image, where methods of several steps
    begin without history.
    """
    check_protocol(scheduler)
    what = f"scheduler: got {type(scheduler).__name__}"
    with refused(what):
        count = len(scheduler.timesteps)
    if not 0 <= first < count:
        raise ValueError(f"first: got {first}, expected 0 to {count - 1}, an index of its timesteps")
    options = dict(step_options or {})
    with unchanged(scheduler), _bar(type(scheduler).__name__, count - first) as bar:
        with refused(what):
            original = Original(host_copy(scheduler), first, options, bar.update)
            trial = original.record_numbers(_start(original))
        try:
            key = _key(original, clipped, trial)
        except NoValueError:
            return _compile(original, clipped, trial)
        return _compiled.get_or_make(key, lambda: _compile(original, clipped, trial))


def _bar(name: str, steps: int) -> Any:
    """A progress bar of the steps that are run, shown on a terminal from the second second on."""
    # On random numbers, on shorter ones, on basis vectors and, last, where x0 is clipped or the variance learned.
    label = f"compile {name}" if sys.stderr.isatty() else False
    return progress_bar(label, total=4 * steps, delay=_BAR_AFTER, leave=False)


def _key(original: Original, clipped: bool, trial: Recording) -> Hashable:
    """What a table follows from: the scheduler's class and attributes, what else of it is read here, and the numbers
    that its steps return. Raises NoValueError if an attribute, or a method of its own, has no value to compare."""
    scheduler, digest = original.scheduler, hashlib.sha256()
    drawn = [z for row in trial.drawn for z in row]
    for values in (trial.inputs, trial.states, drawn, trial.predictions, trial.converted):
        digest.update(len(values).to_bytes(8, "little"))
        for value in values:
            digest.update(value.contiguous().numpy().tobytes())
    kind = type(scheduler)
    read = (getattr(scheduler, "order", 1), _start(original), original.learned, repr(scheduler_clip(scheduler)))
    given = value_key((original.first, dict(original.options), clipped, *read))
    return kind, _version(kind.__module__), value_key(vars(scheduler)), given, digest.digest()


@cache
def _version(module: str) -> str:
    """The version of a module's library."""
    try:
        return metadata.version(module.partition(".")[0])
    except metadata.PackageNotFoundError:
        return ""


class StepWithOptions:
    """A scheduler's `step` with further arguments. Copied with the scheduler, it is the copy's."""

    def __init__(self, scheduler: Any, options: Mapping[str, Any]) -> None:
        self._scheduler, self._step, self._options = scheduler, scheduler.step, dict(options)

    def __call__(self, output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        timesteps = self._scheduler.timesteps
        position = view_index(timesteps, timestep) + 1  # type: ignore[operator]
        following = timesteps[position] if position < len(timesteps) else None
        options = {name: following if value is NextTimestep else value for name, value in self._options.items()}
        return self._step(output, timestep, sample, **options)


def _start(original: Original) -> float:
    return float(getattr(original.scheduler, "init_noise_sigma", 1.0))


def _compile(original: Original, clipped: bool, trial: Recording) -> Compiled:
    what, start = f"scheduler: got {type(original.scheduler).__name__}", _start(original)
    with refused(what):
        linear = _without_clip(original)
        small = linear.record_numbers(start, size=0.3, batch=1, variance=0.0)
        response = linear.respond(np.cumsum([0, *map(len, small.drawn)]).tolist())
    with _explained(original, trial):
        response = replace(response, rounding=rounding_of(response, small, what))
    clip = scheduler_clip(original.scheduler)
    given_clipped, clipped = clipped, clipped or clip is not None
    rows = reduce(response, clipped, start, what)
    p_x, p_m = _prediction(linear, response)
    found: dict[str, Any] = columns(rows, p_x, p_m, clipped)
    with refused(what):
        if clip is not None and option(original.scheduler, "clip_sample") is not None:
            found |= _clipped_coefficients(linear.with_options(clip_sample=True), p_x, p_m)
        if original.learned:
            found |= _learned_variance(linear, rows.draws)
    found |= {"c_in": _scales(response), "t": response.times, "integer_time": response.integer_time}
    steps = np.arange(response.calls) // getattr(original.scheduler, "order", 1)
    found |= {"initial_scale": start, "learned_variance": original.learned, "steps": steps}
    found |= {"levels": noise_levels(original), "rebuild": Rebuild(compile_timesteps, original, given_clipped)}
    table = StepTable.from_columns(name=type(original.scheduler).__name__, **found)
    with _explained(original, trial):
        verify(table, rows.draws, trial, clip, response.rounding, what)
    return Compiled(table, rows.draws)


@contextmanager
def _explained(original: Original, trial: Recording) -> Iterator[None]:
    """Context in which errors of a proof say why, in the original's terms."""
    try:
        yield
    except UnprovedError as error:
        raise ValueError(f"{error}: {_why(original, trial)}") from None


def _why(original: Original, trial: Recording) -> str:
    start = _start(original)
    again, half = original.record_numbers(start), original.record_numbers(start, size=0.5)
    if not all(map(torch.equal, again.states, trial.states)):
        return "it draws noise by other means than torch.randn, torch.randn_like and diffusers' randn_tensor"
    if scheduler_clip(original.scheduler) is not None:
        return "it limits other values than x0, or in another way than its clip_sample or thresholding says"
    if max(distance(2 * halved, whole) for halved, whole in zip(half.states, trial.states, strict=True)) > TOLERANCE:
        return "its steps are not linear"
    return "its steps depend on the samples' shape, or round more than that"


def scheduler_clip(scheduler: Any) -> Clip:
    """A scheduler's clip of x0, as `clip` of `Sampler`."""
    if option(scheduler, "thresholding"):
        ceiling = float(option(scheduler, "sample_max_value", 1.0))
        # Of bounds that exclude each other, torch.clamp takes the upper one.
        return DynamicThreshold(option(scheduler, "dynamic_thresholding_ratio", 0.995), min(1.0, ceiling), ceiling)
    return float(option(scheduler, "clip_sample_range", 1.0)) if option(scheduler, "clip_sample") else None


def _without_clip(original: Original) -> Original:
    limits = ("clip_sample", "thresholding")
    return original.with_options(**{name: False for name in limits if option(original.scheduler, name)})


def _prediction(original: Original, response: Response) -> tuple[Array, Array]:
    """p_x and p_m where the scheduler returns its x0 (else 0)."""
    scheduler, predictions = original.scheduler, response.predictions
    if option(scheduler, "algorithm_type") in _X0_ALGORITHMS or option(scheduler, "predict_x0"):
        predictions = response.converted if predictions is None else predictions
    found = None if predictions is None else _over_rows(predictions, response)
    return found or (np.zeros(response.calls), np.zeros(response.calls))


def _over_rows(vectors: Array, response: Response) -> tuple[Array, Array] | None:
    """Vectors, one per row, as sums of the row's state and output: the coefficients of both [C]; None if one is not."""
    rows, states, rest = np.arange(response.calls), response.states[:-1], vectors.copy()
    of_m = rest[rows, 1 + rows].copy()
    rest[rows, 1 + rows] = 0.0
    of_x = (rest * states).sum(axis=1) / (states * states).sum(axis=1)
    error = np.abs(rest - of_x[:, None] * states).max(axis=1)
    return None if (error > 1e-5 * np.maximum(1.0, np.abs(rest).max(axis=1))).any() else (of_x, of_m)


def _scales(response: Response) -> Array:
    """c_in of every row."""
    states, inputs = response.states[:-1], response.inputs
    scales: Array = (inputs * states).sum(axis=1) / (states * states).sum(axis=1)
    error = np.abs(inputs - scales[:, None] * states).max(axis=1)
    if (error > 1e-5 * np.abs(inputs).max(axis=1)).any():
        raise ValueError("scheduler: got model inputs that are not multiples of the samples, expected multiples")
    return scales


def _clipped_coefficients(clipping: Original, p_x: Array, p_m: Array) -> dict[str, Array]:
    """a_x, a_0 and a_m of steps that clip x0. Where x0 is saturated it is constant: the derivatives of a step there are
    a_x and a_m, and the remainder is a_0 times the bound."""
    bound = float(option(clipping.scheduler, "clip_sample_range", 1.0))
    x, m = (_SATURATED * np.where(p < 0, -1.0, 1.0) for p in (p_x, p_m))
    # Three samples of a batch: where it is, twice as far in x, and in m.
    samples = torch.from_numpy(np.stack([[x, 2 * x, x], [m, m, 2 * m]])).view(2, 3, 1, 1, 1, -1)
    samples = samples.expand(2, 3, CHANNELS, 1, 1, len(x))
    zeros = torch.zeros(3, CHANNELS, 1, 1, dtype=torch.float64)

    def output(call: int, _: Tensor) -> Tensor:
        mean = samples[1, ..., call].clone()
        return torch.cat([mean, zeros], dim=1) if clipping.learned else mean

    run = clipping.record(zeros, output, lambda *_: zeros, lambda call: samples[0, ..., call].clone())
    base, by_x, by_m = torch.stack(run.states[1:])[:, :, 0, 0, 0].T.numpy()
    a_x, a_m = (by_x - base) / x, (by_m - base) / m
    a_0 = (base - a_x * x - a_m * m) / bound
    size = np.maximum(np.abs(a_x), np.abs(a_0))
    return {"a_x": a_x, "a_0": a_0, "a_m": np.where(np.abs(a_m) > 1e-9 * size, a_m, 0.0)}


def _learned_variance(original: Original, draws: Sequence[Sequence[float]]) -> dict[str, Array]:
    """s, l_0 and l_v of learned variances: the logarithm of the deviation is linear in the variance channels v."""
    # Three samples of a batch, v = -1, 0 and 1, whose elements are the draws of a step; all else is 0.
    zeros = torch.zeros(3, CHANNELS, 1, MAX_DRAWS, dtype=torch.float64)
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1).expand_as(zeros)
    units = torch.eye(MAX_DRAWS, dtype=torch.float64)
    run = original.record(
        zeros,
        lambda *_: torch.cat([zeros, v], dim=1),
        lambda step, in_step, draw: units[in_step].expand_as(zeros).clone(),
        lambda _: zeros.clone(),
    )
    s = torch.stack(run.states[1:])[:, :, 0, 0].norm(dim=-1).numpy()
    logs = np.log2(np.where(s > 0, s, 1.0)).T
    if np.abs(logs[0] - 2 * logs[1] + logs[2]).max() > 1e-4:
        raise ValueError("scheduler: got noise that is not exponential in the variance channels, expected it to be")
    quiet, l_v = np.array([not any(row) for row in draws]), (logs[2] - logs[0]) / 2
    return {"s": np.zeros_like(l_v), "l_0": np.where(quiet, NO_NOISE, logs[1]), "l_v": np.where(quiet, 0.0, l_v)}
