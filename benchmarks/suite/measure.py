"""One workload: every provider's result checked, then all of them timed in turns.

A provider whose result is wrong, or that fails, is not timed. The others take turns, one run each, and ratios are taken
turn by turn: they stay true on a machine whose speed drifts. With one thread on a CPU, time is that thread's CPU time,
to which other work on the machine does not add; else it is wall-clock time, with a wait for the device at both ends. On
a GPU what can be captured is timed a second time without the host: a graph of one run each on several sets of inputs,
which together exceed the L2 cache, after that cache was overwritten.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suite.cases import Provider
from benchmarks.suite.counting import count
from benchmarks.suite.providers import COPY, META_SHAPE, Entry, Job, job
from benchmarks.suite.workloads import Workload

Record = dict[str, Any]

MIN_TURNS = 3
_MAX_COPIES, _COPIES_BYTES = 32, 8 * 2**30


class DeviceLostError(RuntimeError):
    """The device no longer answers: this process is of no further use."""


def measure(
    workload: Workload,
    device: torch.device,
    seconds: float,
    excluded: dict[str, str],
    announce: Callable[[str], object],
) -> Iterator[tuple[str, Record]]:
    """Check and time a workload's providers.

    Args:
        workload: what to do.
        device: where.
        seconds: of measuring, for each kind of noise.
        excluded: providers that must not run, and why: they have crashed before.
        announce: called with the name of the provider that is about to run.

    Yields:
        Name and record, one for each kind of noise; the record is described in docs/benchmarks.md.

    Raises:
        DeviceLostError: a provider has left the device unusable; `announce` has named it.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    work = job(workload, device)
    start, found, entered = time.perf_counter(), {}, {}
    tolerance, truth = work.tolerance(), work.truth()
    for name, entry in work.entries.items():
        announce(name)
        if name in excluded:
            found[name] = {"status": "failed", "reason": excluded[name]}
        elif entry.problem:
            found[name] = {"status": "absent", "reason": entry.problem}
        else:
            provider, found[name] = check_provider(entry, work, truth, tolerance)
            if provider is None:
                continue
            entered[name] = provider
            try:
                found[name] |= _costs(entry, provider, device, torch.Size(work.shape).numel())
            except Exception as error:
                _failure(error)  # a run that fails here fails in its turn too, which is reported
    rotated = {n: _rotated(work, n, p, announce) for n, p in entered.items()} if device.type == "cuda" else {}
    for noise in workload.noises:
        record = {"kind": workload.kind, "solver": workload.what, "family": workload.family, "shape": list(work.shape)}
        record |= {"dtype": workload.dtype, "noise": noise, "rows": work.rows, "clock": clock_for(device)}
        record["bytes"] = work.moved_drawing if noise == "drawn" else work.moved
        timed = _timed(work, entered, rotated, noise == "drawn", seconds, Turns(entered, rotated, device, announce))
        timed["providers"] = {name: {**found[name], **timed["providers"].get(name, {})} for name in found}
        record |= timed
        record["seconds"] = round(time.perf_counter() - start, 2)
        if device.type == "cuda":
            record["torch_mib"] = torch.cuda.memory_reserved() // 2**20  # for GpuMonitor
        start = time.perf_counter()
        yield workload.name if noise == "none" else f"{workload.name}/{noise}", record


def clock_for(device: torch.device) -> str:
    """ "cpu" where one thread does all the work, else "wall"."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def quantiles(values: np.ndarray) -> dict[str, float]:
    """20, 50 and 80 %."""
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def check_provider(entry: Entry, work: Job, truth: Tensor, tolerance: float) -> tuple[Provider | None, Record]:
    """A provider set up for a workload's first case and run once, if its result is right; and its record so far.

    Args:
        entry: the provider.
        work: the workload.
        truth: the exact result.
        tolerance: the largest distance from it.

    Returns:
        The provider, or None if it is refused or has failed; the beginning of its record.
    """
    case = work.case(0)
    begin = time.perf_counter()
    try:
        provider = entry.make(case)
        if provider.result is None:
            provider.run(True)
            return provider, {"status": "ok", "reason": "", "floor": True}
        errors = []
        for draw in (False, True) if provider.seeded else (False,):
            provider.prepare()
            provider.run(draw)
            result = provider.result()
            errors.append(_distance(result, truth))
            if draw is False:
                first = time.perf_counter() - begin
        worst = max(errors)
        found = {"own": entry.own, "error": worst if isfinite(worst) else None, "tolerance": tolerance}
        found["first_s"] = first
        if worst <= tolerance:
            return provider, {"status": "ok", "reason": "", **found}
        reason = f"{worst:.1e} from the exact result, more than {tolerance:.1e}"
        return None, {"status": "refused", "reason": reason, **found}
    except Exception as error:
        return None, {"status": "failed", "reason": _failure(error)}
    finally:
        gc.collect()


def _distance(result: Tensor, truth: Tensor) -> float:
    """The largest, relative to the largest value where that is above 1; infinite for values that are no numbers."""
    if result.shape != truth.shape:
        return float("inf")
    distance = float((result.double() - truth.double()).abs().max()) / max(1.0, float(truth.abs().max()))
    return distance if isfinite(distance) else float("inf")


def _failure(error: Exception) -> str:
    """An error in a line.

    Raises:
        DeviceLostError: the device no longer answers after it.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as lost:
            raise DeviceLostError(text) from lost
    return f"out of memory ({text})" if isinstance(error, MemoryError) or "memory" in text.lower() else text


def _costs(entry: Entry, provider: Provider, device: torch.device, size: int) -> Record:
    """What a run costs beside time, from runs of its own."""
    found: Record = {}
    provider.prepare()
    if device.type == "cuda":
        from benchmarks.suite.device import counts, peak_bytes

        found["peak_bytes"] = peak_bytes(lambda: provider.run(True))
        provider.prepare()
        found["counts"] = counts(lambda: provider.run(True))
    elif entry.on_meta is not None:
        there = entry.on_meta()
        found["counts"] = asdict(count(lambda: there.run(True), META_SHAPE.numel()))
    elif entry.counted:
        found["counts"] = asdict(count(lambda: provider.run(True), size, "cpu"))
    if provider.memory is not None:
        found["held_bytes"] = provider.memory()
    return found


def _rotated(work: Job, name: str, provider: Provider, announce: Callable[[str], object]) -> Any:
    """A provider's graph over several sets of inputs; None where it cannot be captured."""
    from benchmarks.suite.device import Rotated, l2_bytes

    if not provider.capturable or work.moved is None:
        return None
    announce(name)
    copies = 1 + 2 * l2_bytes() // work.moved
    copies = max(1, min(copies, _MAX_COPIES, _COPIES_BYTES // (4 * work.moved)))
    try:
        return Rotated([provider, *(work.entries[name].make(work.case(seed)) for seed in range(1, copies))])
    except Exception as error:
        _failure(error)
        return None


def _timed(
    work: Job, entered: dict[str, Provider], rotated: dict[str, Any], draw: bool, seconds: float, turns: Turns
) -> Record:
    """Times and ratios of the providers, and what failed."""
    device = turns.device
    turns.take(draw)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turns.made < MIN_TURNS:
        turns.take(draw)
    found: dict[str, Record] = {name: {"status": "failed", "reason": reason} for name, reason in turns.failed.items()}
    times = {name: np.array(values[1:]) for name, values in turns.whole.items() if name not in turns.failed}
    for name, values in times.items():
        entry = found[name] = {"us": quantiles(values), "compilations": turns.compilations[name]}
        if device.type == "cuda":
            entry["host_us"] = quantiles(np.array(turns.host[name][1:]))
        if turns.alone.get(name):
            entry["device_us"] = quantiles(np.array(turns.alone[name][1:]))
        moved = work.moved_drawing if draw and name != COPY else work.moved
        if moved is not None:
            entry["gb_per_s"] = moved / entry.get("device_us", entry["us"])["p50"] / 1e3
    copied = found.get(COPY, {}).get("gb_per_s")
    for entry in found.values():
        if copied and "gb_per_s" in entry:
            entry["of_copy"] = entry["gb_per_s"] / copied
    own = [name for name in times if work.entries[name].own]
    others = [name for name in times if not work.entries[name].own and entered[name].result is not None]
    ratios = {name: {other: quantiles(times[other] / times[name]) for other in others} for name in own}
    return {"turns": turns.made, "providers": found, "ratios": ratios}


@dataclass
class Turns:
    """Providers that run one after the other, again and again.

    Attributes:
        entered: the providers.
        rotated: their graphs, or None.
        device: where they run.
        announce: called with the name of the provider that is about to run.
        made: turns so far, the first not counted: it may compile, and fills caches.
        whole, host, alone: microseconds by provider and turn, the first included: of a run, of the host until it is
            enqueued, of the device without the host.
        compilations: graphs that torch.compile made after the first turn, by provider.
        failed: why a provider failed, by its name.
    """

    entered: dict[str, Provider]
    rotated: dict[str, Any]
    device: torch.device
    announce: Callable[[str], object]
    made: int = field(default=-1, init=False)
    whole: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False)
    host: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False)
    alone: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False)
    compilations: Counter[str] = field(default_factory=Counter, init=False)
    failed: dict[str, str] = field(default_factory=dict, init=False)

    def take(self, draw: bool) -> None:
        """Run every provider once."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        clock = time.thread_time_ns if clock_for(self.device) == "cpu" else time.perf_counter_ns
        order = list(self.entered)
        random.Random(self.made).shuffle(order)  # none always runs in the caches that the same other one left
        for name in order:
            if name in self.failed:
                continue
            provider = self.entered[name]
            self.announce(name)
            try:
                provider.prepare()
                wait()
                compiled, start = _compilations(), clock()
                provider.run(draw)
                called = clock()
                wait()
                done = clock()
                if self.rotated.get(name) is not None:
                    self.alone[name].append(self.rotated[name].microseconds(draw))
            except Exception as error:
                self.failed[name] = _failure(error)
                continue
            self.whole[name].append((done - start) / 1e3)
            self.host[name].append((called - start) / 1e3)
            self.compilations[name] += (_compilations() - compiled) * (self.made >= 0)
        self.made += 1


def _compilations() -> int:
    """Graphs that torch.compile has made in this process; its package, seconds to import, is there if it has."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
