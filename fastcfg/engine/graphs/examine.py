"""Whether a program can be captured, found by recording its operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .constants import Constant, ReuseConstants
from .errors import CaptureError
from .modes import visible_copies
from .streams import on_side_stream
from .trace import Trace

__all__ = ["Examined", "examine"]


@dataclass(frozen=True, eq=False)
class Examined:
    """The result for a program that can be captured."""

    constants: tuple[Constant, ...] = ()  # what it copies from the host in one run, in order

    @contextmanager
    def reused(self) -> Iterator[ReuseConstants]:
        """Context in which the program takes its constants from the device."""
        with visible_copies(), ReuseConstants(self.constants) as reuse:
            yield reuse


def examine(
    program: Callable[[], None], states: tuple[Callable[[], None], Callable[[], None]], device: torch.device
) -> Examined:
    """Run a program three times and compare the last two, which begin in different states.

    A graph repeats the same operations on the same memory with the same numbers. So nothing may be read from the
    device, and nothing may differ between the runs except the contents of device memory. Host tensors are then the same
    in every row: they could depend on the device only through a read.

    The functions `states` set the program's memory to the states to begin in, with times far apart. CaptureError names
    the operation that cannot be captured and its line.
    """
    traces = []
    with on_side_stream(device):
        # Lazy initialisation, autotuning, and caches that a model fills in its first call.
        states[0]()
        program()
        for begin in states:
            begin()
            trace = Trace(device)
            with visible_copies(), trace:
                program()
            traces.append(trace)
    first, second = traces
    if reads := first.reads or second.reads:
        raise CaptureError(reads[0])
    if changed := first.difference(second):
        raise CaptureError(f"the model's steps are not alike: {changed}")
    return Examined(tuple(first.constants))
