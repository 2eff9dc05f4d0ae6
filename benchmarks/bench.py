"""Workloads x providers, side by side: how long a sampling step and a sampling loop take with fastcfg, with the
originals (guided-diffusion, GLIDE), with diffusers, with k-diffusion, and with plain torch, eager and compiled.

Each provider's result is first compared with a more exact one; providers that fail this check are not timed. The others
take turns, one run each, and ratios are taken turn by turn, so that they stay true on a machine whose speed drifts. On
a CPU the times are one thread's own CPU time, unless --threads says otherwise. Providers run in a separate process: one
that crashes is reported, and the rest continues. What needs a GPU is listed.

Results go to the folder of --out after every workload: bench.json (docs/benchmarks.md describes it), and at the end
bench.md and pictures. Rerun the command to resume a run that was stopped or ran out of its budget; a finished file is
kept as previous.json.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.command import add_device, parser_of
from benchmarks.report import plots, tables
from benchmarks.suite.results import OUT_OF_TIME, Results
from benchmarks.suite.roof import TARGETS, VARIANTS, add_shares
from benchmarks.suite.workloads import Workload, registry, select
from fastcfg.cli.outputs import check_folder
from fastcfg.cli.parser import Parser, UsageError, choose_device, integer
from fastcfg.utils.files import write_text

_EXAMPLES = """examples:
  python -m benchmarks                                  # what suits this machine; resumes what was stopped
  python -m benchmarks --budget 4m --out bench          # the most important first, whatever fits into four minutes
  python -m benchmarks --list
  python -m benchmarks --only step/ddpm loop/ddim/null-pixel-64 --seconds 3
  python -m benchmarks --only 'loop/*/sd15/b1/*' --device cuda
  python -m benchmarks compare bench/previous.json bench/bench.json
  PYTHONPATH=guided-diffusion:glide-text2im python -m benchmarks       # the originals themselves, from checkouts

exit status: 0; 1 if a provider was refused or failed; 2 for bad arguments"""


# Compiling takes 9 s on two idle cores, 28 on busy ones: after the workloads that matter most.
_ROOFLINE_SECONDS, _BEFORE_ROOFLINE = 30.0, 2


def run(arguments: argparse.Namespace, workloads: list[Workload], left: dict[str, str]) -> dict[str, Any]:
    """Measure, writing each result to the file at once; returns the report."""
    import torch
    from tqdm import tqdm

    from benchmarks.environment import environment, load_average
    from benchmarks.gpu_state import GpuMonitor
    from benchmarks.suite.cases import NotHereError
    from benchmarks.suite.runner import OutOfTimeError, Runner

    begin, kind = time.monotonic(), choose_device(arguments.device)
    threads = arguments.threads or (1 if kind == "cpu" else None)
    device, load = torch.device(kind), load_average()
    settings = {"seconds": arguments.seconds, "budget_s": arguments.budget, "only": arguments.only}

    def where() -> dict[str, Any]:
        return {**environment(device, load), "device_type": kind, "threads": threads or torch.get_num_threads()}

    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "bench.json", where(), settings, arguments.fresh)
    report = results.report
    if results.told:
        print(results.told, file=sys.stderr)
    deadline = None if arguments.budget is None else begin + arguments.budget
    runner = Runner(kind, threads, arguments.seconds, deadline)
    report["left"] = dict(left)
    todo = [workload for workload in workloads if not results.has(_records(workload))]
    report["left"] |= {workload.name: "not begun" for workload in todo}
    bar = tqdm(total=len(todo), unit="workload", file=sys.stderr, disable=arguments.quiet)
    with GpuMonitor(device) as monitor, closing(runner), bar:
        for workload in todo:
            if report["roofline"] is None and not arguments.only and workload.importance > _BEFORE_ROOFLINE:
                report["roofline"] = _roofline(deadline)
            left_s = "" if deadline is None else f", {max(deadline - time.monotonic(), 0):.0f} s left"
            bar.set_postfix_str(workload.name + left_s)
            try:
                for name, record in runner.run(workload):
                    record["gpu"] = monitor.snapshot(record.pop("torch_mib", 0))
                    if name == _records(workload)[-1]:
                        report["left"].pop(workload.name, None)
                    results.add(name, record)
            except OutOfTimeError:
                report["left"][workload.name] = OUT_OF_TIME
            except NotHereError as reason:
                report["left"][workload.name] = str(reason)
            except RuntimeError as error:
                report["left"][workload.name] = f"failed: {error}"
            except KeyboardInterrupt:
                results.write()
                raise
            bar.update()
    report["environment"] = where()
    report["gpu"] = (
        None if kind == "cpu" else {"before": monitor.before, "after": monitor.after, "notes": monitor.notes()}
    )
    add_shares(report)
    report["finished"] = OUT_OF_TIME not in report["left"].values()
    results.write()
    return report


def _records(workload: Workload) -> list[str]:
    """The names of a workload's records."""
    return [workload.name if noise == "none" else f"{workload.name}/{noise}" for noise in workload.noises]


def _roofline(deadline: float | None) -> dict[str, Any] | None:
    """The bounds of the step on GPUs that need not be there; None without time or without Triton."""
    from benchmarks import static_roofline
    from fastcfg.ops.backend import interpreting

    if interpreting() or (deadline is not None and time.monotonic() + _ROOFLINE_SECONDS > deadline):
        return None
    cases = [(variant, target) for target in TARGETS for variant in dict.fromkeys(VARIANTS.values())]
    try:
        return static_roofline.as_report(list(static_roofline.report_rows(cases, os.cpu_count() or 1)))
    except ImportError:  # no Triton here
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status.

    Raises:
        UsageError, ValueError, OSError: bad arguments, or files that cannot be read or written.
    """
    arguments = parser().parse_args(argv)
    if arguments.list:
        for name, workload in registry().items():
            print(f"{name}{'' if workload.on_cpu else '    (GPU)'}")
        return 0
    try:
        workloads, left = select(arguments.only, choose_device(arguments.device))
    except ValueError as error:
        raise UsageError(f"argument --{error}") from error
    check_folder("--out", arguments.out)
    folder = Path(arguments.out)
    try:
        report = run(arguments, workloads, left)
    except KeyboardInterrupt:
        print("\nbench: interrupted; what is finished is kept: rerun the command to resume", file=sys.stderr)
        return 130
    write_text(folder / "bench.md", tables.markdown(report))
    try:
        drawn = plots.draw(report, folder)
    except ImportError:
        drawn = []
        print("bench: no pictures: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    print(tables.terminal(report))
    print(f"\nwritten: {', '.join(str(path) for path in [folder / 'bench.json', folder / 'bench.md', *drawn])}")
    if not report["finished"]:
        print("not finished: rerun the command to resume")
    statuses = [p["status"] for record in report["results"].values() for p in record["providers"].values()]
    failures = [reason for reason in report["left"].values() if reason.startswith("failed")]
    return 1 if failures or {"refused", "failed"} & set(statuses) else 0


def parser() -> Parser:
    """The command's parser."""
    made = parser_of("", __doc__, _EXAMPLES)
    made.add_argument("--list", action="store_true", help="name the workloads, the important ones first")
    made.add_argument(
        "--only", metavar="NAME", nargs="+", default=[], help="workloads by the beginning of their names, or patterns"
    )
    add_device(made)
    made.add_argument("--threads", metavar="N", type=integer(1), help="CPU threads (default: 1, with a GPU torch's)")
    meaning = "of measuring, for each workload and kind of noise (default: 1)"
    made.add_argument("--seconds", metavar="S", type=_duration, default=1.0, help=meaning)
    made.add_argument("--budget", metavar="TIME", type=_duration, help="time for all of it, such as 90s or 4m")
    made.add_argument("--out", metavar="FOLDER", default="bench", help="where results go (default: %(default)s)")
    made.add_argument("--fresh", action="store_true", help="do not resume what was stopped")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def _duration(text: str) -> float:
    """The type of a time: seconds, or a number with a unit."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(s|m|h|)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a time such as 90s, 4m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
