"""Dispatch modes that see operations without disturbing compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...utils._torch_private import TorchDispatchMode, lift_only_cpu_tensors, tree_leaves

__all__ = ["DispatchMode", "operation_name", "tensors_in", "visible_copies"]


class DispatchMode(TorchDispatchMode):
    """A mode under which torch.compile'd code runs as compiled: operations it dispatches are seen, its kernels not."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    if not hasattr(TorchDispatchMode, "ignore_compile_internals"):

        @classmethod
        def is_infra_mode(cls) -> bool:
            """The same for older versions of torch."""
            return True


@contextmanager
def visible_copies() -> Iterator[None]:
    """Context in which `torch.tensor(numbers, device=...)` dispatches its copy to the device, hidden by default."""
    before = lift_only_cpu_tensors(True)
    try:
        yield
    finally:
        lift_only_cpu_tensors(before)


def operation_name(function: Any) -> str:
    """An operation's name without namespace and overload."""
    return str(function._schema.name).split("::")[-1] if hasattr(function, "_schema") else str(function)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
