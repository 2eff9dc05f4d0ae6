"""Where results go: checked before the work, written whole after it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .options import STDOUT
from .parser import UsageError


def check_output(option: str, path: str, suffix: str) -> None:
    """Raise UsageError unless the file that an option names ends in a suffix and can be written."""
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise UsageError(f"argument {option}: got {path!r}, expected a file name that ends in {suffix}")
    if target.is_dir():
        raise UsageError(f"argument {option}: got the folder {path!r}, expected a file")
    if not target.parent.is_dir():
        raise UsageError(f"argument {option}: got {path!r}, expected a folder that exists ({target.parent} does not)")
    _try_writing(option, path, target.parent)


def check_folder(option: str, path: str) -> None:
    """Raise UsageError unless the folder that an option names can be made, or written to if it exists."""
    nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(f"argument {option}: got {path!r}, expected a folder ({nearest} is a file)")
    _try_writing(option, path, nearest)


def _try_writing(option: str, path: str, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        expected = f"a folder that can be written to ({error.strerror})"
        raise UsageError(f"argument {option}: got {path!r}, expected {expected}") from error


def check_plot(path: str | None) -> None:
    """`check_output` of --plot, if it was given, and of matplotlib."""
    if path is not None:
        check_output("--plot", path, ".png")
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("argument --plot: matplotlib is not installed (pip install matplotlib)")


def check_json(path: str | None) -> None:
    """`check_output` of --json, if it names a file."""
    if path not in (None, STDOUT):
        check_output("--json", path, ".json")


def write_json(path: str | None, value: Any) -> None:
    """Write JSON to a file, to standard output for "-", or nowhere for None."""
    from fastcfg.utils.files import write_text

    text = json.dumps(value, indent=2) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    elif path is not None:
        write_text(path, text)
