"""Written solvers and compiled ones check each other: the same outputs and noise, the same model inputs and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import error
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg import Sampler, Schedule, StepTable, sigmas, solvers
from fastcfg.compiler import compile_sampler, compile_scheduler
from fastcfg.schedule import consistency_timesteps
from fastcfg.solvers import Denoiser

diffusers: Any = load_diffusers()
needs_diffusers = pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")

SHAPE = (2, 3, 4, 5)
PROCESS = Schedule.named("scaled_linear")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def normals(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator))


def play(table: StepTable, z: Tensor) -> list[Tensor]:
    """What the model is given in every row, and the last sample, for random outputs and noise; the first is z."""
    outputs, noise, inputs = normals(len(table), 1), normals(len(table), 2), list[Tensor]()

    def model(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x.clone())
        return outputs[len(inputs) - 1]

    options: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "graph": False}
    sampler = Sampler(model, table, backend="reference", **options)
    return [*inputs, sampler.sample(SHAPE, x_T=z / table["c_in"][0], noise=lambda row, shape: noise[row])]


def distance(written: StepTable, compiled: StepTable, scale: float = 1.0) -> float:
    """The largest difference of the two runs; `scale` takes the written one's last sample to the other's space."""
    z = normals(1, 3)[0]
    got, want = play(written, z), play(compiled, z)
    got[-1] = got[-1] * scale
    assert len(got) == len(want)
    assert written.steps.tolist() == compiled.steps.tolist()
    return max(map(error, got, want))


def exact(name: str, **config: Any) -> Any:
    """A scheduler of diffusers whose coefficients are float64: its sigmas are."""
    base = getattr(diffusers, name)

    class Exact(base):
        def set_timesteps(self, *arguments: Any, **options: Any) -> None:
            super().set_timesteps(*arguments, **options)
            self.sigmas = self.sigmas.double()

    return Exact(**config)
