"""A scheduler run on basis vectors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

ROUNDING = 1e-12  # of coefficients in float64, in shares of a row's largest
ROUNDING_FLOAT32 = 1e-7  # of those of schedulers that go through float32 by ways of their own
_DRAWS = 4  # of one step, at most

# Held while functions of modules are others: threads put them back in any order.
_replacing = RLock()


@dataclass(frozen=True, eq=False)
class Response:
    """What a scheduler makes of basis vectors: coordinate 0 is x_T, the next C are the model's outputs, the rest draws.

    Attributes:
        states: [C + 1, size], the sample before every model call, and the last one.
        inputs: [C, size], what the model sees.
        times: [C], its timesteps.
        integer_time: whether these are integers.
        drawn: [C + 1], how many draws were made before every model call, and at all.
        predictions: [C, size] or None: the predicted x0, where the scheduler tells it.
        converted: [C, size] or None: what it makes of the model's output first (`convert_model_output`).
        further: [C, size] or None: what a step returns second, whatever it is called.
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


def respond(scheduler: Any, variance: float | None = None, length: float = 1.0, first: int = 0) -> Response:
    """Run a scheduler whose timesteps are set.

    Args:
        scheduler: of diffusers' protocol; it is copied.
        first: index of the timestep that the run begins with.
        variance: the value of the model's variance channels; None for a model without.
        length: of the basis vectors; what is linear does not depend on it.

    Raises:
        ValueError: its model calls depend on numbers that a table does not have.
    """
    scheduler = copy.deepcopy(scheduler)
    timesteps = scheduler.timesteps[first:]
    calls = len(timesteps)
    size, drawn = 1 + (1 + _DRAWS) * calls, 0

    def basis(index: int) -> Tensor:
        vector = torch.zeros(1, 1, 1, size, dtype=torch.float64)
        vector[..., index] = length
        return vector

    def draw(like: Tensor | None) -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn > _DRAWS * calls:
            raise ValueError(f"scheduler: got more than {_DRAWS} draws of noise a step, expected fewer")
        return basis(calls + drawn)

    converted: list[Tensor] = []
    convert = getattr(scheduler, "convert_model_output", None)
    if convert is not None:

        def recorded(*arguments: Any, **options: Any) -> Tensor:
            result: Tensor = convert(*arguments, **options)
            converted.append(result)
            return result

        scheduler.convert_model_output = recorded
    x, states, inputs, predictions, further, draws = basis(0), [], [], [], [], [0]
    with drawing(scheduler, draw), in_float64(), torch.no_grad():
        for i, t in enumerate(timesteps):
            states.append(x)
            inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
            output = basis(1 + i)
            if variance is not None:
                output = torch.cat([output, torch.full_like(output, variance)], dim=1)
            result = scheduler.step(output, t, x)
            x = result.prev_sample
            predictions.append(getattr(result, "pred_original_sample", None))
            further += returned_second(result)
            draws.append(drawn)
    states.append(x)
    used = 1 + calls + drawn
    told = [prediction for prediction in predictions if prediction is not None]
    return Response(
        _stacked(states, used) / length,
        _stacked(inputs, used) / length,
        timesteps.double().cpu().numpy(),
        not timesteps.is_floating_point(),
        tuple(draws),
        _stacked(told, used) / length if len(told) == calls else None,
        _stacked(converted, used) / length if len(converted) == calls else None,
        _stacked(further, used) / length if len(further) == calls else None,
    )


@contextmanager
def drawing(sampler: Any, draw: Callable[[Tensor | None], Tensor]) -> Iterator[None]:
    """Context in which a scheduler's or a function's draws of noise are `draw`'s, which is given one of the shape."""

    def shaped(shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(torch.empty(tuple(shape), dtype=dtype))

    def unpacked(*shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(torch.empty(*shape, dtype=dtype))

    modules = [inspect.getmodule(base) for base in type(sampler).__mro__ if base is not object]
    found: list[tuple[Any, str, Any]] = [(module, "randn_tensor", shaped) for module in modules if module is not None]
    found += [(torch, "randn", unpacked), (torch, "randn_like", lambda like, **_: draw(like))]
    with _replaced(found):
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """Context in which samples in float64 stay that. Schedulers that turn them to float32 first, to be no worse than
    that for samples in half precision, would round what is read off them."""

    def widest(convert: Callable[..., Any]) -> Callable[..., Any]:
        def converted(values: Tensor, *arguments: Any, **options: Any) -> Any:
            result = convert(values, *arguments, **options)
            narrowed = isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64
            return values if narrowed and values.dtype == torch.float64 and values.ndim == 4 else result

        return converted

    with _replaced([(Tensor, name, widest(getattr(Tensor, name))) for name in ("to", "float", "type")]):
        yield


@contextmanager
def _replaced(functions: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Context in which attributes (owner, name), where there are such, are other functions, to this thread."""
    thread, kept = get_ident(), []

    def of_this_thread(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*arguments: Any, **options: Any) -> Any:
            return (function if get_ident() == thread else original)(*arguments, **options)

        return chosen

    with _replacing:
        try:
            for owner, name, function in functions:
                if hasattr(owner, name):
                    kept.append((owner, name, vars(owner).get(name), getattr(owner, name)))
                    setattr(owner, name, of_this_thread(function, kept[-1][-1]))
            yield
        finally:
            for owner, name, own, _ in reversed(kept):
                delattr(owner, name) if own is None else setattr(owner, name, own)


def position_in(timesteps: Tensor, value: Any) -> int | None:
    """Where an element of `timesteps` is in it; None for anything else. Nothing is read from the device."""
    if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (value.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)


def returned_second(result: Any) -> list[Tensor]:
    """What a step has returned beside the sample, whatever it is called; empty if nothing."""
    return [value.double() for value in list(result.values())[1:2]] if isinstance(result, Mapping) else []


def _stacked(vectors: list[Tensor], used: int) -> Array:
    result: Array = torch.stack([vector.double().reshape(-1)[:used] for vector in vectors]).numpy()
    return result
