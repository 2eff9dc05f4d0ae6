"""GLIDE's four networks at a size that samples in a moment, with random weights, as state dicts and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastcfg.models import Text2ImUNet, Tokenizer
from fastcfg.models.checkpoint import CheckpointMeta, save_checkpoint
from fastcfg.models.glide import GLIDE_BASE, GLIDE_UPSAMPLER, glide_network

WORDS = ("a", "red", "blue", "green", "circle", "square", "star", "above", "below", "and")
BASE_SIZE, SIZE, CONTEXT = 8, 16, 6

_OPTIONS: dict[str, Any] = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "num_head_channels": 16,
    "text_ctx": CONTEXT,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "diffusion_steps": 100,
}
BASE = {**_OPTIONS, "image_size": BASE_SIZE, "attention_resolutions": "4"}
UPSAMPLER = {**_OPTIONS, "image_size": SIZE, "attention_resolutions": "8"}


def words() -> Tokenizer:
    """The tokenizer of all of them."""
    return Tokenizer.word_level(WORDS)


def tiny_network(*, super_res: bool = False, inpaint: bool = False) -> tuple[Text2ImUNet, CheckpointMeta]:
    """A network in eval mode and what describes it."""
    defaults, changes = (GLIDE_UPSAMPLER, UPSAMPLER) if super_res else (GLIDE_BASE, BASE)
    meta = glide_network(defaults, **changes, inpaint=inpaint)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = meta.build(words(), device="cpu")
        for parameter in model.parameters():
            # Layers that start at zero would leave prompts and pictures without effect.
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval(), meta


def write_network(path: Path, *, super_res: bool = False, inpaint: bool = False) -> Path:
    """Write one as a checkpoint of fastcfg for `.safetensors`, and as a state dict of float32 for `.pt`."""
    model, meta = tiny_network(super_res=super_res, inpaint=inpaint)
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_checkpoint(path, model, meta)
    return path
