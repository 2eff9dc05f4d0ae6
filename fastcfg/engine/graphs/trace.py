"""A program's operations on a device and its demands on the host, recorded by the dispatcher during one run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ...utils._torch_private import tree_leaves
from .constants import Constant, copied_operands, digest
from .errors import SourceLine, calling_line, describe
from .modes import DispatchMode, operation_name, tensors_in

__all__ = ["Trace"]

# The host reads values to decide what such an operation returns, or its shape. Results on the host are reads as well.
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class _Event:
    """One operation on the device: what a graph would keep of it, and the line that called it."""

    operation: str
    arguments: tuple[str, ...]
    line: SourceLine | None

    def __str__(self) -> str:
        return self.operation + describe(self.line)


class Trace(DispatchMode):
    """Records a program's operations on a device.

    On a CPU, which stands in for a device, everything that exists before the program runs counts as on the device, and
    so does everything computed from it; what is made from numbers alone counts as on the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.constants: list[Constant] = []  # what the program copied to the device, in order
        self.reads: list[str] = []  # the operations that read from the device, described
        self._device = device
        self._events: list[_Event] = []
        # Made by the host, by address; kept alive so that the address is not used again.
        self._made: dict[int, Tensor] = {}

    def difference(self, other: Trace) -> str:
        """The first operation in which another run of the program differed; "" if none did."""
        for mine, its in zip(self._events, other._events, strict=False):
            if mine.operation != its.operation:
                return f"{its} in place of {mine}"
            if mine.arguments != its.arguments:
                pairs = zip_longest(mine.arguments, its.arguments, fillvalue="nothing")
                old, new = next(pair for pair in pairs if pair[0] != pair[1])
                return f"{mine} with {new} in place of {old}"
        shorter, longer = sorted((self._events, other._events), key=len)
        return f"{longer[len(shorter)]} in some steps only" if len(longer) > len(shorter) else ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        if operation_name(function) == "lift_fresh" and self._device.type == "cpu":
            # torch.tensor made these from numbers without dispatching.
            self._made.update((_address(tensor), tensor) for tensor in operands)
        hosts = [tensor for tensor in operands if self._is_hosts(tensor)]
        # Taken before the call, which may write to its operands.
        crossing = copied_operands(function, args, kwargs)
        digests = {id(t): digest(t) for t in hosts} if crossing or len(hosts) < len(operands) else {}
        copied = [Constant(digests[id(t)], t.to(self._device)) for t in crossing]
        result = function(*args, **kwargs)
        results = tensors_in(result)
        if self._concerns_device(function, operands, hosts, results):
            arguments = tuple(_kept(leaf, digests) for leaf in tree_leaves((args, kwargs)))
            event = _Event(str(function), arguments, calling_line())
            self._events.append(event)
            self.constants += copied
            if len(hosts) < len(operands) and self._reads(function, args, kwargs, results):
                self.reads.append(f"{event} reads from the device")
        return result

    def _is_hosts(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (self._device.type != "cpu" or _address(tensor) in self._made)

    def _concerns_device(self, function: Any, operands: Any, hosts: Any, results: list[Tensor]) -> bool:
        """Whether an operation involves the device. On a CPU, results of the others are noted as made by the host."""
        if self._device.type != "cpu":
            return any(tensor.device.type != "cpu" for tensor in (*operands, *results))
        if len(hosts) < len(operands) or torch.Tag.nondeterministic_seeded in function.tags:
            for tensor in results:
                self._made.pop(_address(tensor), None)
            return True
        self._made.update((_address(tensor), tensor) for tensor in results)
        return False

    def _reads(self, function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> bool:
        """Whether an operation on the device makes the host wait for it."""
        name = operation_name(function)
        if name in _INDEXING:
            return _counts_a_mask(*args)
        if not _READING.isdisjoint(function.tags) or name == "_linalg_check_errors":
            return kwargs.get("output_size") is None  # repeat_interleave reads unless it is given that
        return self._device.type != "cpu" and any(tensor.device.type == "cpu" for tensor in results)


def _counts_a_mask(x: Tensor, indices: Any, value: Tensor | None = None, accumulate: bool = False, *_: Any) -> bool:
    """Whether indexing turns a mask into indices, of which the host must know the number. To write one number where a
    single mask is true, torch fills instead and reads nothing."""
    given = [index for index in indices if index is not None]
    number = value is not None and value.numel() == 1 and value.device.type == "cpu"
    fills = number and len(given) == 1 and not accumulate
    return not fills and any(index.dtype in (torch.bool, torch.uint8) for index in given)


def _kept(leaf: Any, digests: dict[int, str]) -> str:
    """What a graph keeps of an argument: numbers, layouts, and the contents of host tensors."""
    if isinstance(leaf, Tensor):
        return digests.get(id(leaf)) or f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, int | float | complex | str | torch.dtype | None) else type(leaf).__name__


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
