"""Two reports of `python -m benchmarks step`: what became slower or faster beyond the runs' own spread.

Compared are the ratios to the originals' operations in the same run, which hold from machine to machine and under load.
A ratio has changed if its 20 to 80 % ranges in the two reports do not meet; it has become worse if the new range lies
below the old one. Cases, providers and baselines that only one report has are listed as such.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcfg.cli.parser import Parser, UsageError

_EXAMPLES = """examples:
  python -m benchmarks step --json new.json
  python -m benchmarks compare benchmarks/results/cpu/step.json new.json
"""

# How many times as long a baseline takes as a provider, by case, provider and baseline: (p20, p50, p80).
Ratios = dict[str, tuple[float, float, float]]


def read(path: str) -> Ratios:
    """The ratios in a report.

    Raises:
        UsageError: no such file, or not such a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        return dict(_ratios(report["results"]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a report of `python -m benchmarks step --json`") from error


def _ratios(results: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[float, float, float]]]:
    for result in results:
        shape = "x".join(map(str, result["shape"]))
        case = f"{shape} {result['solver']}, noise {result['noise']}, {result['threads']} threads"
        for provider, bases in result["ratios"].items():
            for base, ratio in bases.items():
                yield f"{case}: {base} / {provider}", (ratio["p20"], ratio["p50"], ratio["p80"])


def changes(old: Ratios, new: Ratios) -> tuple[list[str], list[str], list[str]]:
    """What became worse, what better, and what only one of the two has, as lines."""
    worse, better = [], []
    for name in old.keys() & new.keys():
        (old_low, old_middle, old_high), (low, middle, high) = old[name], new[name]
        line = f"{name}: {old_middle:.2f} ({old_low:.2f}-{old_high:.2f}) -> {middle:.2f} ({low:.2f}-{high:.2f})"
        if high < old_low:
            worse.append(line)
        elif low > old_high:
            better.append(line)
    alone = [f"only in the old report: {name}" for name in old.keys() - new.keys()]
    alone += [f"only in the new report: {name}" for name in new.keys() - old.keys()]
    return sorted(worse), sorted(better), sorted(alone)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 1 if something became worse, or a provider has gone."""
    parser = Parser(
        prog="python -m benchmarks compare",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD.json")
    parser.add_argument("new", metavar="NEW.json")
    try:
        arguments = parser.parse_args(argv)
        old, new = read(arguments.old), read(arguments.new)
    except UsageError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    worse, better, alone = changes(old, new)
    for title, lines in (("slower", worse), ("faster", better), ("not in both", alone)):
        if lines:
            print(f"{title}:\n  " + "\n  ".join(lines))
    print(f"{len(old.keys() & new.keys())} ratios compared: {len(worse)} slower, {len(better)} faster")
    return 1 if worse or old.keys() - new.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
