"""Batches of a folder: they depend on folder, seed and step alone, and hold what the recipe asks for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.picture_folder import draw_folder, tiny_config

from fastcfg.models import Tokenizer
from fastcfg.training.folder.config import FolderConfig
from fastcfg.training.folder.data import FolderData
from fastcfg.training.folder.pictures import PictureFolder, to_array

pytestmark = pytest.mark.quick

CONTEXT = 6


@contextmanager
def open_data(config: FolderConfig, size: tuple[int, int] = (16, 16)) -> Iterator[FolderData]:
    folder = PictureFolder(config.data, skip_uncaptioned=config.skip_uncaptioned)
    data = FolderData(config, folder, Tokenizer.from_file(config.tokenizer), CONTEXT, size)
    try:
        yield data
    finally:
        data.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "data")


def texts(batch: dict[str, torch.Tensor], config: FolderConfig) -> list[str]:
    """The captions of a batch, decoded."""
    tokenizer = Tokenizer.from_file(config.tokenizer)
    rows = zip(batch["tokens"].tolist(), batch["mask"].tolist(), strict=True)
    return [tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m]) for tokens, mask in rows]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_depends_on_seed_and_step_alone(folder: Path) -> None:
    config = tiny_config(folder, steps=9, random_hflip=True)
    with open_data(config) as first:
        in_order = [first.batch(step) for step in range(9)]
    for workers, steps in ((1, (7, 2, 8)), (5, (2, 3, 7, 8, 2))):
        with open_data(dataclasses.replace(config, workers=workers)) as other:
            for step in steps:
                assert_same(other.batch(step), in_order[step])
    assert not torch.equal(in_order[0]["images"], in_order[3]["images"])
    with open_data(dataclasses.replace(config, seed=4)) as reseeded:
        assert not torch.equal(reseeded.batch(0)["images"], in_order[0]["images"])
    assert in_order[0]["images"].shape == (4, 3, 16, 16)
    assert in_order[0]["images"].dtype == torch.float32
    assert in_order[0]["mask"].dtype == torch.bool
    assert in_order[0]["tokens"].shape == (4, CONTEXT)
    # Crops move: the same pictures, six rows later, are cut elsewhere.
    values = {tuple(row.flatten().tolist()) for batch in in_order for row in batch["images"]}
    assert len(values) == 36


def test_every_picture_comes_once_in_each_pass_in_an_order_of_its_own(folder: Path) -> None:
    for index, path in enumerate(sorted(folder.rglob("*.txt"))):
        path.write_text(["a", "the", "square", "red", "green", "blue"][index])
    config = tiny_config(folder, steps=9, uncond_p=0.0)
    with open_data(config) as data:
        captions = [text for step in range(9) for text in texts(data.batch(step), config)]
    passes = [captions[start : start + 6] for start in range(0, 36, 6)]
    assert all(sorted(order) == sorted(passes[0]) and len(set(order)) == 6 for order in passes)
    assert len({tuple(order) for order in passes}) > 3


def test_captions_belong_to_their_pictures(folder: Path) -> None:
    config = tiny_config(folder, uncond_p=0.0, crop="centre")
    channels = {"red": 0, "green": 1, "blue": 2}
    with open_data(config) as data:
        batch = data.batch(0)
        captions = texts(batch, config)
    for image, text in zip(batch["images"], captions, strict=True):
        brightest = int(image.amax(dim=(1, 2)).argmax())
        assert text in {f"a {colour} square" for colour, channel in channels.items() if channel == brightest}


def test_dropped_captions_are_empty_and_as_many_as_asked(folder: Path) -> None:
    config = tiny_config(folder, batch_size=1200, uncond_p=0.2)
    with open_data(config, (2, 2)) as data:
        batch = data.batch(0)
    dropped = ~batch["mask"].any(dim=1)
    # Binomial: the standard deviation is 0.0115.
    assert abs(dropped.float().mean().item() - 0.2) < 0.035
    padding = Tokenizer.from_file(config.tokenizer).end_token
    assert (batch["tokens"][dropped] == padding).all()
    assert (batch["tokens"][~dropped][:, :3] != padding).all()
    with open_data(dataclasses.replace(config, batch_size=60, uncond_p=0.0), (2, 2)) as data:
        assert data.batch(0)["mask"].any(dim=1).all()


def test_one_of_several_captions_is_chosen_and_missing_ones_are_unconditional(folder: Path) -> None:
    for path in sorted(folder.rglob("*.txt"))[1:]:
        path.unlink()
    (folder / "0.txt").write_text("a red square\n\nthe red picture\nthe square\n")
    config = tiny_config(folder, batch_size=600, uncond_p=0.0)
    with open_data(config, (2, 2)) as data:
        captions = texts(data.batch(0), config)
    assert captions.count("") == 500
    for text in ("a red square", "the red picture", "the square"):
        # A third of 100: the standard deviation is 4.7.
        assert abs(captions.count(text) - 33) < 20
    with open_data(dataclasses.replace(config, batch_size=30, skip_uncaptioned=True), (2, 2)) as data:
        assert "" not in texts(data.batch(0), config)


def test_low_res_is_the_picture_made_smaller(folder: Path) -> None:
    with open_data(tiny_config(folder, upsample=True, upscale_factor=4)) as data:
        batch = data.batch(0)
    assert batch["low_res"].shape == (4, 3, 4, 4)
    for image, low_res in zip(batch["images"], batch["low_res"], strict=True):
        pixels = ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        expected = to_array(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BICUBIC))
        assert np.array_equal(low_res.numpy(), expected)
    with open_data(tiny_config(folder)) as data:
        assert "low_res" not in data.batch(0)
    with (
        pytest.raises(ValueError, match="upscale_factor: got 3, expected a divisor of 16x16"),
        open_data(tiny_config(folder, upsample=True, upscale_factor=3)),
    ):
        pass


def test_width_and_height_are_not_mixed_up(folder: Path) -> None:
    with open_data(tiny_config(folder, upsample=True), (16, 8)) as data:
        batch = data.batch(0)
    assert batch["images"].shape == (4, 3, 8, 16)
    assert batch["low_res"].shape == (4, 3, 2, 4)


def test_damaged_pictures_are_skipped_with_one_warning(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"not a picture")
    config = tiny_config(folder, steps=12, uncond_p=0.0)

    def batches(**changes: Any) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
        with warnings.catch_warnings(record=True) as caught, open_data(dataclasses.replace(config, **changes)) as data:
            warnings.simplefilter("always")
            return [data.batch(step) for step in range(12)], [str(w.message) for w in caught]

    first, told = batches()
    assert len(told) == 1
    assert "1.png, which cannot be read" in told[0]
    again, _ = batches(workers=1)
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with open_data(config) as data, pytest.raises(ValueError, match=r"data: got 6 pictures in .*none of which can be"):
        data.batch(0)
