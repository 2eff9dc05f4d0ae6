"""Batches of a folder, decoded ahead in threads: a batch depends only on folder, seed and step."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...models.tokenizer import Tokenizer
from .config import FolderConfig
from .pictures import PictureFolder, PictureReader, to_array

# Number of steps decoded ahead. In threads, as Pillow decodes without the GIL: `DataLoader` gives the same batches from
# processes, which take longer to start and turn a picture's error into a traceback.
_AHEAD = 2


class _Sample(NamedTuple):
    """One row of a batch, its picture as float32 [3, H, W]."""

    images: np.ndarray
    low_res: np.ndarray | None
    tokens: Sequence[int]
    mask: Sequence[bool]
    unreadable: Sequence[str]  # messages about the pictures skipped before it


class FolderData:
    """Random access to the batches of a run.

    Each pass over the folder has every picture once, in an order of its own. A picture that cannot be read is replaced
    by the next readable one. Dropped captions, the choice of a caption, crop and mirroring are drawn for every row.

    `size` is the width and height of the pictures: multiples of `upscale_factor` if it is used, or ValueError.
    """

    def __init__(
        self, config: FolderConfig, folder: PictureFolder, tokenizer: Tokenizer, text_ctx: int, size: tuple[int, int]
    ) -> None:
        if config.upsample and any(side % config.upscale_factor for side in size):
            raise ValueError(f"upscale_factor: got {config.upscale_factor}, expected a divisor of {size[0]}x{size[1]}")
        self._config, self._pictures = config, folder.pictures
        self._tokenizer, self._text_ctx = tokenizer, text_ctx
        self._reader = PictureReader(*size, config.crop, config.resize_ratio, config.random_hflip)
        factor = config.upscale_factor
        self._low_size = (size[0] // factor, size[1] // factor) if config.upsample else None
        seed, count = config.seed, len(folder.pictures)
        # The order of the pictures in a pass over the folder.
        self._order = functools.lru_cache(4)(lambda p: np.random.default_rng([seed, p, 0x0DE5]).permutation(count))
        self._pool = ThreadPoolExecutor(config.workers)
        self._told: set[str] = set()
        self._ahead: dict[int, list[Future[_Sample]]] = {}

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, see `Task`, and start on the next ones.

        A missing or dropped caption is all padding. For the upsampler it has `low_res`, float32
        [B, 3, H / upscale_factor, W / upscale_factor]. Each unreadable picture gives one warning; ValueError if none
        can be read.
        """
        for other in [other for other in self._ahead if not step <= other <= step + _AHEAD]:
            for future in self._ahead.pop(other):
                future.cancel()
        for wanted in range(step, min(step + _AHEAD + 1, max(self._config.steps, step + 1))):
            if wanted not in self._ahead:
                rows = range(self._config.batch_size)
                self._ahead[wanted] = [self._pool.submit(self._sample, wanted, row) for row in rows]
        samples = [future.result() for future in self._ahead.pop(step)]
        for message in dict.fromkeys(message for sample in samples for message in sample.unreadable):
            if message not in self._told:
                self._told.add(message)
                warnings.warn(f"skipped: {message}", stacklevel=2)
        batch = {name: torch.tensor([getattr(sample, name) for sample in samples]) for name in ("tokens", "mask")}
        for name in ("images", "low_res") if self._low_size else ("images",):
            batch[name] = torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
        return batch

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _sample(self, step: int, row: int) -> _Sample:
        """Make one row of a step's batch."""
        rng, pictures = np.random.default_rng([self._config.seed, step, row]), self._pictures
        dropped, choice = rng.random() < self._config.uncond_p, rng.random()
        passes, index = divmod(step * self._config.batch_size + row, len(pictures))
        order = self._order(passes)
        unreadable: list[str] = []
        for later in range(len(pictures)):
            picture = pictures[order[(index + later) % len(pictures)]]
            try:
                image = self._reader.read(picture.path, rng)
            except ValueError as error:
                unreadable.append(str(error))
                continue
            captions = ("",) if dropped or not picture.captions else picture.captions
            tokens = self._tokenizer.encode(captions[int(choice * len(captions))])
            padded = self._tokenizer.padded_tokens_and_mask(tokens, self._text_ctx)
            # The upsampler's input is rounded to 8 bits, like sampled pictures.
            low_res = self._low_size and to_array(image.resize(self._low_size, Image.Resampling.BICUBIC))
            return _Sample(to_array(image), low_res, *padded, unreadable)
        raise ValueError(f"data: got {len(pictures)} pictures in {self._config.data}, none of which can be read")
