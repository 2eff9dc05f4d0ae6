"""GLIDE's second stage: from small pictures and their prompts to large ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.noise import Generators
from ..engine.sampler import Step
from ..guidance import NoGuidance
from ..utils.checks import check_count, check_finite
from .base import Drawing, Pipeline
from .pictures import picture_noise

__all__ = ["Upsampler"]


class Upsampler(Pipeline):
    """Enlarges pictures, given their prompts. It samples without guidance, as GLIDE's notebooks do.

    Arguments, attributes and errors as `Pipeline`.

    Example:
        >>> prompt = "an oil painting of a corgi"
        >>> small = TextToImage.load("base.pt", "cuda").sample(prompt, steps=100, num_samples=4)
        >>> Upsampler.load("upsample.pt", "cuda").sample(small, prompt, seed=1000).shape
        torch.Size([4, 3, 256, 256])
    """

    _NETWORKS = ("SuperResText2ImUNet", "SuperResInpaintText2ImUnet")
    _PURPOSE = "enlarge pictures"

    def sample(
        self,
        images: Tensor,
        prompts: str | Sequence[str],
        *,
        steps: int | str = "fast27",
        solver: str = "ddim",
        schedule: str | None = None,
        eta: float | None = None,
        temperature: float = 0.997,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        inpaint: tuple[Tensor, Tensor] | None = None,
        backend: str = "auto",
        graph: str | bool = "auto",
        noise_source: str = "philox",
        batch_size: int = 16,
        progress: bool | str = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Enlarge pictures.

        Args:
            images: [N, 3, h, h] in [-1, 1], h a divisor of the network's size (64 for GLIDE's 256 pixels); rounded to
                256 levels, as in the network's training.
            prompts: one prompt for all, or one per picture.
            steps, solver: as `TextToImage.sample`; GLIDE's notebooks take "fast27", and "ddpm" for inpainting.
            temperature: factor of the starting noise; a little less than 1 makes sharper pictures.
            seed: as `TextToImage.sample`; not the small pictures' seeds, or both start from the same normals.
            generator: as `TextToImage.sample`.
            inpaint: as `TextToImage.sample`, of the enlarged size; so are the other arguments.

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
        texts = self._checked(prompts, images.shape[2], temperature)
        if isinstance(prompts, str):
            texts *= len(images)
        if len(texts) != len(images):
            raise ValueError(f"prompts: got {len(texts)}, expected one or one per picture ({len(images)})")
        batch_size = check_count("batch_size", batch_size)
        seeds, generator = picture_noise(seed, generator, noise_source, 1, len(images))
        inputs = self._inpainting(inpaint, len(images))
        execution = {"backend": backend, "graph": graph, "noise_source": noise_source}
        sampler = self._sampler_for((solver, steps, schedule, eta, temperature), **execution)
        low_res = ((images.detach().to(self.device, torch.float32) + 1) * 127.5).round() / 127.5 - 1
        # Once, instead of at every step in the network: the same bits.
        inputs["low_res"] = F.interpolate(low_res, (size, size), mode="bilinear", align_corners=False)
        drawing = Drawing(texts, seeds, NoGuidance(), {}, inputs, batch_size, None, progress, callback, generator)
        return self._draw(sampler, drawing)

    def check(
        self,
        prompts: str | Sequence[str],
        image_size: int,
        *,
        steps: int | str = "fast27",
        solver: str = "ddim",
        schedule: str | None = None,
        eta: float | None = None,
        temperature: float = 0.997,
    ) -> None:
        """Raise what `sample` would raise for these arguments, given small pictures of `image_size` pixels a side."""
        self._checked(prompts, image_size, temperature)
        self._check_table(self._table(solver, steps, schedule, eta, temperature), NoGuidance(), {})

    def _checked(self, prompts: str | Sequence[str], image_size: int, temperature: float) -> list[str]:
        texts = self._prompts(prompts)
        if self.meta.image_size % image_size or self.meta.image_size == image_size:
            raise ValueError(f"images: got a size of {image_size}, expected a divisor of {self.meta.image_size}")
        check_finite("temperature", temperature, least=0)
        return texts
