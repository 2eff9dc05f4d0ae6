"""A run's starting noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.philox import INITIAL_STREAM, philox_normal
from .backend import resolve_backend
from .checks import expect


def initial_noise(out: Tensor, seeds: Tensor, backend: str = "auto") -> Tensor:
    """Fill `out`, contiguous float32 [B, ...], with standard normals: sample i depends on seeds[i] alone, int64 [B].

    The backend is "auto", "triton", "inductor" (which draws by the reference) or "reference". ValueError for shapes,
    dtypes or devices that do not fit, or a backend that cannot run.
    """
    if not out.ndim or not out.numel():
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected [B, ...] with at least one element")
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out: got {out.dtype} with strides {out.stride()}, expected contiguous torch.float32")
    expect("seeds", seeds, (len(out),), torch.int64, out.device)
    if resolve_backend(backend, out.device) == "triton":
        from ..kernels.normal import launch_normal

        with torch.cuda.device_of(out):
            launch_normal(out, seeds, 0, INITIAL_STREAM)
        return out
    return philox_normal(seeds, out.shape[1:], row=0, stream=INITIAL_STREAM, out=out)
