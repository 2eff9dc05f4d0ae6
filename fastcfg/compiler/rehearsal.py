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

from ..utils.identity import value_key
from ..utils.lru import LRU
from .assembly import Compiled
from .patching import draw_function, drawing
from .sampler import taken_by, trace_sampler
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


@dataclass(frozen=True)
class SamplerRehearsal:
    """What a sampling function asks of its callback and noise sampler.

    Attributes:
        draws: the noise sampler's arguments (sigma, sigma_next) for every draw; None for `torch.randn_like`.
        callbacks: the callback's dictionaries, without samples, by number of the model call before.
        plain_callbacks: whether their samples are the last model call's input and result.
        tree: the arguments, after x, of the function's own Brownian tree; None if it makes none.
        dtypes: of the last model input and of the result: most functions turn half-precision samples into float32.
    """

    draws: tuple[tuple[Any, ...] | None, ...]
    callbacks: dict[int, dict[str, Any]]
    plain_callbacks: bool
    tree: tuple[tuple[Any, ...], dict[str, Any]] | None
    dtypes: tuple[torch.dtype, torch.dtype]


_rehearsed: LRU[tuple[Compiled, SamplerRehearsal]] = LRU(32)


def compile_and_rehearse(
    sample_fn: Callable[..., Tensor],
    levels: tuple[float, ...],
    level_dtype: torch.dtype,
    x_dtype: torch.dtype,
    given_noise: bool,
    options: Mapping[str, Any],
) -> tuple[Compiled, SamplerRehearsal]:
    """`trace_sampler` and a rehearsal with the dtypes of sigmas and x of a call, and a `noise_sampler` if the call has
    one; results are cached. Options are numbers, strings or None.

    Raises:
        ValueError: the function cannot be compiled, or fails on the example.
    """

    def make() -> tuple[Compiled, SamplerRehearsal]:
        rehearsal = _rehearse(sample_fn, torch.tensor(levels, dtype=level_dtype), x_dtype, given_noise, options)
        compiled = trace_sampler(sample_fn, torch.tensor(levels, dtype=torch.float64), **options)
        if len(rehearsal.draws) != len(compiled.start_draws) + sum(map(len, compiled.draws)):
            raise ValueError("its draws of noise depend on the dtype")
        return compiled, rehearsal

    return _rehearsed.get_or_make((sample_fn, levels, level_dtype, x_dtype, given_noise, value_key(options)), make)


def _rehearse(
    sample_fn: Callable[..., Tensor], sigmas: Tensor, dtype: torch.dtype, given_noise: bool, options: Mapping[str, Any]
) -> SamplerRehearsal:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    draws: list[tuple[Any, ...] | None] = []
    trees: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    callbacks: dict[int, dict[str, Any]] = {}
    plain = True
    x = torch.zeros(1, 1, 1, 2, dtype=dtype)

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        inputs.append(x)
        outputs.append(torch.ones_like(x) * len(inputs))
        return outputs[-1]

    def callback(info: dict[str, Any]) -> None:
        nonlocal plain
        call = len(inputs) - 1
        plain = plain and call >= 0 and info.get("x") is inputs[-1] and info.get("denoised") is outputs[-1]
        plain = plain and call not in callbacks
        callbacks[call] = {k: None if k in ("x", "denoised") else v for k, v in info.items()}

    def drawn(arguments: tuple[Any, ...] | None) -> Tensor:
        draws.append(arguments)
        return torch.zeros_like(x)

    def noise_sampler(*sigmas: Any) -> Tensor:
        return drawn(sigmas)

    def brownian_tree(x: Tensor, *args: Any, **kwargs: Any) -> Callable[..., Tensor]:
        trees.append((args, kwargs))
        return noise_sampler

    offered: dict[str, Any] = {"noise_sampler": noise_sampler} if given_noise else {}
    arguments = taken_by(sample_fn, callback=callback, disable=True, **offered) | dict(options)
    try:
        with drawing(sample_fn, lambda _: drawn(None), brownian_tree), torch.no_grad():
            result = sample_fn(model, x, sigmas, **arguments)
        dtypes = inputs[-1].dtype, result.dtype
    except Exception as error:
        raise ValueError(f"it fails on an example ({type(error).__name__}: {error})") from error
    return SamplerRehearsal(tuple(draws), callbacks, plain, trees[0] if trees else None, dtypes)
