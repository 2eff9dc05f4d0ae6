"""CUDA streams owned by a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The purpose of the stream on which a thread examines and captures: what examining initialises, capturing finds.
SIDE = "capture"

# By thread, device and purpose.
_STREAMS: dict[tuple[int, int | None, str], torch.cuda.Stream] = {}


def own_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """This thread's stream for a purpose, always the same one.

    torch hands out its 32 streams in turn, so a new one each time would soon be one on which another thread works or
    captures. And cuBLAS keeps a workspace for every stream it has worked on, 32 MiB on an H100; one allocated during a
    capture never leaves the graphs' pool.
    """
    key = threading.get_ident(), device.index, purpose
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(device)
    return _STREAMS[key]


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run on this thread's side stream, in order with the current one; on a CPU, just run."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), own_stream(SIDE, device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)
