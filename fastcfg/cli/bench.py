"""`fastcfg bench`: the benchmark suite, `python -m benchmarks`.

It comes with the source and is not installed: the command works in a checkout and from an editable install.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .parser import UsageError


def add_parser(commands: Any) -> None:
    """Add the command; its arguments are the suite's."""
    text = "measure fastcfg and others side by side"
    commands.add_parser("bench", help=text, add_help=False).set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the suite, in a process of its own; UsageError without a checkout around the package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise UsageError("bench: got an installed fastcfg, expected a checkout of its source, which has the benchmarks")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks", *arguments.others]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
