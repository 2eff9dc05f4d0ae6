"""guided-diffusion's classifier of noised images: the encoder of a UNet, pooled."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.checks import check_one_of
from .nn import GroupNorm32, PointwiseConv1d, attend, conv_nd, zero_module
from .unet_encoder import LayerOptions, UNetEncoder, weight_dtype

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")

# Width of the hidden layer of the spatial pools.
_SPATIAL_WIDTH = 2048


class AttentionPool2d(nn.Module):
    """Attention of the mean position to all positions and itself (guided-diffusion, class of the same name).

    Arguments, in the original's spelling: size and channels of the feature map; channels per attention head, ValueError
    unless a divisor of `embed_dim`; channels of the output, `embed_dim` if None.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_heads_channels < 1 or embed_dim % num_heads_channels:
            expected = f"a divisor of the {embed_dim} channels"
            raise ValueError(f"num_heads_channels: got {num_heads_channels}, expected {expected}")
        self.spacial_dim, self.num_heads = spacial_dim, embed_dim // num_heads_channels
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = PointwiseConv1d(embed_dim, 3 * embed_dim)
        self.c_proj = PointwiseConv1d(embed_dim, output_dim or embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pool [B, embed_dim, spacial_dim, spacial_dim] to [B, output_dim]; ValueError for other sizes."""
        if x.shape[2:] != (self.spacial_dim, self.spacial_dim):
            raise ValueError(f"x: got features of {tuple(x.shape[2:])}, expected {(self.spacial_dim,) * 2}")
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.t().to(x.dtype)
        weight, bias = self.qkv_proj.weight.squeeze(-1), self.qkv_proj.bias
        channels = x.shape[1]
        # Only the output of the mean's query is used.
        query = F.linear(tokens[:, :1], weight[:channels], bias[:channels])  # type: ignore[index]
        key, value = F.linear(tokens, weight[channels:], bias[channels:]).chunk(2, dim=2)  # type: ignore[index]
        return self.c_proj(attend(*(part.unflatten(2, (self.num_heads, -1)) for part in (query, key, value))))[:, 0]


class EncoderUNetModel(UNetEncoder):
    """Classifier of noised images (guided-diffusion `unet.EncoderUNetModel`), state-dict compatible with it.

    Arguments and errors are those of `UNetModel`, except:

    Args:
        image_size: height and width of the images; only "attention" depends on it.
        out_channels: number of classes.
        dims: must be 2.
        num_heads_upsample: has no effect.
        pool: how features become logits. "adaptive": projection of their mean over positions; "attention":
            `AttentionPool2d`, which needs `num_head_channels`; "spatial": two layers on the means of every block's
            features; "spatial_v2": the same with a norm between the layers.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        check_one_of("pool", pool, POOLS)
        if dims != 2:
            raise ValueError(f"dims: got {dims!r}, expected 2")
        if pool == "attention" and num_head_channels == -1:
            raise ValueError("num_head_channels: got -1, expected the channels per head of the attention pool")
        layer = (model_channels, dropout, conv_resample, dims, num_head_channels)
        options = LayerOptions(*layer, use_scale_shift_norm, resblock_updown, use_new_attention_order)
        super().__init__(options, in_channels, num_res_blocks, attention_resolutions, channel_mult, None, num_heads)
        self.image_size, self.out_channels, self.pool = image_size, out_channels, pool
        self.use_checkpoint, self.use_fp16 = use_checkpoint, use_fp16
        channels = self.widths[-1]
        if pool == "adaptive":
            projection = zero_module(conv_nd(dims, channels, out_channels, 1))
            self.out = nn.Sequential(
                GroupNorm32(channels), nn.SiLU(), nn.AdaptiveAvgPool2d((1, 1)), projection, nn.Flatten()
            )
        elif pool == "attention":
            if image_size % self.size_divisor:
                raise ValueError(f"image_size: got {image_size}, expected a multiple of {self.size_divisor}")
            size = image_size // self.size_divisor
            attention = AttentionPool2d(size, channels, num_head_channels, out_channels)
            self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), attention)
        else:
            first = nn.Linear(sum(self.block_channels) + channels, _SPATIAL_WIDTH)
            between = [nn.ReLU()] if pool == "spatial" else [GroupNorm32(_SPATIAL_WIDTH), nn.SiLU()]
            self.out = nn.Sequential(first, *between, nn.Linear(_SPATIAL_WIDTH, out_channels))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits [B, out_channels] of noised images; arguments, dtype and errors as `UNetModel.forward`.

        The "attention" pool takes images of `image_size` only.
        """
        emb = self._embed(x, timesteps)
        if self.pool == "attention" and x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"x: got spatial sizes {tuple(x.shape[2:])}, expected {(self.image_size,) * 2}")
        dtype = weight_dtype(self.out)
        means = []
        h = x.to(self.dtype)
        for block in self._blocks():
            h = self._run(block, h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.to(dtype).mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if means else h.to(dtype)).to(x.dtype)
