"""What only a GPU can show of the captured loop: syncs, launches, streams, compiled kernels, times."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.captured_loop import (
    GUIDANCES,
    TABLES,
    assert_captured,
    assert_captured_equals_eager,
    assert_same,
    assert_what_is_done_between_rows_agrees,
    build,
    conv,
    draw,
    prepare,
    toward_x0,
)
from support.launches import beside_the_graphs

from benchmarks import host_time
from benchmarks.suite.device import calls, profiled_rows
from fastcfg.engine.loop import Previews
from fastcfg.ops.backend import inductor_problem

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:running eagerly")]

CUDA = torch.device("cuda", 0)
BUDGET = 15.0  # of Python beside a replay, in microseconds per row
Record = Callable[[str, object], None]

# Syncs


@contextmanager
def syncs_raise() -> Iterator[None]:
    """Context in which every wait of the host for a stream raises RuntimeError.

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


VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"graph": False},
    "captured": {},
    "three rows": {"rows_per_graph": 3},
    "torch's noise": {"noise_source": "torch"},
    "interval": {"guidance": GUIDANCES["interval"]},
    "adaptive": {"guidance": GUIDANCES["adaptive"]},
    "apg": {"guidance": GUIDANCES["apg"]},
    "state": {"state_fn": toward_x0},
    "checked": {"check_finite": "raise"},
    "adaptive, eager": {"guidance": GUIDANCES["adaptive"], "graph": False},
}


def test_the_debug_mode_sees_a_read() -> None:
    probe = torch.ones(2, device=CUDA)
    with syncs_raise(), pytest.raises(RuntimeError):
        probe.sum().item()


@pytest.mark.parametrize("solver", TABLES)
def test_no_row_waits_for_the_device(solver: str) -> None:
    """Eager or captured, with previews, with adaptive guidance."""
    table = TABLES[solver]
    for (name, options), with_previews in itertools.product(VARIANTS.items(), (False, True)):
        sampler = build(CUDA, conv(CUDA, table), table, **options)
        want = draw(sampler, 3)
        if options.get("graph", True):
            assert_captured(sampler)
        prepare(sampler, 3, keep_x0=with_previews)  # captures
        run, seen = prepare(sampler, 3, keep_x0=with_previews), []
        previews = Previews(run, lambda preview, seen=seen: seen.append(preview.row), 2) if with_previews else None
        with syncs_raise():
            for row in run.rows():
                if previews is not None:
                    previews.after_row(row)
            if previews is not None:
                previews.deliver()
        assert_same(run.result, want, f"{name}, previews {with_previews}")
        rows = [row for row in range(len(table)) if row % 2 == 0 or row == len(table) - 1]
        assert seen == (rows if with_previews else [])


def test_what_is_done_between_rows_agrees() -> None:
    for backend in ("triton", "reference"):
        assert_what_is_done_between_rows_agrees(CUDA, backend)


# Launches


@pytest.mark.parametrize(("solver", "repeat"), [("ddpm", 1), ("ddpm", 3), ("plms", 1)])
def test_one_launch_runs_a_row(solver: str, repeat: int, record_property: Record) -> None:
    """Or n rows, with nothing else launched or copied between."""
    table = TABLES[solver]
    sampler = build(CUDA, conv(CUDA, table), table, rows_per_graph=repeat)
    draw(sampler)
    assert_captured(sampler)
    programs = len(list(prepare(sampler).rows()))
    assert programs == sum(divmod(len(table), repeat))
    on_host, on_device = profiled_rows(prepare(sampler), programs, cuda=True)
    called, done = calls(on_host), Counter(event.name for event in on_device)
    if not done:
        pytest.skip("the profiler saw nothing on the device (CUPTI may not be allowed here)")
    record_property("host calls", json.dumps(called))
    record_property("device events", json.dumps({event[:80]: count for event, count in done.most_common()}))
    assert beside_the_graphs(called, done, programs) == {}
    assert sum(count for event, count in done.items() if "guided_step" in event) == len(table)


# Streams and backends


@pytest.mark.parametrize("first", ["other", "default"])
def test_streams_may_change_between_calls(first: str) -> None:
    """A sampler used on other streams gives the samples of the default one, and captures once."""
    model, order = conv(CUDA, width=32), [first, "other", "default", "third", "other", "default"]
    eager = build(CUDA, model, graph=False)
    want = [draw(eager, seed) for seed in range(len(order))]
    main = torch.cuda.current_stream(CUDA)
    streams = {"default": main, "other": torch.cuda.Stream(CUDA), "third": torch.cuda.Stream(CUDA)}
    sampler, results = build(CUDA, model), []
    for seed, name in enumerate(order):
        streams[name].wait_stream(main)  # for the weights
        with torch.cuda.stream(streams[name]):
            results.append(draw(sampler, seed))
    for seed, (name, result) in enumerate(zip(order, results, strict=True)):
        main.wait_stream(streams[name])
        assert_same(result, want[seed], f"seed {seed} on {name}")
        result.record_stream(main)
    assert_captured(sampler)
    assert sampler.report()["captures"] == 1


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize("solver", ["ddpm", "plms"])
@pytest.mark.parametrize("backend", ["triton", "reference", "inductor"])
def test_captured_equals_eager_on_every_backend(backend: str, solver: str, noise: str) -> None:
    if backend == "inductor" and (problem := inductor_problem(CUDA)):
        pytest.skip(problem)
    assert_captured_equals_eager(CUDA, TABLES[solver], backend=backend, noise_source=noise)


@pytest.mark.parametrize("by", ["compile='default'", "torch.compile"])
def test_compiled_models_are_captured(by: str, record_property: Record) -> None:
    if problem := inductor_problem(CUDA):
        pytest.skip(f"Inductor cannot compile here: {problem}")
    if by == "torch.compile":
        captured = build(CUDA, torch.compile(conv(CUDA)), dtype=torch.float32)
        eager = build(CUDA, captured.model, dtype=torch.float32, graph=False)
    else:
        captured = build(CUDA, compile="default")
        eager = build(CUDA, captured._callables()[0], dtype=torch.float32, graph=False)
    for seed in (0, 1):
        assert_same(draw(captured, seed), draw(eager, seed), f"seed {seed}")
    assert_captured(captured)
    distance = (draw(captured) - draw(build(CUDA, graph=False))).abs().max().item()
    record_property("distance from the model that is not compiled", distance)
    assert distance < 2e-2  # fused kernels round differently, and TF32 may be used for other layers


# Times


@pytest.mark.parametrize(
    ("options", "shape"),
    # Large: 2 * 4 images of 32 x 32, 2 convolutions of 64 channels: 0.6 GFLOP a row and convolution.
    [({}, (1, 3, 8, 8)), ({"width": 64, "depth": 2}, (4, 3, 32, 32))],
    ids=["tiny", "large"],
)
def test_auto_decides_by_time(options: dict[str, int], shape: tuple[int, ...], record_property: Record) -> None:
    model = conv(CUDA, **options)
    auto = build(CUDA, model, graph="auto")
    result = draw(auto, shape=shape)
    (decision,) = auto.report()["programs"]
    times = decision["milliseconds"]
    record_property("reason", decision["reason"])
    record_property("milliseconds", json.dumps(times))
    assert {"eager batched", "graph batched"} <= set(times)
    assert all(value > 0 for value in times.values())
    chosen = f"{'eager' if decision['graph'] == 'none' else 'graph'} {decision['batching']}"
    assert times[chosen] < 1.05 * min(times.values())
    eager = build(CUDA, model, graph=False, batching=decision["batching"])
    assert_same(result, draw(eager, shape=shape))


def test_rows_take_hardly_any_host_time_and_captured_ones_less_time(record_property: Record) -> None:
    found = host_time.measure(CUDA)
    for name, times in found.items():
        record_property(name, json.dumps(times))
    for noise in ("philox", "torch"):
        assert found[f"beside a replay, {noise}"]["host_us"]["median"] < BUDGET
    assert found["captured"]["us"]["median"] < found["eager"]["us"]["median"]
