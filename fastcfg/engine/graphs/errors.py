"""Why a program cannot be captured, and which line of the model is to blame."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType, TracebackType

import torch

__all__ = ["CaptureError", "Place", "calling_place", "failing_place"]

# File name, line number and name of a function.
Place = tuple[str, int, str]

_FASTCFG = Path(__file__).resolve().parents[2]
_LIBRARIES = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, _FASTCFG))
_MODELS = f"{_FASTCFG / 'models'}/"


class CaptureError(RuntimeError):
    """A program that a graph cannot hold; the message names the operation and the line of the model that did it."""


def describe(place: Place | None) -> str:
    """ " (file.py:12 in forward: `source`)", or nothing."""
    if place is None:
        return ""
    file, line, function = place
    source = linecache.getline(file, line).strip()
    return f" ({Path(file).name}:{line} in {function}" + (f": `{source}`)" if source else ")")


def calling_place() -> Place | None:
    """The innermost line on the stack that is neither torch's nor the engine's: the model's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_models(frame):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back
    return None


def failing_place(trace: TracebackType | None) -> Place | None:
    """The innermost such line that an exception passed through."""
    place = None
    while trace is not None:
        if _is_models(trace.tb_frame):
            place = trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_code.co_name
        trace = trace.tb_next
    return place


def _is_models(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_MODELS) or not file.startswith((*_LIBRARIES, "<frozen"))
