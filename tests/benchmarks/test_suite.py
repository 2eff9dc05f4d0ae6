"""The benchmark suite: who is wrong, crashes or fails gets no time, the rest goes on, and nothing finished is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT
from support import faulty_workers as workers
from support.faulty_workers import nothing, provider

from benchmarks import bench
from benchmarks.__main__ import main
from benchmarks.report.reading import load
from benchmarks.suite import engine, measure, originals, providers, workloads
from benchmarks.suite.cases import NotHereError, Provider, StepCase
from benchmarks.suite.measure import Turns
from benchmarks.suite.providers import COPY, Entry, Job
from benchmarks.suite.results import OUT_OF_TIME, Results
from benchmarks.suite.roof import add_shares
from benchmarks.suite.runner import OutOfTimeError, Runner, Worker
from benchmarks.suite.worker import serve
from benchmarks.suite.workloads import registry, select
from fastcfg.cli.parser import UsageError
from fastcfg.parity.steps import check_step, make_case
from fastcfg.reference import originals as reference_originals

CPU = torch.device("cpu")
SHAPE = (2, 3, 4, 4)
NAMES = [f"op/{name}/pixel-64/b16/float32" for name in ("guidance-blend", "predict-x0")]
COMMAND = ["--seconds", "0.05", "--quiet", "--device", "cpu", "--only"]

# Processes


def run(runner: Runner, name: str = NAMES[0]) -> dict[str, Any]:
    try:
        return dict(runner.run(registry()[name]))
    finally:
        runner.close()


def test_faults_are_reported_and_the_rest_continues() -> None:
    found = run(Runner("cpu", 1, 0.01, target=workers.serve_faults))[NAMES[0]]["providers"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "steady": "ok",
        "own": "ok",
        "wrong": "refused",
        "no numbers": "refused",
        "out of memory": "failed",
        "absent": "absent",
        "not to be counted": "ok",
        "hanging": "failed",
        "crashing": "failed",
    }
    assert {name for name, entry in found.items() if "us" in entry} == {"steady", "own", "not to be counted"}
    assert found["wrong"]["reason"] == "1.0e-02 from the exact result, more than 1.0e-05"
    assert "inf from the exact result" in found["no numbers"]["reason"]
    assert "out of memory" in found["out of memory"]["reason"]
    assert "took too long" in found["hanging"]["reason"]
    assert found["crashing"]["reason"] == "crashed (SIGSEGV)"


def test_the_worker_says_what_cannot_be_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(workload: str, device: torch.device) -> Job:
        raise {"a": NotHereError("diffusers is not installed"), "b": KeyError("x")}[workload]

    monkeypatch.setattr(measure, "job", job)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    todo, said = iter([("a", {}), ("b", {})]), []

    def recv() -> Any:
        try:
            return next(todo)
        except StopIteration:
            raise EOFError from None

    serve(SimpleNamespace(recv=recv, send=said.append), SimpleNamespace(), SimpleNamespace(), "cpu", None, 0.01)  # type: ignore[arg-type]
    assert said == [("not here", "diffusers is not installed", None), ("error", "KeyError: 'x'", None)]


def test_what_cannot_be_set_up_raises() -> None:
    runner = Runner("cpu", 1, 0.01, target=workers.serve_errors)
    with pytest.raises(NotHereError, match="diffusers is not installed"):
        list(runner.run(registry()[NAMES[0]]))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        run(runner, NAMES[1])


def test_a_process_that_dies_without_work_is_replaced() -> None:
    runner = Runner("cpu", 1, 0.01, target=workers.serve_one)
    assert dict(runner.run(registry()[NAMES[0]]))
    assert runner._worker is not None
    runner._worker.process.join()
    assert run(runner, NAMES[1])
    with pytest.raises(RuntimeError, match=r"setting it up: ended its process .exit status 3."):
        run(Runner("cpu", 1, 0.01, target=workers.serve_nothing))


@pytest.mark.parametrize("others", [True, False])
def test_the_limit_is_a_providers_and_not_the_workloads(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suite.runner._PATIENCE", 0.1)
    ours, theirs = multiprocessing.Pipe()
    begin = time.monotonic()

    class Since:
        value = property(lambda self: time.monotonic() if others else begin)

    process = SimpleNamespace(is_alive=lambda: True, sentinel=multiprocessing.Pipe()[0])
    done = threading.Timer(0.5, theirs.send, [("done", "", None)])
    done.start()
    answers = Runner("cpu", 1, 0.01)._answers(Worker(process, ours, None, Since()))
    with pytest.raises(StopIteration) as end:
        next(answers)
    assert end.value.value == (None if others else "took too long, 0 s")
    done.join()


def test_an_error_of_the_command_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner.__init__, "__defaults__", (None, workers.serve_half))
    monkeypatch.setattr(Results, "add", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    before = set(multiprocessing.active_children())
    assert main([*COMMAND, NAMES[0], "--out", str(tmp_path)]) == 2
    assert set(multiprocessing.active_children()) == before


def test_half_a_workload_is_left_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "step/ddim/pixel-64/b1/float32", []
    records = [(f"{name}/{noise}", {"turns": 1}) for noise in ("given", "drawn")]
    monkeypatch.setattr(Runner, "run", lambda *_: iter(records))
    monkeypatch.setattr(Results, "add", lambda results, *_: seen.append(dict(results.report["left"])))
    arguments = bench.parser().parse_args([*COMMAND, name, "--out", str(tmp_path)])
    assert bench.run(arguments, [registry()[name]], {})["left"] == {}
    assert seen == [{name: "not begun"}, {}]


def test_the_deadline_stops_what_runs() -> None:
    begin = time.monotonic()
    runner = Runner("cpu", 1, 0.01, begin + 0.5, target=workers.serve_half)
    for _ in range(2):
        with pytest.raises(OutOfTimeError):
            run(runner)
    assert time.monotonic() - begin < 60
    assert runner._worker is None


CODE = """
from support import faulty_workers
from benchmarks import bench
from benchmarks.suite.runner import Runner
Runner.__init__.__defaults__ = (None, faulty_workers.serve_once_and_hang)
bench.main({!r})
"""


def test_a_run_killed_in_the_middle_keeps_what_is_finished_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its own process, which hangs, ends too."""
    folder, hanging = tmp_path / "out", tmp_path / "hanging"
    command = [*COMMAND, *NAMES, "--out", str(folder)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HANGING": str(hanging), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(command)], env=os.environ | paths, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not hanging.exists():
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)  # the output's end: no process has it open any more
    killed = load(folder / "bench.json")
    assert list(killed["results"]) == NAMES[:1]
    assert not killed["finished"]
    assert killed["left"] == {NAMES[1]: "not begun"}

    monkeypatch.setattr(Runner.__init__, "__defaults__", (None, workers.serve_steadily))
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "resuming" in err
    whole = load(folder / "bench.json")
    assert whole["finished"]
    assert whole["results"][NAMES[0]] == killed["results"][NAMES[0]]
    assert list(whole["results"]) == NAMES
    assert whole["left"] == {}
    assert NAMES[0].split("/")[1] in out
    assert (folder / "bench.md").exists()


def results(folder: Path, commit: str = "a", fresh: bool = False) -> Results:
    return Results(folder / "bench.json", {"commit": commit}, {"seconds": 1.0}, fresh)


def test_only_an_unfinished_file_of_the_same_run_is_resumed(tmp_path: Path) -> None:
    first, record = results(tmp_path), {"turns": 1, "providers": {}, "ratios": {}}
    first.add("x", record)
    assert results(tmp_path).report["results"] == {"x": record}
    for other in ({"commit": "b"}, {"fresh": True}):
        first.write()
        assert results(tmp_path, **other).report["results"] == {}  # type: ignore[arg-type]
        assert load(tmp_path / "previous.json")["results"] == {"x": record}
    first.report["finished"] = True
    first.write()
    assert "previous.json" in results(tmp_path).told
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UsageError, match="not a report"):
        results(tmp_path)


# The gate


@pytest.mark.parametrize("solver", workloads.SOLVERS)
def test_every_way_to_be_wrong_is_further_off_than_the_tolerance(solver: str) -> None:
    case = StepCase.random(solver, SHAPE)
    truth = engine.exact_step(case)
    kept = [
        case,
        replace(case, output=case.output.roll(2, 0)),
        replace(case, scale=3.001),
        replace(case, timestep=11),
    ]
    distances = []
    for entered in kept:
        made = engine.step(entered, "reference")
        made.prepare()
        made.run(False)
        assert made.result is not None
        distances.append(measure._distance(made.result(), truth))
    right, *wrong = distances
    assert right < providers.TOLERANCES["float32"] < min(wrong)


def test_a_wrong_kernel_gets_no_time_and_fails_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcfg.kernels import guided_step

    case = StepCase.random("ddpm", SHAPE)
    work = Job(SHAPE, lambda seed: case, lambda: engine.exact_step(case), lambda: 1e-5, 1, 1, {})
    entry = Entry(lambda case: engine.step(case, "triton"), own=True)
    assert measure.check_provider(entry, work, work.truth(), 1e-5)[1]["status"] == "ok"

    launch = guided_step.launch_guided_step

    def wrong(*arguments: Any, **options: Any) -> None:
        launch(*arguments, **options)
        arguments[2].x[0, 0, 0, 0] += 1e-3

    step = make_case("ddpm", torch.float32, SHAPE, 0)
    assert not any(finding.problem for finding in check_step(step, "triton", CPU))
    monkeypatch.setattr(guided_step, "launch_guided_step", wrong)
    assert any("from the reference" in finding.problem for finding in check_step(step, "triton", CPU))
    made, found = measure.check_provider(entry, work, work.truth(), 1e-5)
    assert made is None
    assert (found["status"], "us" in found) == ("refused", False)


def test_noise_drawn_in_the_kernel_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    case = StepCase.random("ddpm", SHAPE)
    work = Job(SHAPE, lambda seed: case, lambda: engine.exact_step(case), lambda: 1e-5, 1, 1, {})
    other = replace(case, seeds=case.seeds + 1)
    for given, status in ((case, "ok"), (other, "refused")):
        entry = Entry(lambda _, given=given: engine.step(given, "triton"))
        assert measure.check_provider(entry, work, work.truth(), 1e-5)[1]["status"] == status


# The work


@pytest.mark.parametrize("style", originals.STYLES)
@pytest.mark.parametrize("solver", workloads.SOLVERS)
def test_the_originals_steps_have_the_bits_of_the_reference_formulas(style: str, solver: str) -> None:
    case = StepCase.random(solver, SHAPE)
    learned = solver != "ddpm-fixed"
    made = originals.step(case, originals.Original(case.schedule, style, learned))
    made.prepare()
    made.run(False)

    x, t = torch.cat([case.x, case.x]), torch.full((4,), case.timestep)
    output = originals.guided(lambda x, t: case.output, case.scale, 3)(x, t)
    variance = "learned_range" if learned else "fixed_small"
    p = reference_originals.p_mean_variance(case.schedule, output, x, t, variance=variance)
    want = reference_originals.ddim_sample(case.schedule, p, x, t, case.noise)
    if solver != "ddim":
        want = reference_originals.p_sample(p, t, case.noise)
    assert made.result is not None
    assert torch.equal(made.result(), want[:2])


class Upstream(originals.Original):
    """Draws for itself, as the originals do."""

    def p_sample(self, model: Any, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"sample": super().p_sample(model, x, t, torch.randn_like(x))}


def test_the_originals_themselves_take_part_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = StepCase.random("ddpm", SHAPE).schedule
    process = originals._Upstream(Upstream(schedule, "GLIDE"))
    monkeypatch.setattr(originals, "upstream", lambda style, *_: process if style == "GLIDE" else None)
    work = providers.job(registry()["step/ddpm/pixel-64/b1/float32"], CPU)
    assert [name for name in work.entries if "itself" in name] == ["GLIDE itself"]
    draw, results = torch.randn_like, []
    for name in ("GLIDE", "GLIDE itself"):
        made = work.entries[name].make(work.case(0))
        made.prepare()
        made.run(False)
        assert made.result is not None
        results.append(made.result())
    assert torch.equal(*results)
    assert torch.randn_like is draw


def eager(work: Job) -> Iterator[tuple[str, Provider]]:
    for name, entry in work.entries.items():
        if not entry.problem and entry.counted:
            yield name, entry.make(work.case(0))


@pytest.mark.parametrize("solver", workloads.SOLVERS)
def test_steps_agree_and_draw_only_when_asked_to(solver: str) -> None:
    work = providers.job(registry()[f"step/{solver}/pixel-64/b1/float32"], CPU)
    truth, seen = work.truth(), set()
    for name, made in eager(work):
        if made.result is None:
            continue
        for draw in (False, True):
            state = torch.get_rng_state()
            made.prepare()
            made.run(draw)
            moved = not torch.equal(torch.get_rng_state(), state)
            careful = solver == "ddim" and name in ("torch eager", "reference", "diffusers")
            # k-diffusion's Euler draws noise, and multiplies it by zero.
            assert moved == ((draw and not careful) or (name == "k-diffusion" and solver == "ddim")), name
            if not draw:
                assert measure._distance(made.result(), truth) < work.tolerance(), name
        seen.add(name)
    assert {"guided-diffusion", "torch eager", "reference"} <= seen


@pytest.mark.parametrize("name", ["loop/ddpm/null-pixel-64/b1/float32", "loop/ddim/null-pixel-64/b1/float32"])
def test_loops_end_at_the_same_samples(name: str) -> None:
    work = providers.job(registry()[name], CPU)
    truth, seen = work.truth(), set()
    for provider_name, made in eager(work):
        made.prepare()
        made.run(False)
        assert made.result is not None
        assert measure._distance(made.result(), truth) < work.tolerance(), provider_name
        seen.add(provider_name)
    assert {"guided-diffusion", "GLIDE", "fastcfg"} <= seen


def test_half_precision_is_judged_by_the_distance_that_the_gate_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    work = providers.job(replace(registry()["loop/ddim/null-latent-128/b1/float32"], dtype="bfloat16"), CPU)
    monkeypatch.setattr(providers, "HALF_FLOOR", 0.0)
    exact, calls = engine.exact_loop, []
    monkeypatch.setattr(engine, "exact_loop", lambda *given: [calls.append(1), exact(*given)][1])
    tolerance, truth = work.tolerance(), work.truth()
    assert float(truth.abs().max()) > 2  # latents are not clipped
    plain = work.entries["guided-diffusion"].make(work.case(0))
    plain.run(False)
    assert plain.result is not None
    distance = measure._distance(plain.result(), truth)
    assert tolerance == pytest.approx(providers.PLAIN_FACTOR * distance)
    assert len(calls) == 1


def test_noise_drawn_in_a_fused_step_moves_nothing() -> None:
    moved = {}
    for solver in workloads.SOLVERS:
        work = providers.job(registry()[f"step/{solver}/pixel-64/b1/bfloat16"], CPU)
        moved[solver] = [size / (3 * 64 * 64) for size in (work.moved, work.moved_drawing)]  # type: ignore[operator]
        assert work.case(1) is work.case(1)
    # x twice, two outputs and inputs, the variance, and the noise that is given.
    assert moved == {"ddpm": [22, 18], "ddpm-fixed": [20, 16], "ddim": [16, 16]}


@pytest.mark.parametrize("kind", ["op", "option"])
def test_formulas_in_torch_agree_with_the_operations(kind: str) -> None:
    for workload in registry().values():
        if workload.kind == kind and workload.on_cpu:
            work = providers.job(replace(workload, batch=1), CPU)
            truth = work.truth()
            for name, made in eager(work):
                made.prepare()
                made.run(False)
                if made.result is not None:
                    assert measure._distance(made.result(), truth) < work.tolerance(), (workload.name, name)


def test_what_is_dispatched_is_that_of_the_originals_and_of_a_lean_step() -> None:
    # Kernels, those of full size, copies from the host: counted by running openai/guided-diffusion@22e0df8183 and
    # openai/glide-text2im@69b530740e in the same way; reads of diffusers 0.42 and k-diffusion 0.1.1.
    want = {
        ("ddpm", "guided-diffusion"): (45, 26, 10, 0),
        ("ddim", "guided-diffusion"): (71, 44, 14, 0),
        ("ddpm", "GLIDE"): (61, 42, 10, 0),
        ("ddim", "GLIDE"): (95, 68, 14, 0),
        # As tests/engine/test_no_allocation.py has it: fourteen passes and the drawing, and eleven.
        ("ddpm", "reference"): (21, 15, 0, 0),
        ("ddim", "reference"): (17, 11, 0, 0),
    }
    got = {}
    for solver in ("ddpm", "ddim"):
        work = providers.job(registry()[f"step/{solver}/pixel-64/b1/float32"], CPU)
        for name in ("guided-diffusion", "GLIDE", "reference"):
            entry = work.entries[name]
            found = measure._costs(entry, entry.make(work.case(0)), CPU, 3 * 64 * 64)["counts"]
            got[solver, name] = tuple(found[key] for key in ("kernels", "full_size", "host_copies", "reads"))
    assert got == want


def test_reads_are_counted() -> None:
    numbers = torch.arange(3.0)
    made = Provider(nothing, lambda draw: [numbers[0].item(), bool(numbers[1] > 0), numbers.add(1)], None)
    assert measure._costs(Entry(nothing), made, CPU, 3)["counts"]["reads"] == 2
    assert "counts" not in measure._costs(Entry(nothing, counted=False), made, CPU, 3)


def test_ratios_are_taken_turn_by_turn() -> None:
    made = {"own": provider()(None), "other": provider()(None), COPY: replace(provider()(None), result=None)}
    turns = Turns(made, {}, CPU, nothing)
    turns.take = lambda draw: setattr(turns, "made", 9)  # type: ignore[method-assign, assignment]
    # The first is not counted. A machine that becomes slower in between changes times, not their ratio.
    turns.whole = {"own": [9.0, 1.0, 10.0, 100.0], "other": [1.0, 3.0, 30.0, 300.0], COPY: [1.0, 1.0, 1.0, 1.0]}
    work = workers.faulty_job({name: Entry(nothing, own=name == "own") for name in made})(None, CPU)
    found = measure._timed(work, made, {}, False, 0.0, turns)
    assert found["ratios"] == {"own": {"other": {"p20": 3.0, "p50": 3.0, "p80": 3.0}}}
    assert found["providers"]["own"]["us"]["p50"] == 10.0
    assert found["providers"]["own"]["gb_per_s"] == pytest.approx(8 / 10.0 / 1e3)
    assert found["providers"]["own"]["of_copy"] == pytest.approx(0.1)


def test_the_share_of_a_datasheet() -> None:
    gpus = {
        "H100 SXM": {"bytes_ps": 5.0, "instructions_ps": 2.0},
        "H200 SXM": {"bytes_ps": 4.0, "instructions_ps": 8.0},
    }
    times = {"device_us": {"p50": 16.0}, "us": {"p50": 99.0}}
    record = {"kind": "step", "solver": "ddpm", "noise": "drawn", "dtype": "bfloat16", "shape": [2, 500, 1000]}
    report: dict[str, Any] = {
        "environment": {"device": "NVIDIA H200"},
        "roofline": {"rows": [{"variant": "main", "gpus": gpus}, {"variant": "ddim", "gpus": {}}]},
        "results": {"a": {**record, "providers": {"triton": times, "reference": dict(times)}}},
    }
    add_shares(report)
    # 8 ps for each of a million elements are 8 microseconds.
    assert report["results"]["a"]["providers"]["triton"]["of_roofline"] == pytest.approx(0.5)
    assert "of_roofline" not in report["results"]["a"]["providers"]["reference"]


# The registry and the command


def test_the_registry_has_what_people_look_for_and_the_important_first() -> None:
    names = list(registry())
    assert names[0] == "step/ddpm/pixel-64/b1/float32"
    for model in workloads.MODELS:
        for batch in (1, 4, 16):
            assert any(f"/{model}/b{batch}/" in name for name in names)
    for family in workloads.SHAPES:
        assert f"step/ddpm/{family}/b1/bfloat16" in names
    assert "step/ddpm/pixel-64/b256/float16" in names


def test_selection() -> None:
    chosen, left = select([], "cpu")
    assert all(workload.on_cpu for workload in chosen)
    assert len(chosen) + len(left) == len(registry())
    assert set(left.values()) == {"needs a GPU"}
    assert [w.name for w in select(["step/ddim/pixel-64/b1"], "cpu")[0]] == [
        f"step/ddim/pixel-64/b1/{dtype}" for dtype in ("float32", "bfloat16", "float16")
    ]
    assert {w.batch for w in select(["loop/*/sd15/*"], "cpu")[0]} == {1, 4, 16}
    assert len(select([], "cuda")[0]) == len(registry())
    with pytest.raises(ValueError, match="only: got 'setp'"):
        select(["setp"], "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "setp"], "argument --only: got 'setp'"),
        (["--budget", "4 fortnights"], "--budget: got '4 fortnights'"),
        (["--threads", "0"], "--threads: got '0'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measuring began"))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(registry())
    assert lines[0] == "step/ddpm/pixel-64/b1/float32"


def test_a_budget_of_nothing_names_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", NAMES[0], "--out", str(tmp_path), "--budget", "0.001s", "--quiet", "--device", "cpu"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["left"] == {NAMES[0]: OUT_OF_TIME}
    assert not report["finished"]
    assert "not finished" in capsys.readouterr().out
