"""CUDA graphs and the memory they share."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from ...utils._torch_private import release_capture_pool
from .errors import CaptureError, describe, failing_place
from .streams import own_stream

if TYPE_CHECKING:
    from .examine import Examined

__all__ = ["CudaGraph", "Pool", "on_side_stream"]

# torch's generator knows one capture at a time, and a device-wide wait (torch.cuda.graph begins with one) would break a
# capture that is under way in another thread.
_CAPTURING = threading.RLock()

# Of the stream on which a thread examines and captures: what the first needs, the second finds.
_SIDE = "capture"

# Graphs whose capture CUDA did not end: torch's allocator of pinned memory goes on asking them what is theirs.
_BROKEN: list[torch.cuda.CUDAGraph] = []


class Pool:
    """The memory that one owner's graphs share. They may be replayed on any stream, but one after the other.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.lock = device, threading.Lock()
        self._handle: Any = None
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def admit(self, graph: CudaGraph) -> Any:
        """The handle for a new graph. A handle whose graphs are all gone cannot be used again."""
        if not len(self._graphs):
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle

    def expel(self, graph: CudaGraph) -> None:
        """Forget a graph whose capture failed: it holds no memory."""
        self._graphs.discard(graph)

    def follow(self) -> None:
        """Have the current stream wait for the last one that used the memory, if that was another."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def nbytes(self) -> int:
        """Bytes the allocator has set aside for the pool."""
        if not len(self._graphs):
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) == tuple(self._handle))


class CudaGraph:
    """Programs captured once, one after the other; calling the object replays them.

    Args:
        programs: runs of one program, which has run before: a capture can initialise nothing.
        examined: what is known of it.
        pool: the memory it shares with other graphs.

    Raises:
        CaptureError: the program does something a graph cannot hold.
    """

    def __init__(self, programs: Sequence[Callable[[], None]], examined: Examined, pool: Pool) -> None:
        # The graph does not own the tensors it reads.
        self._programs, self._examined = programs, examined
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        # Not cached: a cast of a weight would be read at replay instead of the weight.
        cached, outer = torch.is_autocast_cache_enabled(), sys.exc_info()[1]
        torch.set_autocast_cache_enabled(False)
        try:
            with _CAPTURING, torch.cuda.device(pool.device):
                self._capture()
        except BaseException as error:
            pool.expel(self)
            first = _first(error, outer)
            if not isinstance(first, RuntimeError):
                raise first from None  # an interrupt, or the model's own
            raise CaptureError(_reason(first)) from error
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _capture(self) -> None:
        before = torch.cuda.current_stream(self._pool.device)
        side, pool = own_stream(_SIDE, self._pool.device), self._pool.admit(self)
        # Thread-local: another thread that queries CUDA, a progress display say, must not break the capture.
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
            # Where the end of a capture fails, torch stays on its stream.
            torch.cuda.set_stream(before)

    def __call__(self) -> None:
        """Enqueue the captured work on the current stream."""
        with self._pool.lock:
            self._pool.follow()
            self._graph.replay()


def _first(error: BaseException, outer: BaseException | None) -> BaseException:
    """What went wrong first: ending a broken capture raises a second error over it.

    Args:
        error: what was caught.
        outer: what was being handled before the capture began.
    """
    while error.__context__ not in (None, outer) and not isinstance(error, CaptureError):
        error = error.__context__
    return error


def _reason(error: RuntimeError) -> str:
    if isinstance(error, CaptureError):
        return str(error)
    return f"{str(error).partition(chr(10))[0]}{describe(failing_place(error.__traceback__))}"


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _mend(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Undo what torch leaves undone where CUDA refuses to end a capture.

    The allocator would go on setting memory aside for it, and the generator would refuse to draw for anybody else. A
    capture that succeeds puts the generator right.
    """
    _BROKEN.append(graph)
    with suppress(RuntimeError):
        release_capture_pool(stream.device.index, pool)
    with suppress(RuntimeError):
        something = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            something.zero_()


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run on this thread's side stream, in order with the current one; on a CPU, just run."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), own_stream(_SIDE, device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)
