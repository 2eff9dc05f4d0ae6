"""Buffers and programs kept from call to call, as long as what was captured is valid."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.caller import warn_caller
from ..utils.identity import Same
from ..utils.lru import LRU
from .buffers import Buffers
from .call import Call
from .graphs import Pool
from .programs import Programs
from .staleness import Fingerprint

# Shapes and option sets whose buffers and graphs are kept for the next call.
MAX_ENTRIES = 4


@dataclass(frozen=True, eq=False)
class CachedPrograms:
    """Buffers and programs of one kind of call. As a context manager, they go back to the cache at the end."""

    cache: ProgramCache
    key: Any
    buffers: Buffers
    programs: Programs
    pool: Pool
    fingerprint: Fingerprint | None  # of what was captured; None if nothing was
    generation: int  # how often the cache had been refreshed

    def __enter__(self) -> CachedPrograms:
        return self

    def __exit__(self, *error: object) -> None:
        self.cache._give_back(self)


class ProgramCache:
    """Buffers and programs on a device that are not in use; the least recently used are dropped."""

    def __init__(self, device: torch.device) -> None:
        self.captures = 0  # how often programs were made
        self.recaptured = ""  # why they were last made again although there were some; empty if that never happened
        self._kept: LRU[CachedPrograms] = LRU(MAX_ENTRIES)
        self._pool = Pool(device)
        self._generation = 0
        self._warned: set[Same] = set()
        self._lock = threading.Lock()

    def take(self, call: Call) -> CachedPrograms:
        """Buffers loaded for a call, and programs, which no other call has until they are given back."""
        key = call.key
        kept = self._kept.pop(key)
        if kept is not None and kept.buffers.changed_values():
            self.recaptured, kept = "a value given to the model has changed in place", None
        buffers = None
        if kept is not None:
            if not (stale := self._stale(kept)):
                kept.buffers.enter_stream()
                kept.buffers.load(call)
                return kept
            self.recaptured, buffers = stale, kept.buffers
            del kept  # its graphs' memory serves the new ones
        buffers = buffers or Buffers(call)
        buffers.enter_stream()
        pool, generation = self._pool, self._generation
        programs = Programs(buffers, call.models, pool)
        self.captures += 1
        if programs.problem and (model := call.options.models[0]) not in self._warned:
            self._warned.add(model)
            warn_caller(f"running eagerly: the model {programs.problem}")
        captured = any(decision.graph != "none" for decision in programs.decisions.values())
        # Taken now: a model may keep tensors from its first calls.
        fingerprint = Fingerprint(call.options.functions()) if captured else None
        buffers.load(call)
        return CachedPrograms(self, key, buffers, programs, pool, fingerprint, generation)

    def nbytes(self) -> int:
        """Bytes of the memory that is kept and of the graphs' pool."""
        return sum(entry.buffers.nbytes() for entry in self._kept.values()) + self._pool.nbytes()

    def release(self) -> None:
        """Drop everything; what is in use now is not kept when it is given back."""
        with self._lock:
            self._kept.clear()
            self._pool = Pool(self._pool.device)

    def refresh(self) -> None:
        """Make everything captured until now invalid."""
        self._generation += 1

    def _give_back(self, entry: CachedPrograms) -> None:
        with self._lock:
            if entry.pool is self._pool:  # else released meanwhile
                self._kept.put(entry.key, entry)

    def _stale(self, entry: CachedPrograms) -> str:
        """Why programs are not valid any more; empty if they are."""
        if entry.generation != self._generation:
            return "refresh() was called"
        return "" if entry.fingerprint is None else entry.fingerprint.changes(entry.buffers.options.functions())
