"""The `fastcfg` command, run in this process: its files, its words, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from support.fake_nvml import FakeNvml
from support.native import CPU_BACKEND
from support.picture_folder import OPTIONS, draw_folder, write_tokenizer
from support.tiny_checkpoint import MODEL, SIZE, TIMESTEPS, write_tiny_checkpoint

import fastcfg
from fastcfg.cli import doctor, main, nvml
from fastcfg.cli.grid import Row, Section, draw_grid
from fastcfg.pipelines.pictures import to_pil
from fastcfg.pipelines.text_to_image import TextToImage

PROMPT = "a red circle above"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(checkpoint: Path, *arguments: str, prompts: Sequence[str] = (PROMPT,)) -> int:
    return main(["sample", *prompts, "--checkpoint", str(checkpoint), "--device", "cpu", "--steps", "3", *arguments])


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# sample


def test_sample_writes_a_grid_and_tells_what_it_did(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(checkpoint, "--num-samples", "4", "--seed", "5") == 0
    captured = capsys.readouterr()
    told = captured.out
    assert "wrote    samples.png: 4 pictures of 8x8, seeds 5 to 8\n" in told
    assert "images/s, 3 steps of ddpm" in told
    assert f"backend  {CPU_BACKEND} on cpu, graph: none (the device is a CPU)" in told
    assert "3/3" in captured.err
    assert os.listdir() == ["samples.png"]
    with Image.open("samples.png") as image:
        assert image.format == "PNG"
        assert image.text["Software"] == f"fastcfg {fastcfg.__version__}"
        assert image.text["Description"] == PROMPT
        settings = json.loads(image.text["fastcfg"])
        assert (settings["seeds"], settings["guidance_scales"], settings["solver"]) == ([5, 6, 7, 8], [3.0], "ddpm")


def test_the_grid_shows_the_pipelines_pictures(checkpoint: Path) -> None:
    arguments = ["--num-samples", "3", "--seed", "2", "--guidance-scale", "1,4", "--solver", "ddim", "--eta", "0.5"]
    assert sample(checkpoint, *arguments, prompts=["a red star", "a blue star"]) == 0
    page = pixels("samples.png")
    pipeline = TextToImage.load(checkpoint)
    tiles = []
    for scale in (1.0, 4.0):
        images = pipeline.sample(
            ["a red star", "a blue star"], guidance_scale=scale, steps=3, solver="ddim", eta=0.5, num_samples=3, seed=2
        )
        tiles.append(((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    tile = 256
    for section, scale_index in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for i in range(3):
            picture = Image.fromarray(tiles[scale_index][3 * section + i]).resize(
                (tile, tile), Image.Resampling.BICUBIC
            )
            assert contains(page, np.asarray(picture))


def contains(page: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture lies somewhere on a page, exactly."""
    height, width = picture.shape[:2]
    inner = page[: page.shape[0] - height + 1, : page.shape[1] - width + 1]
    corners = np.argwhere((inner == picture[0, 0]).all(axis=2))
    return any(np.array_equal(page[y : y + height, x : x + width], picture) for y, x in corners)


def test_equal_runs_write_equal_files_and_other_seeds_do_not(checkpoint: Path) -> None:
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert sample(checkpoint, "--num-samples", "2", "--seed", seed, "--out", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_picture_i_does_not_depend_on_their_number(checkpoint: Path) -> None:
    """To one level of 255: batches of another size may round otherwise in torch's convolutions."""
    for name, count in (("one.png", "1"), ("four.png", "4")):
        assert sample(checkpoint, "--num-samples", count, "--seed", "0", "--out", name) == 0
    one, four = pixels("one.png").astype(int), pixels("four.png").astype(int)
    # Both have tiles of 256 pixels and start at the same corner.
    first = np.s_[60:300, 30:270]
    assert one[first].std() > 20
    assert np.abs(one[first] - four[first]).max() <= 2


@pytest.mark.parametrize("to_file", [True, False])
def test_sample_writes_a_summary(checkpoint: Path, to_file: bool, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--json", "summary.json"] if to_file else ["--json"]
    scales = ["--seed", "0", "--guidance-scale", "0,1", "--guidance-scale", "6"]
    assert sample(checkpoint, "--num-samples", "2", "--negative", "a blue star", "--no-graph", *scales, *where) == 0
    out = capsys.readouterr().out
    summary = json.loads(Path("summary.json").read_text() if to_file else out)
    if to_file:
        assert out.startswith("wrote    samples.png: 6 pictures")
    assert summary["images_per_second"] == pytest.approx(6 / summary.pop("seconds"))
    assert summary["versions"]["torch"] == version("torch")
    del summary["versions"], summary["images_per_second"]
    assert summary == {
        "out": "samples.png",
        "model": "shapes",
        "prompts": [PROMPT],
        "negative_prompt": "a blue star",
        "guidance": "cfg",
        "guidance_scales": [0.0, 1.0, 6.0],
        "steps": 3,
        "rows": 3,
        "guidance_interval": None,
        "solver": "ddpm",
        "schedule": None,
        "eta": None,
        "num_samples": 2,
        "seeds": [0, 1],
        "checkpoint": str(checkpoint),
        "inpaint": None,
        "mask": None,
        "image_size": SIZE,
        "dtype": "float32",
        "upsample": None,
        "device": "cpu",
        "backend": CPU_BACKEND,
        "graph": "none",
        "graph_reason": "graph=False",
        "images": 6,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt: got '', expected words"),
        (["a red cirlce"], "prompt: got words the model does not know: 'cirlce' (did you mean circle?); expected"),
        (["red " * 7], "prompt: got 7 tokens in 'red red red red red red red ', expected at most 6"),
        ([PROMPT, "--negative", "a corgi"], "negative_prompt: got words the model does not know: 'corgi'"),
        ([], "the following arguments are required: PROMPT"),
        ([PROMPT, "--guidance-scale", "nan"], "argument --guidance-scale: got 'nan', expected a finite number"),
        ([PROMPT, "--guidance-scale", "1,,2"], "argument --guidance-scale: got '', expected a finite number"),
        ([PROMPT, "--steps", "0"], "argument --steps: got '0', expected an integer of at least 1, or steps such as"),
        ([PROMPT, "--steps", "many"], "argument --steps: got 'many', expected an integer of at least 1, or steps such"),
        ([PROMPT, "--steps", "90,90"], "steps: got '90,90', expected a number or another respacing (section_counts:"),
        ([PROMPT, "--steps", "101"], f"steps: got 101, expected an integer from 1 to {TIMESTEPS}"),
        ([PROMPT, "--solver", "eulr"], "argument --solver: invalid choice: 'eulr' (choose from "),
        ([PROMPT, "--eta", "0.5"], "eta: got 0.5 with solver 'ddpm', expected 0 or None"),
        ([PROMPT, "--eta", "-1", "--solver", "ddim"], "eta: got -1.0, expected a finite value of at least 0"),
        ([PROMPT, "--num-samples", "-3"], "argument --num-samples: got '-3', expected an integer of at least 1"),
        ([PROMPT, "--seed", str(2**63)], "argument --seed: got 9223372036854775808, expected -1, or 0 to 2**63 - 1"),
        ([PROMPT, "--seed", "0.5"], "argument --seed: got '0.5', expected an integer"),
        ([PROMPT, "--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from "),
        ([PROMPT, "--backend", "cuda"], "argument --backend: invalid choice: 'cuda' (choose from "),
        ([PROMPT, "--guidance", "agp"], "argument --guidance: invalid choice: 'agp' (choose from "),
        ([PROMPT, "--schedule", "karras"], "schedule: got 'karras' with solver 'ddpm', expected one of linspace"),
        ([PROMPT, "--solver", "euler", "--steps", "ddim25"], "steps: got the respacing 'ddim25' with solver 'euler'"),
        ([PROMPT, "--guidance", "perp_neg"], "negative_prompt: got None with PerpNeg, expected words"),
        ([PROMPT, "--guidance", "adaptive", "--solver", "ddim_cfg_pp"], "guidance: got AdaptiveCFG with the table"),
        ([PROMPT, "--out", "samples.jpg"], "argument --out: got 'samples.jpg', expected a file name that ends in .png"),
        ([PROMPT, "--out", "nowhere/x.png"], "argument --out: got 'nowhere/x.png', expected a folder that exists"),
        ([PROMPT, "--out", "folder.png"], "argument --out: got the folder 'folder.png', expected a file"),
        ([PROMPT, "--out", "/proc/x.png"], "argument --out: got '/proc/x.png', expected a folder that can be written"),
        (["--json", PROMPT, PROMPT], f"argument --json: got '{PROMPT}', expected a file name that ends in .json"),
        ([PROMPT, "--checkpoint", "none.st"], "checkpoint none.st: got no file, expected a fastcfg-checkpoint"),
        (
            [PROMPT, "--checkpoint", "foreign.st"],
            "weights foreign.st: got a file that cannot be loaded, expected",
        ),
        ([PROMPT, "--checkpoint", "folder.png"], "checkpoint folder.png: got a folder, expected a fastcfg-checkpoint"),
        ([PROMPT, "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line_before_any_sampling(
    checkpoint: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sampling began")

    monkeypatch.setattr(fastcfg.Sampler, "sample", fail)
    Path("folder.png").mkdir()
    Path("foreign.st").write_bytes(b"not safetensors at all")
    before = sorted(os.listdir())
    assert main(["sample", "--checkpoint", str(checkpoint), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fastcfg: error: {message}")
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sample", PROMPT], ["train", "--out", "run"]):
        assert main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr().err.startswith("fastcfg: error: argument --device: got 'cuda', expected auto or cpu")
    assert os.listdir() == []


def test_a_failed_write_leaves_the_old_file(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("samples.png").write_bytes(b"old")

    def fail(self: Image.Image, path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert sample(checkpoint, "--num-samples", "1") == 2
    assert "fastcfg: error: No space left on device" in capsys.readouterr().err
    assert os.listdir() == ["samples.png"]
    assert Path("samples.png").read_bytes() == b"old"


def test_named_solvers_draw_and_say_so(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ["--solver", "heun", "--schedule", "karras", "--guidance", "apg", "--guidance-scale", "4"]
    assert sample(checkpoint, *named, "--num-samples", "1", "--seed", "3", "--negative-prompt", "a blue star") == 0
    assert "3 steps of heun on karras\n" in capsys.readouterr().out
    options: dict[str, Any] = {"solver": "heun", "schedule": "karras", "guidance": "apg", "guidance_scale": 4.0}
    images = TextToImage.load(checkpoint).sample(PROMPT, negative_prompt="a blue star", steps=3, seed=3, **options)
    tile = to_pil(images)[0].resize((256, 256), Image.Resampling.BICUBIC)
    assert contains(pixels("samples.png"), np.asarray(tile))
    with Image.open("samples.png") as image:
        settings = json.loads(image.text["fastcfg"])
    assert (settings["solver"], settings["schedule"], settings["guidance"]) == ("heun", "karras", "apg")


def test_a_random_seed_is_printed_and_draws_the_picture_again(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        assert sample(checkpoint, "--num-samples", "1", "--seed", "-1", "--guidance-scale", "1,3", "--out", name) == 0
    seeds = [line.split("seed ")[1] for line in capsys.readouterr().out.splitlines() if "wrote" in line]
    assert seeds[0] != seeds[1]
    scales = ["--guidance-scale", "1,3"]
    assert sample(checkpoint, "--num-samples", "1", "--seed", seeds[1], *scales, "--out", "c.png") == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


def test_unexpected_errors_exit_1_with_their_traceback_on_request(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a bug of the engine")

    monkeypatch.setattr(fastcfg.Sampler, "sample", fail)
    assert sample(checkpoint) == 1
    line = "fastcfg: error: ValueError: a bug of the engine"
    assert capsys.readouterr().err.endswith(f"{line} (--debug shows the traceback)\n")
    for arguments in (["--debug", "sample", PROMPT], ["sample", PROMPT, "--debug"]):
        assert main([*arguments, "--checkpoint", str(checkpoint), "--device", "cpu"]) == 1
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert err.endswith(f"{line}\n")
    assert main(["sample", PROMPT, "--debug", "--checkpoint", str(checkpoint), "--steps", "1000"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_bench_runs_the_suite_of_a_checkout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "others, each with a --help of its own" in capfd.readouterr().out
    assert main(["bench", "--no-such-option"]) == 2


def test_an_interruption_is_one_line_and_writes_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastcfg.Sampler, "sample", interrupt)
    assert sample(checkpoint) == 130
    assert capsys.readouterr().err.endswith("\nfastcfg: interrupted\n")
    assert os.listdir() == []


def test_an_interrupted_training_tells_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(config: Any, out: str, **_: Any) -> None:
        (Path(out) / "state.pt").write_bytes(b"")
        raise KeyboardInterrupt

    Path("run").mkdir()
    monkeypatch.setattr("fastcfg.training.train.train", interrupt)
    assert main(["train", "--out", "run", "--device", "cpu"]) == 130
    told = "fastcfg: interrupted: the same command with --resume goes on from the last save\n"
    assert capsys.readouterr().err == f"\n{told}"


# The grid


def test_a_grid_places_every_picture_in_order() -> None:
    colours = [np.full((4, 4, 3), 20 * (i + 1), dtype=np.uint8) for i in range(10)]
    section = Section("a caption that is far too long for so narrow a page " * 3, [Row("", np.stack(colours))])
    page = np.asarray(draw_grid([section], "footer", columns=4))
    corners = []
    for i in range(10):
        found = np.argwhere((page == 20 * (i + 1)).all(axis=2))
        assert len(found) >= 180 * 180
        corners.append(tuple(np.median(found, axis=0)))
    assert [(round(y), round(x)) for y, x in corners] == [(round(y), round(x)) for y, x in sorted(corners)]
    assert len({round(x) for _, x in corners}) == 4
    assert len({round(y) for y, _ in corners}) == 3


def test_a_page_is_as_long_as_its_pictures_need() -> None:
    pictures = np.full((1, 256, 256, 3), 7, dtype=np.uint8)
    page = np.asarray(draw_grid([Section("a caption", [Row("", pictures)])] * 120, "the footer", columns=1))
    assert (page == 7).all(axis=2).sum() == 120 * 256 * 256
    assert (page[-40:] < 200).any()


# train

RECIPE = {
    "steps": 3,
    "batch_size": 2,
    "warmup_steps": 1,
    "decay_steps": 1,
    "shards": 1,
    "reading_steps": 0,
    "model": {**MODEL, "text_ctx": 16, "channel_mult": [1, 1, 1], "attention_resolutions": [4]},
}


def train(*arguments: str) -> int:
    Path("recipe.json").write_text(json.dumps(RECIPE))
    return main(["train", "--recipe", "recipe.json", "--device", "cpu", "--no-progress", *arguments])


def test_train_writes_a_checkpoint_that_sample_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out", "run", "--seed", "4", "--set", "cond_drop=0.25", "--set", "bf16=false") == 0
    assert "trained  3 steps" in capsys.readouterr().out
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert (recipe["steps"], recipe["seed"], recipe["cond_drop"], recipe["bf16"]) == (3, 4, 0.25, False)
    assert recipe["model"]["channel_mult"] == [1, 1, 1]
    assert sample(Path("run/model.safetensors"), "--num-samples", "1", prompts=["a red circle above a star"]) == 0


def test_train_resumes_with_the_runs_own_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out", "run", "--set", "decay_steps=0") == 0
    assert main(["train", "--out", "run", "--resume", "--steps", "4", "--device", "cpu", "--no-progress"]) == 0
    assert "trained  4 steps" in capsys.readouterr().out
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "run", "--steps", "0"], "argument --steps: got '0', expected an integer of at least 1"),
        (["--out", "run", "--learning-rate", "-1"], "learning_rate: got -1.0, expected a positive number"),
        (["--out", "run", "--set", "cond_drop"], "argument --set: got 'cond_drop', expected NAME=VALUE"),
        (["--out", "run", "--set", "cond_drop=1.5"], "cond_drop: got 1.5, expected 0 <= value < 1"),
        (["--out", "run", "--set", "colour=red"], "recipe: got unknown settings colour, expected some of steps"),
        (["--out", "run", "--set", 'steps={"a": 1}'], "steps: got {'a': 1}, expected a value of type int"),
        (["--out", "run", "--set", 'model={"depth": 1}'], "model: got"),
        (["--out", "run", "--recipe", "none.json"], "argument --recipe: got 'none.json', expected a JSON file"),
        (["--out", "run", "--recipe", "bad.json"], "recipe bad.json: got a file that is not JSON"),
        (
            ["--out", "run", "--resume"],
            "argument --resume: got 'run', which has no recipe.json, expected a run's folder",
        ),
        (
            ["--out", "run", "--upsample"],
            "argument --upsample: got True without --data, expected a folder to train on",
        ),
        (["--out", "bad.json"], "argument --out: got 'bad.json', expected a folder"),
        (["--out", "/proc/run"], "argument --out: got '/proc/run', expected a folder that can be written to"),
    ],
)
def test_train_refuses_before_it_begins(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text("{")
    assert main(["train", "--no-progress", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fastcfg: error: {message}")
    assert captured.err.count("\n") == 1
    assert os.listdir() == ["bad.json"]


def test_train_refuses_a_folder_that_holds_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out", "run") == 0
    before = Path("run/model.safetensors").read_bytes()
    capsys.readouterr()
    assert train("--out", "run", "--seed", "9") == 2
    assert "which holds a run, expected resume or another folder" in capsys.readouterr().err
    assert Path("run/model.safetensors").read_bytes() == before


@pytest.fixture
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a short run on a folder of pictures."""
    outside = tmp_path_factory.mktemp("pictures")
    folder = draw_folder(outside / "data")
    tokenizer = write_tokenizer(outside / "words.json")
    network = f"model={json.dumps(OPTIONS)}"
    short = ["--steps", "2", "--batch-size", "2", "--no-progress", "--device", "cpu", "--set", network]
    return ["train", "--data", str(folder), "--tokenizer", str(tokenizer), *short]


def test_train_on_a_folder_resumes_and_goes_on_from_its_weights(
    pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--uncond-p",
        "0.5",
        "--resize-ratio",
        "0.9",
        "--freeze-transformer",
        "--accumulate",
        "2",
        "--random-hflip",
    ]
    assert main([*pictures, "--out", "run", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"data     {pictures[2]}: 6 pictures\n"
    assert captured.out.startswith("wrote    run/model.safetensors and run/glide.pt\ntrained  2 steps")
    recipe = json.loads(Path("run/recipe.json").read_text())
    settings = ("uncond_p", "resize_ratio", "freeze_transformer", "accumulate", "random_hflip", "bf16", "learning_rate")
    assert [recipe[name] for name in settings] == [0.5, 0.9, True, 2, True, False, 1e-5]
    assert main(["train", "--out", "run", "--resume", "--steps", "3", "--device", "cpu", "--no-progress"]) == 0
    assert "trained  3 steps" in capsys.readouterr().out
    assert sample(Path("run/model.safetensors"), "--num-samples", "1", prompts=["a red square"]) == 0
    short = [*pictures[1:3], "--steps", "1", "--batch-size", "1", "--no-progress", "--device", "cpu"]
    assert main(["train", *short, "--init", "run/glide.pt", "--out", "other", *pictures[3:5], *pictures[-2:]]) == 0
    assert main(["train", *short, "--init", "run/model.safetensors", "--out", "further", "--no-bf16"]) == 0


@pytest.mark.filterwarnings("default")
def test_train_tells_of_damaged_pictures_in_one_line(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(pictures[2]) / "0.png").write_bytes(b"nothing")
    assert main([*pictures, "--out", "run", "--steps", "4"]) == 0
    told = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("fastcfg: warning: skipped: data:")
    ]
    assert len(told) == 1
    assert "0.png, which cannot be read" in told[0]


def test_train_on_a_folder_refuses_in_one_line(pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("base.pt").write_bytes(b"nothing")
    for arguments, message in (
        (["--data", "none"], "data: got none, which is not a folder, expected one with pictures"),
        (["--data", "empty"], "data: got empty with no pictures, expected files named .png"),
        (["--uncond-p", "1"], "uncond_p: got 1.0, expected 0 <= value < 1"),
        (["--init", "base.pt"], "weights base.pt: got a file that cannot be loaded, expected a state dict"),
        (["--init", "none.pt"], "init: got none.pt, which is not a file, expected weights to start from"),
        (["--crop", "left"], "argument --crop: invalid choice: 'left' (choose from "),
        (["--set", "cond_drop=0.1"], "recipe: got unknown settings cond_drop, expected some of steps"),
    ):
        assert main([*pictures, "--out", "run", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"fastcfg: error: {message}")
        assert captured.err.count("\n") == 1
    assert sorted(os.listdir()) == ["base.pt", "empty"]


# doctor


def test_doctor_tells_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == {
        *("usable", "versions", "platform", "cpu", "gpus", "nvml", "device", "backend", "graphs", "checks"),
    }
    assert findings["usable"] is True
    assert findings["versions"]["fastcfg"] == fastcfg.__version__
    assert {"torch", "triton", "numpy", "nvidia-ml-py"} <= set(findings["versions"])
    assert {check: finding["ok"] for check, finding in findings["checks"].items()} == {
        "fused_step": True,
        "checkpoint": True,
    }
    assert findings["checks"]["fused_step"]["max_error"] > 0
    assert len(findings["gpus"]) == torch.cuda.device_count()
    assert findings["graphs"]["supported"] == torch.cuda.is_available()
    assert findings["backend"]["auto"] not in findings["backend"]["others"]
    assert "inductor" in findings["backend"]["others"]
    assert main(["doctor", "--json", "doctor.json"]) == 0
    assert json.loads(Path("doctor.json").read_text())["versions"] == findings["versions"]
    assert "usable      yes" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the steps run on a GPU")
def test_doctor_says_what_the_native_kernels_lack_and_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    for sets, said in ((("baseline",), "baseline"), ((), "no C compiler 'no-such-compiler'")):
        monkeypatch.setattr("fastcfg.ops.instruction_sets", lambda sets=sets: sets)
        monkeypatch.setattr("fastcfg.ops.extension.instruction_sets", lambda sets=sets: sets)
        line = doctor._others("reference", torch.device("cpu"))["native"]
        assert said in line
        assert ("times as long" in line) == (not sets)


@pytest.mark.parametrize("broken", ["fused_step", "checkpoint"])
def test_doctor_finds_what_is_broken(
    broken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "checkpoint":
        monkeypatch.setattr(TextToImage, "load", lambda: (_ for _ in ()).throw(ValueError("no checkpoint")))
    else:
        right = doctor._one_step

        def wrong(device: torch.device, backend: str, dtype: torch.dtype) -> torch.Tensor:
            return right(device, backend, dtype) + (1e-4 if dtype == torch.float32 else 0)

        monkeypatch.setattr(doctor, "_one_step", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"{broken:<12}FAILED" in out
    assert out.endswith("usable      no\n")


def test_doctor_refuses_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "nowhere/doctor.json"]) == 2
    assert "argument --json: got 'nowhere/doctor.json', expected a folder that exists" in capsys.readouterr().err


def test_nvml_states_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    driver, states = nvml.nvml_states(["GPU-1"])
    assert driver == "580.1"
    assert states == [
        {
            "power_limit_w": 700.0,
            "power_w": None,
            "sm_clock_mhz": 1500,
            "sm_clock_max_mhz": 1980,
            "memory_clock_mhz": 3200,
            "memory_clock_max_mhz": 3201,
            "temperature_c": 41,
            "throttle_reasons": ["GpuIdle", "SwPowerCap"],
            "utilization_percent": 97,
            "memory_used_mib": 3072,
            "other_processes": 1,
        }
    ]
    fake.pids = [1]  # a container's numbers
    assert nvml.nvml_states(["GPU-1"])[1][0]["other_processes"] is None
    assert nvml.nvml_states(["GPU-2"]) == ("Not Found", [])
    assert not fake.running
    gpu = {"name": "H200", "capability": "9.0", "memory_gib": 139.8, **states[0]}
    assert [text for _, text in doctor._gpu_lines(gpu)] == [
        "H200, capability 9.0, 140 GiB",
        "? of 700 W, 41 C",
        "SM 1500 of 1980 MHz",
        "memory 3200 of 3201 MHz",
        "clocks held down by: GpuIdle, SwPowerCap",
    ]


def test_without_nvml_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=None))
    assert nvml.nvml_states(["GPU-1"]) == ("NVML Shared Library Not Found", [])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.nvml_states(["GPU-1"]) == ("the package nvidia-ml-py is not installed", [])


# The command itself


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["sample", "train", "doctor", "examples:", 'fastcfg sample "a red circle above a blue square"']),
        (
            ["sample"],
            [
                "PROMPT",
                "--guidance-scale",
                "(default: 3;",
                "(default: samples.png)",
                "(default: fast, best",
                "--base FILE",
            ],
        ),
        (
            ["train"],
            [
                "--out DIR",
                "--resume",
                "--set NAME=VALUE",
                "--data DIR",
                "--uncond-p P",
                "examples:",
                "model.safetensors",
            ],
        ),
        (["doctor"], ["--json", "Exit status", "examples:"]),
    ],
)
def test_help_teaches(command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("usage: fastcfg")
    text = " ".join(captured.out.split())
    for word in words:
        assert word in text


@pytest.mark.parametrize(("arguments", "message"), [([], "required: COMMAND"), (["draw"], "invalid choice: 'draw'")])
def test_a_command_must_be_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_as_a_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastcfg"]
    done = subprocess.run([*command, "--version"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastcfg {fastcfg.__version__}\n", "")
    done = subprocess.run([*command, "sample"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastcfg: error: the following arguments are required: PROMPT\n"
