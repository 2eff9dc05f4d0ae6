"""From a checkpoint and prompts to pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..engine.sampler import Step
from ..guidance import CFG
from ..models.tokenizer import Tokenizer
from .base import SOLVERS, Stage, check_count, check_finite, picture_seeds

__all__ = ["SOLVERS", "TextToImage"]

_EMBEDDED = "shapes.safetensors"


class TextToImage(Stage):
    """A text-conditional model with its tokenizer and noise schedule, ready to sample; GLIDE's base models too.

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
        ValueError: a network without learned variances or without text, or one that enlarges pictures.

    Example:
        >>> pipeline = TextToImage.load()
        >>> images = pipeline.sample("a red circle above a blue square", num_samples=4, seed=0)
        >>> images.shape
        torch.Size([4, 3, 32, 32])
    """

    _NETWORKS = ("Text2ImUNet", "InpaintText2ImUNet")
    _PURPOSE = "draw from text"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TextToImage:
        """Read a checkpoint or a state dict.

        Args:
            path: a file that `fastcfg train` wrote, or a state dict of GLIDE's base model, with or without inpainting
                (`base.pt`, `base_inpaint.pt`); None is the model that comes with the package.
            device: where to run it.
            dtype: dtype of weights and features; None keeps float32. The state and the solver's arithmetic are float32
                in any case. (`model.convert_to_fp16()` is GLIDE's own mixture.)
            tokenizer: of a state dict: a tokenizer, the folder with GPT-2's vocabulary, or a tokenizer's JSON file;
                None looks for GLIDE's (the extra `glide`). A file of `fastcfg train` has its own.
            options: of a state dict: GLIDE's options where they differ from its defaults.

        Raises:
            ValueError: not such a file, tokenizer or options that do not go with it, a device that is not there, or a
                dtype that is not floating.
            OSError: the file cannot be read.

        Example:
            >>> pipeline = TextToImage.load("base.pt", "cuda")
            >>> images = pipeline.sample("an oil painting of a corgi", steps=100)
        """
        with ExitStack() as stack:
            if path is None:
                from importlib.resources import as_file, files

                path = stack.enter_context(as_file(files("fastcfg") / "checkpoints" / _EMBEDDED))
            return cls._load(path, device, dtype, tokenizer, options)

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | None = None,
        guidance_scale: float = 3.0,
        steps: int | str = 50,
        solver: str = "ddpm",
        eta: float = 0.0,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        inpaint: tuple[Tensor, Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        backend: str = "auto",
        graph: str | bool = "auto",
        noise: str = "philox",
        batch_size: int = 64,
        progress: bool | str = False,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Draw pictures.

        Args:
            prompts: a prompt, or several.
            negative: what to guide away from, instead of from the empty prompt.
            guidance_scale: s of uncond + s (cond - uncond): 0 ignores the prompt, 1 samples the conditional model.
            steps: timesteps per picture, spread evenly over the schedule; or a respacing such as "10,15,20", "ddim50"
                or "fast27" (`fastcfg.schedule.space_timesteps`).
            solver: "ddpm" (with the learned variances) or "ddim".
            eta: the noise of "ddim": 0 for none, 1 for as much as DDPM's.
            num_samples: pictures per prompt.
            seed: sample i of every prompt has the seed `seed + i`; or one seed per picture.
            inpaint: for inpainting networks: (image, mask), [3, H, W] in [-1, 1] and [1, H, W] with 1 where the image
                is known and 0 elsewhere, or one of either per picture, [N, ...]. Known pixels come out as they are.
            cond_fn: a gradient that guides too (a classifier's, CLIP's), as `Sampler`: called with the state of one
                batch, the model's times, and the keyword arguments of the conditional branch.
            backend: as `Sampler`.
            graph: as `Sampler`.
            noise: as `Sampler`. With "philox" a picture depends on its prompt and seed alone, but for the last bits:
                torch's convolutions and matrix products may round otherwise in another batch size.
            batch_size: pictures computed at once.
            progress: show a progress bar; a string is its label.
            callback: called with the `Step` of every row of every batch.

        Returns:
            float32 [N, 3, H, W] in [-1, 1], the samples of the first prompt first.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a prompt that is empty, longer than the model's context or of words it does not know; steps
                outside 1 ... T or no respacing of it; an unknown solver; eta with "ddpm"; a scale that is not finite;
                counts below 1; pictures to inpaint that do not fit the network; or what `Sampler` raises.
        """
        if not isinstance(prompts, str | Sequence):
            raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or several")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("prompts: got none, expected at least one")
        tokens = [self._tokens("prompt", text) for text in texts]
        unconditional = self._tokens("negative", negative) if negative else []
        check_finite("guidance_scale", guidance_scale)
        check_count("num_samples", num_samples)
        check_count("batch_size", batch_size)
        seeds = picture_seeds(seed, len(texts), num_samples)
        pictures = self._inpainting(inpaint, len(seeds))
        sampler = self._sampler_for(steps, solver, eta, 1.0, backend, graph, noise)
        owners = [text for text in range(len(texts)) for _ in range(num_samples)]
        return self._draw(
            sampler,
            CFG(guidance_scale),
            tokens,
            owners,
            unconditional,
            pictures,
            seeds,
            cond_fn,
            batch_size,
            progress,
            callback,
        )
