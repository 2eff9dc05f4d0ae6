"""Multiply-add with one rounding, in torch."""

from __future__ import annotations

from collections.abc import Callable
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
    a = 1 + torch.arange(1, 65, dtype=torch.float32, device="cpu") * 2.0**-13
    product = a * a
    exact = (a.double() * a.double() - product.double()).float()
    got = torch.addcmul(-product.to(device), a.to(device), a.to(device)).cpu()
    return bool(torch.equal(got, exact))


def adder(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """A function of (total, term, *, alpha, out=None): total + alpha*term with the bits of `fma`, for tensors of this
    dtype and device and a number alpha. `torch.add` where it rounds once: a number costs it less host time than a
    scalar tensor costs `torch.addcmul`."""
    return torch.add if dtype != torch.float32 or add_rounds_once(device) else _add


def _add(total: Tensor, term: Tensor, *, alpha: float, out: Tensor | None = None) -> Tensor:
    return fma(torch.full((), alpha, dtype=total.dtype, device=total.device), term, total, out=out)


@cache
def add_rounds_once(device: torch.device) -> bool:
    """Whether float32 `torch.add` with `alpha` is fused on this device, in vectors, in what is left of them, and in
    strided tensors."""
    a = 1 + torch.arange(1, 78, dtype=torch.float32, device="cpu") * 2.0**-13
    alpha = 1 + 2.0**-13
    product = a * alpha
    exact = (a.double() * alpha - product.double()).float()
    dense, terms = -product.to(device), a.to(device)
    got = torch.add(dense, terms, alpha=alpha)
    strided = torch.add(*(t.repeat_interleave(2)[::2] for t in (dense, terms)), alpha=alpha)
    return all(torch.equal(found.cpu(), exact) for found in (got, strided, dense.add_(terms, alpha=alpha)))
