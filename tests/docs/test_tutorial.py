"""The tutorial runs, and shows the pictures of these cells."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))

from notebook import markdown, run

TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def test_the_tutorial_runs() -> None:
    pytest.importorskip("matplotlib")
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(True):
        namespace = run(json.loads(TUTORIAL.read_text(encoding="utf-8")))
    # The cells assert the differences that they print; this is that the last of them was reached.
    assert torch.equal(namespace["eager"], namespace["replayed"])
    assert namespace["difference"] < 1e-4


def test_its_outputs_are_stored_and_small() -> None:
    notebook = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert TUTORIAL.stat().st_size < 150_000
    text, pictures = markdown(notebook, "tutorial")
    assert len(pictures) >= 6
    assert all(data.startswith(b"\x89PNG") and f"]({name})" in text for name, data in pictures.items())
    assert "captured equals eager: True" in text


def test_a_cell_that_fails_is_named() -> None:
    notebook = {"cells": [{"cell_type": "code", "source": ["x = 1\n", "print(x)\n", "x + 1"]}]}
    assert run(notebook)["x"] == 1
    assert [output.get("text") or output["data"] for output in notebook["cells"][0]["outputs"]] == [
        ["1\n"],
        {"text/plain": ["2"]},
    ]
    notebook["cells"].append({"cell_type": "code", "source": ["x / 0"]})
    with pytest.raises(ZeroDivisionError) as error:
        run(notebook)
    assert any("cell 2" in str(entry.path) for entry in error.traceback)
