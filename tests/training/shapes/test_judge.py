"""The judge agrees with the renderer and with nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastcfg.training.shapes.judge import connected_components, find_objects, judge
from fastcfg.training.shapes.scenes import (
    BACKGROUND,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    render,
    render_batch,
    sample_scene,
)


def other(rng: np.random.Generator, names: tuple[str, ...], name: str) -> str:
    """Another one of the names."""
    rest = [n for n in names if n != name]
    return rest[rng.integers(len(rest))]


def test_rendered_truth_is_judged_correct() -> None:
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng) for _ in range(100)]
    verdicts = [judge(picture, scene) for picture, scene in zip(render_batch(scenes, rng), scenes, strict=True)]
    # Measured: 100 of 100.
    assert np.mean([verdict.correct for verdict in verdicts]) >= 0.99


def test_truth_survives_small_errors() -> None:
    rng = np.random.default_rng(12)
    scenes = [sample_scene(rng) for _ in range(100)]
    pictures = render_batch(scenes, rng)
    pictures = pictures + rng.normal(0, 0.05, pictures.shape).astype(np.float32)
    assert np.mean([judge(picture, scene).correct for picture, scene in zip(pictures, scenes, strict=True)]) >= 0.97


@pytest.mark.parametrize("change", ["colour", "shape"])
def test_one_wrong_attribute_is_seen(change: str) -> None:
    rng = np.random.default_rng(13)
    for _ in range(12):
        scene = sample_scene(rng)
        picture = render(scene, rng)
        index = rng.integers(len(scene.objects))
        item = scene.objects[index]
        names = COLOURS if change == "colour" else SHAPES
        wrong = dataclasses.replace(item, **{change: other(rng, names, getattr(item, change))})
        objects = tuple(wrong if place == index else o for place, o in enumerate(scene.objects))
        verdict = judge(picture, Scene(objects, scene.relation))
        assert verdict.count
        assert not verdict.correct
        assert not (verdict.colours if change == "colour" else verdict.shapes)


def test_swapped_attributes_are_seen() -> None:
    rng = np.random.default_rng(14)
    for _ in range(12):
        first = SceneObject(SHAPES[rng.integers(5)], COLOURS[rng.integers(7)], "large")
        second = SceneObject(other(rng, SHAPES, first.shape), other(rng, COLOURS, first.colour), "small")
        relation = tuple(RELATIONS)[rng.integers(4)]
        picture = render(Scene((first, second), relation), rng)
        swapped = (dataclasses.replace(first, colour=second.colour), dataclasses.replace(second, colour=first.colour))
        assert judge(picture, Scene((first, second), relation)).correct
        assert not judge(picture, Scene(swapped, relation)).correct
        assert not judge(picture, Scene(swapped)).correct


def test_wrong_relation_is_seen() -> None:
    rng = np.random.default_rng(15)
    for _ in range(12):
        scene = sample_scene(rng, two_objects=1.0, related=1.0)
        picture = render(scene, rng)
        for relation in RELATIONS:
            verdict = judge(picture, dataclasses.replace(scene, relation=relation))
            assert verdict.colours
            assert verdict.shapes
            assert verdict.relation == verdict.correct == (relation == scene.relation)
        assert judge(picture, dataclasses.replace(scene, relation=None)).correct


def test_wrong_count_is_seen() -> None:
    rng = np.random.default_rng(16)
    pair = sample_scene(rng, two_objects=1.0)
    assert not judge(render(pair, rng), Scene(pair.objects[:1])).count
    assert not judge(render(Scene(pair.objects[:1]), rng), pair).count
    empty = np.empty((3, 32, 32), dtype=np.float32)
    empty[:] = np.array(BACKGROUND).reshape(3, 1, 1) / 127.5 - 1
    assert find_objects(empty) == []
    assert not judge(empty, pair).count


def test_what_is_no_shape_or_no_colour_is_neither() -> None:
    base = np.empty((3, 32, 32), dtype=np.float32)
    base[:] = np.array(BACKGROUND).reshape(3, 1, 1) / 127.5 - 1
    bar = base.copy()
    bar[:, 14:17, 3:29] = 1.0
    assert find_objects(bar)[0].shape is None
    grey = base.copy()
    grey[:, 10:20, 10:20] = 0.2
    assert find_objects(grey)[0].colour is None
    two_tone = base.copy()
    two_tone[0, 10:20, 10:20] = 0.9
    two_tone[:, 10:20, 15:20] = 0.9
    assert find_objects(two_tone)[0].colour is None


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(17)
    scenes = [sample_scene(rng) for _ in range(50)]
    noise = rng.normal(size=(50, 3, 32, 32)).astype(np.float32)
    assert not any(judge(picture, scene).correct for picture, scene in zip(noise, scenes, strict=True))


def test_components_equal_a_flood_fill() -> None:
    rng = np.random.default_rng(18)
    for density in (0.0, 0.3, 0.6, 1.0):
        mask = rng.random((13, 17)) < density
        labels, count = connected_components(mask)
        assert (labels > 0).tolist() == mask.tolist()
        unseen = {(int(i), int(j)) for i, j in np.argwhere(mask)}
        found = 0
        while unseen:
            found += 1
            stack = [unseen.pop()]
            label = labels[stack[0]]
            size = 1
            while stack:
                i, j = stack.pop()
                near = {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)} & unseen
                unseen -= near
                size += len(near)
                stack += near
                assert all(labels[place] == label for place in near)
            assert (labels == label).sum() == size
        assert count == found


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image: got shape \(3, 16, 16\), expected \(3, 32, 32\)"):
        find_objects(np.zeros((3, 16, 16), dtype=np.float32))
