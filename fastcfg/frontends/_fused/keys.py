"""Keys that are looked up often, and keys of any object."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ...utils.identity import NoValueError, Same, value_key


class Key:
    """A key with its hash kept."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: Hashable) -> None:
        self.value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.value == other.value)


def hashable(value: Any) -> Hashable:
    """A key of an object by its value, or by its identity where it has none that can be compared."""
    try:
        return value_key(value)
    except NoValueError:
        return Same(value)
