"""Dispatch modes that leave compiled code compiled, and the host's tensors among an operation's operands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils._torch_private import TorchDispatchMode, lift_only_cpu_tensors, tree_leaves, tree_map
from .errors import CaptureError, calling_place, describe

__all__ = ["Constant", "DispatchMode", "ReuseConstants", "copied_operands", "digest", "tensors_in", "visible_copies"]


class DispatchMode(TorchDispatchMode):
    """A mode under which torch.compile'd code runs as compiled: what it dispatches is seen, the rest is not."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    if not hasattr(TorchDispatchMode, "ignore_compile_internals"):

        @classmethod
        def is_infra_mode(cls) -> bool:
            """How older versions of torch say the same."""
            return True


@contextmanager
def visible_copies() -> Iterator[None]:
    """Have `torch.tensor(numbers, device=...)` dispatch its copy to the device, which torch else makes unseen."""
    before = lift_only_cpu_tensors(True)
    try:
        yield
    finally:
        lift_only_cpu_tensors(before)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor of the host's that an operation on the device takes.

    Attributes:
        digest: of its shape, dtype and contents.
        twin: its copy on the device.
    """

    digest: str
    twin: Tensor


class ReuseConstants(DispatchMode):
    """Gives operations on the device the constants' twins instead of the host's tensors, in the order of their copies.

    An operation then copies within the device, to memory of its own: a model may write to it.

    Args:
        constants: what the program copies in one run.

    Raises:
        CaptureError: in the program, where it copies something else.
    """

    def __init__(self, constants: Sequence[Constant]) -> None:
        super().__init__()
        self._constants, self._next = constants, 0

    def restart(self) -> None:
        """The program runs again from its beginning."""
        self._next = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = {id(tensor): tensor for tensor in copied_operands(function, args, kwargs)}
        if copied:
            twins = {key: self._twin(function, tensor) for key, tensor in copied.items()}
            args, kwargs = tree_map(lambda leaf: twins.get(id(leaf), leaf), (args, kwargs))
        return function(*args, **kwargs)

    def _twin(self, function: Any, tensor: Tensor) -> Tensor:
        if self._next == len(self._constants) or self._constants[self._next].digest != digest(tensor):
            raise CaptureError(
                f"{function}{describe(calling_place())} copies from the host what it did not copy before"
            )
        self._next += 1
        return self._constants[self._next - 1].twin


def copied_operands(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The host's tensors that an operation on another device copies there. Those without dimensions it takes as
    numbers, unless it is itself a copy."""
    operands = tensors_in((args, kwargs))
    hosts = [tensor for tensor in operands if tensor.device.type == "cpu"]
    device = kwargs.get("device")
    elsewhere = len(hosts) < len(operands) or (device is not None and torch.device(device).type != "cpu")
    if not hosts or not elsewhere:
        return []
    is_copy = operation_name(function) in ("_to_copy", "copy_")
    return [tensor for tensor in hosts if tensor.ndim or is_copy]


def operation_name(function: Any) -> str:
    """Without namespace and overload."""
    return str(function._schema.name).split("::")[-1] if hasattr(function, "_schema") else str(function)


def digest(tensor: Tensor) -> str:
    """Of shape, dtype and contents."""
    contents = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.blake2b(contents.tobytes(), digest_size=16).hexdigest()}"


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
