"""Checks of how long things take: the choice between graph and eager, and the host's work."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.captured.registry import Details, check, require, require_same
from benchmarks.captured.rig import build, conv, draw, prepare, require_captured, shape_on
from fastcfg import Sampler, Schedule, solvers

# Python beside a replay, in microseconds a row.
BUDGET = 15.0
_REPEATS = 15
_LONG = solvers.ddpm(Schedule.named("squaredcos_cap_v2", 100).respace(50), variance="fixed_large")


@check(needs_cuda=True)
def auto_decides_by_time(device: torch.device) -> Details:
    """graph="auto" measures graph against eager and says what it chose, for a tiny and for a large model."""
    found = {}
    for name, options, shape in (
        ("tiny", {}, (1, 3, 8, 8)),
        # 2 * 8 images of 32 x 32, 2 convolutions of 64 channels: 0.6 GFLOP a row and convolution.
        ("large", {"width": 64, "depth": 2}, (4, 3, 32, 32)),
    ):
        model = conv(device, **options)
        auto = build(device, model, graph="auto")
        result = draw(auto, shape=shape)
        (decision,) = auto.report()["programs"]
        times = decision["milliseconds"]
        require({"eager batched", "graph batched"} <= set(times), f"{name}: measured {times}: {decision['reason']}")
        require(all(value > 0 for value in times.values()), f"{name}: times {times}")
        fastest = min(times, key=times.get)  # type: ignore[arg-type]
        chosen = f"{'eager' if decision['graph'] == 'none' else 'graph'} {decision['batching']}"
        slower = times[chosen] / times[fastest]
        require(slower < 1.05, f"{name}: chose {chosen}, {slower:.2f} times as slow as {fastest}: {times}")
        eager = build(device, model, graph=False, batching=decision["batching"])
        require_same(result, draw(eager, shape=shape), name)
        found[name] = {"chosen": chosen, "reason": decision["reason"], "milliseconds": times}
    return found


def microseconds_by_row(sampler: Sampler, wait: Callable[[], object]) -> dict[str, float]:
    """Median and extremes over some runs of the time from the first row's start to the last row's end, by row.

    Args:
        sampler: has run before.
        wait: called before the first and after the last row, within the time.
    """
    times, count = [], len(list(prepare(sampler).rows()))
    for _ in range(_REPEATS):
        rows = prepare(sampler).rows()
        wait()
        start = time.perf_counter()
        for _ in range(count):
            next(rows)
        wait()
        times.append((time.perf_counter() - start) / len(sampler.table) * 1e6)
        list(rows)
    return {"median": median(times), "least": min(times), "most": max(times)}


@check()
def rows_are_hardly_any_python(device: torch.device) -> Details:
    """The host's own work beside a replay stays below 15 microseconds a row.

    Measured with programs that do nothing; with noise "torch" what draws it is left in, and on CUDA its launch. The
    budget holds on a CUDA device; a CPU's time is reported.
    """
    found: dict[str, Any] = {"budget_us": BUDGET}
    for noise in ("philox", "torch"):
        sampler = build(device, conv(device, _LONG), _LONG, noise=noise)
        draw(sampler)
        require_captured(sampler)
        for kept in sampler._keeper._kept.values():
            for programs in (kept.programs._single, kept.programs._repeated):
                programs.update(dict.fromkeys(programs, lambda: None))
        found[noise] = microseconds_by_row(sampler, lambda: None)
    if device.type == "cuda":
        for noise in ("philox", "torch"):
            spent = found[noise]["median"]
            require(spent < BUDGET, f"noise {noise!r}: {spent:.1f} microseconds a row, not below {BUDGET:.0f}")
    return found


@check(needs_cuda=True)
def a_tiny_models_rows_in_real_time(device: torch.device) -> Details:
    """How long a row of a tiny model takes, eager and captured, and what a replay costs the host."""
    found: dict[str, Any] = {"shape": list(shape_on(device)), "rows": len(_LONG)}
    for name, options in {
        "eager": {"graph": False},
        "captured": {},
        "captured, torch's noise": {"noise": "torch"},
        "captured, 5 rows in a graph": {"steps_per_graph": 5},
    }.items():
        sampler = build(device, conv(device, _LONG), _LONG, **options)
        draw(sampler)
        found[name] = {"us_by_row": microseconds_by_row(sampler, torch.cuda.synchronize)}
        if options.get("graph", True):
            require_captured(sampler)
            # Without a wait: what the host is busy with, as long as the queue of launches is not full.
            found[name]["host_us_by_row"] = microseconds_by_row(sampler, lambda: None)
    eager, captured = (found[name]["us_by_row"]["median"] for name in ("eager", "captured"))
    require(captured < eager, f"a captured row takes {captured:.1f} microseconds, an eager one {eager:.1f}")
    return found
