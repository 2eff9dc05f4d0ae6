"""Why a program cannot be captured, and the line of the model responsible."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch

# File name, line number and function name.
SourceLine = tuple[str, int, str]

_FASTCFG = Path(__file__).resolve().parents[2]
_LIBRARIES = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, _FASTCFG))
_MODELS = f"{_FASTCFG / 'models'}/"


class CaptureError(RuntimeError):
    """A program cannot be captured; the message names the operation and the line of the model."""


def describe(where: SourceLine | None) -> str:
    """ " (file.py:12 in forward: `source`)", or nothing."""
    if where is None:
        return ""
    file, line, function = where
    source = linecache.getline(file, line).strip()
    return f" ({Path(file).name}:{line} in {function}" + (f": `{source}`)" if source else ")")


def calling_line() -> SourceLine | None:
    """The model's innermost line on the stack: the first outside torch and the engine."""
    return next(_models_lines(traceback.walk_stack(sys._getframe(1))), None)


def failing_line(trace: TracebackType | None) -> SourceLine | None:
    """The model's innermost line that an exception passed through."""
    lines = list(_models_lines(traceback.walk_tb(trace)))
    return lines[-1] if lines else None


def _models_lines(frames: Iterable[tuple[FrameType, int]]) -> Iterator[SourceLine]:
    for frame, line in frames:
        file = frame.f_code.co_filename
        if file.startswith(_MODELS) or not file.startswith((*_LIBRARIES, "<frozen")):
            yield file, line, frame.f_code.co_name
