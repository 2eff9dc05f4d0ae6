"""Warnings that point at the caller's code, however deep in the library they arise."""

from __future__ import annotations

import sys
import warnings

# Frames of these packages are passed over: ours, and torch's decorators around it.
_PASSED_OVER = ("fastcfg", "torch", "contextlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn` at the innermost frame outside the library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
