"""What a sampling step costs beside the network: fastcfg against the originals, side by side in one run.

The network is a stub that returns a ready tensor, so what is timed is everything else that a step does under
classifier-free guidance with learned-range variances and a clipped x0: doubling the batch, guidance, x0, posterior,
noise, the next model input.

  guided-diffusion, GLIDE    the originals' operations in their order, with their own table look-ups
  ... itself                 the original's own code, where guided_diffusion or glide_text2im can be imported
  reference                  fastcfg's plain torch step
  inductor                   the same step compiled (seconds, once; not in these times)
  triton                     fastcfg's kernel, on a GPU

The originals keep 2B samples as their state and draw noise for all of them, for DDIM too; fastcfg keeps B. With noise
"given" nobody draws, with "drawn" everybody draws what it needs from torch.

Before anything is timed, every provider's result is compared with a float64 step; one that is wrong gets no time. Then
they take turns, one step each, and ratios are taken turn by turn: they hold on a machine whose speed drifts. Times are
medians, ratios medians with their 20 to 80 % range. With one thread on a CPU time is that thread's CPU time, to which
other work on the machine does not add ("cpu" in the report); else it is wall-clock time.

What is dispatched is counted on tensors that hold no data (benchmarks/counting.py): kernels are launches on a GPU, host
copies are those that a GPU would have to wait for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.counting import Counts, count
from benchmarks.environment import environment, load_average
from benchmarks.originals import STYLES, Original
from benchmarks.providers import SCALE, STEPS, TIMESTEP, Case, Provider, fastcfg, original, providers
from fastcfg import Schedule
from fastcfg.cli.outputs import check_output
from fastcfg.cli.parser import Parser, UsageError
from fastcfg.files import write_text

SHAPES = ((1, 3, 64, 64), (16, 3, 64, 64), (1, 4, 128, 128))
SOLVERS = ("ddpm", "ddim")
# Measured: at most 4.9e-7, the originals and fastcfg alike.
TOLERANCE = 1e-5
MIN_TURNS = 20

_EXAMPLES = """examples:
  python -m benchmarks step
  python -m benchmarks step --shape 4,3,64,64 --threads 1 --seconds 1
  python -m benchmarks step --json step.json --markdown step.md
  PYTHONPATH=guided-diffusion:glide-text2im python -m benchmarks step      # the originals themselves, from checkouts"""


def error(provider: Provider, truth: Tensor) -> tuple[float, float]:
    """The largest distance of a provider's first step from `truth`, and the seconds the step took (compilation
    included); a distance of infinity for values that are no numbers."""
    provider.prepare()
    start = time.perf_counter()
    provider.step(False)
    seconds = time.perf_counter() - start
    distance = (provider.result().double() - truth).abs().max().item()
    return (distance if distance == distance else float("inf")), seconds


def clock_for(device: torch.device) -> str:
    """ "cpu" where one thread does all the work, else "wall"."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def measure(entered: dict[str, Provider], device: torch.device, draw: bool, seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each provider's steps, one step of each in turn."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.thread_time if clock_for(device) == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in entered}
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < MIN_TURNS:
        for name, provider in entered.items():
            provider.prepare()
            wait()
            start = clock()
            provider.step(draw)
            wait()
            times[name].append(clock() - start)
        turn += 1
    return {name: np.array(values) for name, values in times.items()}


def compare(case: Case, entered: dict[str, Provider], truth: Tensor, seconds: float) -> list[dict[str, Any]]:
    """The correctness gate, then times: one record with noise given and one with noise drawn.

    Args:
        case: the inputs.
        entered: the providers by name.
        truth: float64 [B, C, ...], the right next x.
        seconds: of measuring, for each record.

    Returns:
        Records with "providers" (each "max_error" and either "us", or "refused" with the reason) and "ratios" (by
        fastcfg's providers, then by original: how many times as long that takes).
    """
    checks = {name: error(provider, truth) for name, provider in entered.items()}
    sound = {name: provider for name, provider in entered.items() if checks[name][0] <= TOLERANCE}
    records = []
    for draw in (False, True):
        times = measure(sound, case.x.device, draw, seconds)
        found: dict[str, dict[str, Any]] = {}
        for name, (distance, first) in checks.items():
            found[name] = {"max_error": distance, "first_step_s": first}
            if name in times:
                found[name]["us"] = _quantiles(times[name] * 1e6)
            else:
                found[name]["refused"] = f"{distance:.1e} from the float64 step, more than {TOLERANCE:.0e}"
        ratios = {
            name: {base: _quantiles(times[base] / times[name]) for base in times if base.startswith(STYLES)}
            for name in times
            if not name.startswith(STYLES)
        }
        records.append(
            {
                "shape": list(case.x.shape),
                "solver": case.solver,
                "noise": "drawn" if draw else "given",
                "clock": clock_for(case.x.device),
                "turns": len(next(iter(times.values()), ())),
                "providers": found,
                "ratios": ratios,
            }
        )
    return records


def counts() -> dict[str, dict[str, dict[str, Any]]]:
    """What a step dispatches, by solver and provider; no count depends on the shape."""
    meta = torch.device("meta")
    schedule = Schedule.named("linear").respace(STEPS)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for solver in SOLVERS:
        case = Case.random(solver, (2, 3, 64, 64), meta)
        size = case.x.numel()
        entered = {style: original(case, Original(schedule, style)) for style in STYLES}
        # In float64, where the reference need not try how the device rounds.
        entered["reference"] = fastcfg(case, schedule, "reference", torch.float64)
        found[solver] = {name: asdict(_counted(provider, size)) for name, provider in entered.items()}
        drawn = int(solver == "ddpm")
        found[solver]["triton"] = asdict(Counts(1 + drawn, 1 + drawn, 1 + drawn, 0)) | {
            "source": "tests/test_no_allocation.py: one launch, and the drawing where noise comes from torch"
        }
    return found


def _counted(provider: Provider, size: int) -> Counts:
    return count(lambda: provider.step(True), size)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count, check and measure; returns the report."""
    device = torch.device(arguments.device)
    base = Schedule.named("linear")
    schedule = base.respace(STEPS)
    results = []
    before = torch.get_num_threads()
    load = load_average()
    try:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for shape in arguments.shape or SHAPES:
                for solver in SOLVERS:
                    case = Case.random(solver, tuple(shape), device)
                    truth = fastcfg(case, schedule, "reference", torch.float64)
                    truth.prepare()
                    truth.step(False)
                    records = compare(case, providers(case, schedule, base.betas), truth.result(), arguments.seconds)
                    results += [{"threads": threads, **record} for record in records]
                    for line in map(row, results[-2:]):
                        print(line, file=sys.stderr, flush=True)
    finally:
        torch.set_num_threads(before)
    return {
        "environment": environment(device, load),
        "settings": {
            "steps": STEPS,
            "timestep": TIMESTEP,
            "guidance_scale": SCALE,
            "tolerance": TOLERANCE,
            "seconds": arguments.seconds,
            "threads": list(arguments.threads),
        },
        "counts": counts(),
        "results": results,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as two Markdown tables."""
    names = list(dict.fromkeys(name for result in report["results"] for name in result["providers"]))
    pairs = [(name, base) for name in names if not name.startswith(STYLES) for base in STYLES]
    heads = [f"{name}, µs" for name in names] + [f"{base} / {name}" for name, base in pairs]
    lines = [
        "| shape | step | noise | threads | " + " | ".join(heads) + " |",
        "|" + "---|" * (len(heads) + 4),
    ]
    for result in report["results"]:
        cells = ["x".join(map(str, result["shape"])), result["solver"], result["noise"], str(result["threads"])]
        for name in names:
            found = result["providers"].get(name, {})
            cells.append(f"{found['us']['p50']:.0f}" if "us" in found else "refused" if "refused" in found else "")
        cells += [_ratio(result["ratios"].get(name, {}).get(base)) for name, base in pairs]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| dispatched per step, noise drawn | kernels | of full size | host copies |", "|---|---|---|---|"]
    for solver, entries in report["counts"].items():
        for name, found in entries.items():
            lines.append(f"| {solver}, {name} | {found['kernels']} | {found['full_size']} | {found['host_copies']} |")
    return "\n".join(lines) + "\n"


def row(result: dict[str, Any]) -> str:
    """A result as one line of text."""
    parts = [
        f"{'x'.join(map(str, result['shape'])):>12s} {result['solver']} {result['noise']} {result['threads']} thr:"
    ]
    for name, found in result["providers"].items():
        parts.append(f"{name} {found['us']['p50']:.0f} us" if "us" in found else f"{name} refused: {found['refused']}")
    for name, ratios in result["ratios"].items():
        parts += [f"{name} vs {base} {_ratio(ratio)}" for base, ratio in ratios.items() if "itself" not in base]
    return "  ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if a provider was refused."""
    try:
        arguments = _parser().parse_args(argv)
        for option, suffix in (("json", ".json"), ("markdown", ".md")):
            if getattr(arguments, option):
                check_output(f"--{option}", getattr(arguments, option), suffix)
        report = run(arguments)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=1) + "\n")
        if arguments.markdown:
            write_text(arguments.markdown, markdown(report))
    except (UsageError, ValueError, OSError) as problem:
        print(f"step: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    print(markdown(report), end="")
    refused = {name for result in report["results"] for name, p in result["providers"].items() if "refused" in p}
    if refused:
        print(f"step: refused, because its result is wrong: {', '.join(sorted(refused))}", file=sys.stderr)
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks step",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = " and ".join(",".join(map(str, shape)) for shape in SHAPES)
    parser.add_argument("--shape", metavar="B,C,H,W", type=_integers, action="append", help=f"default: {shapes}")
    parser.add_argument(
        "--threads", metavar="N,N", type=_integers, default=[1, 2], help="numbers of CPU threads (default: 1,2)"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=2.0, help="of measuring, for each row (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown")
    return parser


def _integers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive integers separated by commas")
    return values


def _quantiles(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['p50']:.1f} ({ratio['p20']:.1f}-{ratio['p80']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
