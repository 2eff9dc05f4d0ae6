"""Find out whether a program can be captured, by watching it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .cuda import on_side_stream
from .errors import CaptureError
from .modes import Constant, ReuseConstants, visible_copies
from .trace import Trace

__all__ = ["Examined", "examine"]


@dataclass(frozen=True, eq=False)
class Examined:
    """What was learnt of a program that can be captured.

    Attributes:
        constants: what it copies from the host in one run, in order.
    """

    constants: tuple[Constant, ...] = ()

    @contextmanager
    def reused(self) -> Iterator[ReuseConstants]:
        """Context in which the program takes its constants from the device."""
        reuse = ReuseConstants(self.constants)
        with visible_copies(), reuse:
            yield reuse


def examine(
    program: Callable[[], None],
    states: tuple[Callable[[], None], Callable[[], None]],
    device: torch.device,
) -> Examined:
    """Run a program three times and compare the last two, which begin in different states.

    A graph repeats the same operations on the same memory with the same numbers. So nothing may be read from the
    device, and nothing may differ between the runs but what the device's memory holds. What is copied from the host is
    then the same in every step: a tensor of the host's could depend on the device only through a read.

    Args:
        program: what is to be captured.
        states: functions that put the program's memory into the states to begin in: two times far apart.
        device: where it works.

    Raises:
        CaptureError: it cannot be captured; the message names operation and line.
    """
    traces = []
    with on_side_stream(device):
        # Lazy initialisation, autotuning, and what a model remembers from its first call.
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
