"""`python -m benchmarks [NAME] [arguments]`: the benchmark suite, or one of the others by name."""

from __future__ import annotations

import sys
from importlib import import_module

# By name: the module, and what it is.
BENCHMARKS = {
    "adherence": ("adherence", "how well the embedded model's pictures follow their prompts, by guidance scale"),
    "compare": ("report.compare", "two results of the suite: what became slower or faster beyond the runs' own spread"),
    "descendants": ("descendants.command", "real projects' sampling calls beside themselves accelerated"),
    "forwards": ("forwards", "how well these pictures follow them, by network forwards per picture"),
    "gpu_session": ("gpu_session", "everything that only a GPU can show, in under ten minutes"),
    "host_time": ("host_time", "Python beside a captured row, and on a GPU rows of a tiny network"),
    "pictures": ("pictures", "what every solver draws in 5, 10 and 20 steps, and the schedules: docs/solvers.md"),
    "readme": ("report.readme", "write the results in README.md and docs/results.md from the committed ones"),
    "schedulers": ("schedulers", "a step of diffusers' schedulers, fused and not"),
    "static_roofline": ("static_roofline", "the kernels' machine code and its cost on GPUs that need not be there"),
    "trace": ("trace", "what a profiler sees of the embedded model's loop, eager and captured"),
}


def main(argv: list[str]) -> int:
    """Run the suite, or the benchmark named first with the other arguments.

    Returns:
        The exit status: the benchmark's own, 2 for bad arguments and files, or 130 if interrupted.
    """
    named = bool(argv) and argv[0] in BENCHMARKS
    name, arguments = (argv[0], argv[1:]) if named else ("bench", argv)
    if not named and argv and argv[0] in ("-h", "--help"):
        others = "".join(f"  {other:16s} {text}\n" for other, (_, text) in BENCHMARKS.items())
        help_text = import_module("benchmarks.bench").parser().format_help()
        print(f"{help_text}\nothers, each with a --help of its own:\n{others}", end="")
        return 0
    try:
        status: int = import_module(f"benchmarks.{BENCHMARKS[name][0] if named else name}").main(arguments)
        return status
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as problem:
        from fastcfg.cli.parser import UsageError  # imports torch: a GPU session's first seconds

        if not isinstance(problem, UsageError | ValueError | OSError):
            raise
        print(f"{name}: error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
