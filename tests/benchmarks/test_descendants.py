"""Real projects beside themselves accelerated: recognition, imports without a trace, comparison and table."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import own_diffusion

import fastcfg
from benchmarks import __main__ as benchmarks
from benchmarks.descendants import command, compare
from benchmarks.descendants.calls import Call, Project, loops
from benchmarks.descendants.checkout import Checkout, opened
from benchmarks.descendants.networks import Network, share
from benchmarks.descendants.projects import PROJECTS
from benchmarks.descendants.table import table
from fastcfg.cli.parser import UsageError

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 4, 4)
# Its import is not installed, and its other module is this project's.
OWN = """
import blobfile as bf
from models import LEVELS

@bf.register("kind")
class Kind(enum.Enum):
    EPSILON = 1
"""


def calls(checkout: Checkout) -> Iterator[Call]:
    """The stand-in's."""
    print("what the project prints")
    module = checkout.load("gaussian.own")
    yield from loops(module.OwnDiffusion(module.LEVELS), Network(3), SHAPE, model_kwargs={})


STAND_IN = Project("owner/own", ("gaussian/own.py: class OwnDiffusion",), calls)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkouts, one of them the stand-in's, which is a known project."""
    monkeypatch.setattr(command, "PROJECTS", (STAND_IN,))
    (tmp_path / "other").mkdir()
    (tmp_path / "own/gaussian").mkdir(parents=True)
    (tmp_path / "own/gaussian/__init__.py").write_text("raise RuntimeError('what a package imports is not needed')")
    (tmp_path / "own/gaussian/own.py").write_text(Path(own_diffusion.__file__).read_text() + OWN)
    (tmp_path / "own/models.py").write_text("LEVELS = 6")
    return tmp_path


def test_accelerated_calls_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "found.json"
    assert benchmarks.main(["descendants", str(folder), "--turns", "1", "--json", str(file)]) == 0
    written = capsys.readouterr()
    assert "what the project prints" in written.err
    assert "what the project prints" not in written.out
    (project,) = json.loads(file.read_text())["projects"]
    loop, generator = project["calls"]
    assert (project["name"], loop["name"], generator["progressive"]) == ("owner/own", "p_sample_loop", True)
    for call in (loop, generator):
        assert call["outcome"] in ("engine", "stepped"), call
        assert len(call["runs"]) == len(compare.SEEDS)
        assert call["difference"] <= compare.TOLERANCE
    assert min(loop["step_us"]) > 0
    assert "step_us" not in generator
    row = written.out.splitlines()[2]
    assert written.out.splitlines()[-1] == "1 calls: 1 fused."
    assert row.startswith("| owner/own |  | `p_sample_loop`, progressive | fused")


class Wrong:
    """What accelerate might return: an object whose images, or random numbers, are others."""

    def __init__(self, obj: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.obj, self.change = obj, change

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.change(self.obj.p_sample_loop(*args, **kwargs))

    def p_sample_loop_progressive(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return self.obj.p_sample_loop_progressive(*args, **kwargs)


def drawing(x: torch.Tensor) -> torch.Tensor:
    torch.rand(1)
    return x


def failing(x: torch.Tensor) -> torch.Tensor:
    raise KeyError("epsilon")


def refusing(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("p_sample_loop: got an object, expected another")


@pytest.mark.parametrize(
    ("change", "outcome", "status"),
    [
        (lambda x: x, "engine", 0),
        (lambda x: x + 1e-3, "different", 1),
        (lambda x: x.double(), "different", 1),
        (lambda x: x[:1], "different", 1),
        (lambda x: x.where(x < x.max(), float("nan")), "different", 1),
        (drawing, "different", 1),
        (failing, "unclear error", 1),
        (refusing, "refused", 0),
    ],
)
def test_what_differs_is_found(
    change: Any, outcome: str, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(fastcfg, "accelerate", lambda obj: Wrong(obj, change))
    monkeypatch.setattr(fastcfg, "report", lambda obj: {"run": "engine", "reason": ""})
    file = folder / "found.json"
    assert command.main([str(folder / "own"), "--turns", "0", "--json", str(file)]) == status
    (project,) = json.loads(file.read_text())["projects"]
    assert [call["outcome"] for call in project["calls"]] == [outcome, "engine"]


def test_a_project_that_does_not_import_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own/models.py").write_text("LEVELS = missing")
    assert command.main([str(folder)]) == 0
    assert "| `import` | broken (NameError: name 'missing' is not defined)" in capsys.readouterr().out


def test_an_open_checkout_leaves_no_trace(folder: Path) -> None:
    place, path, finders, modules = os.getcwd(), list(sys.path), list(sys.meta_path), dict(sys.modules)
    sys.modules["models"] = modules["models"] = sys
    try:
        with opened(folder / "own") as checkout:
            module = checkout.load("gaussian.own")
            assert module.LEVELS == 6
            assert Path.cwd() == (folder / "own").resolve()
            assert module.Kind.EPSILON.value == 1  # the decorator of a package that is not installed changes nothing
            assert isinstance(module.bf.Path("a"), module.bf.Path)
            assert issubclass(module.bf.Path, object)
            with pytest.raises(TypeError):
                _ = module.bf.Path("a") + 1
            with pytest.raises(ImportError):
                import another_that_is_not_installed  # noqa: F401 - stand-ins are the checkout's alone
        assert (os.getcwd(), sys.path, sys.meta_path) == (place, path, finders)
        assert {name: sys.modules.get(name) for name in modules} == modules
        assert not {"gaussian", "gaussian.own", "blobfile"} & set(sys.modules)
    finally:
        del sys.modules["models"]


def test_folders_without_a_known_project_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="FOLDER: got no checkout of a known project, expected one of owner/own"):
        command.main([str(folder / "other")])
    with pytest.raises(UsageError, match="absent, expected a folder"):
        command.main([str(folder / "absent")])


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_projects_are_told_apart(project: Project, tmp_path: Path) -> None:
    for mark in project.marks:
        name, _, text = mark.partition(": ")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert command.recognised(tmp_path) is project


def test_the_table_shows_the_worst_of_a_loop_and_its_generator() -> None:
    loop = {
        "name": "p_sample_loop, editing",
        "progressive": False,
        "outcome": "engine",
        "reason": "",
        "difference": 1e-6,
    }
    generator = {**loop, "progressive": True, "outcome": "the original", "reason": "a|b", "predicted": 2e-5}
    loop["step_us"] = [200.4, 99.6]
    found = [{"name": "owner/own", "commit": "abc 2026", "calls": [loop, generator]}]
    before = [{"name": "owner/own", "commit": "", "calls": [{**loop, "outcome": "different"}]}]
    row = table(found, before).splitlines()[-1]
    assert row == (
        "| owner/own | abc 2026 | `p_sample_loop`, editing, progressive | different | the original (a\\|b) "
        "| 1e-06 | 2e-05 | 200 → 100 |"
    )


def test_networks_answer_in_the_form_that_is_asked_of_them() -> None:
    x, t = torch.randn(2, 5, 3, 4), torch.tensor([3, 7])
    assert Network(3, 6, axis=2)(x, t).shape == (2, 5, 6, 4)
    assert set(Network(5, output=lambda y: {"x": y})(x, t)) == {"x"}
    network = Network(5)
    plain, said = network(x, t), network(x, t, {"y": {"text": ["a", "b"], "uncond": True}})
    assert not torch.equal(plain, said)
    assert torch.equal(plain, network(x, t[:, None]))
    assert share({"text": ["a", "b"]}, 2).shape == (2, 1)
    assert network.calls == 3
