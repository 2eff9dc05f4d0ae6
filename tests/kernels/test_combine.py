"""The combine kernel under the interpreter is its torch reference, bit for bit."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from support.combinations import random_combination
from torch import Tensor

from fastcfg.clip import DynamicThreshold
from fastcfg.combination import Combination
from fastcfg.kernels.combine import MAX_INPUTS, MAX_OUTPUTS, LaunchConfig, combine_config
from fastcfg.ops import Combine
from fastcfg.ops import combine as combine_module

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Odd sizes, samples of less than a block and of more than one, and up to five dimensions.
SHAPES = ((2, 3, 8, 8), (1, 4, 9), (3, 4, 5, 6, 7), (700,), (2, 3), (5, 1, 1, 1), (2, 2, 30, 30))


@pytest.fixture(autouse=True)
def numpy_exp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the reference the interpreter's exp2: numpy's, which differs from torch's in the last places."""
    monkeypatch.setattr(torch, "exp2", lambda tensor: torch.from_numpy(np.exp2(tensor.numpy())))


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize])


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def build(seed: int) -> tuple[Combination, list[Tensor], list[torch.dtype]]:
    """A combination, inputs for it in some layout, and the results' dtypes."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    learned = seed % 3 == 0 and len(shape) > 1
    inputs, outputs = int(rng.integers(3 if learned else 1, MAX_INPUTS + 1)), int(rng.integers(1, MAX_OUTPUTS + 1))
    # The interpreter takes half a minute for the quantiles of 700 samples.
    clip = (None, 0.8, DynamicThreshold(0.9) if len(shape) > 1 else 0.4)[int(rng.integers(3))]
    combination = random_combination(rng, inputs, outputs, clip, noise=learned)
    wide = inputs > 1 and len(shape) > 1 and (learned or rng.random() < 0.4)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for index in range(inputs):
        size = (shape[0], 2 * shape[1], *shape[2:]) if index == 1 and wide else shape
        tensor = torch.randn(size, generator=generator).to(DTYPES[int(rng.integers(3))])
        strided = len(shape) > 2 and (seed // 7) % 3 == 1
        tensors.append(channels_last(tensor) if strided and (index == 0 or rng.random() < 0.5) else tensor)
    return combination, tensors, [DTYPES[int(rng.integers(3))] for _ in range(outputs)]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("seed", range(84))
def test_results_are_the_reference_s_bit_for_bit(seed: int) -> None:
    combination, tensors, dtypes = build(seed)
    combine = Combine(combination, "cpu", backend="triton")
    results = combine(tensors, dtypes)
    # The reference would give the same bits: see that it is not what ran.
    assert combine._kernel is not None
    assert combine._kernel.takes(tensors, dtypes)
    expected = Combine(combination, "cpu", backend="reference")(tensors, dtypes)
    assert len(results) == len(expected) == len(dtypes)
    for result, want, dtype in zip(results, expected, dtypes, strict=True):
        assert result.dtype == want.dtype == dtype
        assert result.stride() == want.stride()
        assert torch.equal(bits(result), bits(want)), float((result - want).abs().max())
        assert not result.isnan().any()


def test_the_cases_have_every_feature() -> None:
    """84 of them: layouts, clips, factors, learned noise and every number of inputs and outputs."""
    cases = [build(seed) for seed in range(84)]
    counts = {tuple(c.coefficients.shape) for c, _, _ in cases}
    assert {n for _, n in counts} == set(range(1, MAX_INPUTS + 1))
    assert {m for m, _ in counts} == set(range(1, MAX_OUTPUTS + 1))
    x0s = [c for c, _, _ in cases if c.uses_x0]
    assert {type(c.clip) for c in x0s} == {type(None), float, DynamicThreshold}
    assert any(c.sum_of_x0().factor != 1 for c in x0s)
    assert any(c.sum_of(j).factor != 1 for c, _, _ in cases for j in range(len(c.coefficients)))
    learned = [t for c, t, _ in cases if c.noise is not None]
    assert {t[0].is_contiguous() for t in learned} == {True, False}


@pytest.mark.parametrize("clip", [None, 0.5], ids=str)
def test_nan_and_infinity_come_through_where_they_are_read(clip: float | None) -> None:
    combination = Combination([[0.5, 0, 0], [0, 0, 0.5], [0, 0, 1]], [1, 0.5, 0], [1, 0, 0], clip)  # type: ignore[arg-type]
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    for index in range(3):
        tensors = [torch.ones(1, 1, 4) for _ in range(3)]
        tensors[index] = special.view(1, 1, 4)
        dtypes = [torch.float32] * 3
        results = Combine(combination, "cpu", backend="triton")(tensors, dtypes)
        expected = Combine(combination, "cpu", backend="reference")(tensors, dtypes)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert bool(results[0].isfinite().all()) == (index == 2)
        assert bool(results[1].isfinite().all()) == (index != 2)


def test_nothing_is_written_outside_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[Tensor] = []

    def guarded(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        memory.append(torch.full((like.numel() + 128,), math.nan, dtype=dtype or like.dtype))
        return memory[-1][64:-64].view(like.shape)

    combination = random_combination(np.random.default_rng(0), 3, MAX_OUTPUTS)
    combine = Combine(combination, "cpu", backend="triton")
    for shape in ((2, 3, 7), (1, 700), (5,)):
        monkeypatch.setattr(combine_module.torch, "empty_like", guarded)
        combine([torch.randn(shape) for _ in range(3)], [torch.float32] * MAX_OUTPUTS)
        monkeypatch.undo()
    assert len(memory) == 3 * MAX_OUTPUTS
    assert all(bool(m[:64].isnan().all() and m[-64:].isnan().all() and not m[64:-64].isnan().any()) for m in memory)


def test_every_block_size_has_the_same_bits() -> None:
    from fastcfg.kernels.combine import SIZE, combine_options, combine_table, launch_combine

    combination = Combination([[0.5, -0.25], [0, 0]], [1.2, -0.8], [0.5, 1], 1.0)  # type: ignore[arg-type]
    sums = [combination.sum_of(j) for j in range(2)]
    x0 = combination.sum_of_x0()
    table = torch.tensor(combine_table(sums, x0, 1.0, 0.0, 0.0))
    assert table.shape == (SIZE,)
    options: dict[str, Any] = combine_options(2, sums, x0, True, False, None)
    tensors = [torch.randn(2, 3, 10, 10) for _ in range(2)]
    wide = torch.cat([tensors[1], tensors[1]], dim=1)
    found = []
    for output in (tensors[1], wide[:, :3]):
        for block in (64, 128, 1024):
            results = [torch.empty(2, 3, 10, 10) for _ in range(2)]
            launch_combine([tensors[0], output], None, None, results, table, options, LaunchConfig(block, 4))
            found.append(results)
    for results in found[1:]:
        assert all(torch.equal(got, want) for got, want in zip(results, found[0], strict=True))


def test_a_program_has_at_most_1024_elements() -> None:
    assert combine_config(2**24, 1).block == 1024
    assert combine_config(2**14, 1).block == 512
