"""Runs workloads in separate processes, within a time budget."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.suite.cases import NotHereError
from benchmarks.suite.worker import serve
from benchmarks.suite.workloads import MODELS, Workload

# Seconds that a provider may take for what it has announced: setting up, or a run. Compiling is the longest.
_PATIENCE = 180.0
_CRASHES = 4  # of one workload, until it is given up


@dataclass
class Worker:
    """A process that measures, the pipe to it, and which provider runs there since when."""

    process: Any
    pipe: Connection
    current: Any
    since: Any

    def stop(self) -> None:
        """End it, whatever it does."""
        self.pipe.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


@dataclass
class Runner:
    """Measures workloads, in processes that may crash.

    Attributes:
        device: "cpu" or "cuda".
        threads: of torch; None leaves them.
        seconds: of measuring for each record.
        deadline: of `time.monotonic`, at which what runs is stopped; None for none.
        target: what a process runs; it is `worker.serve` but for tests.
    """

    device: str
    threads: int | None
    seconds: float
    deadline: float | None = None
    target: Callable[..., None] = serve
    _worker: Worker | None = field(default=None, init=False)
    _spent: dict[str, list[float]] = field(default_factory=dict, init=False)

    def run(self, workload: Workload) -> Iterator[tuple[str, dict[str, Any]]]:
        """Measure a workload; yields name and record as soon as they are there.

        A provider that takes its process down is named in the records as failed, and the others start again.

        Raises:
            OutOfTimeError: the deadline has come, or comes too soon to begin.
            NotHereError: the workload cannot be set up here.
            RuntimeError: setting it up failed.
        """
        if self.deadline is not None and time.monotonic() + self._expected(workload) > self.deadline:
            raise OutOfTimeError
        excluded: dict[str, str] = {}
        start = time.monotonic()
        for _ in range(_CRASHES):
            if self._worker is not None and not self._worker.process.is_alive():
                self.close()
            worker = self._worker = self._worker or self._started()
            worker.current.value, worker.since.value = b"", time.monotonic()
            with suppress(OSError):  # it has just died: `_answers` returns how
                worker.pipe.send((workload, excluded))
            crash = yield from self._answers(worker)
            if crash is None:
                self._spent.setdefault(_sort(workload), []).append(time.monotonic() - start)
                return
            name = worker.current.value.decode()
            self.close()
            if not name:
                raise RuntimeError(f"setting it up: {crash}")
            excluded[name] = crash
        raise RuntimeError("given up: " + ", ".join(f"{name}: {reason}" for name, reason in excluded.items()))

    def _answers(self, worker: Worker) -> Iterator[tuple[str, dict[str, Any]]]:
        """Records as they come; returns how the process died, or None if it did not."""
        while True:
            limit = worker.since.value + _PATIENCE
            until = limit if self.deadline is None else min(limit, self.deadline)
            wait([worker.pipe, worker.process.sentinel], timeout=max(until - time.monotonic(), 0.0))
            if worker.pipe.poll():
                try:
                    kind, name, record = worker.pipe.recv()
                except (EOFError, OSError):  # it died: between two messages, within one, or before it read ours
                    worker.process.join()
                    return _death(worker.process.exitcode)
                if kind == "record":
                    yield name, record
                elif kind == "done":
                    return None
                elif kind == "lost":
                    return f"left the device unusable: {name}"
                else:
                    raise NotHereError(name) if kind == "not here" else RuntimeError(name)
            elif not worker.process.is_alive():
                return _death(worker.process.exitcode)
            elif self.deadline is not None and time.monotonic() >= self.deadline:
                self.close()
                raise OutOfTimeError
            elif time.monotonic() >= worker.since.value + _PATIENCE:  # the same provider still
                return f"took too long, {time.monotonic() - worker.since.value:.0f} s"

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _started(self) -> Worker:
        context = multiprocessing.get_context("spawn")  # not forked: torch has threads, and CUDA forbids it
        ours, theirs = context.Pipe()
        current, since = context.Array("c", 128, lock=False), context.Value("d", time.monotonic(), lock=False)
        process = context.Process(
            target=self.target, args=(theirs, current, since, self.device, self.threads, self.seconds), daemon=False
        )
        process.start()
        theirs.close()
        return Worker(process, ours, current, since)

    def _expected(self, workload: Workload) -> float:
        """Seconds that a workload is likely to take: as long as the last ones of its sort."""
        last = self._spent.get(_sort(workload), [])[-3:]
        return max(last) if last else len(workload.noises) * self.seconds


class OutOfTimeError(Exception):
    """The time budget is used up."""


def _sort(workload: Workload) -> str:
    """Networks take as long as their architecture."""
    return workload.family if workload.family in MODELS else workload.kind


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"crashed ({name}{', killed: out of memory?' if name == 'SIGKILL' else ''})"
    return f"ended its process (exit status {code})"
