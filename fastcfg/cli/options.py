"""Commands and options added to a parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

# The value of --json without a FILE.
STDOUT = "-"


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand; `run` gets the parsed arguments and returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=formatter
    )
    parser.set_defaults(run=run)
    add_debug(parser, default=argparse.SUPPRESS)
    return parser


def add_option(parser: argparse._ActionsContainer, flag: str, metavar: str, text: str, **options: Any) -> None:
    """`add_argument` of an option with a value; where it has a default, the help ends with it."""
    text += " (default: %(default)s)" if "default" in options else ""
    parser.add_argument(flag, metavar=metavar, help=text, **options)


def add_debug(parser: argparse.ArgumentParser, default: Any = False) -> None:
    """Add --debug."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def add_device(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add --device, which `choose_device` reads."""
    text = f"auto (a GPU if there is one), cpu or cuda{note}"
    add_option(parser, "--device", "NAME", text, choices=("auto", "cpu", "cuda"), default="auto")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --json [FILE], which `outputs.check_json` and `outputs.write_json` read."""
    text = f"write {what} as JSON to FILE, or without a FILE to standard output and nothing else"
    add_option(parser, "--json", "FILE", text, nargs="?", const=STDOUT)
