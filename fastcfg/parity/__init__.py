"""Parity: whether fastcfg computes, on this device, what it says it computes. `fastcfg parity` runs it.

The JSON of `--json` has the keys

    ok            whether everything is within bounds
    environment   versions by name, platform, device, threads, commit (None if unknown)
    settings      device, quick, seed, backends, model, steps
    skipped       why backends are not checked, by name
    findings      one object per comparison: the attributes of `Finding`, and its bound_ulp, ok and problem

Numbers that are not finite are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ..ops import inductor_problem, resolve_backend, triton_problem
from ..ops.backend import interpreting
from .findings import Error, Finding
from .loops import Problem, check_loops, check_model
from .pipelines import PipelineProblem, check_pipeline
from .report import as_json, as_text, plot
from .report import as_text as table
from .steps import check_steps
from .user import load_problem

__all__ = ["Error", "Finding", "PipelineProblem", "Problem", "load_problem", "runnable"]
__all__ += ["as_json", "as_text", "check_loops", "check_model", "check_pipeline", "check_steps", "plot", "table"]

BACKENDS = ("reference", "inductor", "triton")
# The first Triton with an interpreter that rounds a multiply-add once, as GPUs do.
_INTERPRETER = (3, 9)


def runnable(device: torch.device, asked: Sequence[str] = (), quick: bool = False) -> tuple[list[str], dict[str, str]]:
    """The backends that can be checked on a device, and why the others are skipped.

    Args:
        device: where they run.
        asked: backends by name, which must run; empty takes all that can.
        quick: leave out a backend that takes long unless it is asked for.

    Raises:
        ValueError: one asked for cannot run.
    """
    if asked:
        return [resolve_backend(backend, device) for backend in dict.fromkeys(asked)], {}
    problems = {"triton": triton_problem(device) or _interpreter_problem(device), "inductor": inductor_problem(device)}
    if quick:
        problems["inductor"] = problems["inductor"] or "compiles for seconds (--backend inductor, or no --quick)"
    skipped = {name: problem for name, problem in problems.items() if problem}
    return [name for name in BACKENDS if name not in skipped], skipped


def _interpreter_problem(device: torch.device) -> str:
    if device.type != "cpu" or not interpreting():
        return ""
    try:
        installed = tuple(int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return ""
    return "" if installed >= _INTERPRETER else "the interpreter of Triton before 3.9 rounds a multiply-add twice"
