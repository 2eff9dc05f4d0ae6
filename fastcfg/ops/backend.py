"""Which backend runs an operation."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "reference")

# Looked for here, once: torch.compile cannot trace the look-up.
_HAS_TRITON = find_spec("triton") is not None


def resolve_backend(backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs: "triton" or "reference".

    Args:
        backend: "auto" takes Triton on a GPU for a float32 state and the reference elsewhere; a backend asked for by
            name must work or raise.
        device: where the state lives.
        dtype: the state's dtype.

    Raises:
        ValueError: unknown backend, or Triton asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    problem = triton_problem(torch.device(device), dtype)
    if backend == "triton" and problem:
        raise ValueError(f"backend: 'triton' cannot run here: {problem}")
    if backend == "auto":
        # The interpreter is for tests; nobody means it by "auto".
        return "reference" if problem or torch.device(device).type == "cpu" else "triton"
    return backend


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


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def through_dispatcher() -> bool:
    """Whether to launch through `torch.library`: under `torch.compile`, and in the interpreter, so that the stand-in
    for graphs can record the launch."""
    return torch.compiler.is_compiling() or interpreting()
