"""The UNet of guided-diffusion and GLIDE, state-dict compatible with both."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from .nn import GroupNorm32, conv_nd, zero_module
from .unet_encoder import LayerOptions, UNetBlock, UNetEncoder, weight_dtype


class UNetModel(UNetEncoder):
    """UNet with attention, and embeddings of timestep and class (guided-diffusion `unet.UNetModel`).

    Arguments are the original's, in its order; with `encoder_channels` it is GLIDE's `unet.UNetModel`. As in the
    original, the last layers of all residual branches and of the network start at zero. ValueError if channels are not
    divisible into the 32 groups of the norms or the given heads.

    Args:
        image_size: intended size of the pictures; kept as an attribute only.
        in_channels, out_channels: channels of input and output: out is twice the image's if the variance is learned.
        model_channels: base width.
        num_res_blocks, dropout: residual blocks per level, and the dropout rate in them.
        attention_resolutions: downsampling factors with attention, e.g. (2, 4).
        channel_mult: width of each level as a multiple of `model_channels`.
        conv_resample: resampling layers have a convolution; no effect with `resblock_updown`.
        dims: spatial dimensions, 1 to 3.
        num_classes: number of classes of a class-conditional model, or None.
        use_checkpoint: recompute activations in the backward pass to save memory.
        use_fp16: kept as an attribute only, for callers that convert after loading weights, as the originals do.
        num_heads_upsample: `num_heads` of the upsampling half, or -1 for the same.
        use_scale_shift_norm: see `ResBlock`.
        num_heads, num_head_channels, use_new_attention_order, encoder_channels: see `AttentionBlock`.
        resblock_updown: residual blocks do the resampling.
    """

    def __init__(
        self,
        image_size: int | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        *,
        encoder_channels: int | None = None,
    ) -> None:
        layer = (model_channels, dropout, conv_resample, dims, num_head_channels)
        options = LayerOptions(*layer, use_scale_shift_norm, resblock_updown, use_new_attention_order, encoder_channels)
        super().__init__(
            options, in_channels, num_res_blocks, attention_resolutions, channel_mult, num_classes, num_heads
        )
        self.image_size, self.out_channels = image_size, out_channels
        self.use_checkpoint, self.use_fp16 = use_checkpoint, use_fp16
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample

        channels, skips = self.widths[-1], list(self.block_channels)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            for index in range(num_res_blocks + 1):
                layers: list[nn.Module] = [options.res_block(channels + skips.pop(), width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(options.attention(channels, heads_up))
                if level and index == num_res_blocks:
                    layers.append(options.resample(channels, "up"))
                self.output_blocks.append(UNetBlock(*layers))

        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network; returns [B, out_channels, *spatial], of the dtype of `x`.

        Args:
            x: [B, in_channels, *spatial]; sizes are multiples of 2 ** (levels - 1), or ValueError.
            timesteps: [B], integer or float.
            y: [B] integer classes, for class-conditional models only, or ValueError.
        """
        return self._forward_blocks(x, self._embed(x, timesteps, y))

    def _blocks(self) -> Iterator[UNetBlock]:
        yield from super()._blocks()
        yield from self.output_blocks  # type: ignore[misc]

    def _forward_blocks(self, x: Tensor, emb: Tensor, encoder_kv: Sequence[Tensor] | None = None) -> Tensor:
        """Run all blocks and `out`; `encoder_kv` has one entry per attention block, in the order they run."""
        kv = None if encoder_kv is None else iter(encoder_kv)
        skips, h = [], x.to(self.dtype)
        for block in self.input_blocks:
            h = self._run(block, h, emb, kv)  # type: ignore[arg-type]
            skips.append(h)
        h = self._run(self.middle_block, h, emb, kv)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb, kv)  # type: ignore[arg-type]
        return self.out(h.to(weight_dtype(self.out))).to(x.dtype)  # `convert_to_fp16` leaves `out` in float32
