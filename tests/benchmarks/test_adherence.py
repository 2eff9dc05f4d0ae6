"""The adherence benchmark: it measures what it says, resumes, and writes its outputs whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_checkpoint import write_tiny_checkpoint

from benchmarks import adherence
from benchmarks.__main__ import main
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.training.shapes.data import evaluation_prompts
from fastcfg.training.shapes.scenes import VOCABULARY, render_batch

PROMPTS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    return str(write_tiny_checkpoint(path, size=32, words=VOCABULARY, text_ctx=16))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Instead of a model: draws the first half of the prompts right at scale 3, and only noise at others."""
    scales: list[float] = []

    def sample(self: TextToImage, prompts: list[str], *, guidance_scale: float, seed: list[int], **_: Any) -> Any:
        scales.append(guidance_scale)
        wanted = evaluation_prompts(len(prompts), adherence.HELD_OUT_SEED)
        assert prompts == [text for text, _ in wanted]
        assert seed == list(range(len(prompts)))
        images = render_batch([scene for _, scene in wanted], np.random.default_rng(0))
        images[0 if guidance_scale != 3.0 else len(prompts) // 2 :] = -1
        return torch.from_numpy(images)

    monkeypatch.setattr(TextToImage, "sample", sample)
    return scales


def run(*arguments: str) -> int:
    return main(["adherence", "--num-prompts", str(PROMPTS), "--device", "cpu", *arguments])


def test_what_follows_its_prompt_is_counted(
    painter: list[float], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file, curve = tmp_path / "report.json", tmp_path / "curve.png"
    outputs = ["--json", str(report_file), "--plot", str(curve)]
    assert run("--checkpoint", checkpoint, "--scales", "3,0", *outputs) == 0
    report = json.loads(report_file.read_text())
    assert painter == [3.0, 0.0]
    assert [row["scale"] for row in report["scales"]] == [0.0, 3.0]
    wrong, right = (row["own_prompts"]["correct"] for row in report["scales"])
    assert (wrong["fraction"], wrong["standard_error"]) == (0.0, 0.0)
    assert right["fraction"] == 0.5
    assert right["standard_error"] == pytest.approx(np.sqrt(0.25 / PROMPTS))
    related = [scene.relation is not None for _, scene in evaluation_prompts(PROMPTS, adherence.HELD_OUT_SEED)]
    relation = report["scales"][1]["own_prompts"]["relation"]["fraction"]
    assert relation == pytest.approx(sum(related[: PROMPTS // 2]) / sum(related))
    assert report["rendered"]["correct"]["fraction"] == 1.0
    assert report["scales"][1]["shuffled_prompts"]["correct"]["fraction"] < 0.1
    assert "| 3 | 50.0 ± 10.2 |" in capsys.readouterr().out
    assert curve.read_bytes().startswith(b"\x89PNG")


def test_finished_scales_are_kept(painter: list[float], checkpoint: str, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    common = ["--checkpoint", checkpoint, "--json", str(report_file)]
    assert run(*common, "--scales", "3") == 0
    assert run(*common, "--scales", "0,3,1") == 0
    assert painter == [3.0, 0.0, 1.0]
    assert [row["scale"] for row in json.loads(report_file.read_text())["scales"]] == [0.0, 1.0, 3.0]


def test_a_report_of_other_settings_is_refused_and_kept(
    painter: list[float], checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_file = tmp_path / "report.json"
    common = ["--checkpoint", checkpoint, "--json", str(report_file), "--scales", "3"]
    assert run(*common) == 0
    before = report_file.read_text()
    capsys.readouterr()
    assert run(*common, "--steps", "7") == 2
    assert "a report with steps = 50, expected 7" in capsys.readouterr().err
    assert report_file.read_text() == before
    report_file.write_text("[]")
    assert run(*common) == 2
    assert "no report to resume from" in capsys.readouterr().err


def test_a_real_model_is_measured(checkpoint: str, tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    arguments = ["--num-prompts", "3", "--scales", "2", "--steps", "2", "--solver", "ddim", "--batch-size", "2"]
    assert run("--checkpoint", checkpoint, *arguments, "--json", str(report_file)) == 0
    report = json.loads(report_file.read_text())
    assert report["settings"]["num_prompts"] == 3
    assert {"fastcfg", "torch", "platform", "device", "threads"} <= set(report["environment"])
    # A network that was never trained draws no scene.
    assert report["scales"][0]["own_prompts"]["correct"]["fraction"] == 0.0


def test_shuffling_leaves_no_scene_at_its_place() -> None:
    for count in (2, 3, 50):
        scenes = [object() for _ in range(count)]
        others = adherence.shuffled(scenes)  # type: ignore[arg-type]
        assert set(others) == set(scenes)
        assert all(a is not b for a, b in zip(scenes, others, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "1,x"], "argument --scales: got 'x', expected a finite number"),
        (["--num-prompts", "1"], "argument --num-prompts: got '1', expected an integer of at least 2"),
        (["--plot", "curve.pdf"], "argument --plot: got 'curve.pdf', expected a file name that ends in .png"),
        (
            ["--json", "nowhere/report.json"],
            "argument --json: got 'nowhere/report.json', expected a folder that exists",
        ),
        (["--checkpoint", "none.safetensors"], "checkpoint none.safetensors: got no file"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"adherence: error: {message}")
    assert captured.err.count("\n") == 1


def test_the_readme_picture_is_drawn(checkpoint: str, tmp_path: Path) -> None:
    picture = tmp_path / "guidance.png"
    assert run("--checkpoint", checkpoint, "--picture", str(picture), "--steps", "1") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
