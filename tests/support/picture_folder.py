"""A folder of drawn pictures with captions, and the smallest GLIDE network, for tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fastcfg.models import Tokenizer
from fastcfg.training.folder.config import FolderConfig

COLOURS = ("red", "green", "blue")
# GLIDE's options of a network that learns in seconds.
OPTIONS: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "num_head_channels": 16,
    "attention_resolutions": "8",
    "dropout": 0.0,
    "text_ctx": 6,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
}


def draw_folder(folder: Path, count: int = 6, size: tuple[int, int] = (40, 28)) -> Path:
    """Pictures 0.png, 1.png, ... of a coloured square, each with its caption; the last ones lie in a subfolder."""
    rng = np.random.default_rng(5)
    (folder / "deeper").mkdir(parents=True)
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        picture = Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 60, 3)))
        x, y = (int(v) for v in rng.integers(4, 12, 2))
        ImageDraw.Draw(picture).rectangle((x, y, x + 14, y + 12), fill=colour)
        path = (folder if index < count - 2 else folder / "deeper") / f"{index}.png"
        picture.save(path)
        path.with_suffix(".txt").write_text(f"a {colour} square\n")
    return folder


def write_tokenizer(path: Path) -> Path:
    """A tokenizer that knows the captions' words."""
    Tokenizer.word_level(["a", "the", "square", "picture", *COLOURS]).save(path)
    return path


def tiny_config(folder: Path, **changes: Any) -> FolderConfig:
    """A short recipe for a folder, with a tokenizer beside it."""
    tokenizer = folder.parent / "tokenizer.json"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    values: dict[str, Any] = {
        "data": str(folder),
        "tokenizer": str(tokenizer),
        "steps": 5,
        "batch_size": 4,
        "warmup_steps": 1,
        "ema_decay": 0.9,
        "seed": 3,
        "workers": 2,
        "model": OPTIONS,
    }
    return FolderConfig.from_dict({**values, **changes})
