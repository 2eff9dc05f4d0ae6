"""The benchmark of adherence over network forwards: it counts both, resumes, and finds the cheapest way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import forwards
from benchmarks.__main__ import main
from benchmarks.ways import Best, Measured, Way, allowed_failures, cheapest
from fastcfg import AdaptiveCFG
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.training.shapes.data import evaluation_prompts
from fastcfg.training.shapes.scenes import render_batch

PART = 4
BEST = Best(0.75, 0.125, 16)  # of 16 pictures, 6 may be wrong


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "PART", PART)
    monkeypatch.setattr(forwards, "GRID_PROMPTS", 2 * PART)
    monkeypatch.setattr(forwards, "KNEE_PROMPTS", 4 * PART)
    monkeypatch.setattr(Best, "from_adherence", lambda *_: BEST)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Instead of a model: of every part, it draws one picture right for each step."""
    drawn: list[tuple[Any, ...]] = []

    def sample(self: TextToImage, prompts: list[str], **options: Any) -> torch.Tensor:
        steps, seeds = options["steps"], options["seed"]
        wanted = [evaluation_prompts(4 * PART, forwards.HELD_OUT_SEED)[i] for i in seeds]
        assert prompts == [text for text, _ in wanted]
        drawn.append((options["solver"], steps, seeds[0]))
        images = render_batch([scene for _, scene in wanted], np.random.default_rng(0))
        images[steps:] = -1
        return torch.from_numpy(images)

    monkeypatch.setattr(TextToImage, "sample", sample)
    monkeypatch.setattr(TextToImage, "report", lambda self: {"branches": [2] * drawn[-1][1]})
    return drawn


def run(path: Path | str, *arguments: str) -> int:
    return main(["forwards", "--json", str(path), "--device", "cpu", *arguments])


def ways(path: Path) -> dict[str, dict[str, Any]]:
    return {f"{row['solver']} {row['steps']}": row for row in json.loads(path.read_text())["ways"]}


def test_every_combination_is_drawn_and_judged(
    painter: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, curve = tmp_path / "report.json", tmp_path / "curve.png"
    assert run(path, "--solver", "ddim,ddpm", "--steps", "1,3", "--num-prompts", "8", "--plot", str(curve)) == 0
    assert painter == [(s, n, i) for s in ("ddim", "ddpm") for n in (1, 3) for i in (0, PART)]
    row = ways(path)["ddpm 3"]
    assert row["verdicts"] == "11101110"
    assert (row["adherence"], row["num_prompts"], row["forwards_per_picture"]) == (0.75, 8, 6.0)
    assert row["standard_error"] == pytest.approx(np.sqrt(0.75 * 0.25 / 8))
    assert (row["scale"], row["guidance"], row["interval"], row["schedule"]) == (3.0, "cfg", [0.0, 1.0], None)
    assert "75.0 ± 15.3" in capsys.readouterr().out
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert [Measured.from_json(row).as_json() for row in ways(path).values()] == list(ways(path).values())


def test_nothing_finished_is_drawn_again(
    painter: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, extend = tmp_path / "report.json", forwards.Judged.extend

    def interrupted(self: forwards.Judged, row: Measured) -> Measured:
        if len(painter) == 3:
            raise KeyboardInterrupt
        return extend(self, row)

    grid = ("--solver", "ddim,ddpm", "--steps", "2", "--num-prompts", "8")
    with monkeypatch.context() as patched:
        patched.setattr(forwards.Judged, "extend", interrupted)
        assert run(path, *grid) == 130
    assert [len(row["verdicts"]) for row in ways(path).values()] == [8, 4]
    assert run(path, *grid) == 0
    assert painter == [(s, 2, i) for s in ("ddim", "ddpm") for i in (0, PART)]
    assert run(path, *grid) == 0
    assert len(painter) == 4


def test_the_knee_is_the_cheapest_way_within_one_standard_error(
    painter: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert run(path, "--solver", "ddim", "--steps", "1,2,3,4", "--num-prompts", "4") == 0
    assert json.loads(path.read_text())["fast"] is None
    assert run(path, "--knee", "--most", "5") == 0
    assert "no way is within one standard error" in capsys.readouterr().out
    assert run(path, "--knee") == 0
    assert "cheapest:    6.0 forwards" in capsys.readouterr().out
    report = json.loads(path.read_text())
    # One right of 4 stops after 9 wrong, two of 4 after 8; 16 of three are drawn, and of the most expensive no more.
    assert {name: len(row["verdicts"]) for name, row in ways(path).items()} == {
        "ddim 1": 12,
        "ddim 2": 16,
        "ddim 3": 16,
        "ddim 4": 4,
    }
    assert (report["fast"]["solver"], report["fast"]["steps"], "verdicts" in report["fast"]) == ("ddim", 3, False)


def test_the_real_model_takes_one_forward_for_an_unguided_row(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run(path, "--solver", "dpmpp_2m", "--steps", "2", "--interval", "0:0.5,0:1", "--num-prompts", "1") == 0
    rows = json.loads(path.read_text())["ways"]
    assert [(row["interval"], row["forwards_per_picture"]) for row in rows] == [([0.0, 0.5], 3.0), ([0.0, 1.0], 4.0)]
    assert all(row["forwards"] == PART * row["forwards_per_picture"] and row["seconds"] > 0 for row in rows)
    assert isinstance(Way("ddim", 5, 2.0, "adaptive", (0.0, 0.5)).spec(), AdaptiveCFG)


def test_the_demo_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(TextToImage, "sample", lambda self, *_, **options: calls.append(options["steps"]))
    assert run(tmp_path / "report.json", "--demo", "2") == 0
    assert len(calls) == 1 + 2 * 2
    demo = json.loads((tmp_path / "report.json").read_text())["demo"]
    assert (demo["turns"], len(demo["ratio"])) == (2, 3)


@pytest.mark.quick
def test_the_choice_needs_enough_prompts_and_breaks_ties_by_adherence() -> None:
    rows = [
        Measured(Way("ddim", 1), "1" * 8, 8.0),  # too few prompts
        Measured(Way("ddim", 2), "1" * 9 + "0" * 7, 32.0),  # not good enough
        Measured(Way("ddim", 3), "1" * 10 + "0" * 6, 48.0),
        Measured(Way("ddpm", 3), "1" * 11 + "0" * 5, 48.0),
        Measured(Way("ddim", 4), "1" * 16, 64.0),
    ]
    assert cheapest(rows, BEST, 16) is rows[3]
    assert cheapest(rows[:2], BEST, 16) is None
    assert allowed_failures(16, BEST.wanted) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "ddpmm"], "argument --solver: got 'ddpmm', expected some of ddpm, ddim"),
        (["--interval", "0.5"], "argument --interval: got '0.5', expected START:STOP with 0 <= START < STOP <= 1"),
        (["--guidance", "apg"], "argument --guidance: got 'apg', expected some of cfg, adaptive"),
        (["--schedule", "carras"], "argument --schedule: got 'carras', expected some of karras"),
        (["--num-prompts", "17"], "argument --num-prompts: got 17, expected at most 16"),
        (["--plot", "curve.pdf"], "argument --plot: got 'curve.pdf', expected a file name that ends in .png"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "report.json", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"forwards: error: {message}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["settings"].update(batch=7), "a report with .*'batch': 7"),
        (lambda report: report["ways"][0].pop("verdicts"), "which is no report to resume from"),
    ],
)
def test_other_reports_are_refused_and_kept(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    painter: list[tuple[Any, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "report.json"
    assert run(path, "--steps", "1", "--num-prompts", "1") == 0
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    assert run(path, "--steps", "1") == 2
    assert re.search(message, capsys.readouterr().err)
    assert json.loads(path.read_text()) == report


def test_the_best_is_that_of_the_adherence_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = forwards.RESULTS / "adherence.json"
    report = json.loads(path.read_text())
    found = Best.from_adherence(path, report["settings"])
    assert (found.num_prompts, round(found.adherence, 3), found.forwards_per_picture) == (512, 0.992, 100)
    assert allowed_failures(512, found.wanted) == 5
    other = tmp_path / "adherence.json"
    report["settings"]["steps"] = 7
    other.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"adherence\.json: got .*'steps': 7.* expected .*'steps': 50"):
        Best.from_adherence(other, report["settings"])
