"""Training batches, made on the fly: the batch of a step depends only on the seed and the step."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from fastcfg.models.tokenizer import Tokenizer
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.reading import batch_targets
from fastcfg.training.shapes.scenes import Scene, caption, render_named, sample_scene


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures and their captions' tokens.

    Attributes:
        images: float32 ``[B, 3, 32, 32]`` in [-1, 1].
        tokens: int64 ``[B, text_ctx]``.
        mask: bool ``[B, text_ctx]``, True on a caption's own tokens; all False where the caption was dropped.
        colours: int64 ``[B, 32, 32]``, each pixel's colour, see ``render_named``.
        shapes: int64 ``[B, 32, 32]``, likewise its shape.
        at_words: int64 ``[B, text_ctx, 4]``, what to read at each word, see ``reading_targets``.
        about: int64 ``[B, 5]``, what to read about the scene.
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor
    colours: Tensor
    shapes: Tensor
    at_words: Tensor
    about: Tensor


class ShapesData:
    """Random access to the batches of a run.

    Args:
        config: the recipe.
        tokenizer: encodes the captions.
    """

    def __init__(self, config: ShapesConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._encode = functools.lru_cache(maxsize=1 << 16)(self._encode_uncached)

    def batch(self, step: int) -> Batch:
        """Make the batch of a step.

        Args:
            step: the step, counted from 0.

        Returns:
            The batch.
        """
        config = self._config
        rng = np.random.default_rng([config.seed, step])
        scenes = [sample_scene(rng, two_objects=config.two_objects) for _ in range(config.batch_size)]
        captions = [caption(scene, rng, name_sizes=config.name_sizes) for scene in scenes]
        dropped = rng.random(config.batch_size) < config.cond_drop
        captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        encoded = [self._encode(text) for text in captions]
        at_words, about = batch_targets(captions, scenes, config.model["text_ctx"])
        images, colours, shapes = (torch.from_numpy(array) for array in render_named(scenes, rng))
        return Batch(
            images=images,
            tokens=torch.tensor([tokens for tokens, _ in encoded]),
            mask=torch.tensor([mask for _, mask in encoded]),
            colours=colours,
            shapes=shapes,
            at_words=at_words,
            about=about,
        )

    def _encode_uncached(self, text: str) -> tuple[list[int], list[bool]]:
        tokenizer = self._tokenizer
        return tokenizer.padded_tokens_and_mask(tokenizer.encode(text), self._config.model["text_ctx"])


def evaluation_prompts(count: int, seed: int = 0, two_objects: float = 0.75) -> list[tuple[str, Scene]]:
    """Prompts with the scenes they ask for, to measure how well a model follows its prompts.

    Two objects always have a relation, so that there is always one to judge.

    Args:
        count: how many.
        seed: another seed gives other prompts; unrelated to any training seed.
        two_objects: share of prompts for two objects.

    Returns:
        Pairs of prompt and scene.
    """
    rng = np.random.default_rng([seed, 0x5CE4E])
    scenes = [sample_scene(rng, two_objects=two_objects, related=1.0) for _ in range(count)]
    return [(caption(scene, rng), scene) for scene in scenes]
