"""Device values read on the host without stalling the device: copied on a side stream, read one row later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graphs.streams import own_stream


class Readback:
    """Copies tensors like the first one to the host, one row late.

    `push` takes a value in the order of the current stream; `take`, called after more work was enqueued, waits until
    that value has arrived, while the device has work.
    """

    def __init__(self, like: Tensor) -> None:
        on_gpu = like.device.type == "cuda"
        self._staged = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._arrived = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
        self._stream: Any = own_stream("readback", like.device) if on_gpu else None
        # Blocking events: the host sleeps instead of spinning while it waits.
        self._staging, self._arrival = (torch.cuda.Event(blocking=True) if on_gpu else None for _ in range(2))

    def push(self, tensor: Tensor) -> None:
        """Start copying a value. The one before must have been taken."""
        self._staged.copy_(tensor)
        if self._stream is None:
            self._arrived.copy_(self._staged)
            return
        self._staging.record(torch.cuda.current_stream(tensor.device))  # type: ignore[union-attr]
        self._stream.wait_event(self._staging)
        with torch.cuda.stream(self._stream):
            self._arrived.copy_(self._staged, non_blocking=True)
            self._arrival.record(self._stream)  # type: ignore[union-attr]

    def take(self) -> Tensor:
        """The value pushed last, as a tensor of the caller's own."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._arrived.clone()


class Pace:
    """Keeps the host at most one row ahead of the device, so that a progress bar shows work that is done."""

    def __init__(self, device: torch.device) -> None:
        self._device, on_gpu = device, device.type == "cuda"
        self._events = [torch.cuda.Event(blocking=True) for _ in range(2)] if on_gpu else []
        self._row = 0

    def after_row(self) -> None:
        """A row was enqueued: wait for the one before it."""
        if self._events:
            self._events[self._row % 2].record(torch.cuda.current_stream(self._device))
            self._row += 1
            if self._row > 1:
                self._events[self._row % 2].synchronize()
