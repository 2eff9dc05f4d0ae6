"""Layers shared by the networks: norms in float32, resampling, the timestep embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_POOLS: dict[int, type[nn.AvgPool1d] | type[nn.AvgPool2d] | type[nn.AvgPool3d]] = {
    1: nn.AvgPool1d,
    2: nn.AvgPool2d,
    3: nn.AvgPool3d,
}


def conv_nd(dims: int, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions."""
    if dims not in _CONVOLUTIONS:
        raise ValueError(f"dims: got {dims!r}, expected 1, 2 or 3")
    return _CONVOLUTIONS[dims](in_channels, out_channels, kernel_size, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero all parameters of `module` and return it: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def convert_modules(module: nn.Module, kinds: tuple[type[nn.Module], ...], dtype: torch.dtype) -> None:
    """Cast weight and bias of every submodule of the given `kinds` to `dtype`; the rest keeps its dtype."""
    for child in module.modules():
        if isinstance(child, kinds):
            child.to(dtype)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal timestep embedding of DDPM, as in guided-diffusion and GLIDE.

    The frequencies are made on the device of `timesteps`: no copy from the host, so a CUDA graph can capture the call.

    Args:
        timesteps: [B], integer or floating point, may be fractional.
        dim: width of the embedding; an odd width ends in a zero.
        max_period: period of the slowest frequency.

    Returns:
        [B, dim] float32: cosines, then sines.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class GroupNorm32(nn.GroupNorm):
    """Group norm in 32 groups, computed in float32 whatever the dtype of input and weights."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in float32 whatever the dtype of input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class PointwiseConv1d(nn.Conv1d):
    """A 1x1 convolution applied to tokens [B, T, C]: a matrix product that needs no transposed copy."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, with a convolution behind it if `use_conv`.

    With three spatial dimensions only the inner two are resized.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Downsampling by two: a strided convolution if `use_conv`, else average pooling.

    With three spatial dimensions only the inner two are resized.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        self.op: nn.Module
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = _POOLS[dims](kernel_size=stride, stride=stride)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)
