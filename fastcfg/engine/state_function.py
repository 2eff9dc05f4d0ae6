"""A run's `state_fn`: what changes the state before or after every row, inside the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..known_pixels import POSITIONS, KeptImage
from ..ops import StateChange
from ..reference.log_prob import stochastic_rows
from ..reference.philox import INITIAL_STREAM, STEP_STREAM
from ..state_change import FRESH_STREAM, KNOWN_COLUMNS, NO_NORMALS, RENOISE_STREAM, TENSOR, KnownBuffers, StateSpec
from ..step import StepBuffers
from ..table import StepTable
from ..utils.checks import check_one_of
from ..utils.identity import Alike

StateCallable = Callable[[Tensor, Tensor, Tensor], Tensor]

_STREAMS = {"fixed": INITIAL_STREAM, "fresh": FRESH_STREAM, "row": STEP_STREAM}


@dataclass(frozen=True)
class StateFunction:
    """A function that changes the state, for `Sampler(state_fn=...)`, and its place.

    Attributes:
        function: (x, x0, row) -> the state, [B, C, ...]. x is the state, x0 the one predicted in the row before the
            change (zeros before the first), both the engine's own memory in the state's dtype; row an int64 scalar on
            the device, the index in the table of the row that follows or has just been executed. It is captured with
            the row: tensor operations only, nothing read back.
        when: "after" or "before" every row. A function given to a sampler as it is comes after.

    Raises:
        TypeError: not a function.
        ValueError: another place.
    """

    function: StateCallable
    when: str = "after"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"state_fn: got {type(self.function).__name__}, expected a function (x, x0, row) -> x")
        check_one_of("when", self.when, POSITIONS)


@dataclass(frozen=True)
class StateOptions:
    """What of a `state_fn` programs depend on."""

    spec: StateSpec
    function: Alike  # of a function of the caller's; of None for known pixels
    copies: int = 0  # of normals to static buffers before every row, which functions of the caller's draw


@dataclass(frozen=True, eq=False)
class StatePlan:
    """A call's `state_fn`, checked: the options, the known pixels, and what draws their normals on the host, row by
    row: functions (row, shape) -> tensor."""

    options: StateOptions
    known: KeptImage | None = None
    draws: dict[str, Callable[[int, tuple[int, ...]], Tensor]] = field(default_factory=dict)


def checked_state_function(
    state_fn: Any, table: StepTable, shape: tuple[int, ...], resumed: bool = False
) -> KeptImage | StateFunction:
    """A `state_fn` as given, a function of the caller's in its place; TypeError or ValueError unless it fits a run, or
    one that goes on from a `RunState`."""
    if not isinstance(state_fn, KeptImage):
        function = state_fn if isinstance(state_fn, StateFunction) else StateFunction(state_fn)
        if resumed and function.when == "before":
            expected = "one after rows: the x0 that it is given is not exported"
            raise ValueError(f"state_fn: got a function before rows in a resumed run, expected {expected}")
        return function
    state_fn = state_fn.of_table(table)
    noise = {"noise": state_fn.noise} if isinstance(state_fn.noise, Tensor) else {}
    for name, value in {"image": state_fn.image, "hold": state_fn.hold, **noise}.items():
        fits = value.ndim == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True))
        if not fits or (name != "hold" and value.shape[1:] != shape[1:]):
            raise ValueError(f"state_fn {name}: got shape {tuple(value.shape)}, expected {shape}, or one for the batch")
    return state_fn


def draws_by_seed(state_fn: KeptImage | StateFunction | None) -> bool:
    """Whether a `state_fn` needs the samples' seeds."""
    if not isinstance(state_fn, KeptImage):
        return False
    return isinstance(state_fn.noise, str) or (state_fn.jumps and state_fn.renoise is None)


def check_row_noise(state_fn: KeptImage | StateFunction | None, table: StepTable, kind: str) -> None:
    """Raise ValueError where known pixels need the noise of a row whose step draws none."""
    if isinstance(state_fn, KeptImage) and isinstance(state_fn.noise, str) and state_fn.noise == "row":
        rows = state_fn.rows()
        needed = rows[:, KNOWN_COLUMNS.index("noise")] * rows[:, KNOWN_COLUMNS.index("gate")]
        if kind == "brownian" and np.delete(needed, stochastic_rows(table)).any():
            got = f"'row' with Brownian noise and rows of {table.name} that add none"
            raise ValueError(f"state_fn noise: got {got}, expected 'fixed' or 'fresh'")


def plan_state(state_fn: KeptImage | StateFunction, noise_source: str, seeds: Tensor | None) -> StatePlan:
    """The plan of a checked `state_fn`, for a run whose steps draw from `noise_source` and, by Philox, from `seeds`."""
    before = state_fn.when == "before"
    if isinstance(state_fn, StateFunction):
        return StatePlan(StateOptions(StateSpec(before=before), Alike(state_fn.function)))
    draws = {}
    if isinstance(state_fn.noise, str):
        noise = TENSOR if state_fn.noise == "row" and noise_source == "tensor" else _STREAMS[state_fn.noise]
    else:
        noise = TENSOR
        if not isinstance(state_fn.noise, Tensor):
            draws["noise"] = state_fn.noise
    renoise = NO_NORMALS
    if state_fn.jumps:
        renoise = RENOISE_STREAM
        if state_fn.renoise is not None:
            renoise, draws["renoise"] = TENSOR, state_fn.renoise
    for name, stream in (("noise", noise), ("renoise", renoise)):
        if stream >= 0 and seeds is None:
            raise ValueError(
                f"state_fn {name}: got {getattr(state_fn, name)!r} in a run without seeds (its noise is torch's or"
                " recorded), expected a tensor or a function (row, shape) -> tensor"
            )
    spec = StateSpec(before, True, state_fn.hard, noise, renoise)
    return StatePlan(StateOptions(spec, Alike(None), len(draws)), state_fn, draws)


class KnownMemory:
    """The static tensors of a run's known pixels, and what fills them."""

    def __init__(self, plan: StatePlan, buffers: StepBuffers) -> None:
        x, spec = buffers.x, plan.options.spec
        self._row_noise = spec.noise == TENSOR and plan.known.noise == "row"  # type: ignore[union-attr]

        def normals(wanted: bool) -> Tensor | None:
            return torch.zeros_like(x) if wanted else None

        self.buffers = KnownBuffers(
            image=torch.zeros_like(x),
            hold=torch.zeros_like(x),
            rows=torch.zeros((len(buffers.table) - 1, len(KNOWN_COLUMNS)), dtype=x.dtype, device=x.device),
            noise=normals(spec.noise == TENSOR and not self._row_noise),
            renoise=normals(spec.renoise == TENSOR),
        )

    def load(self, plan: StatePlan) -> None:
        """Take a call's pixels."""
        known, memory = plan.known, self.buffers
        memory.image.copy_(known.image)  # type: ignore[union-attr]
        memory.hold.copy_(known.hold)  # type: ignore[union-attr]
        memory.rows.copy_(torch.from_numpy(np.ascontiguousarray(known.rows())))  # type: ignore[union-attr]
        if isinstance(known.noise, Tensor):  # type: ignore[union-attr]
            memory.noise.copy_(known.noise)  # type: ignore[union-attr]

    def fill(self, plan: StatePlan, row: int) -> None:
        """Draw a row's normals on the host, where the caller's functions do it; ValueError for another shape."""
        for name, draw in plan.draws.items():
            buffer = getattr(self.buffers, name)
            drawn = draw(row, tuple(buffer.shape))
            if not isinstance(drawn, Tensor) or drawn.shape != buffer.shape:
                got = f"shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"state_fn {name}({row}): got {got}, expected shape {tuple(buffer.shape)}")
            buffer.copy_(drawn)

    def of_slot(self, noise: Tensor | None) -> KnownBuffers:
        """The tensors for a row that reads its noise from a given buffer."""
        return replace(self.buffers, noise=noise) if self._row_noise else self.buffers

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for tensor in vars(self.buffers).values() if tensor is not None]


class StateProgram:
    """The change of a row in a program: calls the caller's function, if there is one, and writes the state and the
    model's next input, which the step then need not write."""

    def __init__(self, options: StateOptions, buffers: StepBuffers, known: KnownBuffers | None, backend: str) -> None:
        self.before = options.spec.before
        self._function, self._buffers = options.function.value, buffers
        self._change = StateChange(options.spec, buffers, known, backend)

    def __call__(self) -> None:
        """Change the state; TypeError or ValueError if the function returned anything but a state."""
        buffers = self._buffers
        new = buffers.x
        if self._function is not None:
            row = buffers.counter[0].long()
            new = self._function(buffers.x, buffers.x0, row if self.before else row - 1)
            if not isinstance(new, Tensor):
                raise TypeError(f"state_fn: got {type(new).__name__} from it, expected the state")
            if new.shape != buffers.x.shape or not new.dtype.is_floating_point:
                got = f"{new.dtype} {tuple(new.shape)}"
                raise ValueError(f"state_fn: got {got} from it, expected a state of shape {tuple(buffers.x.shape)}")
            new = new.to(buffers.x.dtype).contiguous()
        self._change(new)
