"""Teaching the text transformer to read before the picture network listens to it.

A picture network soon learns which colours and shapes a caption names, but for long draws them in any combination:
nothing of what it attends to says which colour belongs to which shape, or where. So the transformer is first trained
alone, on captions only, to say at every word of an object what that object is and where it lies, and at its last
position (the one that is added to the timestep embedding) what the whole scene is. This takes a minute where pictures
take hours. A little of the same loss goes on beside the pictures', or what these do not use yet is soon forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.scenes import COLOURS, SHAPES, SIZE_WORDS, SIZES, Scene, caption, sample_scene

IGNORED = -100
# Answers asked for at each word of an object: its colour, shape, size (or not said) and place (or anywhere).
_WORD_CHOICES = (len(COLOURS), len(SHAPES), len(SIZES) + 1, 5)
# Answers asked for at the last position: the arrangement (one object, beside, atop, any), then colour and shape of the
# left or upper object, and of the right or lower one.
_SCENE_CHOICES = (4, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))
_PLACES = {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}
_ANYWHERE = 4


def reading_targets(text: str, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What a reader of a caption should answer.

    Args:
        text: a caption of the scene.
        scene: the scene.

    Returns:
        Answers at each word, int64 ``[words, 4]``, and about the scene, int64 ``[5]``, as indices; ``IGNORED`` where
        there is nothing to ask.
    """
    words = text.split()
    at_words = np.full((len(words), len(_WORD_CHOICES)), IGNORED)
    size_words = {word: size for size, synonyms in SIZE_WORDS.items() for word in synonyms}
    for index, word in enumerate(words):
        if word not in SHAPES:
            continue
        place = next(k for k, item in enumerate(scene.objects) if (item.shape, item.colour) == (word, words[index - 1]))
        named = size_words.get(words[index - 2]) if index > 1 else None
        answer = (
            COLOURS.index(words[index - 1]),
            SHAPES.index(word),
            SIZES.index(named) if named else len(SIZES),
            _PLACES[scene.relation][place] if scene.relation else _ANYWHERE,
        )
        at_words[index - (2 if named else 1) : index + 1] = answer
    about = np.full(len(_SCENE_CHOICES), IGNORED)
    items = list(scene.objects)
    if len(items) == 1:
        about[:3] = 0, COLOURS.index(items[0].colour), SHAPES.index(items[0].shape)
    elif scene.relation is None:
        about[0] = 3
    else:
        if _PLACES[scene.relation][0] % 2:
            items.reverse()
        about[0] = 1 + _PLACES[scene.relation][0] // 2
        about[1:] = [choice for o in items for choice in (COLOURS.index(o.colour), SHAPES.index(o.shape))]
    return at_words, about


class ReadingHeads(nn.Module):
    """Linear readers of the text transformer's features, dropped after training.

    Args:
        width: width of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word = nn.Linear(width, sum(_WORD_CHOICES))
        self.scene = nn.Linear(width, sum(_SCENE_CHOICES))

    def forward(self, features: Tensor, at_words: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
        """Score the answers read from the features.

        Args:
            features: ``xf_out`` of the network, ``[B, width, text_ctx]``.
            at_words: answers at each word, int64 ``[B, text_ctx, 4]``.
            about: answers about the scene, int64 ``[B, 5]``.

        Returns:
            The sum of the questions' mean cross-entropies, and the share of right answers. A question nobody is asked
            counts nothing.
        """
        features = features.transpose(1, 2).float()
        word_loss, word_right = _score(self.word(features), at_words, _WORD_CHOICES)
        scene_loss, scene_right = _score(self.scene(features[:, -1]), about, _SCENE_CHOICES)
        return word_loss + scene_loss, (word_right + scene_right) / 2


def train_reading(model: Text2ImUNet, config: ShapesConfig) -> tuple[ReadingHeads, float]:
    """Train the model's text transformer to read captions, by ``config.reading_steps`` steps of its own.

    Args:
        model: the network; its text layers but ``transformer_proj`` are changed in place.
        config: the recipe.

    Returns:
        The heads, and the share of right answers in the last step.
    """
    device = model.positional_embedding.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = ReadingHeads(model.xf_width).to(device)
    text = [parameter for _, parameter in reading_parameters(model)]
    parameters = [*text, *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.reading_rate)
    right = 0.0
    for step in range(config.reading_steps):
        rise = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = config.reading_rate * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.reading_steps))
        tokens, mask, at_words, about = (tensor.to(device) for tensor in _batch(model, config, step))
        loss, share = heads(model.get_text_emb(tokens, mask)["xf_out"], at_words, about)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(text, config.grad_clip)
        optimizer.step()
        right = float(share)
    for parameter in parameters:
        parameter.grad = None
    return heads, right


def reading_parameters(model: Text2ImUNet) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the layers that read: all that ``xf_out`` depends on."""
    prefixes = ("transformer.", "final_ln.", "token_embedding.", "positional_embedding", "padding_embedding")
    return [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(prefixes)]


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
    """``reading_targets`` of many captions, as ``ReadingHeads`` takes them.

    Args:
        captions: the captions; nothing is asked about an empty one.
        scenes: their scenes.
        text_ctx: number of text positions.

    Returns:
        Answers at each word, int64 ``[B, text_ctx, 4]``, and about the scene, int64 ``[B, 5]``.
    """
    at_words = np.full((len(scenes), text_ctx, len(_WORD_CHOICES)), IGNORED)
    about = np.full((len(scenes), len(_SCENE_CHOICES)), IGNORED)
    for row, (text, scene) in enumerate(zip(captions, scenes, strict=True)):
        if text:
            answers, about[row] = reading_targets(text, scene)
            at_words[row, : len(answers)] = answers[:text_ctx]
    return torch.from_numpy(at_words), torch.from_numpy(about)


def _score(logits: Tensor, answers: Tensor, choices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sum of the questions' cross-entropies, and the mean share of right answers."""
    losses, right = [], []
    for part, wanted in zip(logits.split(list(choices), dim=-1), answers.unbind(dim=-1), strict=True):
        asked = wanted != IGNORED
        if asked.any():
            losses.append(F.cross_entropy(part[asked], wanted[asked]))
            right.append((part[asked].argmax(dim=-1) == wanted[asked]).float().mean())
    if not losses:
        return logits.sum() * 0, logits.new_ones(())
    return torch.stack(losses).sum(), torch.stack(right).mean().detach()
