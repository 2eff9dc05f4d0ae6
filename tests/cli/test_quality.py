"""`fastcfg sample --quality`: what it stands for, what replaces it, and that the default is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.tiny_checkpoint import write_tiny_checkpoint

from benchmarks.ways import Best, Measured, Way, allowed_failures, cheapest
from fastcfg.cli import build_parser, main
from fastcfg.cli.quality import GLIDE_STEPS, MEASURED, QUALITIES, settings
from fastcfg.pipelines.pictures import to_pil
from fastcfg.pipelines.text_to_image import TextToImage

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PROMPT = "a red circle above a blue square"
BEST, FAST = ({**vars(QUALITIES[name])} for name in ("best", "fast"))
WHOLE: dict[str, Any] = {"guidance_interval": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "forwards.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.quick
def test_the_default_is_the_cheapest_within_one_standard_error() -> None:
    found = report()
    rows = [Measured.from_json(row) for row in found["ways"]]
    best = Best.from_adherence(RESULTS / "adherence.json", found["settings"])
    chosen = cheapest(rows, best, 512)
    assert chosen is not None
    fast = QUALITIES["fast"]
    assert chosen.way == Way(fast.solver, int(fast.steps), 3.0, "cfg", fast.guidance_interval or (0, 1), fast.schedule)
    assert found["fast"] == chosen.as_json(verdicts=False)
    assert found["best"] == best.as_json()
    assert (QUALITIES["best"].solver, QUALITIES["best"].steps) == (best.way.solver, best.way.steps)
    # No cheaper way could still follow as many of all prompts.
    cheaper = [row for row in rows if row.forwards_per_picture < chosen.forwards_per_picture]
    assert all(row.verdicts.count("0") > allowed_failures(512, best.wanted) for row in cheaper)
    for name, row in (("best", found["best"]), ("fast", found["fast"])):
        assert MEASURED[name] == (row["forwards_per_picture"], round(100 * row["adherence"], 1))
    assert found["demo"]["ratio"][0] >= 4


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], FAST),
        (["--quality", "fast"], FAST),
        (["--quality", "best"], BEST),
        (["--checkpoint", "model.safetensors"], BEST),
        (["--checkpoint", "model.safetensors", "--quality", "fast"], FAST),
        (["--model", "glide", "--base", "base.pt"], {**BEST, "steps": GLIDE_STEPS}),
        (["--model", "glide", "--base", "base.pt", "--quality", "fast"], FAST),
        (["--steps", "7"], {**FAST, "steps": 7}),
        (["--steps", "7", "--quality", "best"], {**BEST, "steps": 7}),
        (["--steps", "10,10"], {**BEST, "steps": "10,10"}),
        (["--solver", "euler"], {**BEST, "solver": "euler"}),
        (["--solver", "euler", "--quality", "fast"], {**BEST, "solver": "euler"}),
        (
            ["--solver", "unipc", "--steps", "9", "--schedule", "beta"],
            {"solver": "unipc", "steps": 9, "schedule": "beta"},
        ),
        (["--schedule", "trailing"], {**FAST, "schedule": "trailing"}),
        (["--guidance-interval", "0.25:1"], {**FAST, "guidance_interval": (0.25, 1.0)}),
        (["--guidance-interval", "0.25:1", "--quality", "best"], {**BEST, "guidance_interval": (0.25, 1.0)}),
        (["--guidance", "apg"], FAST | WHOLE),
        (["--guidance-scale", "0,3"], FAST | WHOLE),
        (["--negative-prompt", "a star"], FAST | WHOLE),
        (["--negative-prompt", "a star", "--guidance-interval", "0:1"], {**FAST, "guidance_interval": (0.0, 1.0)}),
    ],
)
def test_options_replace_what_the_quality_says(arguments: list[str], expected: dict[str, Any]) -> None:
    assert settings(build_parser().parse_args(["sample", PROMPT, *arguments])) == BEST | expected


def test_best_draws_the_pictures_that_the_pipeline_draws(checkpoint: str) -> None:
    arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--num-samples", "1", "--seed", "3"]
    assert main(["sample", "a red circle", "--quality", "best", *arguments]) == 0
    tile = to_pil(TextToImage.load(checkpoint).sample("a red circle", seed=3))[0].resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    with Image.open("samples.png") as page:
        assert json.loads(page.text["fastcfg"])["guidance_interval"] is None
        pixels, found = np.asarray(page), np.asarray(tile)
    corners = np.argwhere((pixels[: 1 - 256, : 1 - 256] == found[0, 0]).all(axis=2))
    assert any(np.array_equal(pixels[y : y + 256, x : x + 256], found) for y, x in corners)


def test_the_embedded_model_draws_fast_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", PROMPT, "--device", "cpu", "--num-samples", "1", "--seed", "0"]) == 0
    assert (
        f"{FAST['steps']} steps of {FAST['solver']} on {FAST['schedule']}, guided from 0 to 0.5\n"
        in capsys.readouterr().out
    )
    with Image.open("samples.png") as page:
        drawn = json.loads(page.text["fastcfg"])
    assert {name: drawn[name] for name in FAST} == json.loads(json.dumps(FAST))
    pipeline = TextToImage.load()
    pipeline.sample(PROMPT, seed=0, **FAST)
    assert sum(pipeline.report()["branches"]) == MEASURED["fast"][0]


@pytest.mark.quick
def test_the_help_tells_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"]) == 0
    told = capsys.readouterr().out
    for name, (forwards, share) in MEASURED.items():
        line = next(line for line in told.splitlines() if line.startswith(f"  {name}  "))
        assert f"{QUALITIES[name].steps} steps of {QUALITIES[name].solver}" in line
        assert line.endswith(f": {forwards} forwards, {share} %")


@pytest.mark.quick
@pytest.mark.parametrize("text", ["0.5", "0.5:0.5", "1:0", "0:2", "a:b", "nan:1", ":"])
def test_intervals_are_checked(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", PROMPT, "--guidance-interval", text]) == 2
    expected = f"argument --guidance-interval: got {text!r}, expected START:STOP with 0 <= START < STOP <= 1\n"
    assert capsys.readouterr().err == f"fastcfg: error: {expected}"
