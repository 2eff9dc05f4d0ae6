"""The pieces of the step in torch, each with the roundings of its kernel: float16 and bfloat16 are computed in float32,
float64 in itself; every result is contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clip import QuantileRank
from . import quantile
from ._fma import fma
from .table_step import blend, per_sample, predict


def split_model_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """[N, 2C, ...] to its first and its last C channels."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    mean, variance = output.split(channels, dim=1)
    dense: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    return mean.to(dtype, **dense), variance.to(dtype, **dense)


def guidance_blend(
    output: Tensor, weights: Tensor, *, base: int | None = None, scaled: bool = False, momentum: Tensor | None = None
) -> Tensor:
    """[K*B, C, ...] and weights [B, K] (or [B, K + 1] with momentum, or by place) to [B, C, ...], by `blend`."""
    branches = weights.shape[1] - (momentum is not None)
    return blend(_computed(output).chunk(branches), base, weights, scaled=scaled, momentum=momentum)


def predict_x0(
    x: Tensor,
    output: Tensor,
    p_x: Tensor,
    p_m: Tensor,
    bound: Tensor | None = None,
    rest: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """p_x*x + p_m*output, limited to ±bound; NaN stays NaN. The rest is what rounding took from p_x and p_m."""
    x, output = _computed(x), _computed(output)
    if rest is None:
        x0 = fma(per_sample(p_x, x), x, output * per_sample(p_m, x))
    else:
        names = ("p_x", "p_m", "p_x_rest", "p_m_rest")
        x0 = predict({k: per_sample(v, x) for k, v in zip(names, (p_x, p_m, *rest), strict=True)}, x, output)
    if bound is None:
        return x0
    limit = per_sample(bound, x)
    return torch.clamp(x0, -limit, limit)


def posterior_mean_variance(
    x0: Tensor,
    x: Tensor,
    coef_x0: Tensor,
    coef_x: Tensor,
    min_log: Tensor,
    max_log: Tensor,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean coef_x0*x0 + coef_x*x, variance and log variance: f*max_log + (1-f)*min_log with f = (v+1)/2 for variance
    channels v, or min_log [B, 1, ...] without them."""
    x0, x = _computed(x0), _computed(x)
    mean = fma(per_sample(coef_x, x), x, x0 * per_sample(coef_x0, x))
    log_variance = per_sample(min_log, x)
    if variance is None:
        return mean, torch.exp(log_variance), log_variance.clone()
    fraction = (_computed(variance) + 1) * 0.5
    log_variance = fma(fraction, per_sample(max_log, x), (1 - fraction) * log_variance)
    return mean, torch.exp(log_variance), log_variance


def quantile_bound(x0: Tensor, rank: QuantileRank) -> Tensor:
    """[B, ...] to [B], by `quantile.quantile_bound`."""
    return quantile.quantile_bound(_computed(x0), rank)


def threshold(x0: Tensor, bound: Tensor) -> Tensor:
    """x0 limited to ±bound and divided by it; NaN stays NaN."""
    x0, limit = _computed(x0), per_sample(bound, x0)
    return torch.clamp(x0, -limit, limit).div_(limit)


def _computed(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
