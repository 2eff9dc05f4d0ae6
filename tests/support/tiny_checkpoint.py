"""A small text-to-image checkpoint with random weights, for tests of what stands on a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastcfg.models import Text2ImUNet, Tokenizer
from fastcfg.models.checkpoint import CheckpointMeta, save_checkpoint

WORDS = ("a", "red", "blue", "green", "circle", "square", "star", "above", "below", "and")
SIZE, CONTEXT, TIMESTEPS = 8, 6, 100

MODEL: dict[str, Any] = {
    "text_ctx": CONTEXT,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "channel_mult": [1],
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
}


def write_tiny_checkpoint(path: Path, *, size: int = SIZE, words: Sequence[str] = WORDS, **changes: Any) -> Path:
    """Write it; `changes` replace arguments of the network."""
    arguments = {**MODEL, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Text2ImUNet(tokenizer=Tokenizer.word_level(words), **arguments)
        for parameter in model.parameters():
            # Layers that start at zero would leave the prompt without effect.
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    save_checkpoint(path, model, CheckpointMeta(arguments, "squaredcos_cap_v2", TIMESTEPS, size))
    return path
