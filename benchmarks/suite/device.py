"""What only a GPU tells of a run: launches, copies and waits, memory, and time without the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.suite.cases import Provider

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def counts(run: Callable[[], object]) -> dict[str, int | None]:
    """Launches, copies and waits of one run, by torch's profiler, under the names of `counting.Counts`."""
    # A CUPTI that is torn down and comes back has crashed with graphs: torch.profiler says the same of Inductor's.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("run"):
            run()
        torch.cuda.synchronize()
    events = list(profile.events())
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in on_host if event.name == "run"]
    called = [event.name for event in on_host if span.start <= event.time_range.start <= span.end]
    done = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "dispatched": sum(name.startswith("aten::") for name in called),
        # Copies and fills on the device are operations too, as `counting` has it.
        "kernels": sum(name != "run" and not name.startswith(("Memcpy HtoD", "Memcpy DtoH")) for name in done),
        "full_size": None,
        "host_copies": sum(name.startswith("Memcpy HtoD") for name in done),
        "reads": sum(name.startswith("Memcpy DtoH") for name in done),
        "waits": sum(name.partition("_v")[0] in _WAITS for name in called),
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
