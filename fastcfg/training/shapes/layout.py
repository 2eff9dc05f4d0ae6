"""The layout loss: name colour and shape at every cell of the last attention block's feature map.

The error of the noise says little about which colour goes with which shape, or which object lies on which side: at the
noisy steps where this is decided, a wrong layout costs a few percent. With the layout loss the network learns it in a
fraction of the steps. The two linear heads are dropped after training.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.blocks import AttentionBlock
from ...models.text2im import Text2ImUNet
from .scenes import COLOURS, SHAPES

_OCCUPIED = 0.25  # a cell covered less than this is background


class LayoutHead(nn.Module):
    """Reads colour and shape from a network's last attention block (ValueError without one), for each thread apart."""

    def __init__(self, model: Text2ImUNet) -> None:
        super().__init__()
        blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
        if not blocks:
            raise ValueError("model: got a network without attention blocks, expected one that attends to its text")
        self._heard = threading.local()
        blocks[-1].register_forward_hook(self._listen)
        channels = blocks[-1].norm.num_channels
        self.norm = nn.GroupNorm(32, channels)
        self.colour = nn.Conv2d(channels, len(COLOURS) + 1, 1)
        self.shape = nn.Conv2d(channels, len(SHAPES) + 1, 1)

    def _listen(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._heard.features = output

    def forward(self, colours: Tensor, shapes: Tensor) -> Tensor:
        """Score the features of this thread's last call of the network against the names of `render_named`.

        Returns the mean cross-entropy of both names over the cells, [B].
        """
        features = self.norm(self._heard.features.float())
        self._heard.features = None
        losses = []
        for head, names in ((self.colour, colours), (self.shape, shapes)):
            # The name that fills most of each cell.
            masks = F.one_hot(names, head.out_channels).movedim(-1, 1).float()
            areas = F.adaptive_avg_pool2d(masks, features.shape[-1])
            areas[:, 0] = torch.where(areas[:, 0] <= 1 - _OCCUPIED, 0.0, 2.0)
            losses.append(F.cross_entropy(head(features), areas.argmax(dim=1), reduction="none"))
        return (losses[0] + losses[1]).mean(dim=(1, 2))
