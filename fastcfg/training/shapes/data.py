"""Training batches, made when asked for: a batch depends only on seed and step."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ...models.tokenizer import Tokenizer
from .config import ShapesConfig
from .reading import batch_targets
from .scenes import Scene, caption, render_named, sample_scene


class ShapesData:
    """Random access to the batches of a run."""

    def __init__(self, config: ShapesConfig, tokenizer: Tokenizer) -> None:
        self._config, length = config, config.model["text_ctx"]
        encode, pad = tokenizer.encode, tokenizer.padded_tokens_and_mask
        self._encode = functools.lru_cache(maxsize=1 << 16)(lambda text: pad(encode(text), length))

    def batch(self, step: int) -> dict[str, Tensor]:
        """Make the batch of a step, see `Task`. The mask of a dropped caption is all False.

        It also has `colours` and `shapes` of `render_named`, and `at_words` and `about` of `batch_targets`.
        """
        config = self._config
        rng = np.random.default_rng([config.seed, step])
        scenes = [sample_scene(rng, two_objects=config.two_objects) for _ in range(config.batch_size)]
        captions = [caption(scene, rng, name_sizes=config.name_sizes) for scene in scenes]
        dropped = rng.random(config.batch_size) < config.cond_drop
        captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        tokens, mask = (torch.tensor(part) for part in zip(*map(self._encode, captions), strict=True))
        at_words, about = batch_targets(captions, scenes, config.model["text_ctx"])
        images, colours, shapes = (torch.from_numpy(array) for array in render_named(scenes, rng))
        batch = {"images": images, "tokens": tokens, "mask": mask, "colours": colours, "shapes": shapes}
        return {**batch, "at_words": at_words, "about": about}


def evaluation_prompts(count: int, seed: int = 0, two_objects: float = 0.75) -> list[tuple[str, Scene]]:
    """Draw `count` pairs of a prompt and the scene it describes, to measure how well a model follows prompts.

    Two objects (a share of `two_objects` of the scenes) always have a relation. Seeds are unrelated to training seeds.
    """
    rng = np.random.default_rng([seed, 0x5CE4E])
    scenes = [sample_scene(rng, two_objects=two_objects, related=1.0) for _ in range(count)]
    return [(caption(scene, rng), scene) for scene in scenes]
