"""The common half of UNets and guided-diffusion's classifiers: embedding, input blocks, middle block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import AttentionBlock, ResBlock
from .nn import CONVOLUTIONS, Downsample, Upsample, conv_nd, convert_modules, timestep_embedding


class UNetBlock(nn.Sequential):
    """Layers in sequence; passes the embedding and the encoder's keys and values to those that take them."""

    def forward(self, x: Tensor, emb: Tensor, encoder_kv: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            extra = (
                (emb,) if isinstance(layer, ResBlock) else (encoder_kv,) if isinstance(layer, AttentionBlock) else ()
            )
            x = layer(x, *extra)
        return x

    @property
    def attention(self) -> AttentionBlock | None:
        """The block's attention layer, or None."""
        # No next() of a generator: torch.compile of torch 2.8 does not support it.
        for layer in self:
            if isinstance(layer, AttentionBlock):
                return layer
        return None


@dataclass(frozen=True)
class LayerOptions:
    """The options common to all layers of a network, for making layers; see `UNetModel`."""

    model_channels: int
    dropout: float
    conv_resample: bool
    dims: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    encoder_channels: int | None = None

    def res_block(self, channels: int, width: int | None = None, **resampling: bool) -> ResBlock:
        """A residual block of `channels` in and `width` out."""
        emb, shift = 4 * self.model_channels, self.use_scale_shift_norm
        return ResBlock(channels, emb, self.dropout, width, shift, self.dims, **resampling)

    def attention(self, channels: int, heads: int) -> AttentionBlock:
        """An attention block."""
        order = self.use_new_attention_order
        return AttentionBlock(channels, heads, self.num_head_channels, self.encoder_channels, order)

    def resample(self, channels: int, direction: str) -> nn.Module:
        """A layer that halves ("down") or doubles ("up") the resolution."""
        if self.resblock_updown:
            return self.res_block(channels, **{direction: True})
        return {"down": Downsample, "up": Upsample}[direction](channels, self.conv_resample, self.dims)


class UNetEncoder(nn.Module):
    """The contracting half of a UNet: base of `UNetModel` and `EncoderUNetModel`, which state arguments and errors.

    `widths` are the channels of each level, `block_channels` the output channels of each input block.
    """

    use_checkpoint = use_fp16 = False

    def __init__(
        self,
        options: LayerOptions,
        in_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        channel_mult: Sequence[float],
        num_classes: int | None,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.widths = [int(multiple * options.model_channels) for multiple in channel_mult]
        if any(width % 32 for width in self.widths):
            raise ValueError(f"model_channels x channel_mult: got widths {self.widths}, expected multiples of 32")
        self.in_channels, self.model_channels, self.num_classes = in_channels, options.model_channels, num_classes
        self.dims = options.dims
        self.size_divisor = 2 ** (len(self.widths) - 1)

        emb_channels = 4 * self.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(self.model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels = self.widths[0]
        self.input_blocks = nn.ModuleList([UNetBlock(conv_nd(self.dims, in_channels, channels, 3, padding=1))])
        self.block_channels = [channels]
        for level, width in enumerate(self.widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [options.res_block(channels, width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(options.attention(channels, num_heads))
                self.input_blocks.append(UNetBlock(*layers))
                self.block_channels.append(channels)
            if level != len(self.widths) - 1:
                self.input_blocks.append(UNetBlock(options.resample(channels, "down")))
                self.block_channels.append(channels)

        self.middle_block = UNetBlock(
            options.res_block(channels), options.attention(channels, num_heads), options.res_block(channels)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' convolutions and features."""
        return weight_dtype(self.input_blocks)

    def convert_to_fp16(self) -> None:
        """Cast the blocks' convolutions and text matrices to float16, and nothing else, as the original does."""
        self._convert_blocks(torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        self._convert_blocks(torch.float32)

    def _blocks(self) -> Iterator[UNetBlock]:
        """All blocks in the order they run."""
        yield from self.input_blocks  # type: ignore[misc]
        yield self.middle_block

    def _convert_blocks(self, dtype: torch.dtype) -> None:
        """Cast the convolutions of all blocks."""
        for block in self._blocks():
            convert_modules(block, CONVOLUTIONS, dtype)

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Check the shapes of all inputs; embed timesteps and classes."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            expected = f"[B, {self.in_channels}] and {self.dims} spatial sizes, conditioning channels included"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
        resized = x.shape[-min(self.dims, 2) :]
        if any(size % self.size_divisor for size in resized):
            raise ValueError(f"x: got spatial sizes {tuple(resized)}, expected multiples of {self.size_divisor}")
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected {tuple(x.shape[:1])}")
        if (y is None) != (self.num_classes is None):
            got = "None" if y is None else "a tensor"
            raise ValueError(f"y: got {got}, expected it exactly if num_classes is set (it is {self.num_classes})")
        if y is not None and y.shape != timesteps.shape:
            raise ValueError(f"y: got shape {tuple(y.shape)}, expected {tuple(timesteps.shape)}")
        embedding = timestep_embedding(timesteps, self.model_channels)
        emb: Tensor = self.time_embed(embedding.to(weight_dtype(self.time_embed)))
        return emb if y is None else emb + self.label_emb(y)

    def _run(self, block: UNetBlock, h: Tensor, emb: Tensor, encoder_kv: Iterator[Tensor] | None = None) -> Tensor:
        """Run a block, with activation checkpointing if enabled; an attention block takes the next keys and values."""
        kv = None if encoder_kv is None or block.attention is None else next(encoder_kv)
        if self.use_checkpoint and self.training:
            return checkpoint(block, h, emb, kv, use_reentrant=False)
        return block(h, emb, kv)


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first parameter."""
    return next(module.parameters()).dtype
