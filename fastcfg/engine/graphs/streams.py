"""CUDA streams that a thread keeps for itself."""

from __future__ import annotations

import threading

import torch

__all__ = ["own_stream"]

# By thread, device and purpose.
_STREAMS: dict[tuple[int, int | None, str], torch.cuda.Stream] = {}


def own_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """This thread's stream for a purpose: always the same one.

    torch has 32 streams and hands them out in turns: whoever takes a new one each time soon takes one on which somebody
    else works, or captures. And cuBLAS keeps a workspace for every stream it has worked on, 32 MiB on an H100; one made
    during a capture never leaves the graphs' pool.

    Args:
        purpose: any name.
        device: a CUDA device.
    """
    key = threading.get_ident(), device.index, purpose
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(device)
    return _STREAMS[key]
