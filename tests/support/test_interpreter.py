"""The test settings themselves: the interpreter's fma and the poisoned allocations."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from support.interpreter_fma import WITNESS, WITNESS_FMA, fma_float32, interpreter_rounds_once, round_once

pytestmark = pytest.mark.quick

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")


def two_roundings(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a * b + c


def random_operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b, c = np.random.default_rng(0).standard_normal((3, 4096)).astype(np.float32)
    return a, b, c


def run_fma_kernel(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    from support.fma_kernel import fma_kernel

    out = torch.full((a.size,), float("nan"))
    fma_kernel[(1,)](*(torch.from_numpy(array) for array in (a, b, c)), out, BLOCK=a.size)
    return out.numpy()


def test_fma_float32_rounds_once_where_float64_would_round_twice() -> None:
    a, b, c = WITNESS
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) != WITNESS_FMA
    assert fma_float32(a, b, c) == WITNESS_FMA
    assert fma_float32(-a, b, -c) == -WITNESS_FMA


def test_fma_float32_equals_the_float64_sum_and_differs_from_two_roundings() -> None:
    a, b, c = random_operands()
    expected = (a.astype(np.float64) * b + c).astype(np.float32)
    np.testing.assert_array_equal(fma_float32(a, b, c), expected)
    assert np.count_nonzero(two_roundings(a, b, c) != expected) > a.size // 10


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (np.inf, 0.0, 1.0, np.nan),
        (np.inf, 1.0, -np.inf, np.nan),
        (np.inf, 1.0, 1.0, np.inf),
        (3e38, 10.0, 0.0, np.inf),
        (3e38, 10.0, -np.inf, -np.inf),
        (1e-30, 1e-30, 0.0, 0.0),
        (2.0**-75, 2.0**-75, 2.0**-149, 2.0**-148),  # a tie between subnormals goes to the even one
    ],
)
def test_fma_float32_at_the_ends_of_the_range(a: float, b: float, c: float, expected: float) -> None:
    result = fma_float32(*(np.array([value], dtype=np.float32) for value in (a, b, c)))
    np.testing.assert_array_equal(result, np.array([expected], dtype=np.float32))


@interpreted
def test_kernels_in_these_tests_have_an_fma_that_rounds_once() -> None:
    a, b, c = random_operands()
    a[0], b[0], c[0] = WITNESS
    np.testing.assert_array_equal(run_fma_kernel(a, b, c), fma_float32(a, b, c))


@interpreted
def test_an_interpreter_that_rounds_twice_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return TensorHandle(two_roundings(x.data, y.data, z.data), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    a, b, c = random_operands()
    assert not interpreter_rounds_once()
    np.testing.assert_array_equal(run_fma_kernel(a, b, c), two_roundings(a, b, c))
    round_once()
    assert interpreter_rounds_once()
    np.testing.assert_array_equal(run_fma_kernel(a, b, c), fma_float32(a, b, c))


@pytest.mark.usefixtures("poison_empty")
def test_poison_empty_fills_floating_tensors_only() -> None:
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.ones(2, 2)).isnan().all()
    assert torch.empty(3, dtype=torch.int64).shape == (3,)
