"""`python -m benchmarks [NAME ...]`: list the benchmarks, or run one."""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = {
    "adherence": "how well the embedded model's pictures follow their prompts, by guidance scale",
    "compare": "two reports: what became slower or faster beyond the runs' own spread",
    "gpu_session": "everything that a GPU is needed for, in one command and one time budget",
    "graphs": "the captured loop, proved on a device: bits, launches, syncs, memory, threads, times",
    "readme": "README.md's results and pictures from the committed reports",
    "static_roofline": "what the kernels' machine code costs on GPUs that are not there",
    "step": "time of a step beside the model, against the originals' operations",
    "trace": "what rows of the embedded model's loop make host and device do, by torch's profiler",
}


def main(argv: list[str]) -> int:
    """Run the benchmark named first with the other arguments; its exit status."""
    if argv and argv[0] in BENCHMARKS:
        package = "benchmarks.report" if argv[0] in ("compare", "readme") else "benchmarks"
        status: int = import_module(f"{package}.{argv[0]}").main(argv[1:])
        return status
    print("usage: python -m benchmarks NAME [arguments] (NAME --help explains)\n")
    for name, text in BENCHMARKS.items():
        print(f"  {name:20s} {text}")
    return 0 if not argv or argv[0] in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
