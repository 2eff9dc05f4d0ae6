"""The recipe of fine-tuning a GLIDE network on a folder of pictures and captions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...utils.checks import check_one_of
from ..config import TrainConfig, require

CROPS = ("random", "centre")


@dataclasses.dataclass(frozen=True)
class FolderConfig(TrainConfig):
    """A recipe for a folder. The same recipe, folder, machine and versions of torch and Pillow give the same weights.

    The default learning rate suits pretrained weights; from scratch GLIDE uses 1e-4.

    Attributes:
        data: the folder, searched with its subfolders; the captions of `NAME.png` are the lines of `NAME.txt`.
        init: initial weights: a checkpoint of fastcfg, with its own network and tokenizer, or a state dict of GLIDE as
            `.pt` or `.safetensors`; empty for random weights.
        tokenizer: folder with GPT-2's `encoder.json` and `vocab.bpe`, or a tokenizer as JSON; empty for GLIDE's.
        uncond_p: probability of dropping a caption, which trains the unconditional model, in [0, 1).
        skip_uncaptioned: leave out pictures without a caption instead of training on them unconditionally.
        side_x, side_y: width and height of the pictures trained on; 0 for the network's. A checkpoint states this size
            if it is square.
        crop: "random", or "centre" for the largest crop in the middle.
        resize_ratio: smallest area of a random crop, as a share of the largest crop's, in (0, 1].
        random_hflip: mirror half of the pictures.
        upsample, upscale_factor: train the upsampler, with `low_res` this many times smaller than the picture.
        freeze_transformer: do not train the text transformer and its projection.
        freeze_diffusion: do not train the UNet, except the layers that attend to the text.
        use_checkpoint: recompute activations in the backward pass to save memory.
        workers: threads that decode pictures ahead; the result does not depend on it.
        model: GLIDE's options that differ from its defaults, `GLIDE_BASE` or `GLIDE_UPSAMPLER`; empty if `init` is a
            checkpoint of fastcfg.

    Example:
        >>> FolderConfig(data="pictures", init="base.pt", uncond_p=0.2).learning_rate
        1e-05
    """

    # The place of the pictures may change; the state has a fingerprint of their contents.
    FREE: ClassVar[frozenset[str]] = frozenset({"data", "workers"})

    batch_size: int = 8
    learning_rate: float = 1e-5
    warmup_steps: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema_decay: float = 0.9999
    data: str = ""
    init: str = ""
    tokenizer: str = ""
    uncond_p: float = 0.2
    skip_uncaptioned: bool = False
    side_x: int = 0
    side_y: int = 0
    crop: str = "random"
    resize_ratio: float = 0.8
    random_hflip: bool = False
    upsample: bool = False
    upscale_factor: int = 4
    freeze_transformer: bool = False
    freeze_diffusion: bool = False
    use_checkpoint: bool = False
    workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require("data", self.data, bool(self.data), "a folder of pictures")
        self._check("0 <= value < 1", "uncond_p")
        check_one_of("crop", self.crop, CROPS)
        require("resize_ratio", self.resize_ratio, 0 < self.resize_ratio <= 1, "0 < value <= 1")
        self._check("at least 0", "side_x", "side_y")
        self._check("at least 2", "upscale_factor")
        self._check("at least 1", "workers")
