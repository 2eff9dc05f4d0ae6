"""Layers shared by the networks: norms in float32, attention, resampling, the timestep embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# By number of spatial dimensions, less one.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def conv_nd(dims: int, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims: got {dims!r}, expected 1, 2 or 3")
    return CONVOLUTIONS[dims - 1](in_channels, out_channels, kernel_size, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero all parameters of `module` and return it, so that its residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def convert_modules(module: nn.Module, kinds: tuple[type[nn.Module], ...], dtype: torch.dtype) -> None:
    """Cast the submodules of the given `kinds` to `dtype`."""
    for child in module.modules():
        if isinstance(child, kinds):
            child.to(dtype)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal timestep embedding of DDPM, as in guided-diffusion and GLIDE.

    Maps timesteps [B], integer or float, to float32 [B, dim]: cosines, then sines, then a zero if `dim` is odd.
    `max_period` is the period of the slowest frequency.
    """
    # The frequencies are computed on the device: a CUDA graph cannot capture a copy from the host.
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Attention of queries [B, T, heads, D] to keys and values [B, S, heads, D]; returns [B, T, heads * D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)


class GroupNorm32(nn.GroupNorm):
    """Group norm in 32 groups, computed in float32 for any dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in float32 for any dtype."""

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
    """Nearest-neighbour upsampling by two (the inner two of three dimensions), then a convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Downsampling by two (the inner two of three dimensions): a strided convolution if `use_conv`, or a mean."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        conv = conv_nd(dims, channels, channels, 3, stride=stride, padding=1) if use_conv else None
        self.op = conv or _POOLS[dims - 1](kernel_size=stride, stride=stride)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)
