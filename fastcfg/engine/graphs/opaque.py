"""Compiled models, recorded whole because their operations cannot be seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def recording(record: Callable[..., Any]) -> Iterator[None]:
    """Context in which `Opaque` functions are run by `record(function, args, kwargs)`."""
    _THREAD.record = record
    try:
        yield
    finally:
        _THREAD.record = None


def is_compiled(function: Any) -> bool:
    """Whether torch.compile made a function, a module or one of its parts."""
    modules = function.modules() if isinstance(function, Module) else ()
    return any(made_by_compile(item) for item in (function, *modules))
