"""The kernels compiled for GPUs that are not there: what the machine code must not have, and what it may cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from support import ROOT

# Triton 3.4, which torch 2.8 requires, links AMD's code with ROCm's own linker, which only such a machine has.
OLDEST = version("triton").startswith("3.4.")
TARGETS = ("sm_80", "sm_90", "sm_100") if OLDEST else ("sm_80", "sm_90", "sm_100", "gfx942")
# Its only spill: two registers of a step with three saved tensors.
SPILLS, STACKS = ({("sm_80", "history-3"): size} if OLDEST else {} for size in (4, 8))

# Of every contiguous step: float32 tensors read and written per element, each to be moved 16 bytes at a time.
STEPS = {
    "main": (1, 1),
    "block-1024": (1, 1),
    "block-512": (1, 1),
    "noise-tensor": (2, 1),
    "fixed-variance": (1, 1),
    "ddim": (1, 1),
    "fp16": (1, 1),
    "fp32": (1 + 3, 1 + 2),
    "k3": (1, 1),
    "history-3": (1 + 3, 1 + 1),
    "gradient": (1 + 1, 1),
    "x0": (1, 1 + 1),
    "rescale": (1, 1),
    "scaled": (1, 1),
    "momentum": (1 + 1, 1),
    "all-terms": (1 + 4, 1 + 2),
    "one-sample": (1 + 4, 1 + 2),
}
PIECES = ("split-piece", "blend-piece", "x0-piece", "posterior-piece", "threshold-piece")
# Of dynamic thresholding: they count, and the last program of a sample goes on.
PASSES = ("step-bound", "quantile-first", "quantile-pass", "quantile-last")
# Of the Gram matrix.
SUMS = ("gram", "gram-k3-momentum")
# One element at a time.
SCALAR = ("channels-last", "gram-channels-last", "odd-size", "one-element", "step-bound-one")

# sm_80 and sm_90 compile everything; the others these, which between them have every feature, to save a minute.
CHOSEN = (
    *("main", "fp32", "x0", "all-terms", "one-sample", "rescale", "scaled", "momentum", *SUMS, "gram-sum"),
    *("blend-piece", "posterior-piece", "step-bound", "quantile-first", "channels-last", "step-bound-one"),
    "starting-noise",
)

# Of a thread with 16 elements (8 on gfx942). 128 leave room for 16 warps on an SM. Measured with Triton 3.9 and 3.6, at
# most: 128 with x0 output, 108 otherwise.
MOST_REGISTERS = 128
# Addresses and masks of single elements take registers, and so do three saved tensors. Measured: 168, 145, 188.
MOST_REGISTERS_OF = {"all-terms": 176, "channels-last": 176, "odd-size": 208}


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static_roofline", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What is compiled, by target and variant, all of it afresh."""
    folder = tmp_path_factory.mktemp("roofline")
    names = (*STEPS, *PIECES, *PASSES, *SUMS, *SCALAR, "gram-sum", "starting-noise")  # other dtypes are for the table
    found = {}
    for targets, variants in ((TARGETS[:2], names), (TARGETS[2:], CHOSEN)):
        arguments = ("--target", *targets, "--variant", *variants, "--json", str(folder / "rows.json"))
        done = run_command(*arguments, TRITON_CACHE_DIR=str(folder / "cache"))
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((folder / "rows.json").read_text())
        assert all(row["target"] in done.stdout and row["variant"] in done.stdout for row in report["rows"])
        assert {(row["target"], row["variant"]) for row in report["rows"]} == {
            (t, v) for t in targets for v in variants
        }
        found |= {(row["target"], row["variant"]): row for row in report["rows"]}
    return found


def test_nothing_spills_and_nothing_lives_in_local_memory(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert {key: row["spills"] for key, row in rows.items() if row["spills"]} == SPILLS
    assert {key: row["stack_bytes"] for key, row in rows.items() if row["stack_bytes"]} == STACKS


def test_no_instruction_runs_twice(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """So that the number of instructions bounds what is executed."""
    loops = {key: row["backward_branches"] for key, row in rows.items() if row["backward_branches"]}
    # On AMD an atomic maximum is made of those of its active lanes, one after the other: here of a single one.
    single = {("gfx942", variant) for variant in ("step-bound", "step-bound-one", "quantile-first", "quantile-last")}
    # The sum over blocks goes on for as many as there are.
    single |= {(target, "gram-sum") for target in TARGETS}
    assert {key: n for key, n in loops.items() if n > (key in single)} == {}


def test_registers(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    used = {key: row["registers"] for key, row in rows.items()}
    assert {k: n for k, n in used.items() if n > MOST_REGISTERS_OF.get(k[1], MOST_REGISTERS)} == {}


def test_every_warp_has_read_the_row_before_the_ticket(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Or the last program may advance the row under a slow warp of another, or miss its counts. No interpreter shows
    it."""
    with_ticket = {key: row for key, row in rows.items() if key[1] in (*STEPS, *PASSES, "step-bound-one")}
    assert {key for key, row in with_ticket.items() if not row["barriers_before_ticket"]} == set()


@pytest.mark.parametrize(
    ("target", "variant"), [(t, v) for t in TARGETS for v in STEPS if t in TARGETS[:2] or v in CHOSEN]
)
def test_float32_tensors_move_16_bytes_at_a_time(
    rows: dict[tuple[str, str], dict[str, Any]], target: str, variant: str
) -> None:
    row = rows[target, variant]
    if row["elements_per_thread"] < 4:
        # Waves of 64 threads have only 2 elements each in the smallest programs.
        assert target == "gfx942"
        assert variant in ("block-512", "one-sample")
        return
    groups = row["elements_per_thread"] / 4
    read, written = STEPS[variant]
    assert (row["loads"].get("16"), row["stores"].get("16")) == (read * groups, written * groups)
    assert "2" not in row["loads"]
    assert "2" not in row["stores"]


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        (target, variant)
        for target in ("sm_80", "sm_90", "sm_100")
        for variant in (*STEPS, *PIECES, *PASSES, *SUMS)
        if target != "sm_100" or variant in CHOSEN
    ],
)
def test_the_code_moves_the_bytes_of_the_formula(
    rows: dict[tuple[str, str], dict[str, Any]], target: str, variant: str
) -> None:
    row = rows[target, variant]
    moved = sum(
        int(width) * count for kind in ("loads", "stores") for width, count in row[kind].items() if int(width) > 4
    )
    scalars = 0
    if variant in STEPS:
        # Each of 8 bytes: the seed, and the time for each branch.
        scalars = 8 * (variant not in ("ddim", "history-3", "noise-tensor")) + 8 * (3 if variant == "k3" else 2)
    assert (moved - scalars) / row["elements_per_thread"] == row["bytes_per_element"]


def test_the_main_step_moves_18_bytes_per_element(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert rows["sm_90", "main"]["bytes_per_element"] == 18


def test_the_main_step_costs_at_most_80_instructions_per_element(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    row = rows["sm_90", "main"]
    assert row["elements_per_thread"] == 16
    # 69.6 with Triton 3.9, 71.1 with 3.6.
    assert row["instructions_per_element"] <= 80


def test_the_main_step_is_bound_by_bytes_everywhere(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    bounds = {name: gpu["bound"] for target in TARGETS for name, gpu in rows[target, "main"]["gpus"].items()}
    names = ["A100 SXM 80GB", "H100 SXM", "H200 SXM", "B200", *(["MI300X"] if "gfx942" in TARGETS else [])]
    assert bounds == dict.fromkeys(names, "bytes")


def test_the_passes_over_x0_cost_few_instructions(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Those of one that counts and those of predicting x0, for 16 elements in a thread."""
    # sm_90: 32.6, 21.1, 23.9, 28.4 with Triton 3.9, which counts with atomics; 99, 72.6, 72.6, 73.8 with 3.6's ballots.
    most = {"step-bound": 110, "quantile-first": 80, "quantile-pass": 80, "quantile-last": 80}
    measured = {variant: rows["sm_90", variant]["instructions_per_element"] for variant in most}
    assert {variant: n for variant, n in measured.items() if n > most[variant]} == {}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--target", "sm_90"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["--json", "/no/such/folder/rows.json"], {}, "--json: got /no/such/folder/rows.json"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = run_command(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_an_unknown_target_is_refused_with_those_known() -> None:
    done = run_command("--target", "sm_75")
    assert done.returncode == 2
    assert "sm_75" in done.stderr
    assert "sm_90" in done.stderr
