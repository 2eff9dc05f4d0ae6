"""The suite's workloads through pytest-benchmark, for those who track with it:

    pytest benchmarks --benchmark-json new.json
    pytest benchmarks --benchmark-compare
    pytest benchmarks -k "step and ddim and not compile"

Groups hold one workload each, so that its providers stand beside each other. A provider whose result is wrong is not
timed: its test fails. Networks are left to `python -m benchmarks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite.measure import check_provider
from benchmarks.suite.providers import Job, job
from benchmarks.suite.workloads import MODELS, Workload, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_STEPS = ("guided-diffusion", "GLIDE", "diffusers", "k-diffusion", "torch eager", "torch.compile")
_OWN = {
    "step": ("native", "reference", "inductor", "triton"),
    "loop": ("fastcfg", "fastcfg inductor", "fastcfg captured"),
}


def _cases() -> Iterator[Any]:
    for workload in select([], DEVICE.type)[0]:
        if workload.family in MODELS or workload.importance > 4:
            continue
        names = _STEPS if workload.kind in ("step", "loop") else ("torch eager", "torch.compile")
        for name in (*names, *_OWN.get(workload.kind, _OWN["step"])):
            for noise in workload.noises:
                yield pytest.param(workload, noise == "drawn", name, id=f"{workload.name}/{noise}/{name}")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the suite measures: threads that wait for each other make times on a busy CPU meaningless."""
    before = torch.get_num_threads()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _job(workload: Workload) -> tuple[Job, Tensor]:
    torch.compiler.reset()  # torch.compile refuses one function at more than eight shapes
    work = job(workload, DEVICE)
    return work, work.truth()


@pytest.mark.parametrize(("workload", "draw", "name"), _cases())
def test_workload(benchmark: Any, workload: Workload, draw: bool, name: str) -> None:
    work, truth = _job(workload)
    entry = work.entries.get(name)
    if entry is None or entry.problem:
        pytest.skip(f"{name}: {'no part of it' if entry is None else entry.problem}")
    provider, found = check_provider(entry, work, truth, work.tolerance())
    assert provider is not None, found["reason"]
    benchmark.group = f"{workload.name}, noise drawn: {draw}"
    benchmark.extra_info |= {"error": found["error"], "bytes": work.moved, "rows": work.rows}

    def run() -> None:
        provider.run(draw)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    rounds = 5 if workload.kind == "loop" else 30
    benchmark.pedantic(run, setup=lambda: (provider.prepare(), None)[1], rounds=rounds, warmup_rounds=2)
