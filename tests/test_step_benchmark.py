"""`python -m benchmarks step`: the originals' steps and counts, the gate, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import originals, step
from benchmarks.step import Case, Provider, compare, counts, fastcfg
from fastcfg import Schedule
from fastcfg.reference import gaussian

SHAPE = (2, 3, 4, 4)
SCHEDULE = Schedule.named("linear").respace(step.STEPS)


@pytest.mark.parametrize("style", originals.STYLES)
@pytest.mark.parametrize("solver", step.SOLVERS)
def test_the_originals_steps_have_the_bits_of_the_reference_formulas(style: str, solver: str) -> None:
    case = Case.random(solver, SHAPE)
    provider = step.original(case, originals.Original(SCHEDULE, style))
    provider.prepare()
    provider.step(False)

    x, t = torch.cat([case.x, case.x]), torch.full((4,), step.TIMESTEP)
    output = originals.guided(case.output, step.SCALE)(x, t)
    p = gaussian.p_mean_variance(SCHEDULE, output, x, t)
    want = (
        gaussian.p_sample(p, t, case.noise) if solver == "ddpm" else gaussian.ddim_sample(SCHEDULE, p, x, t, case.noise)
    )
    assert torch.equal(provider.result(), want[:2])


def test_counts_are_those_of_the_originals_and_of_a_lean_step() -> None:
    found = counts()
    # Kernels and host-to-device copies of openai/guided-diffusion@22e0df8183 and openai/glide-text2im@69b530740e,
    # counted by running their own code in the same way.
    want = {
        ("ddpm", "guided-diffusion"): (45, 10),
        ("ddim", "guided-diffusion"): (71, 14),
        ("ddpm", "GLIDE"): (61, 10),
        ("ddim", "GLIDE"): (95, 14),
        ("ddpm", "reference"): (18, 0),
        ("ddim", "reference"): (14, 0),
        ("ddpm", "triton"): (2, 0),
        ("ddim", "triton"): (1, 0),
    }
    got = {
        (solver, name): (entry["kernels"], entry["host_copies"])
        for solver, entries in found.items()
        for name, entry in entries.items()
    }
    assert got == want
    # As tests/test_no_allocation.py has it: eleven passes and the drawing, and eight.
    assert [found[solver]["reference"]["full_size"] for solver in step.SOLVERS] == [12, 8]


def entered_for(case: Case) -> tuple[dict[str, Provider], torch.Tensor]:
    truth = fastcfg(case, SCHEDULE, "reference", torch.float64)
    truth.prepare()
    truth.step(False)
    entered = {style: step.original(case, originals.Original(SCHEDULE, style)) for style in originals.STYLES}
    return {**entered, "reference": fastcfg(case, SCHEDULE, "reference")}, truth.result()


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_wrong_provider_gets_no_time(factor: float) -> None:
    case = Case.random("ddpm", SHAPE)
    entered, truth = entered_for(case)
    right = entered["reference"]
    entered["wrong"] = replace(right, result=lambda: right.result() * factor)
    for record in compare(case, entered, truth, seconds=0):
        found = record["providers"]
        assert "us" not in found["wrong"]
        assert "from the float64 step, more than 1e-05" in found["wrong"]["refused"]
        assert "wrong" not in record["ratios"]
        for name in ("guided-diffusion", "GLIDE", "reference"):
            assert "refused" not in found[name]
            assert found[name]["us"]["p50"] > 0


@pytest.mark.parametrize("solver", step.SOLVERS)
def test_a_wrong_guidance_scale_timestep_or_batch_half_would_be_noticed(solver: str) -> None:
    case = Case.random(solver, SHAPE)
    entered, truth = entered_for(case)
    reference = entered["reference"]
    assert step.error(reference, truth)[0] <= step.TOLERANCE
    swapped = fastcfg(replace(case, output=case.output.roll(2, 0)), SCHEDULE, "reference")
    other = fastcfg(case, Schedule.named("linear").respace(step.STEPS + 1), "reference")
    for wrong in (swapped, other):
        assert step.error(wrong, truth)[0] > step.TOLERANCE


def test_given_noise_is_not_drawn_and_drawn_noise_is() -> None:
    entered, _ = entered_for(Case.random("ddpm", SHAPE))
    for provider in entered.values():
        for draw in (False, True):
            state = torch.get_rng_state()
            provider.prepare()
            provider.step(draw)
            assert torch.equal(torch.get_rng_state(), state) != draw


def test_the_originals_themselves_take_part_where_they_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process(originals.Original):
        def p_sample(self, model: Any, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"sample": super().p_sample(model, x, t, torch.randn_like(x))}

    process = originals._Upstream(Process(SCHEDULE, "GLIDE"))
    monkeypatch.setattr("benchmarks.providers.upstream", lambda style, *_: process if style == "GLIDE" else None)
    monkeypatch.setattr("benchmarks.providers.inductor_problem", lambda device: "not asked for")
    case = Case.random("ddpm", SHAPE)
    entered = step.providers(case, SCHEDULE, Schedule.named("linear").betas)
    assert list(entered) == ["guided-diffusion", "GLIDE", "GLIDE itself", "reference"]
    draw = torch.randn_like
    for name in ("GLIDE", "GLIDE itself"):
        entered[name].prepare()
        entered[name].step(False)
    assert torch.equal(entered["GLIDE"].result(), entered["GLIDE itself"].result())
    assert torch.randn_like is draw


def test_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.providers.inductor_problem", lambda device: "not asked for")
    files = {"json": tmp_path / "step.json", "markdown": tmp_path / "step.md"}
    before = torch.get_num_threads()
    arguments = ["--shape", "1,3,4,4", "--threads", "1", "--seconds", "0", "--device", "cpu"]
    for option, path in files.items():
        arguments += [f"--{option}", str(path)]
    assert step.main(arguments) == 0
    assert torch.get_num_threads() == before

    report = json.loads(files["json"].read_text())
    assert set(report) == {"environment", "settings", "counts", "results"}
    assert {"torch", "device", "cpu_capability", "load_average", "commit"} <= set(report["environment"])
    assert report["settings"]["tolerance"] == step.TOLERANCE
    assert [(r["solver"], r["noise"]) for r in report["results"]] == [
        (solver, noise) for solver in step.SOLVERS for noise in ("given", "drawn")
    ]
    for result in report["results"]:
        assert result["shape"] == [1, 3, 4, 4]
        assert (result["threads"], result["clock"]) == (1, "cpu")
        assert result["turns"] >= step.MIN_TURNS
        for found in result["providers"].values():
            assert found["max_error"] <= step.TOLERANCE
            assert 0 < found["us"]["p20"] <= found["us"]["p50"] <= found["us"]["p80"]
        assert set(result["ratios"]["reference"]) == set(originals.STYLES)

    text = files["markdown"].read_text()
    assert capsys.readouterr().out == text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) == 1 + 4 + 1 + 8
    assert "| ddim, guided-diffusion | 71 | 44 | 14 |" in tables
    assert {line.count("|") for line in tables[:5]} == {tables[0].count("|")}


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.providers.inductor_problem", lambda device: "not asked for")
    monkeypatch.setattr(step, "TOLERANCE", 1e-30)
    assert step.main(["--shape", "1,3,4,4", "--threads", "1", "--seconds", "0", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "refused, because its result is wrong: GLIDE, guided-diffusion, reference" in told.err
    assert "| refused |" in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,3,x"], "--shape: got '1,3,x', expected positive integers"),
        (["--threads", "0"], "--threads: got '0', expected positive integers"),
        (["--json", "step.txt"], "--json"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "run", lambda arguments: pytest.fail("measuring began"))
    assert step.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("step: error: ")
    assert message in err
    assert err.count("\n") == 1
