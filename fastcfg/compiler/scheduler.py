"""`compile_scheduler`: a scheduler of diffusers' protocol as a table."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..table import NO_NOISE, StepTable
from .assembly import TOLERANCE, columns, distance, of_known_rounding, verify
from .cache import cached_for
from .probe import Array, Response, drawing, in_float64, position_in, respond, returned_second
from .reduction import reduce

__all__ = ["CompiledScheduler", "NextTimestep", "compile_scheduler", "compile_timesteps", "scheduler_clip"]

_SATURATED = 1e4
# Of the schedulers that convert outputs (`convert_model_output`): those that convert them to x0.
_X0_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "data_prediction")


def compile_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    step_options: Mapping[str, Any] | None = None,
    limited: bool = False,
    **set_timesteps: Any,
) -> StepTable:
    """The table of a scheduler object, with the configuration that its user gave it.

    Its clip of x0 is not in the table: give `scheduler_clip(scheduler)` to the sampler as `clip`.

    Args:
        scheduler: an object of diffusers' protocol: `config`, `set_timesteps`, `timesteps`, `step`, and where it has
            them `scale_model_input`, `init_noise_sigma`, `convert_model_output`. It is not changed.
        num_inference_steps: as its `set_timesteps` takes it.
        step_options: further arguments of its `step`, the same in every one, such as eta of DDIM. The value
            `NextTimestep` stands for the following timestep, and None in the last step (prev_timestep of UnCLIP).
        limited: whether x0 will be limited by the sampler though the scheduler does not. Only tables made for that, or
            of schedulers that limit it, use x0 at all: in terms of state and output rows are fewer roundings.
        **set_timesteps: further arguments of `set_timesteps`.

    Returns:
        A table of as many rows as it has timesteps.

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
    with _running(original):
        original.set_timesteps(num_inference_steps, **set_timesteps)
    return compile_timesteps(original, step_options=step_options, limited=limited).table


@dataclass(frozen=True, eq=False)
class CompiledScheduler:
    """A scheduler's table, and how it draws noise.

    Attributes:
        table: its rows.
        draws: for every row the coefficients of its draws, in their order; those of draws that change nothing are 0.
        further: what its steps return beside the sample: "none", "x0" (the table's, limited), "sum" or "unknown".
        sums: [C, 2], of "sum": the coefficients of the row's state and output.
    """

    table: StepTable
    draws: tuple[tuple[float, ...], ...]
    further: str
    sums: Array | None


def compile_timesteps(
    scheduler: Any, first: int = 0, step_options: Mapping[str, Any] | None = None, limited: bool = False
) -> CompiledScheduler:
    """`compile_scheduler` for a scheduler whose timesteps are set, for a run that begins with `timesteps[first]`.

    Results are kept: of a scheduler that holds the same numbers, in the same version of its library, the next call
    returns them.

    Args, errors: as there. `first` is above 0 where a picture is changed rather than made: methods of several steps
    then begin with less history.
    """
    _check_protocol(scheduler)
    if not 0 <= first < len(scheduler.timesteps):
        raise ValueError(f"first: got {first}, expected 0 to {len(scheduler.timesteps) - 1}, an index of its timesteps")
    return cached_for(
        scheduler,
        (first, dict(step_options or {}), limited),
        lambda: _compile(scheduler, first, step_options or {}, limited),
    )


class NextTimestep:
    """Stands for the timestep that follows, as an argument of `step`."""


class StepWith:
    """A scheduler's `step` with further arguments. Copied with the scheduler, it is the copy's."""

    def __init__(self, scheduler: Any, options: dict[str, Any]) -> None:
        self._scheduler, self._step, self._options = scheduler, scheduler.step, options

    def __call__(self, output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        timesteps = self._scheduler.timesteps
        following = [*timesteps, None][position_in(timesteps, timestep) + 1]  # type: ignore[operator]
        options = {name: following if value is NextTimestep else value for name, value in self._options.items()}
        return self._step(output, timestep, sample, **options)


def _check_protocol(scheduler: Any) -> None:
    for name in ("config", "set_timesteps", "step"):
        if not hasattr(scheduler, name):
            raise ValueError(f"scheduler: got {type(scheduler).__name__} without {name}, expected diffusers' protocol")
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(f"scheduler: got {type(scheduler).__name__}, whose noise is a Brownian tree's, expected draws")


@contextmanager
def _running(scheduler: Any) -> Iterator[None]:
    """Context in which a scheduler that fails is one that cannot be compiled."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"scheduler: got {type(scheduler).__name__}, which does not run on basis vectors "
            f"({type(error).__name__}: {error}), expected one of linear steps"
        ) from error


def _compile(scheduler: Any, first: int, step_options: Mapping[str, Any], limited: bool) -> CompiledScheduler:
    original = copy.deepcopy(scheduler)
    if step_options:
        original.step = StepWith(original, dict(step_options))
    learned = "learned" in str(original.config.get("variance_type"))
    with _running(original):
        linear = _without_clip(original)
        response, shorter = (respond(linear, 0.0 if learned else None, length, first) for length in (1.0, 0.3))
    what = f"scheduler: got {type(scheduler).__name__}"
    response = of_known_rounding(response, shorter, what)
    clip = scheduler_clip(original)
    limited = limited or clip is not None
    start = float(getattr(original, "init_noise_sigma", 1.0))
    rows = reduce(response, limited, start)
    p_x, p_m = _prediction(linear, response)
    found: dict[str, Any] = columns(rows, p_x, p_m, limited)
    if "clip_sample" in original.config and (original.config.get("clip_sample") or original.config.get("thresholding")):
        found |= _beside_the_clip(linear, first, p_x, p_m)
    if learned:
        found |= _learned(linear, first, rows.draws, response.rounding)
    order = getattr(scheduler, "order", 1)
    table = StepTable.from_columns(
        c_in=_scales(response),
        t=response.times,
        integer_time=response.integer_time,
        initial_scale=start,
        learned_variance=learned,
        steps=np.arange(response.calls) // order,
        name=type(scheduler).__name__,
        **found,
    )
    random = _random_run(original, first, table)
    predicted = verify(table, rows.draws, random.outputs, random.drawn, random.states, clip, response.rounding, what)
    return CompiledScheduler(table, rows.draws, *_further(response, random, predicted))


def scheduler_clip(scheduler: Any) -> float | DynamicThreshold | None:
    """What a scheduler does to x0, as `Sampler` takes it as `clip`."""
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
    """p_x and p_m where the scheduler tells its x0 (else 0)."""
    config, predictions = scheduler.config, response.predictions
    if config.get("algorithm_type") in _X0_ALGORITHMS or config.get("predict_x0"):
        predictions = response.converted if predictions is None else predictions
    found = None if predictions is None else _of_rows(predictions, response)
    return found or (np.zeros(response.calls), np.zeros(response.calls))


def _of_rows(vectors: Array, response: Response) -> tuple[Array, Array] | None:
    """One vector a row as a sum of the row's state and output: the two coefficients [C]; None if one is no such sum."""
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
        raise ValueError("scheduler: got one whose model inputs are not scaled samples, expected such ones")
    return scales


def _beside_the_clip(linear: Any, first: int, p_x: Array, p_m: Array) -> dict[str, Array]:
    """a_x, a_0 and a_m of steps whose x0 is limited: derivatives where it is saturated, and what is left there."""
    limited = copy.deepcopy(linear)
    limited.register_to_config(clip_sample=True)
    bound, found = float(limited.config.get("clip_sample_range", 1.0)), []
    zeros = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    for i in range(len(p_x)):
        x, m = _SATURATED * np.sign(p_x[i] or 1.0), _SATURATED * np.sign(p_m[i] or 1.0)
        values = torch.tensor([[x, m], [2 * x, m], [x, 2 * m]], dtype=torch.float64).T.reshape(2, 1, 1, 1, 3)
        output = values[1]
        if "learned" in str(limited.config.get("variance_type")):
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        fresh = copy.deepcopy(limited)
        with drawing(fresh, lambda like: zeros), in_float64(), torch.no_grad():
            t = fresh.timesteps[first + i]
            base, by_x, by_m = fresh.step(output, t, values[0]).prev_sample.double().reshape(-1).tolist()
        a_x, a_m = (by_x - base) / x, (by_m - base) / m
        found.append((a_x, (base - a_x * x - a_m * m) / bound, a_m))
    a_x, a_0, a_m = np.array(found).T
    size = max(float(np.abs(a_m).max()), 1.0)
    return {"a_x": a_x, "a_0": a_0, "a_m": np.where(np.abs(a_m) > 1e-9 * size, a_m, 0.0)}


def _learned(scheduler: Any, first: int, draws: tuple[tuple[float, ...], ...], rounding: float) -> dict[str, Array]:
    """l_0 and l_v: the logarithm of the noise is linear in the variance channels."""
    logs = []
    for v in (-1.0, 0.0, 1.0):
        s = reduce(replace(respond(scheduler, v, first=first), rounding=rounding)).s
        logs.append(np.log2(np.where(s > 0, s, 1.0)))
    if np.abs(logs[0] - 2 * logs[1] + logs[2]).max() > 1e-4:
        raise ValueError("scheduler: got noise that is not exponential in the variance channels, expected that")
    quiet = np.array([not any(row) for row in draws])
    return {
        "s": np.zeros(len(draws)),
        "l_0": np.where(quiet, NO_NOISE, logs[1]),
        "l_v": np.where(quiet, 0.0, (logs[2] - logs[0]) / 2),
    }


@dataclass(frozen=True, eq=False)
class _RandomRun:
    """A run of a scheduler on random outputs, in float64.

    Attributes:
        outputs, drawn, further: of every step, what it was given, has drawn and has returned beside the sample.
        states: the samples, the first one and that of every step.
    """

    outputs: list[Tensor]
    drawn: list[list[Tensor]]
    states: list[Tensor]
    further: list[Tensor]


def _random_run(scheduler: Any, first: int, table: StepTable) -> _RandomRun:
    generator = torch.Generator().manual_seed(0)

    def normal(channels: int = 3) -> Tensor:
        return torch.empty(2, channels, 4, 4, dtype=torch.float64).normal_(generator=generator)

    def draw(like: Tensor | None) -> Tensor:
        run.drawn[-1].append(normal())
        return run.drawn[-1][-1]

    outputs = [normal(6 if table.learned_variance else 3).clamp(-1.5, 1.5) for _ in range(len(table))]
    run = _RandomRun(outputs, [], [normal() * table.initial_scale], [])
    original = copy.deepcopy(scheduler)
    with drawing(original, draw), in_float64(), torch.no_grad():
        for t, output in zip(original.timesteps[first:], outputs, strict=True):
            run.drawn.append([])
            if hasattr(original, "scale_model_input"):
                original.scale_model_input(run.states[-1], t)
            result = original.step(output, t, run.states[-1])
            run.states.append(result.prev_sample.double())
            run.further.extend(returned_second(result))
    return run


def _further(response: Response, random: _RandomRun, predicted: list[Tensor]) -> tuple[str, Array | None]:
    """What a scheduler returns beside the sample, as `CompiledScheduler` says it."""
    if not random.further:
        return "none", None

    def is_returned(vectors: list[Tensor]) -> bool:
        return max(map(distance, vectors, random.further)) <= TOLERANCE

    if len(random.further) == response.calls and is_returned(predicted):
        return "x0", None
    found = None if response.further is None else _of_rows(response.further, response)
    if found is not None:
        pairs = zip(*found, random.states, random.outputs, strict=False)
        if is_returned([of_x * x + of_m * m[:, : x.shape[1]] for of_x, of_m, x, m in pairs]):
            return "sum", np.stack(found, axis=1)
    return "unknown", None
