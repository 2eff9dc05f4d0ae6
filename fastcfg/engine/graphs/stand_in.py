"""The CPU's stand-in for CUDA graphs, with which graph logic is tested."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ...utils._torch_private import made_by_compile, tree_leaves, tree_map, without_dispatch_modes
from .trace import DispatchMode

_THREAD = threading.local()


class StandIn:
    """The operations of programs, recorded once in a run of each with the tensors they touched, and replayed.

    As with a CUDA graph, Python does not run at replay, results land in the recorded tensors, and everything the
    program reads other than tensors is stale: mistakes that break a captured program break this one too.
    """

    def __init__(self, programs: Sequence[Callable[[], None]]) -> None:
        recorder = _Recorder()
        with recording(recorder.record), recorder:
            for program in programs:
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


class _Recorder(DispatchMode):
    """Records every call with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._keep(function, args, kwargs or {}, function(*args, **(kwargs or {})))

    def record(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call a function and record it whole, instead of its operations."""
        with without_dispatch_modes():
            result = function(*args, **kwargs)
        return self._keep(function, args, kwargs, result)

    def _keep(self, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
        # Argument containers are copied: callers may reuse their lists.
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        self.calls.append((function, args, kwargs, tree_leaves(result)))
        return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class Opaque:
    """A compiled function, which a stand-in records as one call: its operations cannot be seen."""

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
