"""The recipe of fine-tuning a GLIDE network on a folder of pictures and captions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastcfg.training.config import TrainConfig, require

CROPS = ("random", "centre")


@dataclasses.dataclass(frozen=True)
class FolderConfig(TrainConfig):
    """A recipe for a folder. The same recipe, folder, machine and versions of torch and Pillow give the same weights.

    The learning rate suits pretrained weights. From scratch GLIDE's own is 1e-4.

    Attributes:
        data: the folder; pictures in its subfolders count, captions are the lines of ``NAME.txt`` beside ``NAME.png``.
        init: weights to start from: a checkpoint of fastcfg, which brings its own network and tokenizer, or a state
            dict of GLIDE as ``.pt`` or ``.safetensors``; empty for random weights.
        tokenizer: folder with GPT-2's ``encoder.json`` and ``vocab.bpe``, or a tokenizer as JSON; empty for GLIDE's.
        uncond_p: probability that a caption is dropped, so that the network learns to do without, in [0, 1).
        skip_uncaptioned: leave pictures without a caption out, instead of training on them unconditionally.
        side_x: width of the pictures trained on; 0 for the network's own size, which is also what the checkpoint says
            of pictures that are not square.
        side_y: their height, likewise.
        crop: random, or centre for the largest crop in the middle.
        resize_ratio: smallest share of the largest crop's area that a random crop has, in (0, 1].
        random_hflip: mirror half of the pictures.
        upsample: train the upsampler, whose ``low_res`` is made from the picture.
        upscale_factor: how much larger than ``low_res`` the upsampler's pictures are.
        freeze_transformer: leave the text transformer and its projection as they are.
        freeze_diffusion: leave the UNet as it is, but for the layers that attend to the text.
        use_checkpoint: compute activations twice instead of keeping them.
        workers: threads that decode pictures ahead; without influence on the result.
        model: GLIDE's options where they differ from its defaults, see ``GLIDE_BASE`` and ``GLIDE_UPSAMPLER``; nothing
            where ``init`` is a checkpoint of fastcfg.

    Raises:
        ValueError: a value out of its range, naming it.

    Example:
        >>> FolderConfig(data="pictures", init="base.pt", uncond_p=0.2).learning_rate
        1e-05
    """

    # Where the pictures lie is free, what they are is not: the state knows them.
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
        require("uncond_p", self.uncond_p, 0 <= self.uncond_p < 1, "0 <= value < 1")
        require("crop", self.crop, self.crop in CROPS, f"one of {', '.join(CROPS)}")
        require("resize_ratio", self.resize_ratio, 0 < self.resize_ratio <= 1, "0 < value <= 1")
        for name in ("side_x", "side_y"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        require("upscale_factor", self.upscale_factor, self.upscale_factor >= 2, "at least 2")
        require("workers", self.workers, self.workers >= 1, "at least 1")
