"""Real descendants of guided-diffusion beside themselves accelerated: `python -m benchmarks descendants FOLDER...`.

Takes checkouts of the projects, or folders of checkouts, recognises each by its files and fetches nothing. Every
project's own diffusion object, with few steps and a small random network, makes the calls of its own sampling script
three times, with a seed each, as it is and as `fastcfg.accelerate` returns it. Images, what every step of a generator
yields and the state of the random generator are compared. Prints a Markdown table; exits with 1 if any call gives
another result or fails without saying what to do.

Outcomes: "fused" (the engine samples), "fused, its own loop" (the object's loop with the engine's steps), "the
original" (its own steps, and why), "refused" (a TypeError or ValueError that says what was got and what is expected),
"unclear error", "different", and "broken" (the original itself fails).
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import add_json, parser_of, write_json
from benchmarks.environment import environment, load_average
from fastcfg.cli.parser import UsageError, integer

from .calls import Project
from .checkout import commit, opened
from .compare import BAD, broken, compare
from .projects import PROJECTS
from .table import summary, table

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = parser_of("descendants", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a checkout, or a folder of checkouts")
    parser.add_argument("--turns", type=integer(0), default=9, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--before", metavar="FILE", help="an earlier report, for a column of its outcomes")
    add_json(parser)
    arguments = parser.parse_args(argv)
    before = json.loads(Path(arguments.before).read_text(encoding="utf-8"))["projects"] if arguments.before else None
    load, threads = load_average(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        projects = [measure(project, folder, arguments.turns) for project, folder in found(arguments.folders)]
    finally:
        torch.set_num_threads(threads)
    print(table(projects, before))
    print(f"\n{summary(projects)}." + (f" Before: {summary(before)}." if before else ""))
    report = {"schema": 1, "environment": environment(torch.device("cpu"), load), "projects": projects}
    write_json(arguments.json, report)
    return int(any(call["outcome"] in BAD for project in projects for call in project["calls"]))


def found(folders: Sequence[Path]) -> Iterator[tuple[Project, Path]]:
    """The projects in folders, and where.

    Raises:
        UsageError: no folder is, or holds, a checkout of a known project.
    """
    known = False
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"FOLDER: got {folder}, expected a folder")
        own = recognised(folder)
        for place in [folder] if own else sorted(path for path in folder.iterdir() if path.is_dir()):
            if project := own or recognised(place):
                known = True
                yield project, place
    if not known:
        names = ", ".join(project.name for project in PROJECTS)
        raise UsageError(f"FOLDER: got no checkout of a known project, expected one of {names}")


def recognised(folder: Path) -> Project | None:
    """The project that a folder is a checkout of."""
    return next((project for project in PROJECTS if project.is_in(folder)), None)


def measure(project: Project, folder: Path, turns: int) -> Record:
    """A project's name, commit and calls; what it prints goes to standard error."""
    calls: list[Record] = []
    print(project.name, file=sys.stderr, flush=True)
    with opened(folder) as checkout, contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for call in project.calls(checkout):
                calls.append(compare(call, turns))
        except Exception as error:  # its modules do not import here
            calls.append(broken(error))
    return {"name": project.name, "commit": commit(folder), "calls": calls}
