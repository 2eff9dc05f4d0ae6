"""What a function dispatches, counted on tensors of torch's meta device.

They have no data, and a copy from the host to them is seen as one to a GPU would be. A function that must read its
tensors is counted on a CPU, where reads are seen and such copies are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")


@dataclass(frozen=True)
class Counts:
    """What one call dispatches.

    Attributes:
        dispatched: operations, views and allocations included.
        kernels: operations on the device that are neither views nor bare allocations: launches, on a GPU.
        full_size: those of them that write a tensor of at least the state's size.
        host_copies: copies of numbers from the host's memory to the device; None where they are not seen.
        reads: numbers read from a tensor, for which the host would have to wait for a GPU.
    """

    dispatched: int
    kernels: int
    full_size: int
    host_copies: int | None
    reads: int


def count(function: Callable[[], object], size: int, device: str = "meta") -> Counts:
    """Count what `function` dispatches.

    Args:
        function: the call to count; its tensors must be on the device.
        size: elements of the state.
        device: "meta" or "cpu".
    """
    log = _Log(device)
    tensor = torch.tensor

    def from_numbers(data: Any, **options: Any) -> Tensor:
        # Not dispatched as a copy of its own.
        log.host_copies += options.get("device") is not None
        return tensor(data, **options)

    torch.tensor = from_numbers
    try:
        with log:
            function()
    finally:
        torch.tensor = tensor
    full_size, copies = sum(numel >= size for numel in log.kernels), log.host_copies if device == "meta" else None
    return Counts(log.dispatched, len(log.kernels), full_size, copies, log.reads)


class _Log(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.dispatched = self.host_copies = self.reads = 0
        self.kernels: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.dispatched += 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type == self.device]
        aliases = [returned.alias_info for returned in function._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        name = function._schema.name.split("::")[1]
        self.reads += name in _READS and any(tensor.device.type == self.device for tensor in given)
        if self.device != "cpu" and made and any(tensor.device.type == "cpu" and tensor.ndim for tensor in given):
            self.host_copies += 1
        elif made and not is_view and name not in _ALLOCATIONS:
            self.kernels.append(max(tensor.numel() for tensor in made))
        return result
