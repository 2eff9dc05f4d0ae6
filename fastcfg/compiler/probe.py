"""Run a scheduler on basis vectors, and on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .patching import drawing, in_float64
from .protocol import NextTimestep, host_copy, option, set_option, step_result
from .quadrature import integrating_at_once

Array = NDArray[np.float64]

ROUNDING = 1e-12  # of float64 coefficients, relative to a row's largest
ROUNDING_FLOAT32 = 1e-7  # of schedulers that still pass through float32
MAX_DRAWS = 4  # of noise, per step
CHANNELS = 3  # of every sample here: some schedulers that know of variance channels take the first three to be the mean


@dataclass(frozen=True, eq=False)
class Response:
    """A run on basis vectors. Coordinate 0 is x_T, the next C are the model's outputs, the rest the draws of noise.

    Attributes:
        states: [C + 1, size], the sample before every model call, and the last one.
        inputs, times, integer_time: the model's [C, size], its timesteps [C], and whether these are integers.
        drawn: [C + 1], the number of draws before every model call, and in all.
        predictions, converted: [C, size] or None, the predicted x0 where `step` returns it, and the results of
            `convert_model_output`.
        rounding: of the coefficients, `ROUNDING` or `ROUNDING_FLOAT32`.
    """

    states: Array
    inputs: Array
    times: Array
    integer_time: bool
    drawn: tuple[int, ...]
    predictions: Array | None
    converted: Array | None = None
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


def normal_sample(generator: torch.Generator, channels: int = CHANNELS) -> Tensor:
    """Standard normals [2, channels, 4, 4], float64."""
    return torch.empty(2, channels, 4, 4, dtype=torch.float64).normal_(generator=generator)


@dataclass(eq=False)
class Recording:
    """A run in float64: the model's outputs and inputs, the first sample and that of every step, each step's draws, and
    the values of `pred_original_sample` and `convert_model_output`. All are copies: steps may write into what they are
    given and what they have returned."""

    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    drawn: list[list[Tensor]] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    converted: list[Tensor] = field(default_factory=list)


# What the model returns, by the number of its call and its input; and a draw of noise, by the number of the step, of
# the draw in the step, and of the draw in the run.
Output = Callable[[int, Tensor], Tensor]
Noise = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Original:
    """A scheduler to be run: copies of it are.

    Attributes:
        scheduler: with timesteps set.
        first: the index of the timestep that a run begins with.
        options: further arguments of every step.
        tick: called after every step.
    """

    scheduler: Any
    first: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    tick: Callable[[], object] = lambda: None

    @property
    def timesteps(self) -> Any:
        """Those of a run."""
        return self.scheduler.timesteps[self.first :]

    @property
    def learned(self) -> bool:
        """Whether its model has variance channels."""
        return "learned" in str(option(self.scheduler, "variance_type"))

    def with_options(self, **values: Any) -> Original:
        """The same with options of its `config` set."""
        changed = host_copy(self.scheduler)
        for name, value in values.items():
            set_option(changed, name, value)
        return replace(self, scheduler=changed)

    def record(
        self, start: Tensor, output: Output, noise: Noise, samples: Callable[[int], Tensor] | None = None
    ) -> Recording:
        """A run as a sampling loop makes it: every step is given the tensor that the last one returned, or that of
        `samples`, by the number of the step.

        Raises:
            ValueError: a sample is not finite, or a step draws more than four times.
        """
        scheduler, run, draws = host_copy(self.scheduler), Recording(states=[start.clone()]), 0

        def draw(like: Tensor | None) -> Tensor:
            nonlocal draws
            in_step = run.drawn[-1]
            if len(in_step) == MAX_DRAWS:
                raise ValueError(
                    f"scheduler: got more than {MAX_DRAWS} draws of noise in a step, expected at most that"
                )
            in_step.append(noise(len(run.drawn) - 1, len(in_step), draws))
            draws += 1
            return in_step[-1].clone()

        convert = getattr(scheduler, "convert_model_output", None)
        if convert is not None:

            def recorded(*args: Any, **kwargs: Any) -> Any:
                converted = convert(*args, **kwargs)
                run.converted.extend([converted.clone()] if isinstance(converted, Tensor) else [])
                return converted

            scheduler.convert_model_output = recorded
        scale = getattr(scheduler, "scale_model_input", None)
        timesteps = [*scheduler.timesteps[self.first :], None]
        with drawing(scheduler, draw), in_float64(), integrating_at_once(), torch.no_grad():
            x = start.clone()
            for i, t in enumerate(timesteps[:-1]):
                x = x if samples is None else samples(i)
                run.drawn.append([])
                run.inputs.append((x if scale is None else scale(x, t)).double().clone())
                run.outputs.append(output(i, run.inputs[-1]))
                options = {k: timesteps[i + 1] if v is NextTimestep else v for k, v in self.options.items()}
                result = step_result(scheduler.step(run.outputs[-1].clone(), t, x, **options))
                x = result.sample.double()
                if not math.isfinite(x.sum().item()):
                    name = type(scheduler).__name__
                    found = f"{name} with samples that are not finite (from step {i} on)"
                    raise ValueError(f"scheduler: got {found}, expected finite ones")
                run.states.append(x.clone())
                if result.prediction is not None:
                    run.predictions.append(result.prediction.double().clone())
                self.tick()
        return run

    def record_numbers(self, start: float, size: float = 1.0, batch: int = 2, variance: float = 1.0) -> Recording:
        """A run of one or two samples on random numbers within 1.5, from noise of deviation `start`, all times `size`.
        Outputs and draws are as large as the model's inputs where these are above 1, so that every term of every row
        counts; variance channels are times `variance`."""
        generator = torch.Generator().manual_seed(0)
        grown = 1.0

        def numbers(channels: int, times: float) -> Tensor:
            return normal_sample(generator, channels)[:batch].clamp(-1.5, 1.5) * times

        def output(call: int, given: Tensor) -> Tensor:
            nonlocal grown
            grown = min(max(1.0, float(given.square().mean().sqrt()) / size), 1e100)
            mean = numbers(CHANNELS, size * grown)
            return torch.cat([mean, numbers(CHANNELS, variance)], dim=1) if self.learned else mean

        return self.record(numbers(CHANNELS, size * start), output, lambda *_: numbers(CHANNELS, size * grown))

    def respond(self, drawn: Sequence[int]) -> Response:
        """A run on basis vectors. `drawn` are the numbers of draws before every step, and in all; variance channels are
        0.

        Raises:
            ValueError: it draws more or less often.
        """
        timesteps = torch.as_tensor(self.timesteps)
        calls = len(timesteps)
        size = 1 + calls + drawn[-1]
        zeros = torch.zeros(1, CHANNELS, 1, -(-size // CHANNELS), dtype=torch.float64)

        def vector(index: int) -> Tensor:
            unit = zeros.clone()
            unit.view(-1)[index] = 1.0
            return unit

        def output(call: int, _: Tensor) -> Tensor:
            return torch.cat([vector(1 + call), zeros], dim=1) if self.learned else vector(1 + call)

        def noise(step: int, in_step: int, draw: int) -> Tensor:
            return vector(min(1 + calls + draw, size - 1))

        run = self.record(vector(0), output, noise)
        if np.cumsum([0, *map(len, run.drawn)]).tolist() != list(drawn):
            raise ValueError("scheduler: got draws of noise that depend on the sample, expected as many for every one")

        def coefficients(vectors: list[Tensor], count: int = calls) -> Array | None:
            if len(vectors) != count or any(vector.numel() != zeros.numel() for vector in vectors):
                return None
            found: Array = torch.stack([vector.double() for vector in vectors]).view(count, -1)[:, :size].numpy()
            return found

        states, inputs = coefficients(run.states, calls + 1), coefficients(run.inputs)
        if states is None or inputs is None:
            raise ValueError("scheduler: got samples whose size changes, expected one size")
        return Response(
            states=states,
            inputs=inputs,
            times=timesteps.double().cpu().numpy(),
            integer_time=not timesteps.is_floating_point(),
            drawn=tuple(drawn),
            predictions=coefficients(run.predictions),
            converted=coefficients(run.converted),
        )
