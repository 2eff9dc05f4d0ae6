"""Compiled results, shared by schedulers with equal attributes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

from ..utils.identity import NoValueError, value_key
from ..utils.lru import LRU

__all__ = ["cached_for"]

Result = TypeVar("Result")

_results: LRU[Any] = LRU(64)


def cached_for(owner: Any, further: Any, make: Callable[[], Result]) -> Result:
    """The cached result for an equal owner and equal further arguments, or the result of `make`. Owners are compared by
    class, version of the class's library and all attributes."""
    try:
        key = (type(owner), _version(type(owner).__module__), value_key(vars(owner)), value_key(further))
    except NoValueError:
        return make()
    result: Result = _results.get_or_make(key, make)
    return result


@cache
def _version(module: str) -> str:
    try:
        return metadata.version(module.partition(".")[0])
    except metadata.PackageNotFoundError:
        return ""
