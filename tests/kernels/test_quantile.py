"""The quantile's kernels under the interpreter: the bits of torch.quantile, and a step's bound like its reference."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from fastcfg.clip import DynamicThreshold
from fastcfg.kernels.guided_step import LaunchConfig
from fastcfg.kernels.quantile import SELECTION, launch_quantile
from fastcfg.kernels.step_bound import launch_step_bound
from fastcfg.kernels.threshold import launch_threshold
from fastcfg.reference import ReferenceBound
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

SMALL = LaunchConfig(64, 4)


def samples(size: int) -> Tensor:
    """One sample of `size` numbers of every kind, [9, size]."""
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(size))
    x[1] = x[1].mul(2).round()  # ties
    x[2] = -0.3
    x[3] = torch.where(x[3] > 0, 0.0, -0.0)
    x[4] *= 1e-40  # denormal
    x[5] *= 1e38
    x[6, size // 2] = -math.inf
    x[7, size // 3] = math.nan
    # Neighbours in the last bit, so that the last digits decide.
    x[8] = (torch.arange(size, dtype=torch.int32) * 7 % 97 + 0x3F7FFFC0).view(torch.float32)
    return x


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit, but for what kind of NaN it is."""
    a, b = (torch.where(t.isnan(), torch.tensor(0x7FC00000), t.contiguous().view(torch.int32)) for t in (a, b))
    return torch.equal(a, b)


def quantile(x: Tensor, p: float, selection: Tensor, floor: float = 0.0, ceiling: float = math.inf) -> Tensor:
    place = DynamicThreshold(p).rank(x[0].numel())._replace(floor=floor, ceiling=ceiling)
    bound = torch.full((len(x),), -7.0)
    launch_quantile(x, selection, bound, place, SMALL)
    return bound


def empty_selection(batch: int) -> Tensor:
    return torch.zeros((batch, SELECTION), dtype=torch.int32)


@pytest.mark.filterwarnings("ignore:.*(invalid|overflow).*:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(
    ("size", "p"),
    [
        *((1, 0.5), (2, 0.5), (2, 0.995), (3, 0.9), (63, 0.0), (63, 0.995), (64, 1.0), (65, 0.5)),
        *((150, 0.0), (150, 0.5), (150, 0.9), (150, 0.995), (150, 1.0)),
    ],
)
def test_the_kernel_gives_the_bits_of_torch_quantile(size: int, p: float) -> None:
    x = samples(size)
    selection = empty_selection(len(x))
    expected = torch.quantile(x.abs(), p, dim=1)
    assert same_bits(quantile(x, p, selection), expected)
    # What every pass must leave behind for the next quantile.
    assert not selection[:, 2:].any()


@pytest.mark.parametrize("p", [0.4, 0.7])
def test_the_interpolation_starts_from_the_nearer_end(p: float) -> None:
    """As torch.lerp's; from the other end some samples would have other bits."""
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.quantile(x.abs(), p, dim=1)
    low, high = x.abs().sort(dim=1).values.T
    weight = torch.tensor(p)
    far = torch.addcmul(low, weight, high - low) if p > 0.5 else torch.addcmul(high, weight - 1, high - low)
    assert (far != expected).any()
    assert same_bits(quantile(x, p, empty_selection(len(x))), expected)


def test_a_quantile_after_another_does_not_see_it() -> None:
    first, second = samples(65), samples(65).flip(0, 1).contiguous()
    selection = empty_selection(len(first))
    quantile(first, 0.9, selection)
    assert same_bits(quantile(second, 0.3, selection), torch.quantile(second.abs(), 0.3, dim=1))


@pytest.mark.filterwarnings("ignore:invalid.*:RuntimeWarning")
def test_the_bound_is_limited() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, math.inf, math.nan])[:, None].repeat(1, 3)
    # torch.quantile: between two infinities it finds NaN.
    expected = torch.tensor([1.1, 1.5, 2.3, math.nan, math.nan])
    assert same_bits(quantile(x, 0.5, empty_selection(5), floor=1.1, ceiling=2.3), expected)


def buffers_for(spec: StepSpec, shape: tuple[int, ...], row: int) -> StepBuffers:
    generator = torch.Generator().manual_seed(row)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rows = 3
    return StepBuffers(
        x=normal(*shape),
        table=normal(rows + 1, len(DEVICE_COLUMNS)),
        counter=torch.tensor([row, 0], dtype=torch.int32),
        weights=normal(rows, shape[0], spec.branches + spec.momentum) * 3 if spec.branches > 1 else None,
        momentum=normal(*shape) if spec.momentum else None,
        bound=torch.full((shape[0],), math.nan),
        x0=torch.full(shape, math.nan),
    )


@pytest.mark.parametrize(
    ("branches", "base", "extra", "dtype", "channels_last", "wide", "shape"),
    [
        (1, None, "", torch.float32, False, False, (2, 1, 17)),
        (2, 1, "", torch.bfloat16, False, True, (2, 3, 5, 7)),
        (2, 0, "scaled", torch.float32, True, True, (1, 3, 8, 8)),
        (2, None, "momentum", torch.float16, True, False, (3, 2, 5, 7)),
        (3, 2, "scaled momentum", torch.bfloat16, True, True, (1, 3, 3, 4, 5)),
        (3, None, "", torch.float32, False, True, (2, 2, 35)),
    ],
)
def test_the_bound_of_a_row_is_the_references_bit_for_bit(
    branches: int,
    base: int | None,
    extra: str,
    dtype: torch.dtype,
    channels_last: bool,
    wide: bool,
    shape: tuple[int, ...],
) -> None:
    terms = dict.fromkeys(extra.split(), True)
    spec = StepSpec(branches, base, clip=True, rescale=True, **terms)  # type: ignore[arg-type]
    threshold = DynamicThreshold(0.8, floor=0.1)
    selection = empty_selection(shape[0])
    for row in (2, 0):
        expected, got = buffers_for(spec, shape, row), buffers_for(spec, shape, row)
        output = torch.randn(
            (branches * shape[0], shape[1] * (1 + wide), *shape[2:]), generator=torch.Generator().manual_seed(9)
        ).to(dtype)
        if channels_last:
            output = output.movedim(1, -1).contiguous().movedim(-1, 1)
        ReferenceBound(threshold, spec, expected)(output)
        launch_step_bound(output, spec, got, selection, threshold.rank(got.x[0].numel()), SMALL)
        assert same_bits(got.x0, expected.x0)  # type: ignore[arg-type]
        assert same_bits(got.bound, expected.bound)  # type: ignore[arg-type]
        assert torch.equal(expected.bound, torch.quantile(expected.x0.abs().flatten(1), 0.8, dim=1))  # type: ignore[union-attr]
        assert got.counter.tolist() == [row, 0]


def test_the_division_is_torchs() -> None:
    x0 = torch.randn(3, 1, 1100, generator=torch.Generator().manual_seed(0)) * 2
    x0[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    bound = torch.tensor([1.7, 1.0, math.nan])
    out = torch.empty_like(x0)
    launch_threshold(x0, bound, out)
    limit = bound.view(3, 1, 1)
    assert same_bits(out, torch.clamp(x0, -limit, limit) / limit)
