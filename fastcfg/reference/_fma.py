"""Multiply-add with one rounding, in torch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """a*b + c with the one rounding of a fused multiply-add; the three broadcast together.

    `torch.addcmul` is fused where torch's kernels are built with fused multiply-add (AVX2, AVX-512, CUDA); elsewhere
    float32 goes through float64, in which the product is exact.
    """
    if torch.compiler.is_compiling() or c.dtype != torch.float32 or addcmul_rounds_once(c.device):
        return torch.addcmul(c, a, b, out=out)
    result = torch.addcmul(c.double(), a.double(), b.double()).float()
    return result if out is None else out.copy_(result)


@cache
def addcmul_rounds_once(device: torch.device) -> bool:
    """Whether float32 `torch.addcmul` is fused on this device, tried on numbers for which two roundings give 0."""
    a = 1 + torch.arange(1, 65, dtype=torch.float32) * 2.0**-13
    product = a * a
    exact = (a.double() * a.double() - product.double()).float()
    got = torch.addcmul(-product.to(device), a.to(device), a.to(device)).cpu()
    return bool(torch.equal(got, exact))
