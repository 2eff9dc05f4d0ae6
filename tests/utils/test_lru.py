"""The bounded cache."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

from fastcfg.utils.lru import LRU

pytestmark = pytest.mark.quick


def test_the_least_recently_used_entry_is_dropped() -> None:
    cache: LRU[int] = LRU(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    assert cache.put("c", 3) == [2]
    assert cache.get("b") is None
    assert cache.values() == [1, 3]
    assert cache.pop("a") == 1
    assert cache.pop("a") is None
    cache.clear()
    assert len(cache) == 0


def test_a_value_is_made_once_and_an_error_is_not_stored() -> None:
    cache: LRU[list[int]] = LRU(2)
    first = cache.get_or_make("a", lambda: [1])
    assert cache.get_or_make("a", lambda: [2]) is first
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("b", lambda: [1 // 0])
    assert len(cache) == 1


def test_copies_and_pickles_are_empty() -> None:
    cache: LRU[object] = LRU(3)
    cache.put("lock", threading.Lock())
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(other), other.capacity) == (0, 3)
    assert len(cache) == 1
