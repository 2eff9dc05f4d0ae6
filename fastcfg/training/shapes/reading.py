"""Reading lessons: train the text transformer on captions alone, before the picture network uses it.

A picture network soon learns which colours and shapes a caption names, but draws them in any combination for long,
because the features it attends to do not say which colour belongs to which shape, or where. The lessons train the
transformer to name, at every word of an object, the object and its place, and at the last position (added to the
timestep embedding) the whole scene. They take a minute where pictures take hours. The same loss, with a small weight
during training, keeps the transformer from forgetting what the pictures do not use yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.text2im import Text2ImUNet
from ...models.tokenizer import Tokenizer
from ..task import TEXT_LAYERS
from .config import ShapesConfig
from .scenes import COLOURS, SHAPES, SIZE_WORDS, SIZES, Scene, caption, sample_scene

IGNORED = -100
# Choices at each word of an object: its colour, shape, size (or unnamed) and place (or anywhere).
_WORD_CHOICES = (len(COLOURS), len(SHAPES), len(SIZES) + 1, 5)
# Choices at the last position: the arrangement (one object, beside, atop, any), then colour and shape of the left or
# upper object, and of the right or lower one.
_SCENE_CHOICES = (4, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))
_PLACES = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}
_ANYWHERE = 4


def reading_targets(text: str, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the right choices, `IGNORED` where none: int64 at each word, [words, 4], and about the scene, [5]."""
    words = text.split()
    at_words = np.full((len(words), len(_WORD_CHOICES)), IGNORED)
    size_words = {word: size for size, synonyms in SIZE_WORDS.items() for word in synonyms}
    for index, word in enumerate(words):
        if word not in SHAPES:
            continue
        place = next(k for k, item in enumerate(scene.objects) if (item.shape, item.colour) == (word, words[index - 1]))
        named = size_words.get(words[index - 2]) if index > 1 else None
        size = SIZES.index(named) if named else len(SIZES)
        where = _PLACES[scene.relation][place] if scene.relation else _ANYWHERE
        answer = (COLOURS.index(words[index - 1]), SHAPES.index(word), size, where)
        at_words[index - (2 if named else 1) : index + 1] = answer
    about = np.full(len(_SCENE_CHOICES), IGNORED)
    first = _PLACES[scene.relation][0] if scene.relation else 0
    items = scene.objects[::-1] if first % 2 else scene.objects
    choices = [choice for item in items for choice in (COLOURS.index(item.colour), SHAPES.index(item.shape))]
    if len(items) == 1:
        about[:3] = 0, *choices
    elif scene.relation is None:
        about[0] = 3
    else:
        about[:] = 1 + first // 2, *choices
    return at_words, about


class ReadingHeads(nn.Module):
    """Linear heads on the text transformer's features of the given width, dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word = nn.Linear(width, sum(_WORD_CHOICES))
        self.scene = nn.Linear(width, sum(_SCENE_CHOICES))

    def forward(self, features: Tensor, at_words: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
        """Score the answers read from the network's `xf_out`, [B, width, text_ctx], against those of `batch_targets`.

        Returns the sum of the mean cross-entropies of all questions asked, and the share of right answers.
        """
        features = features.transpose(1, 2).float()
        word_loss, word_right = _score(self.word(features), at_words, _WORD_CHOICES)
        scene_loss, scene_right = _score(self.scene(features[:, -1]), about, _SCENE_CHOICES)
        return word_loss + scene_loss, (word_right + scene_right) / 2


def train_reading(model: Text2ImUNet, config: ShapesConfig) -> tuple[ReadingHeads, float]:
    """Train the model's text layers except `transformer_proj`, in place, by `config.reading_steps` reading steps.

    Returns the heads, and the share of right answers in the last step.
    """
    device = model.positional_embedding.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = ReadingHeads(model.xf_width).to(device)
    text = [parameter for _, parameter in reading_parameters(model)]
    optimizer = torch.optim.AdamW([*text, *heads.parameters()], lr=config.reading_rate)
    right = 0.0
    for step in range(config.reading_steps):
        rise = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = config.reading_rate * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.reading_steps))
        tokens, mask, at_words, about = (tensor.to(device) for tensor in _batch(model, config, step))
        loss, share = heads(model.get_text_emb(tokens, mask)["xf_out"], at_words, about)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(text, config.grad_clip)
        optimizer.step()
        right = float(share)
    optimizer.zero_grad()
    return heads, right


def reading_parameters(model: Text2ImUNet) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the layers that `xf_out` depends on."""
    return [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(TEXT_LAYERS)]


def _batch(model: Text2ImUNet, config: ShapesConfig, step: int) -> tuple[Tensor, ...]:
    """Tokens, mask and answers of a step's captions."""
    tokenizer, length = model.tokenizer, model.text_ctx
    assert isinstance(tokenizer, Tokenizer)
    rng = np.random.default_rng([config.seed, step, 0x7EAD])
    scenes = [sample_scene(rng, two_objects=config.two_objects) for _ in range(config.reading_batch_size)]
    captions = [caption(scene, rng, name_sizes=config.name_sizes) for scene in scenes]
    encoded = [tokenizer.padded_tokens_and_mask(tokenizer.encode(text), length) for text in captions]
    tokens, mask = (torch.tensor(part) for part in zip(*encoded, strict=True))
    return tokens, mask, *batch_targets(captions, scenes, length)


def batch_targets(captions: Sequence[str], scenes: Sequence[Scene], text_ctx: int) -> tuple[Tensor, Tensor]:
    """`reading_targets` of many captions, int64 [B, text_ctx, 4] and [B, 5]; nothing is asked about empty captions."""
    at_words = np.full((len(scenes), text_ctx, len(_WORD_CHOICES)), IGNORED)
    about = np.full((len(scenes), len(_SCENE_CHOICES)), IGNORED)
    for row, (text, scene) in enumerate(zip(captions, scenes, strict=True)):
        if text:
            answers, about[row] = reading_targets(text, scene)
            at_words[row, : len(answers)] = answers[:text_ctx]
    return torch.from_numpy(at_words), torch.from_numpy(about)


def _score(logits: Tensor, answers: Tensor, choices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of all questions, and the mean share of right answers."""
    losses, right = [], []
    for part, wanted in zip(logits.split(list(choices), dim=-1), answers.unbind(dim=-1), strict=True):
        asked = wanted != IGNORED
        if asked.any():
            losses.append(F.cross_entropy(part[asked], wanted[asked]))
            right.append((part[asked].argmax(dim=-1) == wanted[asked]).float().mean())
    if not losses:
        return logits.sum() * 0, logits.new_ones(())
    return torch.stack(losses).sum(), torch.stack(right).mean().detach()
