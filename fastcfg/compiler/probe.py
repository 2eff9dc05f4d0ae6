"""Run a scheduler on basis vectors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
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
        inputs: [C, size], the model's inputs.
        times: [C], its timesteps.
        integer_time: whether these are integers.
        drawn: [C + 1], the number of draws before every model call, and in all.
        predictions: [C, size] or None, the predicted x0 where `step` returns it.
        converted: [C, size] or None, the results of `convert_model_output`.
        further: [C, size] or None, the second value `step` returns.
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


def respond(scheduler: Any, variance: float | None = None, length: float = 1.0, first: int = 0) -> Response:
    """Run a scheduler whose timesteps are set.

    Args:
        scheduler: an object of diffusers' protocol; a copy is run.
        variance: the value of the model's variance channels; None for a model without.
        length: of the basis vectors. Linear steps do not depend on it.
        first: index of the timestep the run begins with.

    Raises:
        ValueError: a step draws noise more than `MAX_DRAWS` times.
    """
    scheduler = copy.deepcopy(scheduler)
    timesteps = scheduler.timesteps[first:]
    calls, drawn = len(timesteps), 0
    size = 1 + (1 + MAX_DRAWS) * calls

    def draw(like: Tensor | None) -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn > MAX_DRAWS * calls:
            raise ValueError(f"scheduler: got more than {MAX_DRAWS} draws of noise per step, expected at most that")
        return basis_vector(size, calls + drawn, length)

    converted: list[Tensor] = []
    convert = getattr(scheduler, "convert_model_output", None)
    if convert is not None:

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = convert(*args, **kwargs)
            converted.append(result)
            return result

        scheduler.convert_model_output = recorded
    x, inputs, predictions, further, draws = basis_vector(size, 0, length), [], [], [], [0]
    states = [x]
    with drawing(scheduler, draw), in_float64(), torch.no_grad():
        for i, t in enumerate(timesteps):
            inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
            output = basis_vector(size, 1 + i, length)
            if variance is not None:
                output = torch.cat([output, torch.full_like(output, variance)], dim=1)
            result = scheduler.step(output, t, x)
            x = result.prev_sample
            states.append(x)
            prediction = getattr(result, "pred_original_sample", None)
            predictions += [] if prediction is None else [prediction]
            further += second_value(result)
            draws.append(drawn)

    def coefficients(vectors: list[Tensor]) -> Array:
        used = torch.stack([vector.double().reshape(-1)[: 1 + calls + drawn] for vector in vectors])
        found: Array = used.numpy() / length
        return found

    return Response(
        coefficients(states),
        coefficients(inputs),
        timesteps.double().cpu().numpy(),
        not timesteps.is_floating_point(),
        tuple(draws),
        coefficients(predictions) if len(predictions) == calls else None,
        coefficients(converted) if len(converted) == calls else None,
        coefficients(further) if len(further) == calls else None,
    )


def second_value(result: Any) -> list[Tensor]:
    """The value a step returns beside the sample, float64, in a list; empty if it returns none."""
    return [value.double() for value in list(result.values())[1:2]] if isinstance(result, Mapping) else []
