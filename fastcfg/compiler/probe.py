"""Run a scheduler on basis vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .patching import drawing, in_float64

Array = NDArray[np.float64]

ROUNDING = 1e-12  # of float64 coefficients, relative to a row's largest
ROUNDING_FLOAT32 = 1e-7  # of schedulers that still pass through float32
MAX_DRAWS = 4  # of noise, per step


@dataclass(frozen=True, eq=False)
class Response:
    """A run on basis vectors. Coordinate 0 is x_T, the next C are the model's outputs, the rest the draws of noise.

    Attributes:
        states: [C + 1, size], the sample before every model call, and the last one.
        inputs, times, integer_time: the model's [C, size], its timesteps [C], and whether these are integers.
        drawn: [C + 1], the number of draws before every model call, and in all.
        predictions, converted, further: [C, size] or None, the predicted x0 where `step` returns it, the results of
            `convert_model_output`, and the second value `step` returns.
        rounding: of the coefficients, `ROUNDING` or `ROUNDING_FLOAT32`.
    """

    states: Array
    inputs: Array
    times: Array
    integer_time: bool
    drawn: tuple[int, ...]
    predictions: Array | None
    converted: Array | None = None
    further: Array | None = None
    rounding: float = ROUNDING

    @property
    def calls(self) -> int:
        """C, the number of model calls."""
        return len(self.inputs)


def basis_vector(size: int, index: int, length: float) -> Tensor:
    """A sample [1, 1, 1, size] that is `length` at one index and 0 elsewhere, float64."""
    vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
    vector[..., index] = length
    return vector


def normal_sample(generator: torch.Generator, channels: int = 3) -> Tensor:
    """Standard normals [2, channels, 4, 4], float64."""
    return torch.empty(2, channels, 4, 4, dtype=torch.float64).normal_(generator=generator)


@dataclass(eq=False)
class Recording:
    """A scheduler's run in float64: the model's outputs and inputs, the first sample and that of every step, each
    step's draws, and the values of `pred_original_sample`, `convert_model_output` and the second field returned."""

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    drawn: list[list[Tensor]] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    converted: list[Tensor] = field(default_factory=list)
    further: list[Tensor] = field(default_factory=list)


def record(
    scheduler: Any, first: int, start: Tensor, output: Callable[[int], Tensor], noise: Callable[[int], Tensor]
) -> Recording:
    """Run a copy of a scheduler from `timesteps[first]` on; output and noise are called with the number of the call and
    of the draw."""
    scheduler, run = copy.deepcopy(scheduler), Recording(states=[start])

    def draw(like: Tensor | None) -> Tensor:
        run.drawn[-1].append(noise(sum(map(len, run.drawn))))
        return run.drawn[-1][-1]

    convert = getattr(scheduler, "convert_model_output", None)
    if convert is not None:

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            run.converted.append(convert(*args, **kwargs))
            return run.converted[-1]

        scheduler.convert_model_output = recorded
    with drawing(scheduler, draw), in_float64(), torch.no_grad():
        for i, t in enumerate(scheduler.timesteps[first:]):
            x = run.states[-1]
            run.drawn.append([])
            run.inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
            run.outputs.append(output(i))
            result = scheduler.step(run.outputs[-1], t, x)
            run.states.append(result.prev_sample.double())
            prediction = getattr(result, "pred_original_sample", None)
            run.predictions.extend([] if prediction is None else [prediction])
            if isinstance(result, Mapping):
                run.further.extend(value.double() for value in list(result.values())[1:2])
    return run


def respond(scheduler: Any, variance: float | None = None, length: float = 1.0, first: int = 0) -> Response:
    """Run a scheduler, with timesteps set, on basis vectors of a length, from `timesteps[first]` on. `variance` is the
    value of the model's variance channels, None for a model without."""
    timesteps = scheduler.timesteps[first:]
    calls = len(timesteps)
    size = 1 + (1 + MAX_DRAWS) * calls

    def output(call: int) -> Tensor:
        vector = basis_vector(size, 1 + call, length)
        return vector if variance is None else torch.cat([vector, torch.full_like(vector, variance)], dim=1)

    def noise(draw: int) -> Tensor:
        if draw >= MAX_DRAWS * calls:
            raise ValueError(f"scheduler: got more than {MAX_DRAWS} draws of noise per step, expected at most that")
        return basis_vector(size, 1 + calls + draw, length)

    run = record(scheduler, first, basis_vector(size, 0, length), output, noise)
    drawn = np.cumsum([0, *map(len, run.drawn)]).tolist()

    def coefficients(vectors: list[Tensor]) -> Array:
        used = torch.stack([vector.double().reshape(-1)[: 1 + calls + drawn[-1]] for vector in vectors])
        found: Array = used.numpy() / length
        return found

    values = (run.predictions, run.converted, run.further)
    predictions, converted, further = (coefficients(v) if len(v) == calls else None for v in values)
    states, inputs, times = coefficients(run.states), coefficients(run.inputs), timesteps.double().cpu().numpy()
    integer_time, counts = not timesteps.is_floating_point(), tuple(drawn)
    return Response(states, inputs, times, integer_time, counts, predictions, converted, further)
