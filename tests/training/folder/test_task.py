"""Fine-tuning on a folder: it learns, resumes bit by bit, starts from given weights and leaves GLIDE's behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import GOLDEN, ROOT
from support.picture_folder import OPTIONS, draw_folder, tiny_config
from support.trees import assert_equal_trees
from torch import Tensor

from fastcfg.models import SuperResText2ImUNet, Text2ImUNet, Tokenizer
from fastcfg.models.checkpoint import load_checkpoint
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.training import curve
from fastcfg.training.folder.config import FolderConfig
from fastcfg.training.folder.task import FolderTask
from fastcfg.training.recipes import make_recipe, read_recipe
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.train import CHECKPOINT, GLIDE, LOG, PLOT, RECIPE, STATE, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "data")


def state(run: Path) -> dict[str, Any]:
    values = torch.load(run / STATE, weights_only=True)
    del values["seconds"], values["config"]
    return values


def initial(config: FolderConfig) -> dict[str, Tensor]:
    """The weights that a run starts from."""
    task = FolderTask(config)
    task.close()
    return task.model.state_dict()


def moved(model: dict[str, Tensor], start: dict[str, Tensor]) -> set[str]:
    return {name for name in start if not torch.equal(model[name], start[name])}


def test_the_loss_falls(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder, steps=20, batch_size=6, learning_rate=8e-3, warmup_steps=3, crop="centre")
    train(config, tmp_path / "run", progress=False)
    errors = [entry["mse"] for entry in curve.read_log(tmp_path / "run" / LOG)]
    # Noise predicted as zero has an error of 1. Measured: 0.89 at first, 0.19 at the end.
    assert np.mean(errors[:3]) > 0.8
    assert np.mean(errors[-10:]) < 0.3


@pytest.mark.parametrize("upsample", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, folder: Path, upsample: bool) -> None:
    options = {**OPTIONS, "dropout": 0.3}
    weights = initial(tiny_config(folder, upsample=upsample, seed=9))
    torch.save(weights, tmp_path / "base.pt")
    config = tiny_config(folder, init=str(tmp_path / "base.pt"), upsample=upsample, random_hflip=True, model=options)
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "parts", progress=False, stop_after=2)
    # What the run began with is not needed again, and the folder may lie elsewhere.
    (tmp_path / "base.pt").unlink()
    (tmp_path / "tokenizer.json").rename(tmp_path / "away.json")
    shutil.move(folder, tmp_path / "elsewhere")
    again = dataclasses.replace(read_recipe(tmp_path / "parts" / RECIPE), data=str(tmp_path / "elsewhere"), workers=1)
    parts = train(again, tmp_path / "parts", progress=False, resume=True)
    assert (whole.steps, whole.loss) == (parts.steps, parts.loss) == (5, whole.loss)
    assert_equal_trees(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert (tmp_path / "whole" / LOG).read_text() == (tmp_path / "parts" / LOG).read_text()
    assert_equal_trees(*(torch.load(tmp_path / run / GLIDE, weights_only=True) for run in ("whole", "parts")))


def test_resuming_on_other_data_is_refused(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder)
    train(config, tmp_path / "run", progress=False, stop_after=1)
    before = (tmp_path / "run" / STATE).read_bytes()
    caption = (folder / "0.txt").read_text()
    (folder / "0.txt").write_text("the red picture")
    with pytest.raises(ValueError, match=r"resume: got data of .*, expected the state's .*added, removed or changed"):
        train(config, tmp_path / "run", progress=False, resume=True)
    (folder / "0.txt").write_text(caption)
    Image.new("RGB", (5, 5)).save(folder / "new.png")
    with pytest.raises(ValueError, match=r"resume: got data of 7 pictures, .*, expected the state's 6 pictures,"):
        train(config, tmp_path / "run", progress=False, resume=True)
    (folder / "new.png").unlink()
    for changes, message in (
        ({"uncond_p": 0.5}, "resume: got a recipe with uncond_p = 0.5, expected the state's 0.2"),
        ({"init": "other.pt"}, "resume: got a recipe with init = 'other.pt', expected the state's ''"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes), tmp_path / "run", progress=False, resume=True)
    with pytest.raises(ValueError, match="resume: got a ShapesConfig, expected the state's FolderConfig"):
        train(ShapesConfig(), tmp_path / "run", progress=False, resume=True)
    assert (tmp_path / "run" / STATE).read_bytes() == before
    assert train(config, tmp_path / "run", progress=False, resume=True).steps == 5


@pytest.mark.usefixtures("loss_curve")
def test_what_a_run_leaves_behind(tmp_path: Path, folder: Path) -> None:
    told: list[str] = []
    (folder / "1.txt").unlink()
    config = tiny_config(folder, steps=2, side_x=8, side_y=8)
    result = train(config, tmp_path / "run", progress=False, tell=told.append)
    assert told == [f"{folder}: 6 pictures, 1 without a caption (trained on unconditionally)"]
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir()) == sorted([RECIPE, LOG, PLOT, STATE, CHECKPOINT, GLIDE])
    assert make_recipe(json.loads((out / RECIPE).read_text())) == config
    assert set(curve.read_log(out / LOG)[0]) == {"step", "loss", "mse", "vlb", "grad_norm"}
    model, tokenizer, meta = load_checkpoint(result.checkpoint)
    assert (meta.network, meta.schedule, meta.num_timesteps) == ("Text2ImUNet", "squaredcos_cap_v2", 1000)
    assert meta.image_size == 8
    assert meta.recipe["steps_made"] == 2
    assert tokenizer.unknown_words("a red square") == []
    glide = torch.load(out / GLIDE, weights_only=True)
    assert result.glide == out / GLIDE
    assert {value.dtype for value in glide.values()} == {torch.float32}
    assert_equal_trees(glide, state(out)["ema"]["shadow"])
    assert_equal_trees({name: value.half().float() for name, value in glide.items()}, dict(model.state_dict()))
    images = TextToImage.load(result.checkpoint).sample("a red square", num_samples=1, steps=2, progress=False)
    assert images.shape == (1, 3, 8, 8)


def test_the_upsampler_is_trained_on_smaller_pictures(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder, steps=2, upsample=True)
    result = train(config, tmp_path / "run", progress=False)
    model, _, meta = load_checkpoint(result.checkpoint)
    assert type(model) is SuperResText2ImUNet
    assert (meta.network, meta.schedule) == ("SuperResText2ImUNet", "linear")
    start = initial(config)
    # What the smaller picture enters by has learned something.
    weight = torch.load(tmp_path / "run" / GLIDE, weights_only=True)["input_blocks.0.0.weight"]
    assert not torch.equal(weight[:, 3:], start["input_blocks.0.0.weight"][:, 3:])
    with pytest.raises(ValueError, match=r"model: got a SuperResText2ImUNet, expected a Text2ImUNet"):
        TextToImage.load(result.checkpoint)
    further = tiny_config(folder, init=str(result.checkpoint), tokenizer="", upsample=True, model={})
    assert moved(initial(further), dict(model.state_dict())) == set()
    with pytest.raises(ValueError, match=r"init: got .* with a SuperResText2ImUNet, expected a Text2ImUNet"):
        FolderTask(dataclasses.replace(further, upsample=False))


def test_weights_come_from_files_of_every_kind(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder)
    weights = initial(dataclasses.replace(config, seed=8))
    assert "out.2.weight" not in moved(initial(config), weights)  # it starts at zero
    assert "time_embed.0.weight" in moved(initial(config), weights)
    half = {name: value.half() for name, value in weights.items()}
    torch.save(weights, tmp_path / "base.pt")
    torch.save({f"_orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "compiled.pt")
    save_file(weights, tmp_path / "base.safetensors")
    torch.save(half, tmp_path / "half.pt")
    for name, expected in (
        *((name, weights) for name in ("base.pt", "compiled.pt", "base.safetensors")),
        ("half.pt", half),
    ):
        found = initial(dataclasses.replace(config, init=str(tmp_path / name)))
        assert list(found) == list(weights)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert moved(found, {key: value.float() for key, value in expected.items()}) == set()
    run = train(dataclasses.replace(config, init=str(tmp_path / "base.pt"), steps=1), tmp_path / "run", progress=False)
    again = tiny_config(folder, init=str(run.checkpoint), tokenizer="", model={}, seed=5)
    assert moved(initial(again), load_checkpoint(run.checkpoint)[0].state_dict()) == set()
    for changes, message in (({"model": OPTIONS}, "model"), ({"tokenizer": "words.json"}, "tokenizer")):
        with pytest.raises(ValueError, match=rf"{message}: got .*, expected none, as .*safetensors brings its own"):
            FolderTask(dataclasses.replace(again, **changes))


def test_weights_that_do_not_fit_are_refused_before_training(tmp_path: Path, folder: Path) -> None:
    weights = initial(tiny_config(folder))
    few = dict(list(weights.items())[:-5])
    cases: list[tuple[Any, str]] = [
        (few, r"got no .*, .*, .* and 2 more, expected the \d+ tensors of a Text2ImUNet"),
        ({**weights, "foreign": torch.zeros(1)}, r"got foreign foreign, expected"),
        ({**weights, "time_embed.0.bias": torch.zeros(5)}, r"got shapes of time_embed.0.bias \[5\] for \[128\]"),
        ({"model": weights, "step": 5}, r"got an object with model, step, expected a state dict"),
        ([1, 2], r"got a list, expected a state dict"),
        (Path("code"), r"got a file that cannot be loaded"),
    ]
    for value, message in cases:
        torch.save(value, tmp_path / "base.pt")
        with pytest.raises(ValueError, match=rf"weights .*base.pt: {message}"):
            train(tiny_config(folder, init=str(tmp_path / "base.pt")), tmp_path / "run", progress=False)
    (tmp_path / "base.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match=r"weights .*base.safetensors: got a file that cannot be loaded"):
        FolderTask(tiny_config(folder, init=str(tmp_path / "base.safetensors")))
    with pytest.raises(ValueError, match=r"init: got .*none.pt, which is not a file, expected weights to start from"):
        FolderTask(tiny_config(folder, init=str(tmp_path / "none.pt")))
    assert not (tmp_path / "run").exists()


def test_the_originals_weights_and_options_give_the_originals_output(tmp_path: Path, folder: Path) -> None:
    case = next(case for case in json.loads((GOLDEN / "models.json").read_text()) if case["id"] == "glide_base")
    save_file(
        {n: v.float() for n, v in load_file(GOLDEN / "glide_base.safetensors").items()}, tmp_path / "b.safetensors"
    )
    Tokenizer.word_level(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(99)).save(tmp_path / "words.json")
    same = ("num_res_blocks", "num_heads", "num_head_channels", "dropout", "text_ctx", "xf_width", "xf_layers")
    options = {name: case["kwargs"][name] for name in (*same, "xf_heads")}
    options |= {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "8"}
    init = {"init": str(tmp_path / "b.safetensors"), "tokenizer": str(tmp_path / "words.json")}
    task = FolderTask(tiny_config(folder, **init, model=options))
    task.close()
    with np.load(GOLDEN / "glide_base.npz") as arrays, torch.no_grad():
        inputs = {name: torch.from_numpy(arrays[name]) for name in ("x", "timesteps", "tokens", "mask")}
        output = task.model.eval()(**inputs)
        # Measured: 1.4e-6.
        assert np.abs(output.numpy() - arrays["output"]).max() < 1e-5


def is_text(name: str) -> bool:
    parts = (
        "transformer.",
        "transformer_proj.",
        "token_embedding.",
        "final_ln.",
        "positional_embedding",
        "padding_emb",
    )
    return name.startswith(parts)


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        ({"freeze_transformer": True}, lambda name: not is_text(name)),
        ({"freeze_diffusion": True}, lambda name: is_text(name) or "encoder_kv" in name),
        ({"freeze_transformer": True, "freeze_diffusion": True}, lambda name: "encoder_kv" in name),
    ],
    ids=["transformer", "diffusion", "both"],
)
def test_frozen_layers_stay_as_they_are(tmp_path: Path, folder: Path, frozen: dict[str, bool], trained: Any) -> None:
    # The output convolution starts at zero: nothing before it would have a gradient.
    generator = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in initial(tiny_config(folder)).items()}
    start = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    torch.save(start, tmp_path / "base.pt")
    config = tiny_config(folder, init=str(tmp_path / "base.pt"), steps=2, weight_decay=0.1, uncond_p=0.5, **frozen)
    train(config, tmp_path / "run", progress=False)
    changed = moved(state(tmp_path / "run")["model"], start)
    # Group norms of one channel a group swallow some biases: they may have no gradient.
    assert {name for name in start if name.endswith("weight") and trained(name)} <= changed
    assert all(trained(name) for name in changed)
    assert moved(torch.load(tmp_path / "run" / GLIDE, weights_only=True), start) == changed


def test_accumulating_and_checkpointing_only_change_rounding(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder, steps=2, batch_size=6, learning_rate=1e-3)
    plain = train(config, tmp_path / "plain", progress=False)
    again = train(dataclasses.replace(config, use_checkpoint=True), tmp_path / "again", progress=False)
    assert again.loss == plain.loss
    assert_equal_trees(state(tmp_path / "again")["model"], state(tmp_path / "plain")["model"])
    parts = train(dataclasses.replace(config, accumulate=3, shards=2), tmp_path / "parts", progress=False)
    # Equal as far as the log's five digits show.
    for whole, split in zip(*(curve.read_log(tmp_path / run / LOG) for run in ("plain", "parts")), strict=True):
        np.testing.assert_allclose(list(split.values()), list(whole.values()), rtol=1e-4)
    assert parts.steps == 2


def test_checkpointing_reaches_the_network(folder: Path) -> None:
    for wanted in (True, False):
        task = FolderTask(tiny_config(folder, use_checkpoint=wanted))
        task.close()
        assert task.model.use_checkpoint is wanted
        assert task.model.training


def test_bfloat16_is_close_and_weights_stay_float32(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(folder, steps=3, learning_rate=1e-3)
    runs = [dataclasses.replace(config, bf16=bf16) for bf16 in (True, False)]
    losses = [train(run, tmp_path / str(run.bf16), progress=False).loss for run in runs]
    assert losses[0] != losses[1]
    # Measured: 1e-4.
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert {value.dtype for value in state(tmp_path / "True")["model"].values()} == {torch.float32}


def test_a_damaged_picture_does_not_stop_a_run(tmp_path: Path, folder: Path) -> None:
    (folder / "2.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped: data: got .*2.png, which cannot be read") as told:
        assert train(tiny_config(folder), tmp_path / "run", progress=False).steps == 5
    assert len(told) == 1


def test_a_failed_run_ends_its_threads_and_leaves_no_state(tmp_path: Path, folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of which can be read"):
        train(tiny_config(folder), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / STATE).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ""}, "data: got '', expected a folder of pictures"),
        ({"uncond_p": 1.0}, "uncond_p: got 1.0, expected 0 <= value < 1"),
        ({"resize_ratio": 0}, "resize_ratio: got 0.0, expected 0 < value <= 1"),
        ({"crop": "left"}, "crop: got 'left', expected one of random, centre"),
        ({"batch_size": 4, "accumulate": 5}, "accumulate: got 5, expected 1 to batch_size"),
        ({"batch_size": 4, "accumulate": 2, "shards": 3}, "shards: got 3, expected 1 to batch_size / accumulate = 2"),
        ({"cond_drop": 0.1}, "recipe: got unknown settings cond_drop"),
        ({"upscale_factor": 1}, "upscale_factor: got 1, expected at least 2"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
    ],
)
def test_bad_recipes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe({"data": "pictures", **values})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side_x": 15}, "side_x, side_y: got 15x16, expected multiples of 2"),
        ({"model": {**OPTIONS, "depth": 1}}, "model: got unknown options depth, expected some of image_size"),
        ({"model": {**OPTIONS, "super_res": True}}, "model: got inpaint or super_res, expected neither"),
        ({"model": {**OPTIONS, "xf_width": 0}}, "model: got xf_width = 0, expected a network with text"),
        ({"tokenizer": "none.json"}, "tokenizer: got none.json, which is not there"),
        ({"data": "none"}, "data: got none, which is not a folder"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_config(folder, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_shapes_checkpoint_can_be_tuned_on_pictures(tmp_path: Path, folder: Path) -> None:
    embedded = ROOT / "fastcfg" / "checkpoints" / "shapes.safetensors"
    task = FolderTask(tiny_config(folder, init=str(embedded), tokenizer="", model={}))
    task.close()
    assert type(task.model) is Text2ImUNet
    assert task.meta.image_size == 32
    assert moved(task.model.state_dict(), load_checkpoint(embedded)[0].state_dict()) == set()
