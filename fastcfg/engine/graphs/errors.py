"""Why a program cannot be captured, and the line of the model responsible."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType, TracebackType

import torch

__all__ = ["CaptureError", "SourceLine", "calling_line", "describe", "failing_line"]

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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_models(frame):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def failing_line(trace: TracebackType | None) -> SourceLine | None:
    """The model's innermost line that an exception passed through."""
    found = None
    while trace is not None:
        if _is_models(trace.tb_frame):
            found = trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_code.co_name
        trace = trace.tb_next
    return found


def _is_models(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_MODELS) or not file.startswith((*_LIBRARIES, "<frozen"))
