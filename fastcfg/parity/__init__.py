"""Parity: whether fastcfg computes, on this device, what it says it computes. `fastcfg parity` runs it.

The JSON of `--json` holds

    ok            whether everything is within bounds
    environment   versions by name, platform, device, threads, commit (None if unknown)
    settings      device, quick, seed, backends, model, steps
    skipped       why backends are not checked, by name
    findings      one object per comparison:

    check         "step" (one fused step), "noise" (what is drawn), "loop" (50 rows), "model" (the user's own)
    backend, dtype, options, way, shape, tensor, note    the case; `dtype` is the model's, the state is float32
    bitwise       whether it has the bits of the float32 reference on the CPU; null where there are none to have
    reference_ulp, allowed_ulp    its distance from the reference, and the distance allowed (0: the same bits); of a
                  pipeline from its own scheduler's samples
    error         {"max", "rms"}: the distance from the same in float64, relative to that's largest value; {"ulp",
                  "rms_ulp"}: in ulps of the tensor's dtype, that is, in its spacing at the largest value
    torch         the same of plain torch
    trajectory, torch_trajectory    of loops: the largest relative error after every row
    bound_ulp     the largest `error.ulp` allowed: `factor` (2; of a pipeline 4) times `torch.ulp`, at least 1; null
                  without plain torch
    ok, problem   whether it is within bounds, and what is not

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
from .report import as_json, plot, table
from .steps import check_steps
from .user import load_problem

__all__ = [
    "Error",
    "Finding",
    "PipelineProblem",
    "Problem",
    "as_json",
    "check_loops",
    "check_model",
    "check_pipeline",
    "check_steps",
    "load_problem",
    "plot",
    "runnable",
    "table",
]

BACKENDS = ("reference", "inductor", "triton")
# The first whose interpreter rounds a multiply-add once, as GPUs do.
_INTERPRETER = (3, 9)


def runnable(device: torch.device, asked: Sequence[str] = (), quick: bool = False) -> tuple[list[str], dict[str, str]]:
    """The backends that can be checked on a device, and why the others are not.

    Args:
        device: where they would run.
        asked: some by name; they must run. Empty takes all that can.
        quick: leave out what takes long unless it is asked for.

    Raises:
        ValueError: one asked for that cannot run.
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
