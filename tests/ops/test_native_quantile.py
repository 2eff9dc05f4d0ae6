"""The bound of dynamic thresholding in C has the bits of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from support.native import built, chosen
from torch import Tensor

from fastcfg import ops
from fastcfg.clip import DynamicThreshold, QuantileRank
from fastcfg.ops import extension
from fastcfg.ops.native_pieces import native_quantile
from fastcfg.reference import quantile_bound

MARGIN = 64
RANGE = QuantileRank(0, 0.0, 0.0, math.inf)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def selected(x: Tensor, rank: QuantileRank) -> Tensor:
    """The bounds [B] of x [B, N], by way of memory with a margin, which must stay."""
    memory = torch.full((x.shape[1] + 2 * MARGIN,), -1, dtype=torch.int32)
    before = x.clone()
    out = native_quantile(x, rank, memory[MARGIN:-MARGIN], torch.full((len(x),), -1.0))
    assert (memory[:MARGIN] == -1).all()
    assert (memory[-MARGIN:] == -1).all()
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    return out


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.nan_to_num(-1).view(torch.int32), want.nan_to_num(-1).view(torch.int32))


@built
@pytest.mark.parametrize("p", [0, 0.3, 0.5, 0.77, 0.9, 0.995, 1])
@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 1000, 1001, 12288])
def test_bounds_have_the_bits_of_the_reference(size: int, p: float) -> None:
    x = normal(14, size, seed=size)
    x[1] = x[1].round()
    x[2] = -0.3
    x[3] = 0
    x[4] *= 1e-40
    x[5] *= 1e38
    x[6, size // 2] = -math.inf
    x[7, size // 3] = math.nan
    x[8] = torch.where(x[8] > 0, math.inf, x[8])
    x[9, 0] = -0.0
    # Neighbours in the last digit, the middle one and the first; and all bits of a magnitude.
    x[10] = (torch.randint(2**4, (size,)) + 0x3F800000).int().view(torch.float32)
    x[11] = (torch.randint(4, (size,)) * 2**10 + 0x3F8003FF).int().view(torch.float32)
    x[12] = (torch.randint(2, (size,)) * 2**20 + 0x3F8FFFFF).int().view(torch.float32)
    x[13] = torch.randint(0x7F800000, (size,)).int().view(torch.float32)
    rank = DynamicThreshold(p).rank(size)._replace(floor=0.0)
    assert same(selected(x, rank), quantile_bound(x, rank))


@built
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.9375])
def test_every_rank_of_a_few_magnitudes(weight: float) -> None:
    x = torch.cat([normal(1, 40), normal(1, 40).round(), torch.arange(40.0)[None]])
    for index in range(39 + (weight == 0)):
        rank = RANGE._replace(rank=index, weight=weight)
        assert same(selected(x, rank), quantile_bound(x, rank)), index


@built
@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF])
def test_any_nan_makes_the_bound_nan(bits: int) -> None:
    x = normal(1, 100)
    x[0, 99] = math.inf
    rank = DynamicThreshold(0.5).rank(100)
    assert selected(x, rank).isfinite()
    x.view(torch.int32)[0, 99] = bits - 2**32 if bits >= 2**31 else bits
    assert selected(x, rank).isnan()


@built
@pytest.mark.parametrize(("floor", "ceiling"), [(1.0, math.inf), (1e-3, 0.1), (2.0, 2.5), (0.1, 3e38)])
def test_bounds_are_limited(floor: float, ceiling: float) -> None:
    x = normal(5, 301) * torch.logspace(-3, 2, 5)[:, None]
    x[4, 3] = math.nan
    rank = DynamicThreshold(0.9, floor, ceiling).rank(301)
    assert same(selected(x, rank), quantile_bound(x, rank))


@chosen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
def test_the_operations_have_the_bits_of_the_reference(layout: str, dtype: torch.dtype, backend: str) -> None:
    x0 = (2 * normal(2, 3, 7, 11)).to(dtype)
    if layout == "channels-last":
        x0 = x0.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x0 = torch.stack([x0, x0], dim=-1)[..., 0]
    for operation in (ops.quantile_bound, ops.dynamic_threshold):
        got, want = (operation(x0, 0.7, 0.5, backend=name) for name in (backend, "reference"))
        assert same(got, want)
        assert got.dtype == torch.float32
        assert got.stride() == want.stride()


@chosen
def test_operations_that_torch_looks_into_run_on_the_reference(backend: str) -> None:
    x = normal(3, 2, 3, 5)
    mapped = torch.func.vmap(lambda x0: ops.quantile_bound(x0[None], 0.9, 0.1, backend=backend))(x)
    assert same(mapped[:, 0], ops.quantile_bound(x, 0.9, 0.1))


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "instruction_sets", tuple)
    x = normal(2, 3, 5)
    assert same(ops.quantile_bound(x, 0.9), ops.quantile_bound(x, 0.9, backend="reference"))
    with pytest.raises(ValueError, match="'native' cannot run here"):
        ops.quantile_bound(x, 0.9, backend="native")


@built
def test_arguments_that_cannot_be_are_refused() -> None:
    run = extension.native_module().quantile
    with pytest.raises(TypeError, match="got 1 arguments, expected 6"):
        run(0)
    with pytest.raises(ValueError, match="rank: got 3 bytes, expected 32"):
        run(b"abc", 0, 0, 0, 0, 0)
    with pytest.raises(TypeError):
        run(bytes(32), 0, "1", 0, 0, 0)
