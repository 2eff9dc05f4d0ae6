"""Reports of the step benchmark compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main

COMMITTED = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "cpu" / "step.json"


@pytest.fixture
def report() -> Any:
    return json.loads(COMMITTED.read_text())


def compare(folder: Path, old: Any, new: Any) -> int:
    for name, report in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(report))
    return main(["compare", str(folder / "old.json"), str(folder / "new.json")])


def test_a_report_equals_itself(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, report, report) == 0
    told = capsys.readouterr().out
    assert told.endswith("ratios compared: 0 slower, 0 faster\n")
    assert not told.startswith("0 ")


@pytest.mark.parametrize(("factor", "status", "title"), [(0.2, 1, "slower"), (5.0, 0, "faster"), (1.01, 0, "0 slower")])
def test_changes_beyond_the_spread_are_told(
    factor: float, status: int, title: str, report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(report)
    ratio = new["results"][0]["ratios"]["reference"]["guided-diffusion"]
    ratio |= {key: value * factor for key, value in ratio.items()}
    assert compare(tmp_path, report, new) == status
    told = capsys.readouterr().out
    assert title in told
    if factor != 1.01:
        assert told.count(" -> ") == 1
        assert "guided-diffusion / reference" in told


def test_a_provider_that_is_gone_is_told(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = copy.deepcopy(report)
    del new["results"][0]["ratios"]["inductor"]
    assert compare(tmp_path, report, new) == 1
    assert "only in the old report: " in capsys.readouterr().out
    assert compare(tmp_path, new, report) == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"results": [{}]}', '{"results": 3}'])
def test_what_is_no_report_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.json").write_text(text)
    assert main(["compare", str(COMMITTED), str(tmp_path / "new.json")]) == 2
    assert "new.json: not a report of" in capsys.readouterr().err
    assert main(["compare", str(COMMITTED), str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err
