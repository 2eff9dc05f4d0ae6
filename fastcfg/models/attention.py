"""Self-attention over the positions of a feature map, with the text's keys and values in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.models.nn import GroupNorm32, PointwiseConv1d, zero_module


class AttentionBlock(nn.Module):
    """Residual attention block of guided-diffusion and GLIDE.

    Each head's channels hold its queries, keys and values one after the other. An encoder's output adds keys and
    values, placed before the feature map's own.

    Args:
        channels: channels of the feature map.
        num_heads: number of heads, used when `num_head_channels` is -1.
        num_head_channels: channels per head, or -1.
        encoder_channels: channels of the encoder's output; None for a block without one.

    Raises:
        ValueError: `channels` cannot be divided into such heads.
    """

    def __init__(
        self, channels: int, num_heads: int = 1, num_head_channels: int = -1, encoder_channels: int | None = None
    ) -> None:
        super().__init__()
        per_head = num_head_channels if num_head_channels != -1 else max(channels // num_heads, 1)
        if channels % per_head or (num_head_channels == -1 and channels % num_heads):
            name, got = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", per_head)
            raise ValueError(f"{name}: got {got}, expected a divisor of the block's {channels} channels")
        self.num_heads = channels // per_head
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.encoder_kv = None if encoder_channels is None else PointwiseConv1d(encoder_channels, 2 * channels)
        self.proj_out = zero_module(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor, encoder_out: Tensor | None = None) -> Tensor:
        """Attend from every position of `x` to `encoder_out` and to every position of `x`.

        Args:
            x: [B, C, *spatial].
            encoder_out: [B, encoder_channels, S], for blocks that have an encoder.

        Returns:
            [B, C, *spatial], of the dtype of `x`.
        """
        batch, channels, *spatial = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(2, (self.num_heads, 3, -1))
        query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]
        if self.encoder_kv is not None and encoder_out is not None:
            encoder = self.encoder_kv(encoder_out.transpose(1, 2)).unflatten(2, (self.num_heads, 2, -1))
            key_value = torch.cat([encoder, key_value], dim=1)
        key, value = key_value.unbind(3)
        h = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        h = self.proj_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).reshape(batch, channels, *spatial)
