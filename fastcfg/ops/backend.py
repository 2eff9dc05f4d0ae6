"""Which backend runs an operation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from ..utils._torch_private import cpp_compiler_problem, current_dispatch_mode, in_function_transform
from ..utils.checks import check_one_of
from .extension import headers_problem, native_pays, native_problem

BACKENDS = ("auto", "triton", "inductor", "native", "reference")
# For operations other than the step. Inductor compiles only the whole step; around a piece torch.compile does as well.
PIECE_BACKENDS = ("auto", "triton", "native", "reference")

# At import: torch.compile cannot trace the look-up.
_HAS_TRITON = find_spec("triton") is not None


def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32, backends: Sequence[str] = BACKENDS
) -> str:
    """The backend that runs for a state of this device and dtype: "triton", "inductor", "native" or
    "reference".

    "auto" takes Triton on a GPU and the native kernels on a CPU (`native_pays`) for a float32 state, and the reference
    elsewhere. Inductor, which compiles for seconds, runs only by name. ValueError for a name not in `backends`, or a
    backend asked for where it cannot run.
    """
    check_one_of("backend", backend, backends)
    device = torch.device(device)
    if backend == "native":
        problem = native_problem(device, dtype)
    else:
        problem = inductor_problem(device) if backend == "inductor" else triton_problem(device, dtype)
    if backend == "auto":
        # Triton's interpreter is for tests: never chosen by "auto".
        if device.type == "cpu":
            return "native" if "native" in backends and native_pays(device, dtype) else "reference"
        return "reference" if problem else "triton"
    if backend != "reference" and problem:
        raise ValueError(f"backend: {backend!r} cannot run here: {problem}")
    return backend


def resolve_piece(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    backends: Sequence[str] = BACKENDS,
    registered: bool = False,
) -> str:
    """As `resolve_backend`, for an operation that has a native kernel.

    Under `torch.compile` and the transforms of `torch.func`, which look into operations, the reference runs in its
    place; under dispatch modes too, unless it is a `registered` operation.
    """
    if backend not in ("auto", "native") or backend not in backends:
        return resolve_backend(backend, device, dtype, backends)
    if device.type == "cpu" and (is_transformed() or not (registered or current_dispatch_mode() is None)):
        return "reference"
    return resolve_backend(backend, device, dtype, backends)


def is_transformed() -> bool:
    """Whether `torch.compile` or a transform of `torch.func` looks into the operations that run."""
    return torch.compiler.is_compiling() or in_function_transform()


def triton_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why the kernels cannot run on this device with a state of this dtype; empty if they can."""
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"the state is {dtype}, the kernels compute in torch.float32"
    if device.type == "cpu" and not interpreting():
        return "the device is a CPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for device type {device.type!r}"
    return ""


def inductor_problem(device: torch.device) -> str:
    """Why Inductor cannot compile for this device; empty if it can."""
    if device.type == "cpu":
        return _cpp_problem()
    if device.type != "cuda":
        return f"no code generator for device type {device.type!r}"
    return "" if _HAS_TRITON else "the package triton, with which Inductor compiles for GPUs, is not installed"


@cache
def _cpp_problem() -> str:
    return cpp_compiler_problem() or headers_problem()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
