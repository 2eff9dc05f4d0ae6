"""The steps of a fused scheduler, from one `set_timesteps` to the next."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compiler import Compiled, NextTimestep, StepRehearsal, compile_timesteps, rehearse_step, scheduler_clip
from ...ops.stepper import Stepper
from ...utils.identity import view_index
from ...utils.lru import LRU
from .fall_through import FallThroughError, falling_through


class _Selection(NamedTuple):
    """A compiled table in use: its row 0 is at position `first`, and `options` are the arguments of `step`."""

    compiled: Compiled
    first: int
    options: Mapping[str, Any]
    stateful: bool  # whether the table saves tensors


class _Positions:
    """Finds the position in `timesteps` of a step."""

    def __init__(self, scheduler: Any) -> None:
        self._state, self._timesteps = vars(scheduler), scheduler.timesteps
        self._values: list[float] = scheduler.timesteps.detach().cpu().tolist()
        self.count = len(self._values)
        self.next: int | None = None  # after the last fused step

    def find(self, timestep: Any) -> int:
        """The position of a step. Reads nothing from the device if the timestep is an element of `timesteps`."""
        for name in ("_step_index", "_begin_index"):
            if self._state.get(name) is not None:
                return int(self._state[name])
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise FallThroughError("its timesteps differ by sample")
            if (index := view_index(self._timesteps, timestep)) is not None:
                return index
        value = float(timestep)
        if self.next is not None and self._values[self.next : self.next + 1] == [value]:
            return self.next
        if value not in self._values:
            raise FallThroughError(f"timestep {value:g} is not one of its timesteps")
        return self._values.index(value)

    def advance(self, position: int) -> None:
        """Note that the step at a position was made."""
        self.next = position + 1
        if "_step_index" in self._state:
            self._state["_step_index"] = self.next


class _Tables:
    """Chooses the table of a step. What is compiled is `twin`, a copy of the scheduler in the host's memory with its
    class before it was fused."""

    def __init__(self, scheduler: Any, original: type) -> None:
        self._scheduler = scheduler
        self.twin: Any = object.__new__(original)
        state = {name: value for name, value in vars(scheduler).items() if not name.startswith("_fastcfg")}
        self.twin.__dict__.update({n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in state.items()})
        self.selection: _Selection | None = None

    def compiled(self, first: int, options: Mapping[str, Any]) -> Compiled:
        """The table of a run that begins at a position."""
        if "_begin_index" in vars(self.twin):
            self.twin._begin_index = self._scheduler._begin_index if first else None
        with falling_through(ValueError):
            compiled = compile_timesteps(self.twin, first, options)
        if compiled.further == "unknown":
            raise FallThroughError("the second value its steps return is neither x0 nor a sum of sample and output")
        return compiled

    def begin(self, first: int, options: Mapping[str, Any]) -> None:
        """Choose the table of a run that began at a position, for a scheduler copied in the middle of it."""
        if "_step_index" in vars(self.twin):
            self.twin._step_index = None
        with suppress(FallThroughError):
            compiled = self.compiled(first, options)
            self.selection = _Selection(compiled, first, options, compiled.table.num_history > 0)

    def select(self, position: int, follows: bool, options: Mapping[str, Any]) -> _Selection:
        """The table of a step; `follows` says whether the step before it was fused."""
        now = self.selection
        if now is not None and follows and now.stateful and options != now.options:
            raise FallThroughError(f"its options change from {dict(now.options)} to {dict(options)}")
        if now is not None and options == now.options and (follows or not now.stateful):
            return now
        compiled = self.compiled(0, options)
        # Methods of several steps have no history where a run begins, wherever that is.
        stateful = compiled.table.num_history > 0
        if stateful and position:
            compiled = self.compiled(position, options)
        self.selection = _Selection(compiled, position if stateful else 0, options, stateful)
        return self.selection


class FusedSteps:
    """`step` and `scale_model_input` of a scheduler, of a fused class and with timesteps set, by its compiled table.

    Methods raise `FallThroughError` where the original must run. When the scheduler's `timesteps` are replaced, these
    steps have ended. `options` are the arguments of the last step; at first, of the run before.
    """

    def __init__(self, scheduler: Any, original: type, options: Mapping[str, Any]) -> None:
        self.timesteps, self.options = scheduler.timesteps, dict(options)
        self._scheduler = scheduler
        self._positions, self._tables = _Positions(scheduler), _Tables(scheduler, original)
        # By table, shape and dtype, and by dtypes: the next run takes them over if it has the same table.
        self._steppers: LRU[Stepper] = LRU(4)
        self._rehearsals: LRU[StepRehearsal] = LRU(4)
        named = list(inspect.signature(original.step).parameters.values())  # type: ignore[attr-defined]
        self._defaults = {parameter.name: parameter.default for parameter in named[4:]}
        self._clip = scheduler_clip(scheduler)
        self._whole: Compiled | None = None
        self._scales: list[float] = []
        self._fallen = ""
        self._saved: Tensor | None = None  # the tensors that a copied run had saved, until a stepper takes them

    def midway(self) -> tuple[type, dict[str, Any]] | None:
        """What a copy of the scheduler needs to continue a fused run; None outside of one."""
        following, now = self._positions.next, self._tables.selection
        if self._fallen or following is None or now is None:
            return None
        steppers = self._steppers.values()
        saved = steppers[-1].history if now.stateful and steppers else self._saved
        values = {"options": dict(now.options), "first": now.first, "following": following}
        return type(self), values | {"saved": None if saved is None else saved.clone()}

    @classmethod
    def resumed(
        cls,
        scheduler: Any,
        original: type,
        options: Mapping[str, Any],
        first: int,
        following: int,
        saved: Tensor | None,
    ) -> FusedSteps:
        """The steps of a copy, from what `midway` returned."""
        steps = cls(scheduler, original, options)
        steps._tables.begin(first, options)
        steps._positions.next, steps._saved = following, saved
        return steps

    def compile(self, before: FusedSteps | None = None) -> None:
        """Compile a run from the first timestep with the options of the run before, and take over its memory."""
        self._whole = self._tables.compiled(0, self.options)
        if before is not None and before._whole is self._whole:
            self._steppers, self._rehearsals, self._scales = before._steppers, before._rehearsals, before._scales

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """`scale_model_input`."""
        position = self._positions.find(timestep)
        if not self._scales:
            self._scales = self._tables.compiled(0, self.options).table["c_in"].tolist()
        if hasattr(self._scheduler, "is_scale_input_called"):
            self._scheduler.is_scale_input_called = True
        scale = self._scales[position]
        return sample if scale == 1.0 else sample * scale

    def step(self, output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]) -> Any:
        """`step`, with all further arguments by name.

        Raises:
            ValueError: an output that does not fit the sample, or options that change while tensors are saved.
        """
        options = dict(options)
        generator, noise = options.pop("generator", None), options.pop("variance_noise", None)
        return_dict = options.pop("return_dict", True)
        try:
            if self._fallen:
                raise FallThroughError(self._fallen)
            _check_inputs(output, sample, generator, noise)
            position = self._positions.find(timestep)
            if position >= self._positions.count:
                raise FallThroughError("there are more steps than timesteps")
            changed = self._changed(options, position)
            selection = self._tables.select(position, position == self._positions.next, changed)
            self.options = changed
            rehearsal = self._rehearsal(selection, output.dtype, sample.dtype)
        except FallThroughError as error:
            if self._positions.next is not None and self._tables.selection and self._tables.selection.stateful:
                raise ValueError(
                    f"step: got one that cannot be fused ({error}) in the middle of a run with fused steps that save "
                    "tensors, expected such steps from the beginning of a run"
                ) from error
            self._fallen = str(error)
            raise
        compiled, row = selection.compiled, position - selection.first

        def draw() -> Tensor:
            if noise is not None:
                return noise.to(device=sample.device, dtype=rehearsal.noise_dtype)
            shape = tuple(sample.shape)
            return rehearsal.draw(shape, generator=generator, device=sample.device, dtype=rehearsal.noise_dtype)

        values = self._apply(compiled, row, output, sample, compiled.noise(draw, row))
        self._positions.advance(position)
        return rehearsal.reply(values, return_dict)

    def _changed(self, options: Mapping[str, Any], position: int) -> dict[str, Any]:
        """The options that are not the defaults."""
        changed: dict[str, Any] = {}
        last = position == self._positions.count - 1
        for name, value in options.items():
            if name not in self._defaults:
                raise FallThroughError(f"its step has no argument {name}")
            if view_index(self.timesteps, value) == position + 1 or (
                last and value is None and self.options.get(name) is NextTimestep
            ):
                changed[name] = NextTimestep
            elif not isinstance(value, bool | int | float | str | None):
                raise FallThroughError(f"{name} of its step is a {type(value).__name__}")
            elif value != self._defaults[name]:
                changed[name] = value
        return changed

    def _rehearsal(self, selection: _Selection, output: torch.dtype, sample: torch.dtype) -> StepRehearsal:
        if (found := self._rehearsals.get((output, sample))) is None:
            compiled, first, options = selection.compiled, selection.first, selection.options
            with falling_through(ValueError):
                found = rehearse_step(self._tables.twin, compiled, first, options, output, sample)
            self._rehearsals.put((output, sample), found)
        return found

    def _apply(self, compiled: Compiled, row: int, output: Tensor, sample: Tensor, noise: Any) -> list[Tensor]:
        """The values a row returns."""
        if sample.ndim < 3:
            # Fewer than three dimensions have no variance channels, so they may be reshaped.
            wide = (*sample.shape[:-1], *(1,) * (3 - sample.ndim), sample.shape[-1])
            widened = None if noise is None else noise.reshape(wide)
            values = self._apply(compiled, row, output.reshape(wide), sample.reshape(wide), widened)
            return [value.reshape(sample.shape) for value in values]
        keep_x0 = compiled.further == "x0"
        key = (compiled.table, sample.shape, sample.dtype, sample.device)
        if (stepper := self._steppers.get(key)) is None:
            stepper = Stepper(compiled.table, sample, self._clip, keep_x0=keep_x0)
            self._steppers.put(key, stepper)
            if self._saved is not None and stepper.history is not None:
                stepper.history.copy_(self._saved)
                self._saved = None
        following, x0 = stepper(row, output, sample, noise)
        if compiled.further == "none":
            return [following]
        if x0 is None:  # LCM, TCD: two more kernels
            of_x, of_m = compiled.sums[row].tolist()  # type: ignore[index]
            x0 = torch.add(sample * of_x, output[:, : sample.shape[1]], alpha=of_m)
        return [following, x0]


def _check_inputs(output: Any, sample: Any, generator: Any, noise: Any) -> None:
    if not (isinstance(output, Tensor) and isinstance(sample, Tensor) and sample.ndim and sample.numel()):
        raise FallThroughError("sample and model output are not tensors with elements")
    if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
        raise FallThroughError("its step must let gradients through")
    if output.dtype == torch.float64 != sample.dtype:
        raise FallThroughError("the model output is wider than the sample")
    if generator is not None and noise is not None:
        raise FallThroughError("it is given both generator and variance_noise")
