"""The UNet of guided-diffusion and GLIDE, with their parameter names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastcfg.models.attention import AttentionBlock
from fastcfg.models.nn import (
    Downsample,
    GroupNorm32,
    Upsample,
    conv_nd,
    convert_modules,
    timestep_embedding,
    zero_module,
)
from fastcfg.models.resblock import ResBlock

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class UNetBlock(nn.Sequential):
    """Layers in sequence, each given what it takes beside the features."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, encoder_out: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, AttentionBlock):
                x = layer(x, encoder_out)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """UNet with attention and a timestep embedding (guided-diffusion `unet.UNetModel`, GLIDE `unet.UNetModel`).

    Arguments are upstream's, in GLIDE's order. The last convolution of every residual branch, the attention projections
    and the output convolution start at zero, as in upstream.

    Args:
        in_channels: channels of the input.
        model_channels: base width; a multiple of 32, as norms have 32 groups.
        out_channels: channels of the output: twice the image's when the variance is learned.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors at which attention is used, e.g. (2, 4).
        dropout: dropout rate in the residual blocks.
        channel_mult: width of each level as a multiple of `model_channels`; one level per entry.
        conv_resample: resampling layers have a convolution; without effect if `resblock_updown`.
        dims: spatial dimensions, 1 to 3.
        num_classes: number of classes of a class-conditional model, or None.
        use_checkpoint: recompute activations in the backward pass to save memory.
        use_fp16: kept as an attribute for callers that convert after loading weights, as upstream's do. Features follow
            the dtype of the weights.
        num_heads: attention heads, used when `num_head_channels` is -1.
        num_head_channels: channels per attention head, or -1.
        num_heads_upsample: `num_heads` of the upsampling half, or -1 for the same.
        use_scale_shift_norm: residual blocks are conditioned by scale and shift.
        resblock_updown: residual blocks do the resampling.
        encoder_channels: channels of an encoder's output that the attention blocks also attend to, or None.

    Raises:
        ValueError: channels not divisible by the 32 groups of the norms, or into the heads asked for.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
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
        encoder_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = [int(multiple * model_channels) for multiple in channel_mult]
        if any(width % 32 for width in widths):
            raise ValueError(f"model_channels x channel_mult: got widths {widths}, expected multiples of 32")
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.dims = dims
        self.use_checkpoint = use_checkpoint
        self.use_fp16 = use_fp16
        self.size_divisor = 2 ** (len(widths) - 1)
        emb_channels = 4 * model_channels
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample

        def res_block(channels: int, width: int | None = None, **resampling: bool) -> ResBlock:
            return ResBlock(channels, emb_channels, dropout, width, use_scale_shift_norm, dims, **resampling)

        def attention(channels: int, heads: int) -> AttentionBlock:
            return AttentionBlock(channels, heads, num_head_channels, encoder_channels)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels, factor = widths[0], 1
        self.input_blocks = nn.ModuleList([UNetBlock(conv_nd(dims, in_channels, channels, 3, padding=1))])
        skips = [channels]
        layers: list[nn.Module]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(UNetBlock(*layers))
                skips.append(channels)
            if level != len(widths) - 1:
                down = res_block(channels, down=True) if resblock_updown else Downsample(channels, conv_resample, dims)
                self.input_blocks.append(UNetBlock(down))
                skips.append(channels)
                factor *= 2

        self.middle_block = UNetBlock(res_block(channels), attention(channels, num_heads), res_block(channels))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), width)]
                channels = width
                if factor in attention_resolutions:
                    layers.append(attention(channels, heads_up))
                if level and index == num_res_blocks:
                    layers.append(
                        res_block(channels, up=True) if resblock_updown else Upsample(channels, conv_resample, dims)
                    )
                    factor //= 2
                self.output_blocks.append(UNetBlock(*layers))

        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zero_module(conv_nd(dims, channels, out_channels, 3, padding=1))
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' features: that of their convolutions."""
        return _weight_dtype(self.input_blocks)

    def convert_to_fp16(self) -> None:
        """Make the blocks' convolutions float16; norms and embedding layers keep float32, as in upstream."""
        self._convert_blocks(torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        self._convert_blocks(torch.float32)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: [B, in_channels, *spatial]; each size a multiple of 2 per level but the first.
            timesteps: [B], integer or float.
            y: [B] integer classes, exactly for class-conditional models.

        Returns:
            [B, out_channels, *spatial], of the dtype of `x`.

        Raises:
            ValueError: an argument's shape does not fit, or `y` is missing or not wanted.
        """
        if (y is None) != (self.num_classes is None):
            got = "None" if y is None else "a tensor"
            raise ValueError(f"y: got {got}, expected it exactly if num_classes is set (it is {self.num_classes})")
        emb = self._embed_timesteps(x, timesteps)
        if y is not None:
            if y.shape != timesteps.shape:
                raise ValueError(f"y: got shape {tuple(y.shape)}, expected {tuple(timesteps.shape)}")
            emb = emb + self.label_emb(y)
        return self._forward_blocks(x, emb)

    def _embed_timesteps(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Check the shapes of both inputs and embed the timesteps."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            expected = f"[B, {self.in_channels}] and {self.dims} spatial sizes, conditioning channels included"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
        resized = x.shape[-min(self.dims, 2) :]
        if any(size % self.size_divisor for size in resized):
            raise ValueError(f"x: got spatial sizes {tuple(resized)}, expected multiples of {self.size_divisor}")
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected {tuple(x.shape[:1])}")
        embedding = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(embedding.to(_weight_dtype(self.time_embed)))

    def _forward_blocks(self, x: Tensor, emb: Tensor, encoder_out: Tensor | None = None) -> Tensor:
        """The U itself; `out` runs in its own precision, which `convert_to_fp16` leaves at float32."""
        skips = []
        h = x.to(self.dtype)
        for block in self.input_blocks:
            h = self._run(block, h, emb, encoder_out)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, encoder_out)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb, encoder_out)
        return self.out(h.to(_weight_dtype(self.out))).to(x.dtype)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor, encoder_out: Tensor | None) -> Tensor:
        """One block, under activation checkpointing if asked for."""
        if self.use_checkpoint and self.training:
            return checkpoint(block, h, emb, encoder_out, use_reentrant=False)
        return block(h, emb, encoder_out)

    def _convert_blocks(self, dtype: torch.dtype) -> None:
        """Cast the convolutions of all blocks."""
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            convert_modules(blocks, _CONVOLUTIONS, dtype)


def _weight_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first parameter."""
    return next(module.parameters()).dtype
