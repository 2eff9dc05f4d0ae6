"""`python -m benchmarks graphs`: the checks on a CPU, that they fail where they should, and the report."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import graphs
from benchmarks.captured import devices, models
from benchmarks.captured.registry import Check, NotHereError, require_same
from fastcfg import Sampler
from fastcfg.engine import programs
from fastcfg.engine.graphs import Comparison, Pool
from fastcfg.engine.loop import Previews
from fastcfg.engine.readback import Readback
from fastcfg.engine.staleness import Fingerprint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", graphs.CHECKS)
def test_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes longer than all the rest; tests/engine/test_programs.py does it.
    monkeypatch.setattr(models, "inductor_problem", lambda device: "not asked for")
    unavailable = graphs.CHECKS[name].needs_cuda or name == "compiled-models-are-captured"
    if unavailable:
        with pytest.raises(NotHereError, match=r"needs a CUDA device|Inductor cannot compile here: not asked for"):
            graphs.CHECKS[name](CPU)
    else:
        json.dumps(graphs.CHECKS[name](CPU), allow_nan=False)


def test_most_checks_can_be_made_on_a_cpu() -> None:
    assert sum(not check.needs_cuda for check in graphs.CHECKS.values()) >= 13
    assert all(check.claim and name == check.name for name, check in graphs.CHECKS.items())


# What they see


def blind_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fingerprint, "changes", lambda self, other: "")


def restless_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fingerprint, "changes", lambda self, other: "something")


def stale_readback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value arrives one push too late."""
    push = Readback.push

    def late(self: Readback, tensor: torch.Tensor) -> None:
        before = vars(self).setdefault("before", torch.zeros_like(tensor))
        push(self, before)
        vars(self)["before"] = tensor.clone()

    monkeypatch.setattr(Readback, "push", late)


def prompt_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview is waited for in its own row."""
    after_row = Previews.after_row

    def at_once(self: Previews, row: int) -> None:
        after_row(self, row)
        self.deliver()

    monkeypatch.setattr(Previews, "after_row", at_once)


def empty_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "StandIn", lambda rows: lambda: None)


def empty_graphs_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_graphs(monkeypatch)
    monkeypatch.setattr(programs, "compare", lambda *args: Comparison(True, 1.0, 0.5))


def trusting_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.Programs, "_choices", eager_without_a_word)


def eager_without_a_word(self: Any, active: Any, batching: str, decision: Any) -> Any:
    return [programs._Choice(batching, self._eager(active, batching))]


def shared_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are the workspace's own memory."""
    sample = Sampler.sample

    def lend(self: Sampler, *args: Any, **options: Any) -> torch.Tensor:
        sample(self, *args, **options)
        return next(iter(self._keeper._kept.values())).workspace.buffers.x

    monkeypatch.setattr(Sampler, "sample", lend)


def kept_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "nbytes", lambda self: 1000)


BROKEN = [
    (blind_fingerprint, "changed-weights-act-at-the-next-call", r"\.data =: 1 captures, memory replaced: True"),
    (restless_fingerprint, "changed-weights-act-at-the-next-call", "in place: 2 captures, memory replaced: False"),
    (restless_fingerprint, "schedules-change-without-a-capture", "captures after a change of scale by row"),
    (stale_readback, "previews-come-one-row-late", r"preview of row 0: \d+ of \d+ differ"),
    (stale_readback, "adaptive-guidance-ends-when-branches-agree", "branches by row"),
    (prompt_previews, "previews-come-one-row-late", r"\(row, rows enqueued by then\): \[\(0, 1\)"),
    (empty_graphs, "captured-equals-eager", "ddim, none, number, philox x1: running eagerly"),
    (empty_graphs, "outputs-are-the-callers-own", "graph 'none' in place of 'stand-in': cannot be captured: a replay"),
    (empty_graphs_unnoticed, "captured-equals-eager", r"captured against eager, seed 5: \d+ of \d+ differ"),
    (empty_graphs_unnoticed, "samplers-run-in-threads", r"thread 0, own stream False: \d+ of \d+ differ"),
    (trusting_examination, "what-cannot-be-captured-runs-eagerly", "Reading: 0 warnings in three calls"),
    (shared_result, "outputs-are-the-callers-own", "the first result after the second call"),
    (kept_pool, "memory-is-steady-and-given-back", "1000 bytes after release"),
]


@pytest.mark.filterwarnings("ignore:running eagerly")
@pytest.mark.parametrize(("break_it", "name", "message"), BROKEN)
def test_a_check_fails_where_it_should(break_it: Any, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        graphs.CHECKS[name](CPU)


FILL = "void at::native::vectorized_elementwise_kernel<2, at::native::FillFunctor<long>>"


@pytest.mark.parametrize(
    ("called", "done", "message"),
    [
        ([], [], ""),
        (["cudaLaunchKernel"] * 2, [FILL] * 2, ""),  # torch's own
        (["cudaLaunchKernel"] * 2, ["another"] * 2, "beside the graphs the rows called {'cudaLaunchKernel': 10}"),
        (["cudaLaunchKernel"], [FILL], "beside the graphs the rows called {'cudaLaunchKernel': 5}"),
        (["cudaGraphLaunch"], [], "10 graph launches for 5 programs"),
        (["cudaStreamSynchronize"], [], "beside the graphs the rows called {'cudaStreamSynchronize': 5}"),
        ([], ["Memcpy DtoH (Device -> Pinned)"], "copies between host and device"),
        ([], ["_guided_step_kernel"], "guided_step ran 10 times in 5 rows"),
    ],
)
def test_launches_beside_the_graphs_are_found(
    called: list[str], done: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what a profiler would have seen: so much of it for each of the run's programs or rows."""

    def profiled(run: Any, programs: int) -> tuple[Counter[str], Counter[str]]:
        rows = run.table.num_rows
        host = Counter(["cudaGraphLaunch", "cudaStreamIsCapturing", *called] * programs)
        return host, Counter([*["_guided_step_kernel"] * rows, *done * programs, "Memcpy DtoD (Device -> Device)"])

    monkeypatch.setitem(devices.TABLES, "ddpm", devices.TABLES["plms"])  # without noise: faster on a CPU
    monkeypatch.setattr(devices, "profiled_rows", profiled)
    check = graphs.CHECKS["one-launch-runs-a-row"].function
    if message:
        with pytest.raises(AssertionError, match=re.escape(message)):
            check(CPU)
    else:
        assert check(CPU)["ddpm, 1 in a graph"]["launches_of_torchs_generator"] == 5 * len(called)
    monkeypatch.setattr(devices, "profiled_rows", lambda run, programs: (Counter(), Counter()))
    with pytest.raises(NotHereError, match="the profiler saw nothing"):
        check(CPU)


def test_tensors_must_be_the_same_and_finite() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    require_same(x, x.clone(), "x")
    for other, message in (
        (torch.tensor([1.0, 2.5, 3.0]), "x: 1 of 3 differ, by up to 0.5"),
        (torch.tensor([1.0, torch.nan, 3.0]), "x: 1 of 3 differ, by up to inf"),
        (torch.ones(2), r"x: shapes \(2,\) and \(3,\)"),
    ):
        with pytest.raises(AssertionError, match=message):
            require_same(other, x, "x")
    with pytest.raises(AssertionError, match="x: 1 of 2 values are not finite"):
        require_same(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf]), "x")


# The command


def checks(*functions: Any) -> dict[str, Check]:
    names = [function.__name__ for function in functions]
    return {
        name: Check(name, f"claim of {name}", function, False) for name, function in zip(names, functions, strict=True)
    }


def good(device: torch.device) -> dict[str, Any]:
    return {"device": device.type}


def bad(device: torch.device) -> dict[str, Any]:
    raise AssertionError("3 of 4\ndiffer")


def worse(device: torch.device) -> dict[str, Any]:
    raise RuntimeError("CUDA error")


def elsewhere(device: torch.device) -> dict[str, Any]:
    raise NotHereError("needs a CUDA device")


def test_the_report_tells_of_all_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graphs, "CHECKS", checks(bad, worse, elsewhere, good))
    path = tmp_path / "graphs.json"
    assert graphs.main(["--device", "cpu", "--json", str(path)]) == 1
    report = json.loads(path.read_text())
    assert {"torch", "device", "load_average", "commit"} <= set(report["environment"])
    assert report["settings"] == {"device": "cpu", "threads": torch.get_num_threads()}
    results = report["results"]
    assert {name: result["status"] for name, result in results.items()} == {
        "bad": "failed",
        "worse": "failed",
        "elsewhere": "skipped",
        "good": "ok",
    }
    assert results["bad"]["error"] == "3 of 4\ndiffer"
    assert results["worse"]["error"] == "RuntimeError: CUDA error"
    assert results["elsewhere"]["reason"] == "needs a CUDA device"
    assert results["good"]["details"] == {"device": "cpu"}
    assert all(result["seconds"] >= 0 and result["claim"] == f"claim of {name}" for name, result in results.items())
    told = capsys.readouterr()
    assert [line.split(" (")[0] for line in told.out.splitlines()] == [
        "bad: FAILED: 3 of 4 differ",
        "worse: FAILED: RuntimeError: CUDA error",
        "elsewhere: skipped: needs a CUDA device",
        "good: ok",
    ]
    assert told.err.endswith("graphs: failed: bad, worse\n")


def test_some_checks_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(graphs, "CHECKS", checks(bad, elsewhere, good))
    assert graphs.main(["--device", "cpu", "--only", "good", "elsewhere"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["good", "elsewhere"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: got 'nothing', expected one of"),
        (["--device", "tpu"], "--device: got 'tpu', expected one of auto, cpu, cuda"),
        (["--json", "graphs.txt"], "--json"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "sees no GPU")]),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "run", lambda *_: pytest.fail("checking began"))
    assert graphs.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("graphs: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        graphs.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and check.claim in text for name, check in graphs.CHECKS.items())
