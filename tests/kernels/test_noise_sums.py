"""The sums of log-probabilities: the kernel against float64, in every layout and for samples of several programs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcfg.ops import NoiseSums, sums_memory
from fastcfg.reference.philox import philox_normal
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import StepTable

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

TABLE = StepTable.from_columns(t=[3, 2, 1], p_m=1.0, a_0=1.0, s=0.5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 1), (3, 5, 7, 31), (2, 4, 1100)], ids=str)
@pytest.mark.parametrize("source", ["philox", "tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_sums_are_those_of_float64(shape: tuple[int, ...], source: str, learned: bool) -> None:
    batch, row = shape[0], 1
    spec = StepSpec(branches=2, base=0, conditional=1, learned_variance=learned, noise_source=source)
    seeds = torch.arange(batch) + 5
    buffers = StepBuffers(
        normal(*shape),
        TABLE.on("cpu"),
        torch.tensor([row, 0], dtype=torch.int32),
        noise=normal(*shape, seed=1),
        seeds=seeds,
    )
    output = normal(2 * batch, 2 * shape[1], *shape[2:], seed=2).half()
    if len(shape) == 4:
        output = output.contiguous(memory_format=torch.channels_last)
    z = philox_normal(seeds, shape[1:], row=row) if source == "philox" else buffers.noise
    squares: Any = z.double().square().flatten(1).sum(1)  # type: ignore[union-attr]
    variance = output[batch:, shape[1] :].double().flatten(1).sum(1) if learned else torch.zeros(batch)
    for backend in ("triton", "reference"):
        sums = sums_memory(3, buffers.x, backend)
        NoiseSums(spec, buffers, sums, backend)(output)
        assert (sums[[0, 2]] == 0).all()
        assert sums.shape[-1] == (1 if backend == "reference" else -(-buffers.x[0].numel() // 512))
        got = sums[row].double().sum(-1)
        # In a tree of float32 numbers. Measured: 1e-7.
        torch.testing.assert_close(got[0], squares, rtol=1e-6, atol=0)
        size = output.double().abs().flatten(1).sum(1).max()
        torch.testing.assert_close(got[1], variance.double(), rtol=0, atol=float(1e-6 * size))
