"""`fastcfg parity`: right steps pass, wrong ones are found and named, whatever is wrong with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcfg.cli import main
from fastcfg.ops import step as ops_step
from fastcfg.parity import Error, Finding, runnable
from fastcfg.parity.steps import OPTIONS, check_noise, check_step, make_case
from fastcfg.reference import ReferenceStep

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
QUICK = ("parity", "--quick", "--device", "cpu", "--backend", "reference")

USER = """
import torch
from fastcfg import CFG, DynamicThreshold, Sampler, Schedule, solvers

def model(x, t, y):
    shift = y.view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(x + shift), torch.cos(x)], dim=1)

schedule = Schedule.named("linear").respace(20)
call = {"shape": (2, 3, 16, 16), "cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(1)}}
guided = {"guidance": CFG(3.0, interval=(0.0, 0.1)), "clip": 1.0}

def build():
    return {"model": model, "table": solvers.ddim(schedule, eta=0.5), **call, **guided}

def history():
    return {**build(), "table": solvers.plms(schedule)}

def learned():
    return {"sampler": Sampler(model, solvers.ddpm(schedule), **guided), **call}

class Built:
    def __init__(self):
        vars(self).update(build())

def thresholded():
    return {**build(), "clip": DynamicThreshold(0.9)}

def no_table():
    return {"model": model, "shape": (2, 3, 16, 16)}

def misspelt():
    return {**build(), "scale": 3.0}

def wrong_table():
    return {**build(), "table": 3}

def both():
    return {**learned(), "clip": 1.0}

def raises():
    raise RuntimeError("no weights")

def fails_later():
    return {**build(), "model": lambda x, t: x}

def narrow():
    return {**build(), "model": lambda x, t, y: x[:, :1]}
"""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own, with a user's file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(USER)
    yield tmp_path
    sys.modules.pop("mine", None)


def wrong_step(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], name: str = "ReferenceStep") -> None:
    """Let the engine's step, not the check's reference, do something to its buffers besides."""

    class Wrong(ReferenceStep):
        def __call__(self, output: Tensor) -> None:
            super().__call__(output)
            change(self.buffers)

    monkeypatch.setattr(ops_step, name, Wrong)


def one_ulp(buffers: Any) -> None:
    """The first element becomes its neighbour."""
    x = buffers.x.view(-1)
    x[0] = torch.nextafter(x[0], torch.tensor(torch.inf, dtype=x.dtype))


def test_quick_passes_and_writes_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--json", "parity.json", "--plot", "parity.png"]) == 0
    told = capsys.readouterr().out
    assert "parity   yes" in told
    assert "FAILED" not in told
    # The reference on a CPU is compared with itself.
    assert told.count("same code") == sum(line.startswith(("step", "noise")) for line in told.splitlines()) > 0
    report = json.loads(Path("parity.json").read_text())
    assert set(report) == {"ok", "environment", "settings", "skipped", "findings"}
    assert set(report["environment"]) == {"versions", "platform", "device", "threads", "commit"}
    assert set(report["settings"]) == {"device", "quick", "seed", "backends", "model", "steps"}
    findings = report["findings"]
    assert report["ok"]
    for finding in findings:
        fields = {"check", "backend", "dtype", "options", "way", "shape", "tensor", "note", "bitwise", "reference_ulp"}
        fields |= {
            "allowed_ulp",
            "error",
            "torch",
            "trajectory",
            "torch_trajectory",
            "bound_ulp",
            "factor",
            "same_code",
            "ok",
            "problem",
        }
        assert set(finding) == fields
        assert finding["ok"]
    steps = [f for f in findings if f["check"] == "step"]
    assert {f["options"] for f in steps} == set(OPTIONS)
    assert {f["dtype"] for f in steps} == {"float32", "bfloat16", "float16"}
    assert all(f["bitwise"] and set(f["error"]) == {"max", "rms", "ulp", "rms_ulp"} for f in steps)
    assert [len(f["trajectory"]) for f in findings if f["check"] == "loop"] == [50, 50]
    with Image.open("parity.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("backend", ["reference", "inductor"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda buffers: buffers.x.mul_(1 + 1e-3), ("step", "loop"), id="a thousandth"),
        pytest.param(one_ulp, ("step",), id="one ulp of one element"),
    ],
)
def test_a_wrong_step_is_named(
    backend: str,
    change: Callable[[Any], object],
    named: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong_step(monkeypatch, change, {"reference": "ReferenceStep", "inductor": "InductorStep"}[backend])
    monkeypatch.setattr("fastcfg.parity.steps.SMALL_SHAPES", ((1, 3, 8, 8), (1, 2, 9)))
    assert main(["parity", "--quick", "--device", "cpu", "--backend", backend, "--json", "parity.json"]) == 1
    told = capsys.readouterr().out
    assert f"FAILED   step {backend} float32 cfg eager, x at 1x3x8x8: not bit for bit the reference" in told
    report = json.loads(Path("parity.json").read_text())
    assert not report["ok"]
    checks = {f["check"] for f in report["findings"] if not f["ok"]}
    # Inductor runs no quick loops.
    assert checks >= (set(named) if backend == "reference" else {"step"})


@pytest.mark.parametrize(
    ("options", "tensor", "change"),
    [
        ("ddpm", "x", lambda buffers: buffers.x.mul_(1 + 1e-5)),
        ("ddpm", "model_input", lambda buffers: buffers.counter[0].sub_(1)),
        ("plain", "model_input", lambda buffers: buffers.time.add_(1)),
        ("plain", "model_input", lambda buffers: buffers.model_input[-1:].neg_()),
        ("x0 kept", "x0", lambda buffers: one_ulp(type(buffers)(buffers.x0, buffers.table, buffers.counter))),
        ("history", "history", lambda buffers: buffers.history[0].copy_(buffers.history[1])),
        ("gradient", "x", lambda buffers: buffers.x.fill_(torch.nan)),
    ],
)
def test_what_a_step_writes_is_compared(
    options: str, tensor: str, change: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(options, torch.float32, (2, 3, 8, 8), seed=0)
    assert not any(finding.problem for finding in check_step(case, "reference", CPU))
    wrong_step(monkeypatch, change)
    assert {f.tensor for f in check_step(case, "reference", CPU) if f.problem} >= {tensor}


def test_wrong_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.problem for f in check_noise("reference", (2, 3, 5), CPU, 0)] == ["", ""]
    wrong_step(monkeypatch, one_ulp)
    start, step = check_noise("reference", (2, 3, 5), CPU, 0)
    assert not start.problem
    assert "not bit for bit" in step.problem


@pytest.mark.parametrize("options", ["cfg", "ddpm"])
def test_the_kernels_are_checked(options: str) -> None:
    found = list(check_step(make_case(options, torch.float32, (1, 3, 4, 4), seed=1), "triton", CPU))
    assert [f.problem for f in found] == ["", ""]


@pytest.mark.parametrize("options", OPTIONS)
def test_plain_torch_computes_the_same_and_rounds_in_the_models_dtype(options: str) -> None:
    """A wrong formula would make the bound a wide one."""
    exact = check_step(make_case(options, torch.float32, (2, 3, 32, 32), seed=0), "reference", CPU)
    assert all(finding.torch.ulp < 3 for finding in exact)
    if OPTIONS[options].branches > 1:
        coarse = check_step(make_case(options, torch.bfloat16, (2, 3, 32, 32), seed=0), "reference", CPU)
        assert next(coarse).torch.ulp > 100


def test_the_bound_is_twice_plain_torchs_loss_and_at_least_one_ulp() -> None:
    def problem(ours: float, theirs: float) -> str:
        errors = (Error(ulp * 1e-7, ulp * 1e-8, ulp, ulp / 10) for ulp in (ours, theirs))
        return Finding(
            "loop", "reference", "float32", "ddim", "eager", (1, 3, 8, 8), "x", None, None, None, *errors
        ).problem

    assert not problem(3.9, 2.0)
    assert "4.1 ulp from float64, more than 4" in problem(4.1, 2.0)
    assert not problem(0.9, 0.1)
    assert problem(1.1, 0.1)
    assert problem(float("inf"), 1.0)
    assert problem(float("nan"), 1.0)


def test_backends_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("fastcfg.parity.steps.SMALL_SHAPES", ((1, 3, 8, 8), (1, 2, 9)))
    assert main(["parity", "--quick", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "skipped  triton: the device is a CPU" in told
    assert "skipped  inductor: compiles for seconds" in told
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastcfg.parity.version", lambda name: "3.9.0")
    assert "triton" in runnable(CPU)[0]
    monkeypatch.setattr("fastcfg.parity.version", lambda name: "3.8.1")
    assert "rounds a multiply-add twice" in runnable(CPU)[1]["triton"]


@pytest.mark.parametrize("function", ["build", "history", "learned", "Built"])
def test_a_users_model_is_checked(function: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parity", "--backend", "reference", "--model", f"mine.py:{function}", "--steps", "4"]
    assert main([*arguments, "--json"]) == 0
    forced, free, captured = json.loads(capsys.readouterr().out)["findings"]
    assert (forced["options"], free["options"], captured["way"]) == ("teacher-forced", "free", "captured")
    assert captured["note"] == "graph: stand-in"
    assert captured["trajectory"] == free["trajectory"]
    assert forced["bitwise"]
    for finding in (forced, free):
        assert len(finding["trajectory"]) == len(finding["torch_trajectory"]) == 4
        assert 0 < finding["error"]["max"] < 1e-6
        assert 0 < finding["torch"]["max"] < 1e-6


def test_a_wrong_step_fails_a_users_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_step(monkeypatch, lambda buffers: buffers.x.mul_(1 + 1e-5))
    assert main(["parity", "--backend", "reference", "--model", "mine:build"]) == 1
    assert "FAILED   model reference float32 teacher-forced eager, x at 2x3x16x16: " in capsys.readouterr().out


def test_what_plain_torch_has_no_counterpart_of_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "reference", "--model", "mine.py:thresholded"]) == 0
    told = capsys.readouterr().out
    assert "no bound" in told
    assert "bound: the reference's own error" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine.py"], "expected PATH.py:function or module:function"),
        (["--model", "other.py:build"], "No such file"),
        (["--model", "no_such_module:build"], "No module named 'no_such_module'"),
        (["--model", "mine.py:other"], "has no attribute 'other'"),
        (["--model", "mine.py:raises"], "RuntimeError: no weights"),
        (["--model", "mine.py:no_table"], "expected also 'table'"),
        (["--model", "mine.py:misspelt"], "'scale', expected some of model, table"),
        (["--model", "mine.py:wrong_table"], "table: got int, expected a StepTable"),
        (["--model", "mine.py:both"], "'clip' beside a sampler"),
        (["--model", "mine.py:fails_later"], "its first run failed: TypeError"),
        (["--model", "mine.py:narrow"], "model output: got shape (4, 1, 16, 16), expected (4, 3, 16, 16)"),
        (["--model", "mine.py:build", "--quick"], "argument --quick"),
        (["--steps", "3"], "argument --steps: got 3 without --model"),
        (["--steps", "0"], "expected an integer of at least 1"),
        (["--seed", "x"], "expected an integer"),
        (["--backend", "numpy"], "argument --backend: invalid choice: 'numpy' (choose from "),
        (["--json", "parity.txt"], "expected a file name that ends in .json"),
        (["--plot", "parity.pdf"], "expected a file name that ends in .png"),
        (["--plot", "parity.png"], "matplotlib is not installed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["--plot", "parity.png"]:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["parity", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("fastcfg: error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_the_command_says_what_it_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(words in told for words in ("bit for bit", "twice what plain torch loses", "examples:", "diffusers"))
