"""The text transformer: bidirectional, pre-norm, as in GLIDE."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .nn import LayerNorm32, attend


class MultiheadAttention(nn.Module):
    """Self-attention over all positions; the channels are queries, keys and values head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_qkv(x).unflatten(2, (self.heads, 3, -1)).unbind(3)))


class MLP(nn.Module):
    """Two layers with the exact GELU and four times the width in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Attention, then MLP, both residual and pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm32(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm32(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Text transformer of GLIDE (`xf.Transformer`); ValueError unless `width` is a multiple of `heads`."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"xf_heads: got {heads}, expected a divisor of xf_width {width}")
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """Map token features [B, T, width] to the same shape."""
        for block in self.resblocks:
            x = block(x)
        return x
