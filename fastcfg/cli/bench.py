"""`fastcfg bench`: the benchmark suite, `python -m benchmarks`. It comes with the source and is not installed: the
command works in a checkout and from an editable install."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import fastcfg

from .parser import UsageError


def add_parser(commands: Any) -> None:
    """Add the command; its arguments are the suite's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="measure fastcfg and others side by side", add_help=False
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite.

    Raises:
        UsageError: there is no checkout around the package.
    """
    root = Path(fastcfg.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise UsageError("bench: got an installed fastcfg, expected a checkout of its source: the benchmarks lie there")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    status: int = importlib.import_module("benchmarks.__main__").main(arguments.others)
    return status
