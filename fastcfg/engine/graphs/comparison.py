"""A recording compared with the program it was made from: bits and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Comparison", "compare"]

Program = Callable[[], None]

# The faster of each counts. Runs of a large model take long; on a device those of a small model hardly vary.
_RUNS = 2


@dataclass(frozen=True)
class Comparison:
    """The result of running a program and its recording.

    Attributes:
        same: whether both left the same bits, or the program itself does not reproduce its own.
        program: seconds of a run.
        recording: seconds of a replay.
    """

    same: bool
    program: float
    recording: float


def compare(program: Program, recording: Program, begin: Program, results: tuple[Tensor, ...]) -> Comparison:
    """Run both twice from the same state.

    Args:
        program: what was recorded.
        recording: its recording.
        begin: sets the program's memory to the state to begin in.
        results: the tensors to compare, on one device.
    """
    outcomes: dict[str, list[list[Tensor]]] = {"program": [], "recording": []}
    seconds: dict[str, list[float]] = {"program": [], "recording": []}
    for _ in range(_RUNS):
        for name, run in (("program", program), ("recording", recording)):
            begin()
            seconds[name].append(_timed(run, results[0].device))
            outcomes[name].append([tensor.clone() for tensor in results])
    same = _equal(outcomes["program"][-1], outcomes["recording"][-1]) or not _equal(*outcomes["program"])
    return Comparison(same, min(seconds["program"]), min(seconds["recording"]))


def _timed(run: Program, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    first.record(stream)
    run()
    last.record(stream)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return all(
        torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in pair)) for pair in zip(a, b, strict=True)
    )
