"""A small bounded cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class LRU(Generic[Value]):
    """A thread-safe mapping of at most `capacity` entries, never None; a new entry drops the least recently used one.
    Copies and pickles are empty: the contents are rebuilt on demand."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = RLock()

    def __reduce__(self) -> Any:
        return LRU, (self.capacity,)

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> list[Value]:
        """All values, the least recently used first."""
        with self._lock:
            return list(self._entries.values())

    def get(self, key: Hashable) -> Value | None:
        """The value under a key, now the most recently used; None if there is none."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def pop(self, key: Hashable) -> Value | None:
        """Remove and return the value under a key; None if there is none."""
        with self._lock:
            return self._entries.pop(key, None)

    def put(self, key: Hashable, value: Value) -> list[Value]:
        """Store a value as the most recently used; returns the values that were dropped for it."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            return [self._entries.popitem(last=False)[1] for _ in range(len(self._entries) - self.capacity)]

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under a key, or what `make` returns; an exception of its own is raised and nothing is stored.

        `make` runs unlocked: threads that miss the same key at once each call it, and the last result is stored.
        """
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
