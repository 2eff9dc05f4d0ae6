"""The `fastcfg` command: sample, train, doctor, methods, parity, bench."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from fastcfg import __version__

from . import bench, doctor, methods, parity, sample, train
from .options import add_debug
from .parser import Parser, UsageError

__all__ = ["main"]

_DESCRIPTION = """\
Classifier-free-guided diffusion sampling, one fused step per model evaluation.

A small text-to-image model of coloured shapes comes with the package, so `sample` needs nothing else."""

_EXAMPLES = """\
examples:
  fastcfg sample "a red circle above a blue square"
  fastcfg sample "a green star" --solver dpmpp_2m --schedule karras --steps 20 --seed -1
  fastcfg train --out run --steps 2000
  fastcfg doctor
  fastcfg methods
  fastcfg parity --quick
  fastcfg bench --list

`fastcfg COMMAND --help` explains a command."""


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; each subcommand sets `run`, a function of the parsed arguments."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="fastcfg", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"fastcfg {__version__}")
    add_debug(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (sample, train, doctor, methods, parity, bench):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with some arguments, or for None with the process's; return the exit status.

    It is 0; 1 if `doctor` finds fastcfg unusable, `parity` something out of bounds, or `bench` a provider that is wrong
    or fails, and for any unexpected error; 2 for arguments that cannot be used and files that cannot be read or
    written; 130 if interrupted. Errors are one line on stderr; --debug adds the traceback.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        arguments, others = parser.parse_known_args(argv)
        if arguments.run is bench.run:
            arguments.others = others  # the suite has a parser of its own
        elif others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        return int(arguments.run(arguments))
    except KeyboardInterrupt as interruption:
        print("\nfastcfg: " + ": ".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except Exception as error:
        expected = isinstance(error, UsageError | OSError)
        if debug:
            traceback.print_exc()
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        hint = "" if expected or debug else " (--debug shows the traceback)"
        print(f"fastcfg: error: {' '.join(text.split())}{hint}", file=sys.stderr)
        return 2 if expected else 1
