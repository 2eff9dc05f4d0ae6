"""`compile_scheduler`: a scheduler of diffusers' protocol as a table."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
from .assembly import TOLERANCE, Clip, Compiled, columns, distance, refused, verify, with_rounding
from .patching import drawing, in_float64
from .probe import Array, Recording, Response, normal_sample, record, respond
from .reduction import reduce

__all__ = ["NextTimestep", "StepWithOptions", "compile_scheduler", "compile_timesteps", "scheduler_clip"]

_compiled: LRU[Compiled] = LRU(64)
_SATURATED = 1e4
# Algorithms whose `convert_model_output` returns x0.
_X0_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "data_prediction")


def compile_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    step_options: Mapping[str, Any] | None = None,
    clipped: bool = False,
    **set_timesteps: Any,
) -> StepTable:
    """The table of a scheduler object, in the configuration its user gave it: one row per timestep.

    The clip of x0 is not in the table: give `scheduler_clip(scheduler)` to the sampler as `clip`.

    Args:
        scheduler: an object of diffusers' protocol: `config`, `set_timesteps`, `timesteps`, `step`, and optionally
            `scale_model_input`, `init_noise_sigma`, `convert_model_output`. It is not changed.
        num_inference_steps: as its `set_timesteps` takes it.
        step_options: further arguments of its `step`, the same in every step, such as eta of DDIM. The value
            `NextTimestep` stands for the following timestep, and None in the last step (prev_timestep of UnCLIP).
        clipped: whether the sampler will clip x0 although the scheduler does not. Other tables avoid x0: rows over
            state and output round less often.
        **set_timesteps: further arguments of `set_timesteps`.

    Raises:
        ValueError: its steps are not linear, need more than three saved tensors, or the table does not reproduce them.

    Example:
        >>> from diffusers import DPMSolverMultistepScheduler
        >>> table = compile_scheduler(DPMSolverMultistepScheduler(), 20)
        >>> table.num_history
        1
    """
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps!r}, expected an integer of at least 1")
    _check_protocol(scheduler)
    original = copy.deepcopy(scheduler)
    with refused(f"scheduler: got {type(scheduler).__name__}"):
        original.set_timesteps(num_inference_steps, **set_timesteps)
    return compile_timesteps(original, step_options=step_options, clipped=clipped).table


def compile_timesteps(
    scheduler: Any, first: int = 0, step_options: Mapping[str, Any] | None = None, clipped: bool = False
) -> Compiled:
    """`compile_scheduler` for a scheduler with timesteps set, together with its draws of noise; results are cached by
    the scheduler's class, its attributes and the version of its library.

    `first` is the index of the timestep the run begins with, above 0 for image-to-image, where methods of several steps
    begin without history.
    """
    _check_protocol(scheduler)
    if not 0 <= first < len(scheduler.timesteps):
        raise ValueError(f"first: got {first}, expected 0 to {len(scheduler.timesteps) - 1}, an index of its timesteps")
    options, kind = dict(step_options or {}), type(scheduler)
    try:
        key = (kind, _version(kind.__module__), value_key(vars(scheduler)), value_key((first, options, clipped)))
    except NoValueError:
        return _compile(scheduler, first, options, clipped)
    return _compiled.get_or_make(key, lambda: _compile(scheduler, first, options, clipped))


@cache
def _version(module: str) -> str:
    """The version of a module's library."""
    try:
        return metadata.version(module.partition(".")[0])
    except metadata.PackageNotFoundError:
        return ""


class NextTimestep:
    """Stands for the timestep that follows, as an argument of `step`."""


class StepWithOptions:
    """A scheduler's `step` with further arguments. Copied with the scheduler, it is the copy's."""

    def __init__(self, scheduler: Any, options: Mapping[str, Any]) -> None:
        self._scheduler, self._step, self._options = scheduler, scheduler.step, dict(options)

    def __call__(self, output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        timesteps = self._scheduler.timesteps
        following = [*timesteps, None][view_index(timesteps, timestep) + 1]  # type: ignore[operator]
        options = {name: following if value is NextTimestep else value for name, value in self._options.items()}
        return self._step(output, timestep, sample, **options)


def _check_protocol(scheduler: Any) -> None:
    for name in ("config", "set_timesteps", "step"):
        if not hasattr(scheduler, name):
            raise ValueError(f"scheduler: got {type(scheduler).__name__} without {name}, expected diffusers' protocol")
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(f"scheduler: got {type(scheduler).__name__} with a Brownian tree, expected independent draws")


def _compile(scheduler: Any, first: int, step_options: Mapping[str, Any], clipped: bool) -> Compiled:
    original = copy.deepcopy(scheduler)
    if step_options:
        original.step = StepWithOptions(original, step_options)
    learned = "learned" in str(original.config.get("variance_type"))
    what = f"scheduler: got {type(scheduler).__name__}"
    with refused(what):
        linear = _without_clip(original)
        response, shorter = (respond(linear, 0.0 if learned else None, length, first) for length in (1.0, 0.3))
    response = with_rounding(response, shorter, what)
    clip = scheduler_clip(original)
    clipped = clipped or clip is not None
    start = float(getattr(original, "init_noise_sigma", 1.0))
    rows = reduce(response, clipped, start)
    p_x, p_m = _prediction(linear, response)
    found: dict[str, Any] = columns(rows, p_x, p_m, clipped)
    if "clip_sample" in original.config and clip is not None:
        found |= _clipped_coefficients(linear, first, p_x, p_m)
    if learned:
        found |= _learned_variance(linear, first, rows.draws, response.rounding)
    found |= {"c_in": _scales(response), "t": response.times, "integer_time": response.integer_time}
    steps = np.arange(response.calls) // getattr(scheduler, "order", 1)
    found |= {"initial_scale": start, "learned_variance": learned, "steps": steps}
    table = StepTable.from_columns(name=type(scheduler).__name__, **found)
    generator = torch.Generator().manual_seed(0)
    inputs = [normal_sample(generator, 6 if learned else 3).clamp(-1.5, 1.5) for _ in range(len(table))]
    noise = normal_sample(generator) * table.initial_scale
    trial = record(original, first, noise, inputs.__getitem__, lambda draw: normal_sample(generator))
    predicted = verify(table, rows.draws, trial, clip, response.rounding, what)
    further, sums = _further(response, trial, predicted)
    return Compiled(table, rows.draws, further=further, sums=sums)


def scheduler_clip(scheduler: Any) -> Clip:
    """A scheduler's clip of x0, as `clip` of `Sampler`."""
    config = scheduler.config
    if config.get("thresholding"):
        ceiling = float(config.get("sample_max_value", 1.0))
        return DynamicThreshold(config.get("dynamic_thresholding_ratio", 0.995), 1.0, max(ceiling, 1.0))
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def _without_clip(scheduler: Any) -> Any:
    linear = copy.deepcopy(scheduler)
    off = {name: False for name in ("clip_sample", "thresholding") if linear.config.get(name)}
    if off:
        linear.register_to_config(**off)
    return linear


def _prediction(scheduler: Any, response: Response) -> tuple[Array, Array]:
    """p_x and p_m where the scheduler returns its x0 (else 0)."""
    config, predictions = scheduler.config, response.predictions
    if config.get("algorithm_type") in _X0_ALGORITHMS or config.get("predict_x0"):
        predictions = response.converted if predictions is None else predictions
    found = None if predictions is None else _over_rows(predictions, response)
    return found or (np.zeros(response.calls), np.zeros(response.calls))


def _over_rows(vectors: Array, response: Response) -> tuple[Array, Array] | None:
    """Vectors, one per row, as sums of the row's state and output: the coefficients of both [C]; None if one is not."""
    of_x, of_m = np.zeros(response.calls), np.zeros(response.calls)
    for i, (vector, state) in enumerate(zip(vectors, response.states, strict=False)):
        rest = vector.copy()
        of_m[i], rest[1 + i] = rest[1 + i], 0.0
        of_x[i] = rest @ state / (state @ state)
        if np.abs(rest - of_x[i] * state).max() > 1e-5 * max(1.0, np.abs(rest).max()):
            return None
    return of_x, of_m


def _scales(response: Response) -> Array:
    """c_in of every row."""
    scales = np.array([x @ s / (s @ s) for x, s in zip(response.inputs, response.states, strict=False)])
    if np.abs(response.inputs - scales[:, None] * response.states[:-1]).max() > 1e-5 * np.abs(response.inputs).max():
        raise ValueError("scheduler: got model inputs that are not multiples of the samples, expected multiples")
    return scales


def _clipped_coefficients(linear: Any, first: int, p_x: Array, p_m: Array) -> dict[str, Array]:
    """a_x, a_0 and a_m of steps that clip x0. Where x0 is saturated it is constant: the derivatives of a step there are
    a_x and a_m, and the remainder is a_0 times the bound."""
    clipping = copy.deepcopy(linear)
    clipping.register_to_config(clip_sample=True)
    bound, found = float(clipping.config.get("clip_sample_range", 1.0)), []
    zeros = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    for i in range(len(p_x)):
        x, m = _SATURATED * np.sign(p_x[i] or 1.0), _SATURATED * np.sign(p_m[i] or 1.0)
        values = torch.tensor([[x, m], [2 * x, m], [x, 2 * m]], dtype=torch.float64).T.reshape(2, 1, 1, 1, 3)
        output = values[1]
        if "learned" in str(clipping.config.get("variance_type")):
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        fresh = copy.deepcopy(clipping)
        with drawing(fresh, lambda like: zeros), in_float64(), torch.no_grad():
            t = fresh.timesteps[first + i]
            base, by_x, by_m = fresh.step(output, t, values[0]).prev_sample.double().reshape(-1).tolist()
        a_x, a_m = (by_x - base) / x, (by_m - base) / m
        found.append((a_x, (base - a_x * x - a_m * m) / bound, a_m))
    a_x, a_0, a_m = np.array(found).T
    size = max(float(np.abs(a_m).max()), 1.0)
    return {"a_x": a_x, "a_0": a_0, "a_m": np.where(np.abs(a_m) > 1e-9 * size, a_m, 0.0)}


def _learned_variance(scheduler: Any, first: int, draws: Sequence[Any], rounding: float) -> dict[str, Array]:
    """s, l_0 and l_v of learned variances: the logarithm of the deviation is linear in the variance channels v."""
    logs = []
    for v in (-1.0, 0.0, 1.0):
        s = reduce(replace(respond(scheduler, v, first=first), rounding=rounding)).s
        logs.append(np.log2(np.where(s > 0, s, 1.0)))
    if np.abs(logs[0] - 2 * logs[1] + logs[2]).max() > 1e-4:
        raise ValueError("scheduler: got noise that is not exponential in the variance channels, expected it to be")
    quiet, l_v = np.array([not any(row) for row in draws]), (logs[2] - logs[0]) / 2
    return {"s": np.zeros_like(l_v), "l_0": np.where(quiet, NO_NOISE, logs[1]), "l_v": np.where(quiet, 0.0, l_v)}


def _further(response: Response, trial: Recording, predicted: list[Tensor]) -> tuple[str, Array | None]:
    """`further` and `sums` of `Compiled`."""
    if not trial.further:
        return "none", None

    def is_returned(vectors: list[Tensor]) -> bool:
        return max(map(distance, vectors, trial.further)) <= TOLERANCE

    if len(trial.further) == response.calls and is_returned(predicted):
        return "x0", None
    found = None if response.further is None else _over_rows(response.further, response)
    if found is not None:
        pairs = zip(*found, trial.states, trial.outputs, strict=False)
        if is_returned([of_x * x + of_m * m[:, : x.shape[1]] for of_x, of_m, x, m in pairs]):
            return "sum", np.stack(found, axis=1)
    return "unknown", None
