"""Warnings that point at the caller's code, however deep in the library they arise."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# Frames of these packages are passed over: ours, torch's decorators around it, and imports.
_PASSED_OVER = ("fastcfg", "torch", "contextlib", "importlib")


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn` at the innermost frame outside the library."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)
