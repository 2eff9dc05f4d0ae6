"""Compiled models, recorded whole because their operations cannot be seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from ...utils._torch_private import made_by_compile

__all__ = ["Opaque", "is_compiled", "recording"]

_THREAD = threading.local()


class Opaque:
    """A function that a stand-in records as one call instead of by its operations."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = getattr(_THREAD, "record", None)
        return self._function(*args, **kwargs) if record is None else record(self._function, args, kwargs)


class recording:  # noqa: N801
    """Context in which `Opaque` functions are run by `record(function, args, kwargs)`."""

    def __init__(self, record: Callable[..., Any]) -> None:
        self._record = record

    def __enter__(self) -> None:
        _THREAD.record = self._record

    def __exit__(self, *error: object) -> None:
        _THREAD.record = None


def is_compiled(function: Any) -> bool:
    """Whether torch.compile made a function, a module or one of its parts."""
    modules = function.modules() if isinstance(function, Module) else ()
    return any(made_by_compile(item) for item in (function, *modules))
