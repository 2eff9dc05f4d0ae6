"""A run of a scheduler whose timesteps are set, by its compiled table."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compiler import CompiledScheduler, NextTimestep, compile_timesteps, scheduler_clip
from ...compiler.probe import drawing, position_in
from ...compiler.scheduler import StepWith
from ...ops.stepper import Stepper
from .fall_through import FallThroughError

__all__ = ["SchedulerRun"]


# Kept from run to run: shapes and dtypes, each with the saved tensors' memory.
_MOST_STEPPERS = 4


@dataclass(frozen=True)
class _Answer:
    """What a `step` returns.

    Attributes:
        kind: the class that return_dict=True returns.
        names: of its fields.
        dtypes: of their tensors.
        drawn: the dtype of its noise.
    """

    kind: Any
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    drawn: torch.dtype


@dataclass(eq=False)
class _Rows:
    """A compiled table in use.

    Attributes:
        compiled: the table.
        first: the position in `timesteps` of its row 0.
        options: the arguments of `step` that it was compiled with.
        stateful: whether it saves tensors.
    """

    compiled: CompiledScheduler
    first: int
    options: Mapping[str, Any]
    stateful: bool


class SchedulerRun:
    """Steps of a scheduler from `set_timesteps` to the next one.

    Args:
        scheduler: an instance of a fused class, whose timesteps are set and which has made no step.
        original: the class that was fused.
        options: arguments of `step` that the run before was given.

    Attributes:
        timesteps: the scheduler's, by which a run is known.
        options: those of the last step.
    """

    def __init__(self, scheduler: Any, original: type, options: Mapping[str, Any]) -> None:
        self.timesteps, self.options = scheduler.timesteps, dict(options)
        self._scheduler = scheduler
        # What is compiled: the scheduler as it was before us, in the host's memory.
        self._twin: Any = object.__new__(original)
        self._twin.__dict__.update({n: _on_host(v) for n, v in vars(scheduler).items() if not n.startswith("_fastcfg")})
        self._values: list[Any] = self._twin.timesteps.tolist()
        named = list(inspect.signature(original.step).parameters.values())  # type: ignore[attr-defined]
        self._defaults = {parameter.name: parameter.default for parameter in named[4:]}
        self._clip = scheduler_clip(scheduler)
        self._draw = _drawing_function(original)
        self._whole: CompiledScheduler | None = None
        self._rows: _Rows | None = None
        self._next: int | None = None
        self._fallen = ""
        self._scales: list[float] = []
        self._steppers: dict[Any, Stepper] = {}
        self._answers: dict[Any, _Answer] = {}

    def compile(self, before: SchedulerRun | None = None) -> None:
        """The table of a run from the first timestep, with the last run's options.

        Args:
            before: a run whose memory serves again if it had the same table.

        Raises:
            FallThroughError: it is none.
        """
        self._whole = self._compiled(0, self.options)
        if before is not None and before._whole is self._whole:
            self._steppers, self._answers, self._scales = before._steppers, before._answers, before._scales

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """`scale_model_input`.

        Raises:
            FallThroughError: there is no table, or the timestep is none of the run's.
        """
        position = self._position(timestep)
        if not self._scales:
            self._scales = self._compiled(0, self.options).table["c_in"].tolist()
        if hasattr(self._scheduler, "is_scale_input_called"):
            self._scheduler.is_scale_input_called = True
        scale = self._scales[position]
        return sample if scale == 1.0 else sample * scale

    def step(self, output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]) -> Any:
        """`step`, whose options may also be positional: here all have names.

        Raises:
            FallThroughError: the original must make this step and all that follow.
            ValueError: an output that does not fit the sample, or options that change while tensors are saved.
        """
        options = dict(options)
        generator, noise = options.pop("generator", None), options.pop("variance_noise", None)
        return_dict = options.pop("return_dict", True)
        try:
            self._check(output, sample, generator, noise)
            position = self._position(timestep)
            changed = self._changed(options, position)
            rows = self._select(position, changed)
            answer = self._answer(output, sample, rows)
        except FallThroughError as error:
            if self._next is not None and self._rows is not None and self._rows.stateful:
                raise ValueError(
                    f"step: got one that cannot be fused ({error}) in the middle of a run whose first ones were, "
                    "expected such ones from the beginning of a run"
                ) from error
            self._fallen = str(error)
            raise
        row, compiled = position - rows.first, rows.compiled
        noise = self._noise(compiled.draws[row], answer.drawn, sample, generator, noise)
        values = self._apply(compiled, row, output, sample, noise)
        self._next = position + 1
        if "_step_index" in vars(self._scheduler):
            self._scheduler._step_index = position + 1
        values = [value.to(dtype) for value, dtype in zip(values, answer.dtypes, strict=True)]
        return answer.kind(**dict(zip(answer.names, values, strict=True))) if return_dict else tuple(values)

    def _changed(self, options: Mapping[str, Any], position: int) -> dict[str, Any]:
        """The options that are not the defaults."""
        changed: dict[str, Any] = {}
        last = position == len(self._values) - 1
        for name, value in options.items():
            if name not in self._defaults:
                raise FallThroughError(f"its step has no argument {name}")
            if position_in(self.timesteps, value) == position + 1 or (
                last and value is None and self.options.get(name) is NextTimestep
            ):
                changed[name] = NextTimestep
            elif not isinstance(value, bool | int | float | str | None):
                raise FallThroughError(f"{name} of its step is a {type(value).__name__}")
            elif value != self._defaults[name]:
                changed[name] = value
        return changed

    def _check(self, output: Any, sample: Any, generator: Any, noise: Any) -> None:
        if self._fallen:
            raise FallThroughError(self._fallen)
        if not (isinstance(output, Tensor) and isinstance(sample, Tensor) and sample.ndim and sample.numel()):
            raise FallThroughError("sample and model output are no tensors with elements")
        if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
            raise FallThroughError("gradients through its step are wanted")
        if output.dtype == torch.float64 != sample.dtype:
            raise FallThroughError("the model output is wider than the sample")
        if generator is not None and noise is not None:
            raise FallThroughError("it is given both generator and variance_noise")

    def _position(self, timestep: Any) -> int:
        """Where in `timesteps` the run is. Nothing is read back from the device for a timestep that is an element of
        `timesteps`."""
        state = vars(self._scheduler)
        if state.get("_step_index") is not None:
            return int(state["_step_index"])
        if state.get("_begin_index") is not None:
            return int(state["_begin_index"])
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise FallThroughError("its timesteps differ by sample")
            if (offset := position_in(self.timesteps, timestep)) is not None:
                return offset
        value = float(timestep)
        if self._next is not None and self._values[self._next : self._next + 1] == [value]:
            return self._next
        if value not in self._values:
            raise FallThroughError(f"timestep {value:g} is none of its timesteps")
        return self._values.index(value)

    def _select(self, position: int, options: dict[str, Any]) -> _Rows:
        """The table for a step."""
        rows = self._rows
        if position >= len(self._values):
            raise FallThroughError("there are more steps than timesteps")
        if rows is not None and position == self._next and rows.stateful and options != rows.options:
            raise FallThroughError(f"its options change from {dict(rows.options)} to {options}")
        if rows is not None and options == rows.options and (position == self._next or not rows.stateful):
            return rows
        self.options = options
        compiled = self._compiled(0, options)
        first = position if compiled.table.num_history else 0
        # Methods of several steps have no past where a run begins, wherever that is.
        compiled = self._compiled(first, options) if first else compiled
        self._rows = _Rows(compiled, first, options, bool(compiled.table.num_history))
        return self._rows

    def _compiled(self, first: int, options: Mapping[str, Any]) -> CompiledScheduler:
        if "_begin_index" in vars(self._twin):
            self._twin._begin_index = self._scheduler._begin_index if first else None
        try:
            compiled = compile_timesteps(self._twin, first, options)
        except ValueError as error:
            raise FallThroughError(str(error)) from error
        if compiled.further == "unknown":
            raise FallThroughError("its steps return beside the sample what is neither x0 nor a sum")
        return compiled

    def _answer(self, output: Tensor, sample: Tensor, rows: _Rows) -> _Answer:
        """What the original returns and draws, seen on a small example."""
        key = (output.dtype, sample.dtype)
        if key not in self._answers:
            twin, compiled, drawn = copy.deepcopy(self._twin), rows.compiled, [output.dtype]
            twin.is_scale_input_called = True  # or some warn
            noisy = next((row for row, draws in enumerate(compiled.draws) if draws), 0)
            channels = 8 if compiled.table.learned_variance else 4
            example = torch.zeros(1, channels, 8, 8, dtype=output.dtype), torch.zeros(1, 4, 8, 8, dtype=sample.dtype)

            def draw(like: Tensor | None) -> Tensor:
                drawn.append(like.dtype)  # type: ignore[union-attr]
                return torch.zeros(1, 4, 8, 8, dtype=drawn[-1])

            try:
                with drawing(twin, draw), torch.no_grad():
                    step = StepWith(twin, dict(rows.options))
                    result = step(example[0], twin.timesteps[rows.first + noisy], example[1])
            except Exception as error:
                raise FallThroughError(f"its step fails on an example ({type(error).__name__}: {error})") from error
            fields = {name: value for name, value in result.items() if value is not None}
            if len(fields) != 1 + (compiled.further != "none"):
                raise FallThroughError(f"its steps return {', '.join(fields)}, expected two at most")
            dtypes = tuple(value.dtype for value in fields.values())
            self._answers[key] = _Answer(type(result), tuple(fields), dtypes, drawn[-1])
        return self._answers[key]

    def _noise(
        self, draws: tuple[float, ...], dtype: torch.dtype, sample: Tensor, generator: Any, given: Tensor | None
    ) -> Tensor | None:
        """A row's noise: drawn as the original draws it, also where it is not used."""
        shape, device = tuple(sample.shape), sample.device
        if given is not None and draws:
            drawn = [given.to(device=device, dtype=dtype)]
        else:
            drawn = [self._draw(shape, generator=generator, device=device, dtype=dtype) for _ in draws]
        total = sum(weight**2 for weight in draws) ** 0.5
        if not total:
            return None
        if len(drawn) == 1 and draws[0] > 0:
            return drawn[0]
        first, *others = (z * (weight / total) for z, weight in zip(drawn, draws, strict=True))
        return sum(others, start=first)

    def _apply(
        self, compiled: CompiledScheduler, row: int, output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> list[Tensor]:
        """What the row returns."""
        if sample.ndim < 3:
            # Any three dimensions do: fewer have no variance channels.
            wide = (*sample.shape[:-1], *(1,) * (3 - sample.ndim), sample.shape[-1])
            widened = None if noise is None else noise.reshape(wide)
            values = self._apply(compiled, row, output.reshape(wide), sample.reshape(wide), widened)
            return [value.reshape(sample.shape) for value in values]
        keep_x0 = compiled.further == "x0"
        # A stepper holds its table, whose id is nobody else's until then.
        key = (id(compiled.table), keep_x0, sample.shape, sample.dtype, sample.device)
        stepper = self._steppers.get(key)
        if stepper is None:
            if len(self._steppers) == _MOST_STEPPERS:
                del self._steppers[next(iter(self._steppers))]
            stepper = self._steppers[key] = Stepper(compiled.table, sample, self._clip, keep_x0=keep_x0)
        following, x0 = stepper(row, output, sample, noise)
        if compiled.further == "none":
            return [following]
        if x0 is None:  # LCM, TCD: two kernels more
            of_x, of_m = compiled.sums[row].tolist()  # type: ignore[index]
            x0 = torch.add(sample * of_x, output[:, : sample.shape[1]], alpha=of_m)
        return [following, x0]


def _drawing_function(original: type) -> Callable[..., Tensor]:
    """What a scheduler class draws noise with: diffusers' `randn_tensor` where its module has it."""
    for base in original.__mro__:
        draw: Callable[..., Tensor] | None = getattr(inspect.getmodule(base), "randn_tensor", None)
        if draw is not None:
            return draw
    return torch.randn


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
