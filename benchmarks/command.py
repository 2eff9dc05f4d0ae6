"""What the commands share: parsers, the device, and files of results."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastcfg.cli.outputs import check_output
from fastcfg.cli.parser import Parser, UsageError
from fastcfg.utils.files import write_text


def parser_of(name: str, description: str | None, epilog: str = "") -> Parser:
    """The parser of `python -m benchmarks NAME`; it raises UsageError instead of exiting."""
    prog = f"python -m benchmarks {name}".rstrip()
    return Parser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, for `fastcfg.cli.parser.choose_device`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")


def add_json(parser: argparse.ArgumentParser, meaning: str = "write the report as JSON") -> None:
    """Add --json, for `write_json`; a file that cannot be written is an error before any work."""
    parser.add_argument("--json", metavar="FILE", type=_json_file, help=meaning)


def _json_file(text: str) -> str:
    try:
        check_output("--json", text, ".json")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("argument --json: ")) from error
    return text


def write_json(path: Any, report: Any) -> None:
    """Write a report, whole or not at all; nothing without a path."""
    if path:
        write_text(path, json.dumps(report, indent=1) + "\n")
