"""Host tensors that a program copies to the device in every run, and their replacement by copies made once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils._torch_private import tree_map
from .errors import CaptureError, calling_line, describe
from .modes import DispatchMode, operation_name, tensors_in

__all__ = ["Constant", "ReuseConstants", "copied_operands", "digest"]


@dataclass(frozen=True, eq=False)
class Constant:
    """A host tensor that a program copies to the device in every run."""

    digest: str  # of its shape, dtype and contents
    twin: Tensor  # its copy on the device


class ReuseConstants(DispatchMode):
    """Replaces host tensors by the constants' device twins, in the order in which a run of the program copies them.

    The program then copies within the device, to memory of its own that it may write to. Where it copies something
    else, a CaptureError is raised in it.
    """

    def __init__(self, constants: Sequence[Constant]) -> None:
        super().__init__()
        self._constants, self._next = constants, 0

    def restart(self) -> None:
        """Expect the first constant next."""
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
            raise CaptureError(f"{function}{describe(calling_line())} copies from the host what it did not copy before")
        self._next += 1
        return self._constants[self._next - 1].twin


def copied_operands(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The host tensors that an operation on another device copies there. 0-d tensors are taken as numbers, unless the
    operation is itself a copy."""
    operands = tensors_in((args, kwargs))
    hosts = [tensor for tensor in operands if tensor.device.type == "cpu"]
    device = kwargs.get("device")
    elsewhere = len(hosts) < len(operands) or (device is not None and torch.device(device).type != "cpu")
    if not hosts or not elsewhere:
        return []
    is_copy = operation_name(function) in ("_to_copy", "copy_")
    return [tensor for tensor in hosts if tensor.ndim or is_copy]


def digest(tensor: Tensor) -> str:
    """A digest of shape, dtype and contents."""
    contents = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.blake2b(contents.tobytes(), digest_size=16).hexdigest()}"
