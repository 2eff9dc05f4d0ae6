"""The captured loop, proved on a device: what is claimed of it, checked claim by claim.

On a GPU the checks run CUDA graphs; on a CPU the same checks run the stand-in for graphs (`graph=True`), and those that
only a GPU can show are skipped. A check that fails says with which numbers, and the next one goes on. The report holds
what every check saw (launches, bytes, times), and is written whole or not at all.

Times are of this machine as it is: the budget of the host's work, 15 microseconds a row, is enforced on a GPU only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.captured import devices, loops, models, times
from benchmarks.captured.registry import CHECKS, NotHereError
from benchmarks.environment import environment, load_average
from fastcfg.cli.outputs import check_output
from fastcfg.cli.parser import Parser, UsageError, choose_device, one_of
from fastcfg.utils.files import write_text

__all__ = ["CHECKS", "devices", "loops", "main", "models", "run", "times"]

_EXAMPLES = """examples:
  python -m benchmarks graphs
  python -m benchmarks graphs --device cuda --json graphs.json
  python -m benchmarks graphs --only one-launch-runs-a-row memory-is-steady-and-given-back

exit status: 0 if no check failed, 1 if one did, 2 for bad arguments"""


def run(names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Make checks, one after the other, and print a line for each.

    Args:
        names: of the checks.
        device: where.

    Returns:
        The report: environment, settings, and for every check its status ("ok", "failed" or "skipped"), seconds, and
        details, error or reason.
    """
    before, results = load_average(), {}
    for name in names:
        results[name] = _made(name, device)
        print(line(name, results[name]), flush=True)
    return {
        "environment": environment(device, before),
        "settings": {"device": device.type, "threads": torch.get_num_threads()},
        "results": results,
    }


def _made(name: str, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"claim": CHECKS[name].claim}
    start = time.perf_counter()
    try:
        result |= {"status": "ok", "details": CHECKS[name](device)}
    except NotHereError as reason:
        result |= {"status": "skipped", "reason": str(reason)}
    except AssertionError as error:
        result |= {"status": "failed", "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def line(name: str, result: dict[str, Any]) -> str:
    """A result as one line of text."""
    status = result["status"]
    if status == "ok":
        return f"{name}: ok ({result['seconds']:.1f} s) {json.dumps(result['details'])}"
    if status == "skipped":
        return f"{name}: skipped: {result['reason']}"
    return f"{name}: FAILED: {' '.join(result['error'].split())}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if a check failed."""
    try:
        arguments = _parser().parse_args(argv)
        kind = choose_device(arguments.device)
        if arguments.json:
            check_output("--json", arguments.json, ".json")
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        report = run(arguments.only or list(CHECKS), device)
        if arguments.json:
            write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    except (UsageError, OSError) as problem:
        print(f"graphs: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    failed = [name for name, result in report["results"].items() if result["status"] == "failed"]
    if failed:
        print(f"graphs: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    claims = "\n".join(f"  {name}{' (GPU)' * check.needs_cuda}\n      {check.claim}" for name, check in CHECKS.items())
    parser = Parser(
        prog="python -m benchmarks graphs",
        description=__doc__,
        epilog=f"checks:\n{claims}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        type=one_of("auto", "cpu", "cuda"),
        default="auto",
        help="auto, cpu or cuda (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", type=one_of(*CHECKS), help="make these checks (default: all)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
