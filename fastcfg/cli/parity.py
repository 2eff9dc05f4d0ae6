"""`fastcfg parity`: whether fastcfg's numbers can be trusted on this device."""

from __future__ import annotations

import argparse
import platform
from functools import partial
from typing import TYPE_CHECKING, Any

from .outputs import STDOUT, check_output, write_json
from .parser import UsageError, any_integer, choose_device, integer, one_of
from .versions import commit, versions

if TYPE_CHECKING:
    import torch

    from fastcfg.parity import Finding

_DESCRIPTION = """\
Check on this device that fastcfg computes what it says it computes.

steps    one fused step on seeded random inputs, by every backend that runs here, in float32, bfloat16 and float16:
         - against the plain torch reference on the CPU: bit for bit, but for learned variances, whose exponential may
           be 2 ulp off;
         - against the same step in float64: the error must be at most twice what plain torch loses (the same formulas
           in eager torch, each operation rounded on its own; for ddpm and ddim those of guided-diffusion and GLIDE),
           or 1 ulp. The noise drawn in the kernel is compared with fastcfg.reference.philox, bit for bit.
loops    50 rows of ddpm and ddim with guidance and the embedded model (--quick: an analytic one), from the same
         recorded noise, against the loop in float64, with the same bound along the trajectory.
--model  your own model or sampler, instead of both: its first rows, once with the model's outputs recorded in the
         float64 run and given to every backend (teacher-forced: fastcfg's arithmetic alone), once free, once captured.

An ulp is the spacing of a tensor's dtype at its largest value. A line of the table is the worst shape and tensor of a
backend, dtype and option set: whether all have the reference's bits ("same code" where the reference on a CPU is
compared with itself), the largest and the RMS error, plain torch's
largest, the bound, and ok or FAILED.

Exit status: 0 if everything is within bounds, 1 if something is not, 2 if it cannot be checked as asked."""

_EXAMPLES = """\
examples:
  fastcfg parity --quick
  fastcfg parity --json parity.json --plot parity.png
  fastcfg parity --backend triton --device cuda
  TRITON_INTERPRET=1 fastcfg parity --quick --backend triton      # the kernels on a CPU, in Triton's interpreter
  fastcfg parity --model mine.py:build --steps 10

mine.py:
  def build():
      table = fastcfg.solvers.ddim(fastcfg.Schedule.named("linear").respace(50))
      return {"model": model, "table": table, "shape": (4, 3, 64, 64), "guidance": fastcfg.CFG(3.0), "clip": 1.0,
              "cond": {"y": labels}, "uncond": {"y": torch.zeros_like(labels)}}

or {"sampler": a Sampler, "shape": ..., "cond": ..., "uncond": ...}, or an object with such attributes; also branches,
denoised_fn, cond_fn, dtype and memory_format. Or {"pipeline": one of diffusers', "call": {"prompt": ..., ...}}: its
scheduler is compiled to a table, and its first steps are compared with the fused step on the same outputs and noise.

Inductor compiles every case for seconds: it gets fewer, with --quick one, and that only where it is asked for. Triton's
interpreter gets small shapes, and no bfloat16, which it does not round as GPUs do."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "parity",
        help="check the numbers on this device",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--quick", action="store_true", help="small shapes, an analytic model")
    parser.add_argument(
        "--device",
        metavar="NAME",
        type=one_of("auto", "cpu", "cuda"),
        default="auto",
        help="auto (a GPU if there is one), cpu or cuda; a --model with weights runs where they are "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        type=one_of("triton", "inductor", "reference"),
        action="append",
        help="what to check: triton, inductor or reference; may be repeated (default: all that run here)",
    )
    parser.add_argument("--model", metavar="WHERE", help="PATH.py:function or module:function, see below")
    parser.add_argument("--steps", metavar="N", type=integer(1), help="rows of --model to run (default: 5)")
    parser.add_argument("--seed", metavar="N", type=any_integer, default=0, help="of inputs and noise (default: 0)")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=STDOUT,
        help="write the findings as JSON to FILE, or alone to standard output where no FILE is given",
    )
    parser.add_argument("--plot", metavar="FILE", help="PNG of the error along the trajectories; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Run the checks and print or write the findings."""
    if arguments.json not in (None, STDOUT):
        check_output("--json", arguments.json, ".json")
    if arguments.plot:
        _check_plot(arguments.plot)
    if arguments.model and arguments.quick:
        raise UsageError("argument --quick: got it with --model, expected one of them")
    if arguments.steps and not arguments.model:
        raise UsageError(f"argument --steps: got {arguments.steps} without --model, expected both")
    if abs(arguments.seed) >= 2**40:
        raise UsageError(f"argument --seed: got {arguments.seed}, expected an integer below 2**40")

    from fastcfg.parity import as_json, as_text, plot

    findings, skipped, settings, device = _check(arguments)
    failed = [finding for finding in findings if finding.problem]
    if arguments.plot:
        plot(findings, arguments.plot)
    if arguments.json is not None:
        report = {
            "ok": not failed,
            "environment": _environment(device),
            "settings": settings,
            "skipped": skipped,
            "findings": as_json(findings),
        }
        write_json(arguments.json, report)
    if arguments.json != STDOUT:
        print("\n".join(as_text(findings)))
        for note in dict.fromkeys(f"{f.backend} {f.options}: {f.note}" for f in findings if f.note):
            print(f"note     {note}")
        for backend, reason in skipped.items():
            print(f"skipped  {backend}: {reason}")
        for finding in failed:
            print(f"FAILED   {finding.name}: {finding.problem}")
        told = f"{len(failed)} of {len(findings)} comparisons are out of bounds" if failed else "yes"
        print(f"parity   {told} ({len(findings)} comparisons on {settings['device']})")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> tuple[list[Finding], dict[str, str], dict[str, Any], torch.device]:
    import torch
    from tqdm import tqdm

    from fastcfg.parity import (
        PipelineProblem,
        check_loops,
        check_model,
        check_pipeline,
        check_steps,
        load_problem,
        runnable,
    )

    device = torch.device(choose_device(arguments.device))
    progress = partial(tqdm, leave=False, unit="case")
    if arguments.model:
        problem, rows = load_problem(arguments.model, device), arguments.steps or 5
        if isinstance(problem, PipelineProblem):
            device = torch.device(getattr(problem.pipeline, "device", device))
            backends, skipped = runnable(device, arguments.backend or ())
            findings = check_pipeline(problem, backends, rows, progress)
        else:
            device = torch.device(problem.options["device"])
            backends, skipped = runnable(device, arguments.backend or ())
            findings = check_model(problem, backends, rows, arguments.seed, progress)
    else:
        backends, skipped = runnable(device, arguments.backend or (), arguments.quick)
        findings = check_steps(backends, device, arguments.quick, arguments.seed, progress)
        findings += check_loops(backends, device, arguments.quick, arguments.seed, progress)
    settings = {
        "device": str(device),
        "quick": arguments.quick,
        "seed": arguments.seed,
        "backends": backends,
        "model": arguments.model,
        "steps": (arguments.steps or 5) if arguments.model else None,
    }
    return findings, skipped, settings, device


def _check_plot(path: str) -> None:
    from importlib.util import find_spec

    check_output("--plot", path, ".png")
    if find_spec("matplotlib") is None:
        raise UsageError("argument --plot: matplotlib is not installed (pip install matplotlib)")


def _environment(device: torch.device) -> dict[str, Any]:
    import torch

    from .doctor import cpu_name

    return {
        "versions": versions(optional=True),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
