"""Run a fixed program again and again on the same memory: eagerly, as a CUDA graph, or through a stand-in for graphs on
a CPU.

A program is a function without arguments or result that reads and writes tensors it was built with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CudaGraph", "StandIn"]

Program = Callable[[], None]


class CudaGraph:
    """A program captured once; calling the object replays it.

    Args:
        program: what to capture. It is run `warmup` times before, on a side stream, for lazy initialisation and
            autotuning.
        pool: a `torch.cuda.graph_pool_handle()` to share memory with other graphs of the same owner.
        before: called before each of those runs, to put the program's tensors into a valid state.
        warmup: their number.

    Raises:
        RuntimeError: the program does something a graph cannot hold (a sync, an allocation outside the pool, a copy
            from the CPU).
    """

    def __init__(self, program: Program, pool: Any = None, before: Program | None = None, warmup: int = 2) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmup):
                if before is not None:
                    before()
                program()
        torch.cuda.current_stream().wait_stream(side)
        self._program = program  # the graph does not own the tensors it reads
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: another thread that queries CUDA, a progress display say, must not break the capture.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            program()

    def __call__(self) -> None:
        """Enqueue the captured work on the current stream."""
        self._graph.replay()


class StandIn:
    """What a graph does, on a CPU: the program's operations are recorded once, with the very tensors they touched, and
    replayed.

    Python does not run again at replay, results land in the tensors of the recording, and whatever the program reads
    through anything but its tensors is stale: the mistakes that break a captured program break this one too.

    Args:
        program: what to record (running it once).
    """

    def __init__(self, program: Program) -> None:
        recorder = _Recorder()
        with recorder:
            program()
        self._calls = recorder.calls

    def __call__(self) -> None:
        """Repeat the recorded operations."""
        with torch.no_grad():
            for function, args, kwargs, outputs in self._calls:
                results = tree_leaves(function(*args, **kwargs))
                for recorded, result in zip(outputs, results, strict=True):
                    if isinstance(recorded, Tensor) and not _same_memory(recorded, result):
                        recorded.copy_(result)


class _Recorder(TorchDispatchMode):
    """Keeps every dispatched call with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # Argument containers are copied: callers may reuse their lists.
        keep = tree_map(lambda leaf: leaf, (args, kwargs or {}))
        self.calls.append((function, keep[0], keep[1], tree_leaves(result)))
        return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
