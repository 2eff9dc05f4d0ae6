"""A recording compared with the program it was made from: bits and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Program = Callable[[], None]

# The faster of each counts. Runs of a large model take long; on a device those of a small model hardly vary.
_RUNS = 2


@dataclass(frozen=True)
class Comparison:
    """The result of running a program and its recording."""

    same: bool  # whether both left the same bits, or the program itself does not reproduce its own
    program: float  # seconds of a run
    recording: float  # seconds of a replay


def compare(program: Program, recording: Program, begin: Program, results: tuple[Tensor, ...]) -> Comparison:
    """Run both twice from the state that `begin` sets, and compare the results, tensors on one device."""
    seconds: tuple[list[float], list[float]] = [], []
    outcomes: tuple[list[list[Tensor]], list[list[Tensor]]] = [], []
    for _ in range(_RUNS):
        for which, run in enumerate((program, recording)):
            begin()
            seconds[which].append(_timed(run, results[0].device))
            outcomes[which].append([tensor.clone() for tensor in results])
    same = _equal(outcomes[0][-1], outcomes[1][-1]) or not _equal(*outcomes[0])
    return Comparison(same, *map(min, seconds))


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
