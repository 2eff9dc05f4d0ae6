"""Trial runs of a program before a run of the caller's, which leave the caller's model as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..utils._torch_private import tree_leaves
from ..utils.checks import listed
from .graphs import CaptureError
from .graphs.streams import on_side_stream
from .graphs.trace import DispatchMode, tensors_in
from .holders import alike, contents, same
from .snapshot import Snapshot

Program = Callable[[], None]

# Copied beforehand: some operations (batch norms) write to tensors without saying so. Larger ones are copied when an
# operation is about to write to them.
_MAX_BYTES, _MAX_NAMES = 1 << 20, 3

# Trials in other threads would find each other's changes.
_ONE_AT_A_TIME = threading.RLock()


class Trial:
    """Context in which programs may be run: after it their functions' state is what it was before.

    A graph repeats operations, not Python: a model whose Python state changes from call to call cannot be captured.
    What it fills once (a cache of positions, say), whatever it is given, stays.
    """

    def __init__(self, functions: Mapping[str, Any], device: torch.device, own: Sequence[Tensor]) -> None:
        self._functions, self._device = functions, device
        self._own = {_address(tensor) for tensor in own}  # the engine's memory
        self._kept: dict[str, Any] | None = None  # what is filled once, as it was found, with its contents then

    def __enter__(self) -> Trial:
        with ExitStack() as stack:
            stack.enter_context(_ONE_AT_A_TIME)
            stack.enter_context(self._torchs_generators())
            self._before = Snapshot(self._functions)
            self._writes = _Writes(self._own)
            with torch.inference_mode():
                for tensor in self._before.tensors.values():
                    if not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes <= _MAX_BYTES:
                        self._writes.keep(tensor)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._stack:
            self._restore(python=self._kept is None or kind is not None)

    def run(self, program: Program) -> None:
        """Run a program once, and note what it writes to. Not in a capture, which would record the copies."""
        self._writes.begin()
        with on_side_stream(self._device), self._writes:
            program()

    def settle(self, program: Program, states: Sequence[Program], results: Sequence[Tensor]) -> None:
        """Run a program until its functions' Python state stays as it is.

        The functions `states` set the program's memory to the states to begin in. CaptureError names what changes from
        call to call, or says that the first call differs from later ones.
        """
        first, second = states
        self._outcome(first, program, results)
        changed = {name: contents(value) for name, value in self._before.changes().items()}
        if not changed:
            self._check_tensors()
            self._kept = {}
            return
        self._restore()
        outcome = self._outcome(second, program, results)
        filled = {name: (value, contents(value)) for name, value in self._before.changes().items()}
        unlike = _names(changed, {name: kept for name, (_, kept) in filled.items()}, alike)
        self._outcome(first, program, results)
        if unlike := unlike | self._moved(filled):
            raise CaptureError(f"its state changes from call to call: {listed(sorted(unlike), _MAX_NAMES)}")
        self._check_tensors()
        again = self._outcome(second, program, results)
        if not alike(outcome, again) and alike(again, self._outcome(second, program, results)):
            names = listed(sorted(filled), _MAX_NAMES)
            raise CaptureError(f"its first call, in which it sets {names}, gives other numbers")
        self._kept = filled

    def check(self) -> None:
        """CaptureError if the Python state is another than `settle` left."""
        if self._kept is not None and (names := self._moved(self._kept)):
            raise CaptureError(f"its state changes from call to call: {listed(sorted(names), _MAX_NAMES)}")

    def _moved(self, filled: dict[str, tuple[Any, Any]]) -> set[str]:
        """The names of what is not as it was filled: another object, or other contents."""
        now = self._before.changes()
        found = _names({name: value for name, (value, _) in filled.items()}, now, same)
        return found | {name for name, (value, kept) in filled.items() if not alike(value, kept)}

    def _outcome(self, begin: Program, program: Program, results: Sequence[Tensor]) -> list[Tensor]:
        """What a program leaves, from a state and with the generators of the beginning."""
        self._before.restore_generators()
        begin()
        with self._torchs_generators():
            self.run(program)
        return [tensor.clone() for tensor in results]

    def _check_tensors(self) -> None:
        """CaptureError if a tensor changed in place that a graph on the device would not change."""
        for name, tensor in self._before.tensors.items():
            if tensor.device.type != self._device.type and self._writes.changed(tensor):
                raise CaptureError(f"its state changes from call to call: {name} (on {tensor.device})")

    def _torchs_generators(self) -> Any:
        """Context after which torch's global generators are where they were."""
        return torch.random.fork_rng([self._device] if self._device.type == "cuda" else [])

    def _restore(self, python: bool = True) -> None:
        self._writes.undo()
        if python:
            self._before.restore()
        else:
            self._before.restore_generators()


class _Writes(DispatchMode):
    """Copies of what tensors contained before they were written to."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own
        self._made: set[int] = set()  # addresses of memory that a program allocated
        self._copies: dict[Any, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        schema = getattr(function, "_schema", None)
        for place, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = kwargs.get(argument.name, args[place] if place < len(args) else None)
                for tensor in tree_leaves(given):
                    if isinstance(tensor, Tensor) and _address(tensor) not in self._made:
                        self.keep(tensor)
        result = function(*args, **kwargs)
        known = {_address(tensor) for tensor in operands}
        self._made.update(address for tensor in tensors_in(result) if (address := _address(tensor)) not in known)
        return result

    def begin(self) -> None:
        """Another program runs: it may write to what the last one allocated, which exists now."""
        self._made.clear()

    def keep(self, tensor: Tensor) -> None:
        """Copy what a tensor contains, once."""
        address = _address(tensor)
        key = address, tensor.shape, tensor.dtype, *((tensor.stride(), tensor.storage_offset()) if address else ())
        if address and address not in self._own and key not in self._copies:
            view = tensor.detach()
            self._copies[key] = view, view.clone()

    def changed(self, tensor: Tensor) -> bool:
        """Whether memory of a tensor contains something else now."""
        copies = (pair for pair in self._copies.values() if _address(pair[0]) == _address(tensor))
        return any(not alike(*pair) for pair in copies)

    def undo(self) -> None:
        """Write back what was there, the latest first, where it is not there any more."""
        with torch.inference_mode():  # in which tensors made in it may be written too
            for tensor, before in reversed(self._copies.values()):
                if not alike(tensor, before):
                    tensor.copy_(before)


def _names(before: dict[str, Any], now: dict[str, Any], equal: Callable[[Any, Any], bool]) -> set[str]:
    """The names under which two sets of values differ."""
    return {name for name in before.keys() | now.keys() if name not in before or name not in now} | {
        name for name in before.keys() & now.keys() if not equal(before[name], now[name])
    }


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none of its own."""
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.device.type == "meta"
    ):
        return 0
    return tensor.untyped_storage().data_ptr()
