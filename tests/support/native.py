"""Marks for tests of the native kernels, which are skipped where the extension is not built."""

from __future__ import annotations

import pytest
import torch

from fastcfg.ops import instruction_sets, native_problem, resolve_backend
from fastcfg.utils._torch_private import TorchDispatchMode

_PROBLEM = native_problem(torch.device("cpu"))
built = pytest.mark.skipif(bool(_PROBLEM), reason=_PROBLEM)
# Backends that run the native kernels where they can.
chosen = pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=built)])
every_set = pytest.mark.parametrize("instructions", instruction_sets())


class Watching(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


# What "auto" takes on this machine's CPU.
CPU_BACKEND = resolve_backend("auto", "cpu")
