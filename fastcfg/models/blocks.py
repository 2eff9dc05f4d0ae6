"""The blocks of the UNets: residual, conditioned on the timestep embedding; and attention, also to text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .nn import Downsample, GroupNorm32, PointwiseConv1d, Upsample, attend, conv_nd, zero_module


class ResBlock(nn.Module):
    """Residual block of guided-diffusion and GLIDE.

    Args:
        channels, out_channels: input and output channels, equal if the latter is None.
        emb_channels: width of the timestep embedding.
        dropout: dropout rate before the second convolution.
        use_scale_shift_norm: the embedding scales and shifts the second norm's output, instead of added to its input.
        dims: spatial dimensions, 1 to 3.
        up, down: resample by two inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        resampling = Upsample if up else Downsample if down else None
        self.resample = nn.Identity() if resampling is None else resampling(channels, False, dims)
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map features [B, channels, *spatial] and embedding [B, emb_channels] to [B, out_channels, *spatial]."""
        norm_in, activation, conv_in = self.in_layers
        h = conv_in(self.resample(activation(norm_in(x))))
        emb_out = self.emb_layers(emb).to(h.dtype)
        emb_out = emb_out.reshape(*emb_out.shape, *[1] * (h.ndim - 2))
        norm_out, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm_out(h) * (1 + scale) + shift
        else:
            h = norm_out(h + emb_out)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Residual attention block of guided-diffusion and GLIDE.

    Args:
        channels: channels of the feature map; ValueError unless divisible into the heads.
        num_heads, num_head_channels: number of heads, or channels per head unless that is -1.
        encoder_channels: channels of an encoder's output, whose keys and values precede the feature map's; or None.
        use_new_attention_order: the channels of `qkv` are all queries, then all keys, then all values (guided-diffusion
            `QKVAttention`) instead of queries, keys and values head by head (`QKVAttentionLegacy`, GLIDE), which is
            always the order of `encoder_kv`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        encoder_channels: int | None = None,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        per_head = num_head_channels if num_head_channels != -1 else max(channels // num_heads, 1)
        if channels % per_head or (num_head_channels == -1 and channels % num_heads):
            name, got = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", per_head)
            raise ValueError(f"{name}: got {got}, expected a divisor of the block's {channels} channels")
        self.num_heads = channels // per_head
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.encoder_kv = None if encoder_channels is None else PointwiseConv1d(encoder_channels, 2 * channels)
        self.proj_out = zero_module(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
        """Attend from every position of `x` [B, C, *spatial] to the encoder's positions and to every position of `x`.

        `encoder_kv` [B, S, 2C] is the output of the layer `encoder_kv`, in blocks with an encoder. Returns the shape
        and dtype of `x`.
        """
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))
        if self.use_new_attention_order:
            qkv = qkv.unflatten(2, (3, self.num_heads, -1)).transpose(2, 3)
        else:
            qkv = qkv.unflatten(2, (self.num_heads, 3, -1))
        query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]
        if encoder_kv is not None:
            key_value = torch.cat([encoder_kv.unflatten(2, (self.num_heads, 2, -1)), key_value], dim=1)
        h = self.proj_out(attend(query, *key_value.unbind(3)))
        return x + h.transpose(1, 2).reshape(x.shape)
