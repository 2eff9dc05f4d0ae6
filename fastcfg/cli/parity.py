"""`fastcfg parity`: checks of fastcfg's numbers on this device."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .options import STDOUT, add_command, add_device, add_json, add_option
from .outputs import check_json, check_plot, write_json
from .parser import UsageError, any_integer, choose_device, integer, usage_errors
from .versions import commit, versions

if TYPE_CHECKING:
    from fastcfg.parity import Finding

_DESCRIPTION = """\
Check fastcfg's numbers on this device.

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

An ulp is the spacing of a tensor's dtype at its largest value. A line of the table shows the worst shape and tensor of
a backend, dtype and option set: whether all have the reference's bits ("same code" where the reference on a CPU is
compared with itself), the largest and the RMS error, plain torch's largest, the bound, and ok or FAILED.

Exit status: 0 if everything is within bounds, 1 if something is not, 2 if the arguments cannot be used."""

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

Inductor compiles every case for seconds: it gets fewer, with --quick one, and that only on request. Triton's
interpreter gets small shapes, and no bfloat16, which it does not round as GPUs do."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "check the numbers on this device"
    parser = add_command(commands, "parity", run, help=text, description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="small shapes, an analytic model")
    add_device(parser, "; a --model with weights runs where they are")
    backends = ("triton", "inductor", "reference")
    text = f"what to check: {', '.join(backends)}; may be repeated (default: all that run here)"
    add_option(parser, "--backend", "NAME", text, choices=backends, action="append")
    add_option(parser, "--model", "WHERE", "PATH.py:function or module:function, see below")
    add_option(parser, "--steps", "N", "rows of --model to run (default: 5)", type=integer(1))
    add_option(parser, "--seed", "N", "of inputs and noise", type=any_integer, default=0)
    add_json(parser, "the findings")
    add_option(parser, "--plot", "FILE", "PNG of the error along the trajectories; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Run the checks and print or write the findings."""
    check_json(arguments.json)
    check_plot(arguments.plot)
    if arguments.model and arguments.quick:
        raise UsageError("argument --quick: got it with --model, expected one of them")
    if arguments.steps and not arguments.model:
        raise UsageError(f"argument --steps: got {arguments.steps} without --model, expected both")
    if abs(arguments.seed) >= 2**40:
        raise UsageError(f"argument --seed: got {arguments.seed}, expected an integer below 2**40")

    from fastcfg.parity import as_json, as_text, plot

    findings, skipped, settings = _check(arguments)
    failed = [finding for finding in findings if finding.problem]
    if arguments.plot:
        plot(findings, arguments.plot)
    report = {"ok": not failed, "environment": _environment(settings["device"]), "settings": settings}
    write_json(arguments.json, report | {"skipped": skipped, "findings": as_json(findings)})
    if arguments.json != STDOUT:
        print("\n".join(as_text(findings)))
        for note in dict.fromkeys(f"{f.backend} {f.options}: {f.note}" for f in findings if f.note):
            print(f"note     {note}")
        for backend, reason in skipped.items():
            print(f"skipped  {backend}: {reason}")
        for finding in failed:
            print(f"FAILED   {finding.name}: {finding.problem}")
        result = f"{len(failed)} of {len(findings)} comparisons are out of bounds" if failed else "yes"
        print(f"parity   {result} ({len(findings)} comparisons on {settings['device']})")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> tuple[list[Finding], dict[str, str], dict[str, Any]]:
    """Findings on the user's model, sampler or pipeline, or on fastcfg's own; why backends are skipped; settings."""
    import torch

    from fastcfg import parity

    device, wanted = torch.device(choose_device(arguments.device)), arguments.backend or ()
    model, quick, seed, steps = arguments.model or None, arguments.quick, arguments.seed, None
    # What the user's code raises is the user's too.
    with usage_errors():
        if model is None:
            backends, skipped = parity.runnable(device, wanted, quick)
        else:
            problem, steps = parity.load_problem(model, device), arguments.steps or 5
            if isinstance(problem, parity.PipelineProblem):
                device = torch.device(getattr(problem.pipeline, "device", device))
                backends, skipped = parity.runnable(device, wanted)
                findings = parity.check_pipeline(problem, backends, steps, _progress)
            else:
                device = torch.device(problem.options["device"])
                backends, skipped = parity.runnable(device, wanted)
                findings = parity.check_model(problem, backends, steps, seed, _progress)
    if model is None:
        findings = parity.check_steps(backends, device, quick, seed, _progress)
        findings += parity.check_loops(backends, device, quick, seed, _progress)
    named = {"device": str(device), "quick": quick, "seed": seed, "backends": list(backends)}
    return findings, skipped, {**named, "model": model, "steps": steps}


def _progress(cases: Iterable[Any], desc: str) -> Any:
    from fastcfg.utils.progress import progress_bar

    return progress_bar(desc, cases, unit="case", leave=False)


def _environment(name: str) -> dict[str, Any]:
    import torch

    from .doctor import cpu_name

    device = torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else cpu_name()
    found = {"versions": versions(optional=True), "platform": platform.platform(), "device": device}
    return found | {"threads": torch.get_num_threads(), "commit": commit()}
