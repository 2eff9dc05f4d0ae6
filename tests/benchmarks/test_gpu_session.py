"""The session for a GPU machine, with stages of a line; the GPU's state, from a stand-in for NVML; the short runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT
from support.fake_nvml import FakeNvml
from support.tiny_checkpoint import write_tiny_checkpoint

import fastcfg.utils.files
from benchmarks import gpu_session, host_time, short_kernels
from benchmarks.__main__ import main
from benchmarks.gpu_session import BUDGET, Stage, limits
from benchmarks.gpu_state import GpuMonitor
from fastcfg import ops
from fastcfg.pipelines.text_to_image import TextToImage

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def script(name: str, code: str, file: Path | None = None, share: float = 1.0, skip: str = "") -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code, BUDGET), share, file, skip)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the command believes that there is a GPU."""
    monkeypatch.setattr(gpu_session, "probe", lambda: {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11"})


@pytest.mark.usefixtures("gpu")
def test_stages_fail_hang_and_are_skipped_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pid = tmp_path / "out", tmp_path / "pid"
    report = {
        "ok": False,
        "checks": {"a": {"ok": True}, "b": {"ok": False, "detail": "1 > 0"}},
        "x": [{"status": "skipped"}],
    }
    xml = (
        '<testsuites><testsuite><testcase classname="a" name="one">'
        '<properties><property name="us" value="3"/></properties></testcase>'
        '<testcase classname="a" name="two"><failure message="2 == 3">long</failure></testcase>'
        '<testcase classname="a" name="three"><skipped message="no"/></testcase></testsuite></testsuites>'
    )

    def writes(name: str, text: str) -> str:
        return f"import sys, json; open({str(out / name)!r}, 'w').write({text}); print(sys.argv[1])"

    # Starts a process that would outlive it, and waits for it.
    hangs = "import os, time; child = os.fork(); open({!r}, 'w').write(str(child)) if child else 0; time.sleep(60)"
    big = "json.dumps({'rows': [{'a': 1 / 3, 'b': None, 'c': ''}] * 8_000})"
    huge = "json.dumps({'rows': ['x' * 100] * 3_000})"
    tested = [
        script("works", writes("works.json", repr(json.dumps(report))), out / "works.json"),
        script("fails", "print('y' * 9000 + '\\nExtension modules: a, b\\nlast words'); raise SystemExit(3)"),
        script("hangs", hangs.format(str(pid)), share=2.0),
        script("absent", "", skip="it is not installed"),
        script("crashes", "import os; os.kill(os.getpid(), 11)"),
        script("says nothing", "", out / "old.json"),
        script("tests", writes("tests.xml", repr(xml)), out / "tests.xml"),
        Stage("no program", ("/no/such/program",), 1.0),
        script("big", writes("big.json", big), out / "big.json"),
        script("huge", writes("huge.json", huge), out / "huge.json"),
        script("no JSON", writes("no.json", "'{'"), out / "no.json"),
    ]
    monkeypatch.setattr(gpu_session, "all_stages", lambda folder: tested)
    out.mkdir()
    (out / "old.json").write_text("{}")
    os.utime(out / "old.json", (1e9, 1e9))
    written, write_text = [], fastcfg.utils.files.write_text

    def watched(path: Path, text: str) -> None:
        write_text(path, text)
        if path.name == "session.json":
            written.append(json.loads(path.read_text()))

    monkeypatch.setattr(fastcfg.utils.files, "write_text", watched)
    start = time.monotonic()
    assert main(["gpu_session", "--out", str(out), "--budget", "14s"]) == 1
    assert time.monotonic() - start < 14

    got = json.loads((out / "session.json").read_text())
    stages: dict[str, dict[str, Any]] = got["stages"]
    names = [stage.name for stage in tested]
    assert [list(one["stages"]) for one in written] == [names[: i + 1] for i in range(len(names))]
    assert [one["finished"] for one in written] == [False] * (len(names) - 1) + [True]
    assert got["environment"]["torch"] == "2.11"
    assert {name: stage["status"] for name, stage in stages.items()} == {
        **dict.fromkeys(names, "failed"),
        **dict.fromkeys(("works", "tests", "big", "huge"), "ok"),
        "hangs": "timed out",
        "absent": "skipped",
    }
    counts = {"counts": {"True": 1, "False": 1, "skipped": 1}, "failures": {"/checks/b": "1 > 0"}}
    assert (stages["works"]["summary"], stages["works"]["json"]) == (counts, "works.json")
    assert stages["works"]["tail"] == f"{stages['works']['limit_s'] / 2:.0f}s\n"
    assert stages["fails"]["reason"] == "exit status 3: last words"
    assert stages["fails"]["tail"] == "y" * 3_988 + "\nlast words\n"
    assert stages["hangs"]["seconds"] <= stages["hangs"]["limit_s"] + 0.5
    assert stages["hangs"]["reason"] == f"killed after {0.75 * stages['hangs']['limit_s']:.0f} s"
    assert re.search(r'Current thread.*\n  File "<string>", line 1', stages["hangs"]["tail"])
    assert not alive(int(pid.read_text()))
    assert stages["absent"]["reason"] == "it is not installed"
    assert stages["crashes"]["reason"].startswith("exit status -11")
    assert stages["says nothing"]["reason"] == "FileNotFoundError: old.json was not written"
    assert stages["tests"]["summary"] == {
        "counts": {"passed": 1, "failure": 1, "skipped": 1},
        "failures": {"a::two": "2 == 3"},
        "recorded": {"one": {"us": "3"}},
    }
    assert "/no/such/program" in stages["no program"]["reason"]
    assert json.loads((out / "big.json").read_text()) == {"rows": [{"a": 0.3333}] * 8_000}
    assert (stages["big"]["json"], stages["huge"]["json"]) == ("big.json", None)
    assert sorted(path.name for path in out.iterdir()) == [
        "big.json",
        "no.json",
        "old.json",
        "session.json",
        "works.json",
    ]
    assert "JSONDecodeError" in stages["no JSON"]["reason"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("4 ok, 5 failed, 1 timed out, 1 skipped in ")


@pytest.mark.usefixtures("gpu")
def test_a_session_without_failures_and_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_session, "all_stages", lambda folder: [script("a", "raise SystemExit(1)"), script("b", "")])
    assert main(["gpu_session", "--only", "b"]) == 0
    folder = tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3"
    assert list(json.loads((folder / "session.json").read_text())["stages"]) == ["b"]


def test_what_a_stage_saves_goes_to_the_rest() -> None:
    stages = [script("a", "", share=1), script("b", "", skip="no", share=5), script("c", "", share=3)]
    assert limits(stages, 100) == [25, 0, 75]
    assert limits(stages[1:], 90) == [0, 90]
    assert limits(stages[1:2], 90) == [0]


def test_a_dry_run_shows_commands_and_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    for found in (False, True):
        if found:
            tool.parent.mkdir(parents=True)
            tool.write_text("#!/bin/sh\n")
            tool.chmod(0o755)
        assert main(["gpu_session", "--dry-run", "--out", str(tmp_path / "out"), "--budget", "1m30s"]) == 0
        lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
        assert list(lines) == ["doctor", "tests", "parity", "captured", "sanitizer", "bench", "trace"]
        seconds = [float(line.split(" s: ")[0]) for line in lines.values() if " s: " in line]
        assert len(seconds) == 6 + found
        assert sum(seconds) == pytest.approx(90, abs=4)
        assert max(seconds) == float(lines["bench"].split(" s: ")[0])
        assert (str(tool) in lines["sanitizer"]) == found
    assert lines["bench"].endswith(f"-m benchmarks --budget {BUDGET} --out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_and_with_bad_arguments_the_status_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        *([([], "this needs a GPU")] if not torch.cuda.is_available() else []),
        (["--budget", "0s"], "got '0s', expected a time such as 9m"),
        (["--budget", "9"], "got '9', expected a time such as 9m"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["gpu_session", *argv])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert [gpu_session.seconds_of(text) for text in ("9m30s", "4m", "15s")] == [570, 240, 15]


# The GPU's state


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A GPU that is used by this process alone, at full clocks."""
    fake = FakeNvml()
    fake.clocks, fake.reasons, fake.pids = {1: 1980, 2: 3201}, 0, [os.getpid()]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    return fake


def test_a_gpu_in_good_order_has_no_notes(fake: FakeNvml) -> None:
    with GpuMonitor(CUDA) as monitor:
        assert fake.running == 1  # readings open it again, which is cheap
        fake.temperature = 55
        state = monitor.snapshot()
    assert state is not None
    assert (state["temperature_c"], state["torch_mib"], state["memory_used_mib"]) == (55, 1024, 3072)
    assert monitor.before is not None
    assert monitor.before["temperature_c"] == 41
    assert monitor.after == state
    assert monitor.notes() == []


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({"reasons": 1 | 4}, ["Throttled: SwPowerCap in 1 of 2 readings."]),
        ({"reasons": 8}, ["Throttled: HwSlowdown in 1 of 2 readings."]),
        ({"reasons": 1, "clocks": {1: 300, 2: 300}}, []),
        ({"clocks": {1: 1485, 2: 3201}}, ["The sm clock was down to 75% of its maximum while measured."]),
        ({"clocks": {1: 1980, 2: 1600}}, ["The memory clock was down to 50% of its maximum while measured."]),
        ({"pids": [7, os.getpid(), 8]}, ["Shared with other processes: 2."]),
        ({"pids": [7], "used": 3 * 2**30}, []),
        (
            {"pids": [7], "used": 4 * 2**30},
            ["Perhaps shared: 3.0 GiB beside torch's are used by processes that do not show."],
        ),
        ({"used": 4 * 2**30}, []),
        ({"temperature": 83}, ["Up to 83 °C."]),
    ],
)
def test_what_harms_a_measurement_is_noted(changes: dict[str, Any], notes: list[str], fake: FakeNvml) -> None:
    with GpuMonitor(CUDA) as monitor:
        monitor.snapshot()
        for name, value in changes.items():
            setattr(fake, name, value)
        monitor.snapshot()
    assert monitor.notes() == notes


@pytest.mark.parametrize(
    ("others", "notes"), [([], []), ([8], ["Shared with other processes: 1."])], ids=["alone", "shared"]
)
def test_our_process_that_measures_does_not_count(others: list[int], notes: list[str], fake: FakeNvml) -> None:
    with GpuMonitor(CUDA) as monitor:
        fake.pids, fake.used = [os.getpid(), 7, *others], 9 * 2**30
        monitor.snapshot(helper_mib=7 * 2**10)
        fake.pids, fake.used = [os.getpid()], 3 * 2**30  # it has ended
    assert monitor.notes() == notes


def test_a_reading_that_is_refused_is_no_error(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Any:
        raise fake.NVMLError("Not Supported")

    for name in dir(fake):
        if name.startswith("nvmlDeviceGet") and name != "nvmlDeviceGetHandleByUUID":
            monkeypatch.setattr(fake, name, refuse)
    with GpuMonitor(CUDA) as monitor:
        state = monitor.snapshot()
    assert state is not None
    assert {name: value for name, value in state.items() if value is not None} == {"torch_mib": 1024}
    assert monitor.notes() == []


def test_without_nvml_the_note_says_why(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuMonitor(CUDA) as monitor:
        assert monitor.snapshot() is None
    assert monitor.notes() == ["The GPU's state is unknown: the package nvidia-ml-py is not installed."]


def test_nvml_is_not_asked_about_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    with GpuMonitor(CPU) as monitor:
        assert monitor.snapshot() is None
    assert (monitor.before, monitor.after, monitor.notes()) == (None, None, [])
    assert "pynvml" not in sys.modules


# Short runs


def test_short_kernels_run_every_operation_on_tensors_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short_kernels.main()
    lines = capsys.readouterr().out.splitlines()
    public = {name for name in ops.__all__ if name[0] != "B" and "problem" not in name}
    # No kernel, or GuidedStep's.
    public -= {"Stepper", "is_channels_last", "resolve_backend", "guided_step", "sums_memory", "instruction_sets"}
    assert {line.split()[0] for line in lines} == public
    assert len(lines) == 3 * (10 + 1 + 3 + 2 + len(short_kernels.SPECS))
    for shape, dtype in short_kernels.CASES.items():
        for name, call in short_kernels.calls(shape, dtype, CPU):
            assert isinstance(call, partial)
            buffers = vars(call.func.buffers) if isinstance(call.func, ops.GuidedStep | ops.QuantileBound) else {}
            for tensor in (*call.args, *buffers.values()):
                if isinstance(tensor, torch.Tensor):
                    # A memory checker sees what goes beyond an allocation.
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_a_trace_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny.safetensors", text_ctx=8)
    monkeypatch.setattr(TextToImage, "load", partial(TextToImage.load, checkpoint))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["trace", "--rows", "2", "--json", str(tmp_path / "trace.json")]) == 0
    report = json.loads((tmp_path / "trace.json").read_text())
    assert report["settings"] == {"rows": 2}
    assert {name: way["graph"] for name, way in report["ways"].items()} == {"eager": "none", "captured": "stand-in"}
    for way in report["ways"].values():
        work, us = ({name: one[i] for name, *one in way["work"]} for i in (0, 1))
        assert work["aten::mkldnn_convolution"] % 2 == 0
        assert len(work) == 30
        assert way["kernels"] * 2 >= sum(work.values())
        assert way["us"] * 2 >= sum(us.values()) - 1
        assert us["aten::mkldnn_convolution"] > us.get("aten::conv2d", 0)  # which calls it: times are an operator's own
        assert way["idle_us"] > 0
    assert capsys.readouterr().out.count("idle_us") == 2


def test_host_time_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host_time, "RUNS", 2)
    assert main(["host_time", "--json", str(tmp_path / "host_time.json")]) == 0
    results = json.loads((tmp_path / "host_time.json").read_text())["results"]
    assert list(results) == ["beside a replay, philox", "beside a replay, torch"]
    philox, drawn = (times["host_us"]["least"] for times in results.values())
    assert 0 < philox < drawn


BARE = """
import sys
for name in ("safetensors", "tokenizers", "diffusers", "k_diffusion", "scipy", "torchsde", "torchdiffeq"):
    sys.modules[name] = None  # as if it were not installed
from benchmarks.__main__ import main as bench
from benchmarks.suite import providers
from benchmarks.suite.architectures import ARCHITECTURES
from fastcfg.cli import main
assert main(["doctor"]) == 0
assert main(["parity", "--quick", "--backend", "reference", "--device", "cpu"]) == 0
assert bench(["--only", "op/guidance-blend", "--budget", "0.001s", "--out", "out", "--device", "cpu"]) == 0
assert bench(["trace", "--json", "trace.json"]) == 0
print({name: made.problem() for name, made in ARCHITECTURES.items() if made.problem()})
"""


def test_a_bare_machine_has_all_that_the_stages_need(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BARE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint  ok: not read: safetensors and tokenizers not installed" in done.stdout
    assert json.loads((tmp_path / "trace.json").read_text())["status"] == "skipped"
    assert done.stdout.splitlines()[-1].count("not installed") == 3
