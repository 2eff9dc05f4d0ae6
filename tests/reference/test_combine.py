"""Combinations in torch against float64, and the roundings of their sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.combinations import assert_close, in_float64, random_combination
from torch import Tensor

from fastcfg.clip import DynamicThreshold
from fastcfg.combination import Combination, Sum
from fastcfg.reference import ReferenceCombine, _fma

pytestmark = pytest.mark.quick

F32 = torch.float32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [None, 0.8], ids=str)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_the_sums(dtype: torch.dtype, learned: bool, clip: float | None) -> None:
    rng = np.random.default_rng(0)
    for case in range(20):
        inputs, outputs = int(rng.integers(3 if learned else 1, 13)), int(rng.integers(1, 7))
        combination = random_combination(rng, inputs, outputs, clip, noise=learned)
        tensors = [normal(2, 3, 5, seed=100 * case + k).to(dtype) for k in range(inputs)]
        variance = normal(2, 3, 5, seed=case).to(dtype) if learned else None
        results = ReferenceCombine(combination, dtype)(tensors, [dtype] * outputs, variance)
        # Every term is rounded at most once for each of those added after it, and by its coefficient.
        ulps = (2 * inputs + 6) * (1 if dtype == F32 else 2.0**-29)
        assert_close(results, in_float64(combination, tensors, variance), ulps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [DynamicThreshold(0.9), DynamicThreshold(0.5, ceiling=1.5)], ids=str)
def test_a_threshold_is_that_of_diffusers(threshold: DynamicThreshold, dtype: torch.dtype) -> None:
    combination = Combination([[0, 0.5], [0, 0]], [2.0, -1.0], [0.25, 1.0], threshold)  # type: ignore[arg-type]
    for shape in ((3, 4, 8, 8), (3, 7), (2, 5, 3)):
        tensors = [normal(*shape, seed=k).to(dtype) for k in range(2)]
        results = ReferenceCombine(combination, dtype)(tensors, [dtype, dtype])
        assert results[1].abs().max() == 1
        assert_close(results, in_float64(combination, tensors), 12 if dtype == F32 else 2.0**-25)


def test_an_x0_from_noise_is_as_close_as_its_coefficients_allow() -> None:
    """The terms nearly cancel. With two rounded coefficients and a rounded product, the error would be 1.2."""
    x0, noise = normal(4096, seed=1).double(), normal(4096, seed=2)
    for as_output in (True, False):
        errors = []
        for alpha in np.geomspace(0.005, 0.05, 20):
            sigma = float(np.sqrt(1 - alpha**2))
            sample = (alpha * x0 + sigma * noise.double()).float()
            row = [1 / alpha, -sigma / alpha]
            combination = Combination([row]) if as_output else Combination([[0, 0]], row, [1])  # type: ignore[arg-type]
            (result,) = ReferenceCombine(combination)([sample, noise], [F32])
            exact = (sample.double() - sigma * noise.double()) / alpha
            errors.append(float((result.double() - exact).square().mean()) * alpha**2)
        # In units of half the distance between float32 numbers next to 1, over alpha. Measured: 0.56.
        assert np.sqrt(np.mean(errors)) * 2**25 < 0.75


@pytest.mark.parametrize(
    ("row", "of_x0", "expected"),
    [
        ([0.5, 0.25, 0.125, 2], 0, Sum(((2, 0.125), (3, 2), (1, 0.25), (0, 0.5)))),
        ([0.5, 0.25, 0, 2], 3, Sum(((3, 2), (4, 3), (1, 0.25), (0, 0.5)))),
        # An exact term goes before a single other one.
        ([1, 0.25, 0, 0], 0, Sum(((0, 1), (1, 0.25)))),
        ([0, 1, 0.5, 0], 0, Sum(((1, 1), (2, 0.5)))),
        ([1 + 2**-30, 0.25, 0, 0], 0, Sum(((0, 1 + 2**-30), (1, 0.25)))),
        ([1, 0.25, 0.5, 0], 0, Sum(((2, 0.5), (1, 0.25), (0, 1)))),
        # Large terms that may cancel.
        ([4, -2, 0, 0], 0, Sum(((0, 1), (1, -0.5)), 4)),
        ([4, 0, 0, 0], 0, Sum(((0, 4),))),
        ([1.25, -0.5, 0, 0], 0, Sum(((1, -0.5), (0, 1.25)))),
        ([0, 0, 0, 0], 0, Sum(())),
        ([0, 0, 0, 0], 1, Sum(((4, 1),))),
    ],
)
def test_the_order_of_terms(row: list[float], of_x0: float, expected: Sum) -> None:
    assert Combination([row], [1, 0, 0, 0], [of_x0]).sum_of(0) == expected  # type: ignore[arg-type]


def test_no_coefficient_is_lost_to_an_infinite_one() -> None:
    (result,) = ReferenceCombine(Combination([[np.inf, 1.0]]))([torch.zeros(3), torch.ones(3)], [F32])  # type: ignore[arg-type]
    assert result.isnan().all()


def test_learned_noise_is_added_last_whatever_its_own_coefficient() -> None:
    combination = Combination([[0.5, 0, 7, 0.25]], noise=2, l_0=-1)  # type: ignore[arg-type]
    assert combination.sum_of(0) == Sum(((3, 0.25), (0, 0.5)))
    tensors = [normal(2, 4, seed=k) for k in range(4)]
    (result,) = ReferenceCombine(combination)(tensors, [F32], torch.zeros(2, 4))
    expected = torch.addcmul(torch.add(tensors[3] * 0.25, tensors[0], alpha=0.5), torch.tensor(0.5), tensors[2])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("fused", ["addcmul", "nothing"])
def test_bits_are_the_same_where_torch_does_not_fuse(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    combinations = [random_combination(rng, 5, 3, 0.8, noise=True) for _ in range(5)]
    tensors = [normal(2, 3, 7, seed=k) for k in range(6)]

    def run() -> list[Tensor]:
        return [t for c in combinations for t in ReferenceCombine(c)(tensors[:5], [F32] * 3, tensors[5])]

    expected = run()
    calls: list[Any] = []
    monkeypatch.setattr(_fma, "add_rounds_once", lambda device: calls.append(device))
    if fused == "nothing":
        monkeypatch.setattr(_fma, "addcmul_rounds_once", lambda device: False)
    assert all(torch.equal(got, want) for got, want in zip(run(), expected, strict=True))
    assert calls


def test_add_with_alpha_is_fused_or_known_not_to_be() -> None:
    """What `adder` takes, on more numbers than it tries."""
    device = torch.device("cpu")
    add = _fma.adder(F32, device)
    for size in (1, 2, 3, 7, 15, 17, 63, 1000):
        a, b = normal(size, 2, seed=size).unbind(1)
        for x, y in ((a, b), (a.contiguous(), b.contiguous())):
            for alpha in (0.3, -1.7, 157.123456789):
                expected = _fma.fma(torch.tensor(alpha), y.contiguous(), x.contiguous())
                assert torch.equal(add(x, y, alpha=alpha), expected)
                assert torch.equal(add(x, y, alpha=alpha, out=torch.empty_like(x)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0],), "coefficients: got shape"),
        (([[1.0, 2.0]], [1.0], [1.0]), "x0: got shape"),
        (([[1.0, 2.0]], [1.0, 0.0], [1.0, 1.0]), "of_x0: got shape"),
        (([[1.0, 2.0]], None, [1.0]), "x0: got None"),
        (([[1.0, 2.0]], [1.0, 0.0], [1.0], "1"), "clip: got '1'"),
        (([[1.0, 2.0]], [1.0, 0.0], [1.0], -1.0), "clip: got -1"),
        (([[1.0, 2.0, 3.0]], None, None, None, 1), "noise: got 1"),
        (([[1.0, 2.0, 3.0]], None, None, None, 3), "noise: got 3"),
    ],
)
def test_attributes_that_do_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combination(*arguments)
