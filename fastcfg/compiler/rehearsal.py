"""Rehearsals: one run of an original on a small example, to see its draws, arguments and replies.

A table says what a step computes. A drop-in must also draw noise in the original's dtypes, return the original's class,
and give callbacks and noise samplers the original's arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .assembly import Compiled
from .patching import draw_function, drawing
from .scheduler import StepWithOptions


@dataclass(frozen=True)
class StepRehearsal:
    """What a scheduler's `step` draws and returns.

    Attributes:
        draw: the function it draws with, called as draw(shape, generator=, device=, dtype=).
        noise_dtype: the dtype it draws in.
        kind: the class returned with return_dict=True.
        names: of its fields.
        dtypes: of their tensors.
    """

    draw: Callable[..., Tensor]
    noise_dtype: torch.dtype
    kind: Any
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]

    def reply(self, values: Sequence[Tensor], return_dict: bool) -> Any:
        """The values as `step` returns them."""
        values = [value.to(dtype) for value, dtype in zip(values, self.dtypes, strict=True)]
        return self.kind(**dict(zip(self.names, values, strict=True))) if return_dict else tuple(values)


def rehearse_step(
    scheduler: Any,
    compiled: Compiled,
    first: int,
    options: Mapping[str, Any],
    output_dtype: torch.dtype,
    sample_dtype: torch.dtype,
) -> StepRehearsal:
    """Run one step of a copy of a scheduler (timesteps set, in the host's memory) that was compiled from its timestep
    `first` on with `step_options`.

    Raises:
        ValueError: the step fails, or returns more than two values.
    """
    original, noise_dtypes = copy.deepcopy(scheduler), [output_dtype]
    original.is_scale_input_called = True  # or some warn
    row = next((row for row, draws in enumerate(compiled.draws) if draws), 0)
    output = torch.zeros(1, 8 if compiled.table.learned_variance else 4, 8, 8, dtype=output_dtype)
    sample = torch.zeros(1, 4, 8, 8, dtype=sample_dtype)

    def draw(like: Tensor | None) -> Tensor:
        noise_dtypes.append(like.dtype)  # type: ignore[union-attr]
        return torch.zeros(1, 4, 8, 8, dtype=noise_dtypes[-1])

    try:
        with drawing(original, draw), torch.no_grad():
            result = StepWithOptions(original, options)(output, original.timesteps[first + row], sample)
    except Exception as error:
        raise ValueError(f"its step fails on an example ({type(error).__name__}: {error})") from error
    fields = {name: value for name, value in result.items() if value is not None}
    if len(fields) != 1 + (compiled.further != "none"):
        raise ValueError(f"its steps return {', '.join(fields)}, expected at most two values")
    dtypes = tuple(value.dtype for value in fields.values())
    return StepRehearsal(draw_function(type(scheduler)), noise_dtypes[-1], type(result), tuple(fields), dtypes)
