"""The residual block: two convolutions, conditioned on the timestep embedding in between."""

from __future__ import annotations

from torch import Tensor, nn

from .nn import Downsample, GroupNorm32, Upsample, conv_nd, zero_module


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
