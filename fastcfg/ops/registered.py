"""Kernels that return new tensors, as registered operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting


class Operation:
    """A kernel with the memory for its results. A call launches it: by way of the dispatcher under `torch.compile`, and
    in the interpreter, so that the stand-in for graphs can record the launch.

    Args:
        schema: `torch.library`'s, "name(arguments) -> results"; the first argument is a tensor.
        allocate: (*arguments) -> the results' memory, one tensor or a tuple; also the operation on fake tensors.
        launch: (*arguments, *results): fills them; or the kernel K of which `kernels.K.launch_K` does.
        mutates: names of arguments that are written.
        for_modes: whether it runs by way of the dispatcher under any dispatch mode, such as the stand-in.
    """

    def __init__(
        self,
        schema: str,
        allocate: Callable[..., Any],
        launch: Callable[..., None] | str,
        mutates: Sequence[str] = (),
        for_modes: bool = False,
    ) -> None:
        self._for_modes = for_modes
        self._allocate, self._launch = allocate, _launcher(launch) if isinstance(launch, str) else launch
        name, _, signature = schema.partition("(")
        self._registered = torch.library.custom_op(
            f"fastcfg::{name}", self._run, mutates_args=mutates, schema=f"({signature}"
        )
        self._registered.register_fake(allocate)

    def __call__(self, *arguments: Any) -> Any:
        dispatched = torch.compiler.is_compiling() or interpreting()
        if dispatched or (self._for_modes and current_dispatch_mode() is not None):
            return self._registered(*arguments)
        return self._run(*arguments)

    def _run(self, *arguments: Any) -> Any:
        results = self._allocate(*arguments)
        with torch.cuda.device_of(arguments[0]):
            self._launch(*arguments, *(results if isinstance(results, tuple) else (results,)))
        return results


def _launcher(kernel: str) -> Callable[..., None]:
    """Kernels need Triton: they are imported at the first launch."""
    return lambda *arguments: getattr(import_module(f"fastcfg.kernels.{kernel}"), f"launch_{kernel}")(*arguments)
