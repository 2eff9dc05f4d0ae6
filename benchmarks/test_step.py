"""The step's workloads through pytest-benchmark, for those who track with it:

    pytest benchmarks --benchmark-json new.json
    pytest benchmarks --benchmark-compare

Groups hold one case each, so that its providers stand beside each other. A provider whose result is wrong is not timed:
its test fails.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.providers import STEPS, Case, Provider, fastcfg, providers
from benchmarks.step import SHAPES, SOLVERS, TOLERANCE
from fastcfg import Schedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BASE = Schedule.named("linear")
NAMES = ("guided-diffusion", "GLIDE", "reference", "inductor", "triton")


@cache
def entered(solver: str, shape: tuple[int, ...]) -> tuple[dict[str, Provider], Tensor]:
    """The providers of a case, and the right next x in float64."""
    case, schedule = Case.random(solver, shape, DEVICE), BASE.respace(STEPS)
    truth = fastcfg(case, schedule, "reference", torch.float64)
    truth.prepare()
    truth.step(False)
    return providers(case, schedule, BASE.betas), truth.result()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draw", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_step(benchmark: Any, shape: tuple[int, ...], solver: str, draw: bool, name: str) -> None:
    found, truth = entered(solver, shape)
    if name not in found:
        pytest.skip(f"{name} cannot run here")
    provider = found[name]
    provider.prepare()
    provider.step(False)
    assert (provider.result().double() - truth).abs().max() <= TOLERANCE
    benchmark.group = f"{'x'.join(map(str, shape))} {solver}, noise {'drawn' if draw else 'given'}"

    def step() -> None:
        provider.step(draw)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=lambda: (provider.prepare(), None)[1], rounds=30, warmup_rounds=3)
