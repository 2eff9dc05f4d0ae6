"""CUDA graphs and the memory they share."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from ...utils._torch_private import release_capture_pool
from .errors import CaptureError, describe, failing_line
from .streams import SIDE, own_stream

if TYPE_CHECKING:
    from .trace import Examined

# torch's generator supports one capture at a time, and a device-wide wait, with which torch.cuda.graph begins, would
# break a capture in another thread.
_CAPTURING = threading.RLock()

# Graphs whose capture CUDA did not end. torch's pinned-memory allocator still queries them, so they are kept alive.
_BROKEN: list[torch.cuda.CUDAGraph] = []


class Pool:
    """The memory shared by one owner's graphs, which may be replayed on any stream, but one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.lock = device, threading.Lock()
        self._handle: Any = None
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def admit(self, graph: CudaGraph) -> Any:
        """The handle for a new graph. Once all graphs of a handle are freed, torch does not accept it again."""
        if not len(self._graphs):
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle

    def expel(self, graph: CudaGraph) -> None:
        """Forget a graph whose capture failed: it holds no memory."""
        self._graphs.discard(graph)

    def follow(self) -> None:
        """Have the current stream wait for the last stream that used the memory."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def nbytes(self) -> int:
        """Bytes the allocator has reserved for the pool."""
        if not len(self._graphs):
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) == tuple(self._handle))


class CudaGraph:
    """Runs of one program, captured once, one after the other; calling the object replays them.

    The program must have run before: nothing can be initialised during a capture. CaptureError says why it cannot be
    captured.
    """

    def __init__(self, programs: Sequence[Callable[[], None]], examined: Examined, pool: Pool) -> None:
        # The graph does not own the tensors it reads.
        self._programs, self._examined = programs, examined
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        # Without autocast's cache: a replay would read the cached cast of a weight instead of the weight.
        cached, outer = torch.is_autocast_cache_enabled(), sys.exc_info()[1]
        torch.set_autocast_cache_enabled(False)
        try:
            with _CAPTURING, torch.cuda.device(pool.device):
                self._capture()
        except BaseException as error:
            pool.expel(self)
            first = _first(error, outer)
            if not isinstance(first, RuntimeError):
                raise first from None  # an interrupt, or the model's own error
            raise CaptureError(_reason(first)) from error
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _capture(self) -> None:
        before = torch.cuda.current_stream(self._pool.device)
        side, pool = own_stream(SIDE, self._pool.device), self._pool.admit(self)
        # Thread-local: another thread that queries CUDA, such as a progress display, must not break the capture.
        capture = torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local")
        try:
            with capture, self._examined.reused() as constants:
                for program in self._programs:
                    constants.restart()
                    program()
        except BaseException:
            if not _has_ended(self._graph):
                _mend(self._graph, pool, side)
            raise
        finally:
            # Where ending a capture fails, torch stays on the capture's stream.
            torch.cuda.set_stream(before)

    def __call__(self) -> None:
        """Enqueue the captured work on the current stream."""
        with self._pool.lock:
            self._pool.follow()
            self._graph.replay()


def _first(error: BaseException, outer: BaseException | None) -> BaseException:
    """The original error: ending a broken capture raises a second one over it. `outer` is the exception that was being
    handled before the capture began."""
    while error.__context__ not in (None, outer) and not isinstance(error, CaptureError):
        error = error.__context__
    return error


def _reason(error: RuntimeError) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    return f"{str(error).partition(chr(10))[0]}{describe(failing_line(error.__traceback__))}"


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _mend(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Clean up after a capture that CUDA refused to end: torch's allocator would keep reserving memory for it, and its
    generator would refuse to draw. A capture that succeeds resets the generator."""
    _BROKEN.append(graph)
    with suppress(RuntimeError):
        release_capture_pool(stream.device.index, pool)
    with suppress(RuntimeError):
        something = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            something.zero_()
