"""Noise drawn on its own: a run's start, Brownian noise, and a step's for those that do not draw it themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.brownian import brownian_normal
from ..reference.philox import BROWNIAN_STREAM, INITIAL_STREAM, STEP_STREAM, philox_normal
from .backend import resolve_piece
from .checks import expect
from .native import native_normal
from .native_pieces import native_brownian


def initial_noise(out: Tensor, seeds: Tensor, backend: str = "auto") -> Tensor:
    """Fill `out`, contiguous float32 [B, ...], with standard normals: sample i depends on seeds[i] alone, int64 [B].

    The backend is "auto" (on a CPU "native" where that can run), "triton", "native", "inductor" (which draws as "auto"
    does) or "reference"; all have the same bits. ValueError for shapes, dtypes or devices that do not fit, or a backend
    that cannot run.
    """
    _check(out, seeds)
    backend = _resolved(backend, out)
    if backend == "native":
        return native_normal(out, seeds, stream=INITIAL_STREAM)
    if backend == "triton":
        from ..kernels.normal import launch_normal

        with torch.cuda.device_of(out):
            launch_normal(out, seeds, 0, INITIAL_STREAM)
        return out
    return philox_normal(seeds, out.shape[1:], row=0, stream=INITIAL_STREAM, out=out)


def brownian_noise(
    out: Tensor, seeds: Tensor, nodes: Tensor, factors: Tensor, terms: int, backend: str = "auto"
) -> Tensor:
    """Fill `out` as `initial_noise`, with a row's Brownian noise: the sum of the first `terms` of `nodes`, int64 [K],
    with `factors`, float32 [K] (`fastcfg.reference.brownian.brownian_terms`). Backends and errors are the same."""
    _check(out, seeds)
    expect("nodes", nodes, (len(factors),), torch.int64, out.device)
    expect("factors", factors, (len(nodes),), torch.float32, out.device)
    if not 0 <= terms <= len(factors):
        raise ValueError(f"terms: got {terms}, expected 0 to {len(factors)}")
    backend = _resolved(backend, out)
    if backend == "native":
        return native_brownian(out, seeds, nodes, factors, terms)
    if backend == "triton":
        from ..kernels.brownian import launch_brownian

        with torch.cuda.device_of(out):
            launch_brownian(out, seeds, nodes, factors, terms, BROWNIAN_STREAM)
        return out
    return brownian_normal(seeds, nodes, factors, terms, out)


def step_noise(out: Tensor, seeds: Tensor, row: Tensor) -> Tensor:
    """Fill `out` as `initial_noise`, with the noise of a row, an integer scalar. Without checks."""
    if out.dtype == torch.float32 and resolve_piece("auto", out.device) == "native":
        return native_normal(out, seeds, row=int(row), stream=STEP_STREAM)
    return philox_normal(seeds, out.shape[1:], row=row, stream=STEP_STREAM, out=out)


def _resolved(backend: str, out: Tensor) -> str:
    resolved = resolve_piece(backend, out.device)
    return resolve_piece("auto", out.device) if resolved == "inductor" else resolved


def _check(out: Tensor, seeds: Tensor) -> None:
    if not out.ndim or not out.numel():
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected [B, ...] with at least one element")
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out: got {out.dtype} with strides {out.stride()}, expected contiguous torch.float32")
    expect("seeds", seeds, (len(out),), torch.int64, out.device)
