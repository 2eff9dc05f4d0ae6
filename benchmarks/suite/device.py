"""What only a GPU shows of a run: launches, copies and waits, memory, and time without the host."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks.suite.cases import Provider
from fastcfg.engine.loop import Run

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profiled(
    run: Callable[[], object], after: Callable[[], object] = lambda: None, cuda: bool = True
) -> tuple[list[Any], list[Any]]:
    """What torch's profiler sees of a run.

    Args:
        run: the calls to watch.
        after: called when they are enqueued; its work on the device is seen too.
        cuda: whether there is a GPU to watch.

    Returns:
        The host's events within `run`, and all of the device's.
    """
    # A CUPTI that is torn down and comes back has crashed with graphs: torch.profiler says the same of Inductor's.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    wait = torch.cuda.synchronize if cuda else lambda: None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + cuda]
    wait()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("run"):
            run()
        after()
        wait()
    events = list(profile.events())
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in on_host if event.name == "run"]
    within = [e for e in on_host if span.start <= e.time_range.start <= span.end and e.name != "run"]
    return within, [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "run"]


def profiled_rows(run: Run, programs: int, cuda: bool) -> tuple[list[Any], list[Any]]:
    """`profiled` of a sampling run, prepared, that consists of so many programs; the last copy is not within it."""
    rows = run.rows()

    def rest() -> None:
        for _ in rows:
            raise AssertionError(f"more than {programs} programs")

    return profiled(lambda: [next(rows) for _ in range(programs)], rest, cuda)


def calls(on_host: Iterable[Any]) -> Counter[str]:
    """CUDA's functions among the host's events, by name without CUPTI's version."""
    return Counter(event.name.partition("_v")[0] for event in on_host if event.name.startswith("cu"))


def counts(run: Callable[[], object]) -> dict[str, int | None]:
    """Launches, copies and waits of one run, under the names of `counting.Counts`."""
    on_host, on_device = profiled(run)
    done, called = [event.name for event in on_device], calls(on_host)
    return {
        "dispatched": sum(event.name.startswith("aten::") for event in on_host),
        # Copies and fills on the device are operations too, as `counting` has it.
        "kernels": sum(not name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for name in done),
        "full_size": None,
        "host_copies": sum(name.startswith("Memcpy HtoD") for name in done),
        "reads": sum(name.startswith("Memcpy DtoH") for name in done),
        "waits": sum(called[name] for name in _WAITS),
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes allocated at most during a run, beyond those before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def l2_bytes() -> int:
    """Size of the device's L2 cache."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 64 * 2**20))


class Rotated:
    """A graph of one run each on several sets of inputs, timed with an L2 cache that holds none of them.

    Args:
        providers: the same provider on different inputs.

    Raises:
        RuntimeError: they cannot be captured.
    """

    def __init__(self, providers: Sequence[Provider]) -> None:
        self._providers = providers
        self._flush = torch.empty(2 * l2_bytes(), dtype=torch.uint8, device="cuda")
        self._graphs = {draw: self._captured(draw) for draw in (False, True)}

    def _captured(self, draw: bool) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for provider in self._providers:
                provider.prepare()
                provider.run(draw)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for provider in self._providers:
                provider.run(draw)
        return graph

    def microseconds(self, draw: bool) -> float:
        """Device time of one run, from one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for provider in self._providers:
            provider.prepare()
        for _ in range(4):  # long enough for the host to enqueue the graph: its launch is not to be timed
            self._flush.zero_()
        start.record()
        self._graphs[draw].replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(self._providers)
