"""`fastcfg sample --model glide`: both stages, inpainting, and what is refused, on tiny networks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.native import CPU_BACKEND
from support.tiny_glide import BASE_SIZE, SIZE, words, write_network

import fastcfg
from fastcfg.cli import main
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.pipelines.upsampler import Upsampler

PROMPT, OTHER = "a red circle", "a blue star below"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The four networks as checkpoints, and one state dict."""
    folder = tmp_path_factory.mktemp("glide")
    kinds = {"base": (False, False), "upsample": (True, False), "base_inpaint": (False, True)}
    kinds["upsample_inpaint"] = (True, True)
    found = {
        name: str(write_network(folder / f"{name}.safetensors", super_res=s, inpaint=i))
        for name, (s, i) in kinds.items()
    }
    words().save(folder / "words.json")
    return {**found, "base.pt": str(write_network(folder / "base.pt")), "words": str(folder / "words.json")}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(*arguments: str) -> int:
    return main(["sample", "--model", "glide", "--device", "cpu", *arguments])


def on_page(path: str, pictures: torch.Tensor) -> list[bool]:
    """Whether each of [N, 3, H, W] lies somewhere on a page, enlarged to tiles of 256 pixels, exactly."""
    with Image.open(path) as image:
        page = np.asarray(image)
    found = []
    for picture in ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        tile = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC))
        corners = np.argwhere((page[:-255, :-255] == tile[0, 0]).all(axis=2))
        found.append(any(np.array_equal(page[y : y + 256, x : x + 256], tile) for y, x in corners))
    return found


def write_pictures(size: tuple[int, int] = (48, 32)) -> tuple[np.ndarray, np.ndarray]:
    """A picture and a mask whose left half is kept, as files; returns their squares in the middle."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.repeat(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3)), 8, axis=0), 8, axis=1)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:, : size[0] // 2] = 255
    Image.fromarray(image.astype(np.uint8)).save("image.png")
    Image.fromarray(mask).save("mask.png")
    left = (size[0] - size[1]) // 2
    return image[:, left : left + size[1]].astype(np.uint8), mask[:, left : left + size[1]]


def test_both_stages_draw_what_they_draw_from_python(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", files["base"], "--upsample", files["upsample"], "--steps", "3", "--upsample-steps", "2,1"]
    arguments += ["--num-samples", "2", "--seed", "5", "--guidance-scale", "1,3", "--upsample-temp", "0.9"]
    assert sample(*arguments, "--json", "summary.json", PROMPT, OTHER) == 0
    base, upsampler = TextToImage.load(files["base"]), Upsampler.load(files["upsample"])
    for scale in (1.0, 3.0):
        small = base.sample([PROMPT, OTHER], guidance_scale=scale, steps=3, num_samples=2, seed=5)
        seeds = [2**32 + 5, 2**32 + 6] * 2
        prompts = [PROMPT, PROMPT, OTHER, OTHER]
        large = upsampler.sample(small, prompts, steps="2,1", temperature=0.9, seed=seeds)
        assert on_page("samples.png", large) == [True] * 4
    captured = capsys.readouterr()
    assert captured.out.startswith("wrote    samples.png: 8 pictures of 16x16, seeds 5 to 6 for every prompt\n")
    assert "3 steps of ddpm, then 3 of ddim\n" in captured.out
    assert "guidance 3" in captured.err
    assert "to 16 pixels" in captured.err
    summary = json.loads(Path("summary.json").read_text())
    assert summary["upsample"].pop("seconds") < summary["seconds"]
    assert summary["upsample"] == {
        "file": files["upsample"],
        "image_size": SIZE,
        "steps": "2,1",
        "rows": 3,
        "solver": "ddim",
        "temperature": 0.9,
        "seeds": [2**32 + 5, 2**32 + 6],
        "backend": CPU_BACKEND,
        "graph": "none",
        "graph_reason": "the device is a CPU",
    }
    expected = ("glide", files["base"], 3, 3, "float32", 8, SIZE, None)
    names = ("model", "checkpoint", "steps", "rows", "dtype", "images", "image_size", "inpaint")
    assert tuple(summary[name] for name in names) == expected
    with Image.open("samples.png") as image:
        settings = json.loads(image.text["fastcfg"])
    assert settings["upsample"]["temperature"] == 0.9
    assert "seconds" not in settings["upsample"]


def test_the_defaults_are_the_notebooks(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--base", files["base"], "--upsample", files["upsample"], PROMPT, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    names = ("guidance_scales", "steps", "solver", "num_samples", "seeds")
    seed = summary["seeds"][0]  # the notebooks' are not set
    assert [summary[name] for name in names] == [[3.0], 100, "ddpm", 1, [seed]]
    second = summary["upsample"]
    names = ("steps", "rows", "solver", "temperature", "seeds")
    assert [second[name] for name in names] == ["fast27", 27, "ddim", 0.997, [seed + 2**32]]


def test_the_base_alone_draws_small_pictures(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--base", files["base"], "--steps", "fast27", "--seed", "0", PROMPT) == 0
    small = TextToImage.load(files["base"]).sample(PROMPT, steps="fast27", seed=0)
    assert on_page("samples.png", small) == [True]
    assert "1 pictures of 8x8, seed 0\n" in capsys.readouterr().out


def test_inpainting_keeps_what_the_mask_keeps(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    image, mask = write_pictures()
    models = ["--base", files["base_inpaint"], "--upsample", files["upsample_inpaint"]]
    few = ["--steps", "3", "--upsample-steps", "3", "--seed", "5", "--json", "summary.json"]
    assert sample(*models, *few, "--inpaint", "image.png", "--mask", "mask.png", PROMPT) == 0
    known = {}
    for size in (BASE_SIZE, SIZE):
        pixels = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        kept = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)) // 255
        pair = torch.from_numpy(pixels / np.float32(127.5) - 1).permute(2, 0, 1), torch.from_numpy(kept[None])
        known[size] = pair
    small = TextToImage.load(files["base_inpaint"]).sample(PROMPT, steps=3, seed=5, inpaint=known[BASE_SIZE])
    large = Upsampler.load(files["upsample_inpaint"]).sample(
        small, PROMPT, steps=3, solver="ddpm", seed=2**32 + 5, inpaint=known[SIZE]
    )
    assert on_page("samples.png", large) == [True]
    pixels, kept = known[SIZE]
    assert torch.equal(large[0] * kept, pixels * kept)
    assert 0 < kept.float().mean() < 1
    summary = json.loads(Path("summary.json").read_text())
    assert (summary["inpaint"], summary["mask"]) == ("image.png", "mask.png")
    assert summary["upsample"]["solver"] == "ddpm"


@pytest.mark.parametrize("kind", ["1", "L", "ones", "RGB"])
def test_masks_of_every_kind_are_the_same(files: dict[str, str], kind: str) -> None:
    write_pictures()
    with Image.open("mask.png") as mask:
        other = mask.point(lambda level: level // 255) if kind == "ones" else mask.convert(kind)
    other.save("other.png")
    models = ["--base", files["base_inpaint"], "--steps", "2", "--seed", "0"]
    for name in ("mask.png", "other.png"):
        assert sample(*models, "--inpaint", "image.png", "--mask", name, "--out", f"of-{name}", PROMPT) == 0
    with Image.open("of-mask.png") as one, Image.open("of-other.png") as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))


B, U, BI, UI = "<base>", "<upsample>", "<base_inpaint>", "<upsample_inpaint>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "shapes", "--base", B], "argument --base: got '<base>' without --model glide, expected both or"),
        (["--model", "shapes", "--upsample", U], "argument --upsample: got '<upsample>' without --model glide, expect"),
        (["--model", "shapes", "--mask", "m.png"], "argument --mask: got 'm.png' without --model glide, expected both"),
        (["--model", "sdxl"], "argument --model: invalid choice: 'sdxl' (choose from "),
        ([], "argument --model: got 'glide' without --base, expected its weights, such as base.pt"),
        (["--base", B, "--checkpoint", B], "argument --checkpoint: got '<base>' with --model glide, expected --base"),
        (["--base", B, "--upsample-temp", "1"], "argument --upsample-temp: got 1.0 without --upsample, expected both"),
        (["--base", B, "--upsample-steps", "9"], "argument --upsample-steps: got 9 without --upsample, expected both"),
        (["--base", "none.pt"], "argument --base: got 'none.pt', which is no file"),
        (["--base", B, "--upsample", "none.pt"], "argument --upsample: got 'none.pt', which is no file"),
        (["--base", U], "argument --base: model: got a SuperResText2ImUNet, expected a Text2ImUNet or Inpaint"),
        (
            ["--base", B, "--upsample", B],
            "argument --upsample: model: got a Text2ImUNet, expected a SuperRes",
        ),
        (
            ["--base", "bad.pt"],
            "argument --base: weights bad.pt: got a file that cannot be loaded, expected",
        ),
        (["--base", "<base.pt>", "--tokenizer", "<words>"], "argument --base: weights <base.pt>: got no input_blocks"),
        (["--base", "<base.pt>", "--tokenizer", "none"], "argument --base: tokenizer: got none, which is not there"),
        (["--base", B, "--upsample", U, "--upsample-temp", "-1"], "temperature: got -1.0, expected a finite value"),
        (
            ["--base", B, "--upsample", U, "--upsample-temp", "x"],
            "argument --upsample-temp: got 'x', expected a fin",
        ),
        (
            ["--base", B, "--upsample", U, "--upsample-steps", "0"],
            "argument --upsample-steps: got '0', expected an i",
        ),
        (
            ["--base", B, "--upsample", U, "--upsample-steps", "101"],
            "steps: got 101, expected an integer from 1 to 100",
        ),
        (["--base", BI, "--inpaint", "image.png"], "argument --inpaint: got 'image.png' without --mask, expected"),
        (["--base", BI, "--mask", "mask.png"], "argument --mask: got 'mask.png' without --inpaint, expected both or"),
        (
            ["--base", BI, "--inpaint", "image.png", "--mask", "none.png"],
            "argument --mask: got 'none.png', which is no",
        ),
        (
            ["--base", BI, "--inpaint", "bad.pt", "--mask", "mask.png"],
            "argument --inpaint: got 'bad.pt', expected a picture that can be read",
        ),
        (
            ["--base", BI, "--inpaint", "image.png", "--mask", "small.png"],
            "argument --mask: got 24x16 pixels, expected 48x32 as --inpaint has",
        ),
        (
            ["--base", B, "--inpaint", "image.png", "--mask", "mask.png"],
            "argument --base: got a Text2ImUNet with --inpaint, expected a network that inpaints",
        ),
        (
            ["--base", BI, "--upsample", U, "--inpaint", "image.png", "--mask", "mask.png"],
            "argument --upsample: got a SuperResText2ImUNet with --inpaint, expected a network that inpaints",
        ),
        (["--base", B, "--upsample", U, "a corgi"], "prompt: got words the model does not know: 'corgi'"),
    ],
)
def test_bad_input_is_one_line_before_any_sampling(
    files: dict[str, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sampling began")

    def filled(text: str) -> str:
        for name, path in files.items():
            text = text.replace(f"<{name}>", path)
        return text

    monkeypatch.setattr(fastcfg.Sampler, "sample", fail)
    write_pictures()
    Image.open("mask.png").resize((24, 16)).save("small.png")
    Path("bad.pt").write_bytes(b"nothing")
    before = sorted(os.listdir())
    assert sample(*(filled(argument) for argument in arguments), PROMPT) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fastcfg: error: {filled(message)}")
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_a_failed_second_stage_writes_nothing(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the device is gone")

    monkeypatch.setattr(Upsampler, "sample", fail)
    assert sample("--base", files["base"], "--upsample", files["upsample"], "--steps", "1", PROMPT) == 2
    assert os.listdir() == []
