"""Checks of what a captured loop asks of a device: syncs, launches, memory, streams, threads."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from benchmarks.captured.registry import Details, NotHereError, check, require, require_same
from benchmarks.captured.rig import (
    GUIDANCES,
    TABLES,
    build,
    conv,
    draw,
    prepare,
    require_captured,
    shape_on,
)
from fastcfg.engine.loop import Previews

# Syncs


@contextmanager
def syncs_raise() -> Iterator[None]:
    """Context in which every wait of the host's for a stream raises RuntimeError.

    torch looks at this mode where it copies and waits, and where it waits for a stream (`memcpy_and_sync` and
    `stream_synchronize` in c10/cuda/CUDAFunctions.h), as `.item()`, `.cpu()`, copies from pageable memory and `nonzero`
    do. It does not in `Event.synchronize`, which is cudaEventSynchronize and no more (c10/cuda/CUDAEvent.h), nor in
    `torch.cuda.synchronize` (`device_synchronize`). Previews, progress and adaptive guidance wait for the row before
    by events: they may.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@check(needs_cuda=True)
def no_loop_waits_for_the_device(device: torch.device) -> Details:
    """No row of any solver waits for the device: eager or captured, with previews, with adaptive guidance."""
    probe = torch.ones(2, device=device)
    try:
        with syncs_raise():
            probe.sum().item()
    except RuntimeError:
        pass
    else:
        raise AssertionError("torch's debug mode does not see a read from the device")
    runs = 0
    variants: dict[str, dict[str, Any]] = {
        "eager": {"graph": False},
        "captured": {},
        "three rows": {"steps_per_graph": 3},
        "torch's noise": {"noise": "torch"},
        "interval": {"guidance": GUIDANCES["interval"]},
        "adaptive": {"guidance": GUIDANCES["adaptive"]},
        "apg": {"guidance": GUIDANCES["apg"]},
        "adaptive, eager": {"guidance": GUIDANCES["adaptive"], "graph": False},
    }
    for (solver, table), (name, options) in itertools.product(TABLES.items(), variants.items()):
        sampler = build(device, conv(device, table), table, **options)
        want = draw(sampler, 3)
        if options.get("graph", True):
            require_captured(sampler)
        for with_previews in (False, True):
            what = f"{solver}, {name}, previews {with_previews}"
            prepare(sampler, 3, keep_x0=with_previews)  # captures
            run, seen = prepare(sampler, 3, keep_x0=with_previews), []
            previews = Previews(run, lambda preview, seen=seen: seen.append(preview.row), 2) if with_previews else None
            try:
                with syncs_raise():
                    for row in run.rows():
                        if previews is not None:
                            previews.after_row(row)
                    if previews is not None:
                        previews.deliver()
            except RuntimeError as error:
                raise AssertionError(f"{what}: {error}") from error
            require_same(run.result, want, what)
            rows = [row for row in range(len(table)) if row % 2 == 0 or row == len(table) - 1]
            require(seen == (rows if with_previews else []), f"{what}: previews of the rows {seen}")
            runs += 1
    return {"runs": runs, "variants": list(variants)}


# Launches


def profiled(run: Any, programs: int) -> tuple[list[Any], list[Any]]:
    """What torch's profiler saw of a run.

    Args:
        run: prepared.
        programs: how many programs it consists of.

    Returns:
        The host's events between the run's first row and its last, and the device's in the whole run. The device's last
        is the copy of the result; a CPU has none.
    """
    # A CUPTI that is torn down and comes back has crashed with graphs: torch.profiler says the same of Inductor's.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    cuda = run.workspace.options.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + cuda]
    rows = run.rows()
    wait()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("all rows"):
            for _ in range(programs):
                next(rows)
        for _ in rows:
            raise AssertionError(f"more than {programs} programs")
        wait()
    events = list(profile.events())
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [event.time_range for event in on_host if event.name == "all rows"]
    within = [e for e in on_host if span.start <= e.time_range.start <= span.end and e.name != "all rows"]
    return within, [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != "all rows"]


def profiled_rows(run: Any, programs: int) -> tuple[Counter[str], Counter[str]]:
    """CUDA's functions and the device's kernels and copies that `profiled` saw, by name."""
    on_host, on_device = profiled(run, programs)
    called = Counter(
        event.name.partition("_v")[0] for event in on_host if event.name.startswith("cu")
    )  # CUPTI's versions
    return called, Counter(event.name for event in on_device)


@check(needs_cuda=True)
def one_launch_runs_a_row(device: torch.device) -> Details:
    """A replayed run is one graph launch per row, or per n rows, with nothing else launched or copied between."""
    found = {}
    for solver, repeat in (("ddpm", 1), ("ddpm", 3), ("plms", 1)):
        table, name = TABLES[solver], f"{solver}, {repeat} in a graph"
        sampler = build(device, conv(device, table), table, steps_per_graph=repeat)
        draw(sampler)
        require_captured(sampler)
        programs = len(list(prepare(sampler).rows()))
        whole, rest = divmod(len(table), repeat)
        require(programs == whole + rest, f"{name}: {programs} programs for {len(table)} rows")
        called, done = profiled_rows(prepare(sampler), programs)
        if not done:
            raise NotHereError("the profiler saw nothing on the device (CUPTI may not be allowed here)")
        launches = called["cudaGraphLaunch"]
        require(launches == programs, f"{name}: {launches} graph launches for {programs} programs: {dict(called)}")
        words = ("Launch", "Memcpy", "Memset", "Synchronize", "Malloc", "Free")
        others = Counter({call: count for call, count in called.items() if any(word in call for word in words)})
        others -= Counter({"cudaGraphLaunch": programs})
        # Before every replay, some versions of torch put seed and offset of the generator where the graph reads them.
        fills = sum(count for event, count in done.items() if "FillFunctor" in event)
        if fills == others["cudaLaunchKernel"] == 2 * programs:
            del others["cudaLaunchKernel"]
        else:
            fills = 0
        require(not others, f"{name}: beside the graphs the rows called {dict(others)}; on the device {dict(done)}")
        crossings = {event: count for event, count in done.items() if "HtoD" in event or "DtoH" in event}
        require(not crossings, f"{name}: copies between host and device {crossings}")
        steps = sum(count for event, count in done.items() if "guided_step" in event)
        require(steps == len(table), f"{name}: guided_step ran {steps} times in {len(table)} rows: {dict(done)}")
        found[name] = {
            "rows": len(table),
            "launches_of_torchs_generator": fills,
            "host_calls": dict(called),
            "device_events": {event[:80]: count for event, count in done.most_common()},
        }
    return found


# Memory


def _settled() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _used(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    _settled()
    return {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}


def _pools(device: torch.device) -> dict[tuple[int, int], int]:
    """Bytes of the allocator's private pools, by their ids."""
    found: Counter[tuple[int, int]] = Counter()
    for segment in torch.cuda.memory_snapshot() if device.type == "cuda" else ():
        if any(segment["segment_pool_id"]):
            found[tuple(segment["segment_pool_id"])] += segment["total_size"]
    return dict(found)


@check()
def memory_is_steady_and_given_back(device: torch.device) -> Details:
    """Calls of a kind add no memory, all shapes share one pool of graphs, and release() gives everything back.

    On a CPU, which counts no bytes of its own, the sampler's own count is all there is.
    """
    model, large = conv(device), shape_on(device)
    small = (1, *large[1:])
    found: dict[str, Any] = {}
    want = draw(build(device, model, graph=False))
    # The first round pays for what the process keeps: compiled kernels, workspaces of cuBLAS.
    for round_ in ("first", "second"):
        before, pools = _used(device), _pools(device)
        sampler = build(device, model)
        draw(sampler)
        one, bytes_of_one = _used(device), sampler.memory()
        for seed in range(1, 4):
            draw(sampler, seed)
        several = _used(device)
        require(several == one, f"{round_} round: three more calls went from {one} to {several}")
        require(sampler.memory() == bytes_of_one, f"{sampler.memory()} bytes after {bytes_of_one}")
        draw(sampler, shape=small)
        both, bytes_of_both = _used(device), sampler.memory()
        require_captured(sampler)
        require(bytes_of_both > bytes_of_one, f"{bytes_of_both} bytes for two shapes, {bytes_of_one} for one")
        new = {key: size for key, size in _pools(device).items() if key not in pools}
        require(len(new) == (device.type == "cuda"), f"{len(new)} pools for two shapes: {new}")
        sampler.release()
        after = _used(device)
        require(sampler.memory() == 0, f"{sampler.memory()} bytes after release()")
        left = {key: size for key, size in _pools(device).items() if key not in pools}
        require(not left, f"{round_} round: pools after release(): {left}")
        if round_ == "second":
            require(after == before, f"release() left {after} of {before} before")
        require_same(draw(sampler), want, "after release()")
        del sampler
        found[round_] = {
            "before": before,
            "one_shape": one,
            "two_shapes": both,
            "after_release": after,
            "sampler_memory_one_shape": bytes_of_one,
            "sampler_memory_two_shapes": bytes_of_both,
            "graph_pool": sum(new.values()),
        }
    return found


# Streams and threads


@check(needs_cuda=True)
def streams_may_change_between_calls(device: torch.device) -> Details:
    """A sampler used on other streams and then on the default one gives the default one's samples."""
    model = conv(device, width=32)
    eager = build(device, model, graph=False)
    want = {seed: draw(eager, seed) for seed in range(6)}
    main = torch.cuda.current_stream(device)
    switches = 0
    for first in ("other", "default"):
        sampler = build(device, model)
        streams = {"default": main, "other": torch.cuda.Stream(device), "third": torch.cuda.Stream(device)}
        order = [first, *("other", "default", "third", "other", "default")]
        results = []
        for seed, name in enumerate(order):
            stream = streams[name]
            stream.wait_stream(main)  # for the weights
            with torch.cuda.stream(stream):
                results.append((seed, stream, draw(sampler, seed)))
            switches += 1
        for seed, stream, result in results:
            main.wait_stream(stream)
            require_same(result, want[seed], f"beginning on the {first} stream: seed {seed} on {order[seed]}")
            result.record_stream(main)
        require_captured(sampler)
        require(sampler.report()["captures"] == 1, f"{sampler.report()['captures']} captures")
    return {"calls": switches}


@check()
def samplers_run_in_threads(device: torch.device) -> Details:
    """Samplers that capture and sample in two threads at once, while a third queries CUDA, give the usual samples."""
    cuda = device.type == "cuda"
    model = conv(device)
    want = {seed: draw(build(device, model, graph=False), seed) for seed in range(4)}
    if cuda:
        torch.cuda.synchronize()
    problems: list[str] = []
    done, queries = threading.Event(), 0

    def query() -> None:
        nonlocal queries
        event = torch.cuda.Event()
        while not done.is_set():
            event.record()
            event.query()
            torch.cuda.Event().query()
            torch.cuda.mem_get_info(device)
            queries += 1

    def sample(seed: int, own_stream: bool) -> None:
        stream = torch.cuda.Stream(device) if cuda and own_stream else None
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for _ in range(3):
                sampler = build(device, model)
                for turn in range(3):
                    result = draw(sampler, seed + turn % 2)
                    require_same(result, want[seed + turn % 2], f"thread {seed}, own stream {own_stream}")
                require_captured(sampler)

    def noting(function: Callable[..., None], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:
                problems.append(f"{function.__name__}{args}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    watcher = noting(query) if cuda else None
    try:
        for own_stream in (False, True) if cuda else (False,):
            for thread in [noting(sample, seed, own_stream) for seed in (0, 2)]:
                thread.join()
    finally:
        done.set()
        if watcher is not None:
            watcher.join()
    require(not problems, "; ".join(problems))
    return {"threads": 2, "samplers_each": 6 if cuda else 3, "queries_meanwhile": queries}
