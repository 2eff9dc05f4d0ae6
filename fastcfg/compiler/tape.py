"""What a function makes of the caller's tensors for its model (conditionings laid side by side, labels of nothing), so
that it can be made of another call's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AT = torch.ops.aten


@dataclass(frozen=True)
class _Made:
    """Stands for a tensor of the caller's, or the result of an operation, by number."""

    index: int


class Tape:
    """The operations on a call's tensors, without the tensors.

    Attributes:
        reads: whether the function does more with them than hand on what operations make of them: it reads numbers,
            writes, or computes with them and its samples. Then they decide about its steps.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.reads = False
        self._operations: list[tuple[Any, Any, Any]] = []
        # Until `close`, the tensors themselves: none takes another's id or memory.
        self._tensors = list(given)
        self._numbers = {id(tensor): number for number, tensor in enumerate(self._tensors)}
        self._memory = {_memory(tensor) for tensor in self._tensors}

    def concerns(self, tensor: Tensor) -> bool:
        """Whether a tensor is the caller's, or made of one that is."""
        return _memory(tensor) in self._memory

    def add(self, func: Any, args: Any, kwargs: Any, result: Any, writes: bool) -> None:
        """An operation on the caller's tensors."""
        results = list(result) if isinstance(result, list | tuple) else [result]
        if writes or func is _AT._local_scalar_dense.default or not all(isinstance(v, Tensor) for v in results):
            self.reads = True
            return
        self._operations.append((func, self.template(args), self.template(kwargs)))
        for tensor in results:
            self._numbers[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
            self._memory.add(_memory(tensor))

    def template(self, value: Any) -> Any:
        """A value with numbers in the place of the caller's tensors, and copies of others."""
        if isinstance(value, Tensor):
            if (number := self._numbers.get(id(value))) is not None:
                return _Made(number)
            self.reads |= self.concerns(value)
            return value.detach().clone()
        if type(value) in (list, tuple):
            return type(value)(map(self.template, value))
        return {name: self.template(item) for name, item in value.items()} if type(value) is dict else value

    def close(self) -> None:
        """Let the tensors go."""
        self._tensors, self._numbers, self._memory = [], {}, set()

    def played(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Run the operations on another call's tensors: these, and the results."""
        made = list(given)
        for func, args, kwargs in self._operations:
            result = func(*filled(args, made), **filled(kwargs, made))
            made += result if isinstance(result, list | tuple) else [result]
        return made


def filled(template: Any, made: Sequence[Tensor]) -> Any:
    """A template with tensors in their places, and copies of those of its own, which a model may change."""
    if isinstance(template, _Made):
        return made[template.index]
    if isinstance(template, Tensor):
        return template.clone()
    if type(template) in (list, tuple):
        return type(template)(filled(item, made) for item in template)
    return {name: filled(item, made) for name, item in template.items()} if type(template) is dict else template


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
