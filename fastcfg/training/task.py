"""What a run trains, and on what: the part of the trainer that can be exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from fastcfg.models.checkpoint import CheckpointMeta
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.training.config import TrainConfig


class Task(Protocol):
    """A network, its data, and what is learned beside the noise. The loop is the same for all.

    Attributes:
        model: the network in train mode, its ``tokenizer`` as attribute; parameters that stay as they are need no
            gradient.
        heads: layers that are trained beside it and dropped afterwards; none in most tasks.
        meta: what the checkpoint says of the network, without the recipe.
        fingerprint: what identifies the data; a run resumes only on equal ones. Empty where the recipe says it all.
        summary: a line that tells what was found, or nothing.
        glide: the averaged weights are also wanted as a plain state dict, for GLIDE's own code.
    """

    model: Text2ImUNet
    heads: nn.Module
    meta: CheckpointMeta
    fingerprint: str
    summary: str
    glide: bool

    def empty_model(self) -> Text2ImUNet:
        """A network like ``model`` without weights, on torch's meta device."""
        ...

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """The batch of a step, which depends on the recipe, the data and the step alone.

        Args:
            step: the step, counted from 0.

        Returns:
            ``images``, float32 ``[B, C, H, W]`` in [-1, 1]; ``tokens``, int64 ``[B, text_ctx]``; ``mask``, bool, alike,
            all False where there is no caption; and what else the other methods take, all with B rows.
        """
        ...

    def before(self, step: int) -> list[nn.Parameter]:
        """What comes right before a step.

        Args:
            step: the step, counted from 0.

        Returns:
            The parameters that were set anew: their average and their optimizer state start again.
        """
        ...

    def conditioning(self, shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of the network beside the text.

        Args:
            shard: rows of a batch, on the network's device.
        """
        ...

    def trained_heads(self, config: TrainConfig) -> list[nn.Parameter]:
        """The parameters of ``heads`` that are trained.

        Args:
            config: the settings that hold at the step.
        """
        ...

    def losses(
        self, shard: Mapping[str, Tensor], text: Mapping[str, Tensor], config: TrainConfig
    ) -> dict[str, tuple[float, Tensor]]:
        """What is learned beside the noise, called after the network, in the same thread.

        Args:
            shard: rows of a batch, on the network's device.
            text: ``xf_proj`` and ``xf_out`` of the shard.
            config: the settings that hold at the step.

        Returns:
            By name the weight and the sum over the rows; the same names at every step.
        """
        ...

    def close(self) -> None:
        """Stop what works ahead."""
        ...


def seed_for(seed: int, *path: str | int) -> int:
    """A torch seed for one purpose, unrelated to those of other purposes.

    Args:
        seed: the recipe's seed.
        path: words and numbers that name the purpose.
    """
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> np.uint64(1))
