"""The extension with the kernels for CPUs: whether it is there, and if not, why."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

BUILD = "pip install ."
# Of every architecture; on aarch64 the baseline has NEON.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@cache
def native_module() -> Any:
    """The extension, or None where it was not built, or not of these sources."""
    try:
        module = import_module("fastcfg.kernels._native")
    except ImportError:
        return None
    return None if _is_old(Path(str(module.__file__))) else module


@cache
def instruction_sets() -> tuple[str, ...]:
    """What the kernels are built for and this CPU has, the widest last; empty without the extension.

    The environment variable FASTCFG_CPU names the widest to use. A warning says where it cannot be, and is then
    without effect.
    """
    module = native_module()
    found = () if module is None else tuple(module.instruction_sets())
    wanted = os.environ.get("FASTCFG_CPU")
    if not found or not wanted:
        return found
    if wanted in found:
        return found[: found.index(wanted) + 1]
    problem = "this CPU does not have it" if wanted in INSTRUCTION_SETS else f"expected one of {INSTRUCTION_SETS}"
    warnings.warn(f"FASTCFG_CPU: got {wanted!r}: {problem}; the kernels use {found[-1]!r}", stacklevel=2)
    return found


def native_problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why the native kernels cannot run on this device with a state of this dtype; empty if they can."""
    if device.type != "cpu":
        return f"the device is {device.type!r}, the native kernels are a CPU's"
    if dtype != torch.float32:
        return f"the state is {dtype}, the kernels compute in torch.float32"
    if instruction_sets():
        return ""
    return f"the extension is not built: {build_problem() or f'{BUILD!r} in a checkout builds it'}"


def native_pays(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the native kernels can run on this device and are faster than torch: on a CPU that multiplies and adds in
    one instruction."""
    fused = platform.machine().lower() in ("aarch64", "arm64") or instruction_sets()[-1:] != ("baseline",)
    return not native_problem(device, dtype) and fused


def build_problem() -> str:
    """What building the extension here lacks; empty if nothing."""
    if sys.platform == "win32":
        return "it needs GCC or Clang, and is not built on Windows"
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    name = shlex.split(command)[0]
    if not shutil.which(name):
        return f"there is no C compiler {name!r} (install one, or name it in CC; then {BUILD!r} builds it)"
    return headers_problem()


def headers_problem() -> str:
    """What to install where Python's C headers are missing; empty if they are there."""
    if Path(sysconfig.get_path("include"), "Python.h").is_file():
        return ""
    return "Python's C headers are not installed (Debian and Ubuntu: python3-dev)"


def _is_old(extension: Path) -> bool:
    """Whether a checkout's sources changed after it was built."""
    built = extension.stat().st_mtime
    return any(source.stat().st_mtime > built for source in extension.with_name("cpu").glob("*"))
