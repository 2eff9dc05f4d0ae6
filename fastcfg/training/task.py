"""The exchangeable part of the trainer: what a run trains, and on what data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from ..models.checkpoint import CheckpointMeta
from ..models.text2im import Text2ImUNet
from .config import TrainConfig


class Task:
    """A network, its data, and its losses besides that of the noise. Steps are counted from 0.

    Attributes:
        model, meta: the network in train mode, frozen parameters with `requires_grad` False, and its description
            without the recipe.
        heads: layers trained beside the network and dropped afterwards.
        fingerprint: identifies the data: a run resumes only on equal data. Empty if the recipe determines them.
        summary: one line about the data found, or "".
        glide: also write the averaged weights as a plain state dict, for GLIDE's own code.
    """

    model: Text2ImUNet
    meta: CheckpointMeta
    heads: nn.ModuleList
    fingerprint = summary = ""
    glide = False

    def empty_model(self) -> Text2ImUNet:
        """A network like `model` without weights, on torch's meta device."""
        return self.meta.build(self.model.tokenizer)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step; depends only on recipe, data and step.

        `images`, float32 [B, C, H, W] in [-1, 1]; `tokens`, int64 [B, text_ctx]; `mask`, bool [B, text_ctx], all False
        without a caption; and what else the other methods need, all with B rows.
        """
        raise NotImplementedError

    def before(self, step: int) -> list[nn.Parameter]:
        """Prepare for a step; returns the parameters set to new values, whose average and optimizer state restart."""
        return []

    def conditioning(self, shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of the network besides the text, for rows of a batch on the network's device."""
        return {}

    def trained_heads(self, config: TrainConfig) -> list[nn.Parameter]:
        """The parameters of `heads` trained under the settings `config` of a step."""
        return []

    def losses(
        self, shard: Mapping[str, Tensor], text: Mapping[str, Tensor], config: TrainConfig
    ) -> dict[str, tuple[float, Tensor]]:
        """Further losses by name, the same at every step: the weight, and the sum over the rows `shard` of a batch.

        Called after the network and in the same thread, with their `xf_proj` and `xf_out`, and the step's settings.
        """
        return {}

    def close(self) -> None:
        """Stop background threads."""


TEXT_LAYERS = ("transformer.", "final_ln.", "token_embedding.", "positional_embedding", "padding_embedding")
"""Beginnings of the names of the parameters that a network's `xf_out` depends on."""


def seed_for(seed: int, *path: str | int) -> int:
    """A torch seed for one purpose, named by words and numbers, unrelated to the seeds of other purposes."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> np.uint64(1))
