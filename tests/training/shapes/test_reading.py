"""The reading lessons: right answers to captions, and a transformer that learns to give them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.reading import (
    IGNORED,
    ReadingHeads,
    batch_targets,
    reading_parameters,
    reading_targets,
    train_reading,
)
from fastcfg.training.shapes.scenes import COLOURS, SHAPES, Scene, SceneObject, caption, sample_scene
from fastcfg.training.shapes.task import build_model

TINY = ShapesConfig.from_dict(
    {
        "reading_steps": 60,
        "reading_batch_size": 64,
        "reading_rate": 1e-2,
        "model": {
            "xf_width": 64,
            "xf_layers": 2,
            "xf_heads": 4,
            "model_channels": 32,
            "channel_mult": [1],
            "attention_resolutions": [1],
        },
    }
)
RED_STAR = SceneObject("star", "red", "small")
BLUE_CROSS = SceneObject("cross", "blue", "large")


def answers(*values: tuple[str, str, int, int]) -> list[list[int]]:
    return [[COLOURS.index(colour), SHAPES.index(shape), size, place] for colour, shape, size, place in values]


def test_targets_of_a_pair() -> None:
    scene = Scene((RED_STAR, BLUE_CROSS), "above")
    at_words, about = reading_targets("there is a blue cross under a little red star", scene)
    nothing = [[IGNORED] * 4]
    # Sizes: small, large, not said. Places: left, right, upper, lower, anywhere.
    cross, star = answers(("blue", "cross", 2, 3), ("red", "star", 0, 2))
    assert at_words.tolist() == nothing * 3 + [cross] * 2 + nothing * 2 + [star] * 3
    # One object, beside, atop, any; then the left or upper object, then the other one.
    assert about.tolist() == [2, *star[:2], *cross[:2]]
    beside = Scene((RED_STAR, BLUE_CROSS), "right of")
    assert reading_targets("a red star right of a blue cross", beside)[1].tolist() == [1, *cross[:2], *star[:2]]


def test_targets_of_what_is_not_said() -> None:
    at_words, about = reading_targets("a red star", Scene((RED_STAR,)))
    (star,) = answers(("red", "star", 2, 4))
    assert at_words.tolist() == [[IGNORED] * 4, star, star]
    assert about.tolist() == [0, *star[:2], IGNORED, IGNORED]
    _, about = reading_targets("a red star and a big blue cross", Scene((RED_STAR, BLUE_CROSS)))
    assert about.tolist() == [3] + [IGNORED] * 4


def test_both_orders_of_a_caption_give_one_scene() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng, two_objects=1.0, related=1.0)
        about = {tuple(reading_targets(caption(scene, rng), scene)[1]) for _ in range(4)}
        assert len(about) == 1


def test_it_learns_to_read_and_touches_nothing_else() -> None:
    model = build_model(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untaught = train_reading(build_model(TINY), dataclasses.replace(TINY, reading_steps=1))[1]
    _, taught = train_reading(model, TINY)
    # Measured: 0.22 and 0.72.
    assert untaught < 0.35
    assert taught > 0.6
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in reading_parameters(model)}
    assert not any(name.startswith(("transformer_proj", "input_blocks")) for name in changed)


def test_lessons_are_deterministic() -> None:
    short = dataclasses.replace(TINY, reading_steps=5)
    models = [build_model(short), build_model(short)]
    for model in models:
        train_reading(model, short)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_dropped_captions_ask_nothing() -> None:
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng) for _ in range(6)]
    captions = [caption(scene, rng) for scene in scenes]
    heads = ReadingHeads(32)
    features = torch.randn(6, 32, 16)
    some = batch_targets(["", *captions[1:]], scenes, 16)
    assert (some[0][0] == IGNORED).all()
    assert (some[1][0] == IGNORED).all()
    loss, right = heads(features, *some)
    rest, rest_right = heads(features[1:], *batch_targets(captions[1:], scenes[1:], 16))
    torch.testing.assert_close(loss, rest)
    assert right == rest_right
    nothing, _ = heads(features, *batch_targets([""] * 6, scenes, 16))
    assert nothing.item() == 0
