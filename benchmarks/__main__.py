"""`python -m benchmarks [NAME] [arguments]`: the benchmark suite, or one of the others by name."""

from __future__ import annotations

import sys
from importlib import import_module

# By name: the module, and what it is.
BENCHMARKS = {
    "adherence": ("adherence", "how well the embedded model's pictures follow their prompts, by guidance scale"),
    "compare": ("report.compare", "two results of the suite: what became slower or faster beyond the runs' own spread"),
    "gpu_session": ("gpu_session", "everything that a GPU has to show, in under ten minutes"),
    "graphs": ("graphs", "the captured loop, proved on a device: bits, launches, syncs, memory, threads, times"),
    "pictures": ("pictures", "what every solver draws in 5, 10 and 20 steps, and the schedules: docs/solvers.md"),
    "readme": ("report.readme", "write the README's results from the committed ones"),
    "schedulers": ("schedulers", "what a step of diffusers' schedulers takes, fused and not"),
    "static_roofline": ("static_roofline", "what the kernels' machine code costs on GPUs that are not there"),
    "trace": ("trace", "what a profiler sees of the embedded model's loop, eager and captured"),
}


def main(argv: list[str]) -> int:
    """Run the suite, or the benchmark named first with the other arguments; the exit status."""
    if argv and argv[0] in BENCHMARKS:
        status: int = import_module(f"benchmarks.{BENCHMARKS[argv[0]][0]}").main(argv[1:])
        return status
    from benchmarks import bench

    if argv and argv[0] in ("-h", "--help"):
        others = "".join(f"  {name:16s} {text}\n" for name, (_, text) in BENCHMARKS.items())
        print(f"{bench.parser().format_help()}\nothers, each with a --help of its own:\n{others}", end="")
        return 0
    return bench.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
