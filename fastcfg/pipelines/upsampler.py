"""GLIDE's second stage: small pictures and their prompts to large ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.sampler import Step
from ..guidance import NoGuidance
from ..models.tokenizer import Tokenizer
from .base import Stage, check_count, check_finite, picture_seeds

__all__ = ["Upsampler"]


class Upsampler(Stage):
    """A text-conditional model that enlarges pictures, with its tokenizer and noise schedule, ready to sample.

    It samples without guidance, as GLIDE's notebooks do.

    Args:
        model: the network, with learned variances (twice the image's channels come out).
        tokenizer: its tokenizer.
        meta: schedule and image size, as in a checkpoint.

    Attributes:
        model: as given.
        tokenizer: as given.
        meta: as given.
        schedule: the noise schedule the model was trained with.

    Raises:
        ValueError: a network without learned variances or without text, or one that enlarges no pictures.

    Example:
        >>> prompt = "an oil painting of a corgi"
        >>> small = TextToImage.load("base.pt", "cuda").sample(prompt, steps=100, num_samples=4)
        >>> Upsampler.load("upsample.pt", "cuda").sample(small, prompt, seed=1000).shape
        torch.Size([4, 3, 256, 256])
    """

    _NETWORKS = ("SuperResText2ImUNet", "SuperResInpaintText2ImUnet")
    _PURPOSE = "enlarge pictures"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Upsampler:
        """Read a checkpoint or a state dict.

        Args:
            path: a file that `fastcfg train` wrote, or a state dict of GLIDE's upsampler, with or without inpainting
                (`upsample.pt`, `upsample_inpaint.pt`).
            device: as `TextToImage.load`.
            dtype: as there.
            tokenizer: as there.
            options: as there.

        Raises:
            ValueError: as there.
            OSError: as there.
        """
        return cls._load(path, device, dtype, tokenizer, options)

    def sample(
        self,
        images: Tensor,
        prompts: str | Sequence[str],
        *,
        steps: int | str = "fast27",
        solver: str = "ddim",
        eta: float = 0.0,
        temperature: float = 0.997,
        seed: int | Sequence[int] = 0,
        inpaint: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
        graph: str | bool = "auto",
        noise: str = "philox",
        batch_size: int = 16,
        progress: bool | str = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Enlarge pictures.

        Args:
            images: [N, 3, h, h] in [-1, 1], h a divisor of the network's size (64 for GLIDE's 256 pixels); rounded to
                256 levels, as the network learned from.
            prompts: one prompt for all, or one per picture.
            steps: timesteps per picture, or a respacing, as `TextToImage.sample`; "fast27" is GLIDE's.
            solver: "ddim", or "ddpm" (with the learned variances), which GLIDE's notebook takes for inpainting.
            eta: the noise of "ddim".
            temperature: factor of the starting noise; a little less than 1 makes sharper pictures.
            seed: picture i has the seed `seed + i`; or one seed per picture. Take others than the small pictures', or
                both start from the same normals.
            inpaint: as `TextToImage.sample`, of the enlarged size.
            backend: as `Sampler`.
            graph: as `Sampler`.
            noise: as `Sampler`; with "philox" a picture depends on its small one, its prompt and its seed alone, but
                for the last bits.
            batch_size: pictures computed at once.
            progress: show a progress bar; a string is its label.
            callback: called with the `Step` of every row of every batch.

        Returns:
            float32 [N, 3, H, H] in [-1, 1].

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: images of a shape that does not fit; or what `TextToImage.sample` raises for the others.
        """
        size = self.meta.image_size
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, expected a tensor")
        if images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != (self._channels, *[images.shape[3]] * 2):
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected [N, {self._channels}, h, h]")
        if not images.is_floating_point() or not (images.abs() <= 1).all():
            raise ValueError(f"images: got {images.dtype} or values outside [-1, 1], expected floats in it")
        self.check(prompts, images.shape[2], steps=steps, solver=solver, eta=eta, temperature=temperature)
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise ValueError(f"prompts: got {len(texts)}, expected one or one per picture ({len(images)})")
        check_count("batch_size", batch_size)
        seeds = picture_seeds(seed, 1, len(images))
        pictures = self._inpainting(inpaint, len(images))
        sampler = self._sampler_for(steps, solver, eta, temperature, backend, graph, noise)
        low_res = ((images.detach().to(self.device, torch.float32) + 1) * 127.5).round() / 127.5 - 1
        # Once, instead of at every step in the network: the same bits.
        pictures["low_res"] = F.interpolate(low_res, (size, size), mode="bilinear", align_corners=False)
        different = list(dict.fromkeys(texts))
        return self._draw(
            sampler,
            NoGuidance(),
            [self._tokens("prompt", text) for text in different],
            [different.index(text) for text in texts],
            None,
            pictures,
            seeds,
            None,
            batch_size,
            progress,
            callback,
        )

    def check(
        self,
        prompts: str | Sequence[str],
        image_size: int,
        *,
        steps: int | str = "fast27",
        solver: str = "ddim",
        eta: float = 0.0,
        temperature: float = 0.997,
    ) -> None:
        """Raise what `sample` would raise for these arguments, before there are pictures.

        Args:
            prompts: as `sample`.
            image_size: height and width of the small pictures.
            steps: as `sample`.
            solver: as there.
            eta: as there.
            temperature: as there.
        """
        if not isinstance(prompts, str | Sequence):
            raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or several")
        for text in [prompts] if isinstance(prompts, str) else dict.fromkeys(prompts):
            self._tokens("prompt", text)
        if self.meta.image_size % image_size or self.meta.image_size == image_size:
            raise ValueError(f"images: got a size of {image_size}, expected a divisor of {self.meta.image_size}")
        check_finite("temperature", temperature)
        if temperature < 0:
            raise ValueError(f"temperature: got {temperature!r}, expected at least 0")
        self._table(steps, solver, eta, temperature)
