"""A ``tl.fma`` that rounds once under the Triton interpreter, as GPUs do.

The interpreters of Triton 3.5 to 3.8 round the product and then the sum; that of 3.9 rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# The exact a*b + c lies 2^-70 below the midpoint of two float32 neighbours: rounding the product first, or the sum
# to float64 first, lands on the midpoint and ties upwards, to 1 + 2^-22.
WITNESS = (np.float32(1 + 2.0**-23), np.float32(2.0**-24 * (1 - 2.0**-23)), np.float32(1 + 2.0**-23))
WITNESS_FMA = np.float32(1 + 2.0**-23)


def fma_float32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of float32 arrays with a single rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there, which makes the cast to float32
    the only rounding that counts (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        addend = np.asarray(c, dtype=np.float64)
        total = np.asarray(product + addend)
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        to_odd = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
        return np.where(to_odd, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def interpreter_rounds_once() -> bool:
    """Whether the installed interpreter's float32 fma rounds once."""
    return bool(_interpret_fma(*WITNESS) == WITNESS_FMA)


def round_once() -> None:
    """Give the interpreter an fma that rounds once, unless it has one. Other dtypes than float32 are left alone."""
    if interpreter_rounds_once():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        return TensorHandle(fma_float32(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def _interpret_fma(a: np.float32, b: np.float32, c: np.float32) -> np.ndarray:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    a_handle, b_handle, c_handle = (TensorHandle(np.array([value]), tl.float32) for value in (a, b, c))
    return InterpreterBuilder().create_fma(a_handle, b_handle, c_handle).data
