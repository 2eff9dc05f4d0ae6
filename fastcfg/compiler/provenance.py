"""Where the tensors of a trial come from: the run itself (its samples, outputs and draws), or the caller."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from .stand_ins import FormError
from .tape import Tape

_writes: dict[Any, tuple[int, ...]] = {}  # operations, the places of the arguments that they write into


class Provenance:
    """What a function makes of a run's tensors, by the memory they are in.

    Args:
        protected: the caller's tensors, which no stand-in run may write into.
        follow: whether tensors are followed; it keeps their memory.
        given: those that the function may make others of for its model.

    Attributes:
        tape: what the function makes of the caller's tensors.
    """

    def __init__(self, protected: Iterable[Tensor], follow: bool, given: Iterable[Tensor] = ()) -> None:
        self._protected = {_memory(tensor): tensor for tensor in protected}
        self.tape = Tape(list(given))
        self.follows = follow
        self._runs: dict[int, Any] = {}  # with the memory itself, so that no other takes its place

    def mark(self, tensor: Tensor) -> None:
        """A tensor is the run's."""
        if self.follows:
            self._runs[_memory(tensor)] = tensor.untyped_storage()

    def is_of_run(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the run's."""
        return _memory(tensor) in self._runs

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operation is about to run; raises `FormError` if it writes into the caller's tensors."""
        for place in _written(func):
            written = args[place] if place < len(args) else kwargs.get(func._schema.arguments[place].name)
            if any(_memory(tensor) in self._protected for tensor in _tensors((written,))):
                raise FormError("sample_fn: got one that changes its arguments in place, expected one that does not")

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation has run."""
        if not self.follows:
            return
        tensors = list(_tensors((*args, *kwargs.values())))
        concerned = any(map(self.tape.concerns, tensors))
        if any(_memory(tensor) in self._runs for tensor in tensors):
            self.tape.reads |= concerned
            written = [args[place] for place in _written(func) if place < len(args)]
            for tensor in _tensors((result, *written)):
                self.mark(tensor)
        elif concerned:
            self.tape.add(func, args, kwargs, result, bool(_written(func)))


def _written(func: Any) -> tuple[int, ...]:
    if (places := _writes.get(func)) is None:
        arguments = func._schema.arguments
        places = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
        _writes[func] = places
    return places


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
