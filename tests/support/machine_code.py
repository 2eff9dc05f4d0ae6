"""What the kernels' machine code must not have and may cost, for any GPU: no GPU is needed.

tests/benchmarks/ has one file for the GPU whose code is compiled in every variant, and one for the others: compiling
takes nearly all the time, and a file is the unit that test workers share out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from support import ROOT

Rows = dict[tuple[str, str], dict[str, Any]]

# Every contiguous step: float32 tensors read and written per element, each to be moved 16 bytes at a time.
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
    "by-channel": (1, 1),
    "by-element": (1 + 1, 1),
    "k3-by-element": (1 + 2, 1),
    "all-terms": (1 + 4, 1 + 2),
    "one-sample": (1 + 4, 1 + 2),
}
PIECES = (
    "split-piece",
    "blend-piece",
    "x0-piece",
    "posterior-piece",
    "threshold-piece",
    "combine-all-bf16",
    "finite",
    "noise-sums-tensor",
)
# Sums of the same tensors: float32 tensors read and written.
COMBINED = {"combine": (2, 2), "combine-all": (8 + 1, 4), "combine-one-sample": (2, 2)}
# Changes of the state between rows: float32 tensors read and written.
CHANGES = {"state-change": (1, 1), "known-pixels": (3, 1), "known-pixels-all": (3, 1)}
# Dynamic thresholding: they count, and the last program of a sample continues.
PASSES = ("step-bound", "quantile-first", "quantile-pass", "quantile-last")
# The Gram matrix.
SUMS = ("gram", "gram-k3-momentum")
# One element at a time.
SCALAR = (
    *("channels-last", "channels-last-by-channel", "gram-channels-last", "odd-size", "one-element", "step-bound-one"),
    "known-pixels-channels-last",
)

ALL = (*STEPS, *PIECES, *COMBINED, *CHANGES, *PASSES, *SUMS, *SCALAR, "gram-sum", "starting-noise", "noise-sums")
ALL += ("brownian",)

# For the other targets. Between them they have every feature: of variants with a feature in common, the one with most
# terms, which takes the most registers.
CHOSEN = (
    *("main", "fp32", "all-terms", "one-sample", "rescale", "momentum", "channels-last", "odd-size"),
    *("k3-by-element", "channels-last-by-channel"),
    *("blend-piece", "combine-all", "step-bound", "quantile-first", "gram-k3-momentum", "gram-sum"),
    *("finite", "noise-sums", "known-pixels-all", "known-pixels-channels-last", "brownian"),
)

# For a thread with 16 elements (8 on gfx942). 128 leave room for 16 warps on an SM. Measured with Triton 3.9 and 3.6,
# at most: 128 with x0 output, 108 otherwise.
MOST_REGISTERS = 128
# Addresses and masks of single elements take registers, and so do three saved tensors and two draws.
# Measured: 168, 145, 188, 148.
MOST_REGISTERS_OF = {"all-terms": 176, "channels-last": 176, "odd-size": 208, "known-pixels-all": 160}
MOST_REGISTERS_OF |= {"channels-last-by-channel": 176}


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "static_roofline", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False)


class MachineCode:
    """Tests of what is compiled for `targets`, of which the first is compiled in all `variants`."""

    targets: tuple[str, ...]
    variants: tuple[str, ...]

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
        """What `python -m benchmarks static_roofline` says, by target and variant."""
        file = tmp_path_factory.mktemp("roofline") / "rows.json"
        arguments = ("--target", *cls.targets, "--variant", *cls.variants, "--json", str(file))
        # Triton keeps what it has compiled by source, target and versions: only changed kernels are compiled again.
        kept = getattr(request.config, "cache", None)
        cache = kept.mkdir("triton") if kept else file.parent
        done = run_command(*arguments, TRITON_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stdout + done.stderr
        rows = {(row["target"], row["variant"]): row for row in json.loads(file.read_text())["rows"]}
        assert list(rows) == [(target, variant) for target in cls.targets for variant in cls.variants]
        assert all(target in done.stdout and variant in done.stdout for target, variant in rows)
        return rows

    def test_nothing_spills_and_nothing_lives_in_local_memory(self, rows: Rows) -> None:
        assert {key: row["spills"] for key, row in rows.items() if row["spills"]} == {}
        assert {key: row["stack_bytes"] for key, row in rows.items() if row["stack_bytes"]} == {}

    def test_no_instruction_runs_twice(self, rows: Rows) -> None:
        """So that the number of instructions bounds what is executed."""
        # On AMD an atomic maximum is a loop over its active lanes: here a single one. The sums over blocks,
        # and over the normals of Brownian noise, are loops.
        atomic = ("step-bound", "step-bound-one", "quantile-first", "quantile-last")
        looping = {("gfx942", variant) for variant in atomic}
        looping |= {(target, name) for target in self.targets for name in ("gram-sum", "brownian")}
        loops = {key: row["backward_branches"] for key, row in rows.items()}
        assert {key: n for key, n in loops.items() if n > (key in looping)} == {}

    def test_registers(self, rows: Rows) -> None:
        used = {key: row["registers"] for key, row in rows.items()}
        assert {k: n for k, n in used.items() if n > MOST_REGISTERS_OF.get(k[1], MOST_REGISTERS)} == {}

    def test_every_warp_has_read_the_row_before_the_ticket(self, rows: Rows) -> None:
        """Or the last program may advance the row under a slow warp of another, or miss its counts. No interpreter
        shows it."""
        with_ticket = {key: row for key, row in rows.items() if key[1] in (*STEPS, *PASSES, "step-bound-one")}
        assert {key for key, row in with_ticket.items() if not row["barriers_before_ticket"]} == set()

    def test_float32_tensors_move_16_bytes_at_a_time(self, rows: Rows) -> None:
        wrong, moved = {}, STEPS | COMBINED | CHANGES
        for (target, variant), row in rows.items():
            if variant not in moved:
                continue
            if row["elements_per_thread"] < 4:
                # Waves of 64 threads have only 2 elements each in the smallest programs.
                assert (target, variant) in {("gfx942", "block-512"), ("gfx942", "one-sample")}
                continue
            groups, (read, written) = row["elements_per_thread"] / 4, moved[variant]
            moves = (row["loads"].get("16"), row["stores"].get("16"))
            if moves != (read * groups, written * groups) or "2" in row["loads"] or "2" in row["stores"]:
                wrong[target, variant] = row["loads"], row["stores"]
        assert wrong == {}

    def test_the_code_moves_the_bytes_of_the_formula(self, rows: Rows) -> None:
        """On NVIDIA; AMD's code reads scalars by instructions of their own."""
        wrong = {}
        for (target, variant), row in rows.items():
            if not target.startswith("sm_") or variant not in (*STEPS, *PIECES, *COMBINED, *CHANGES, *PASSES, *SUMS):
                continue
            widths = [(int(width), count) for kind in ("loads", "stores") for width, count in row[kind].items()]
            moved, scalars = sum(width * count for width, count in widths if width > 4), 0
            if variant in STEPS:
                # Each of 8 bytes: the seed, and the time for each branch.
                branches = 3 if variant.startswith("k3") else 2
                scalars = 8 * (variant not in ("ddim", "history-3", "noise-tensor")) + 8 * branches
            if variant in CHANGES:
                # The times of two branches, and the seed.
                scalars = 8 * (2 if variant == "state-change" else 3)
            if (moved - scalars) / row["elements_per_thread"] != row["bytes_per_element"]:
                wrong[target, variant] = (moved - scalars) / row["elements_per_thread"], row["bytes_per_element"]
        assert wrong == {}

    def test_the_main_step_is_bound_by_bytes(self, rows: Rows) -> None:
        bounds = [gpu["bound"] for target in self.targets for gpu in rows[target, "main"]["gpus"].values()]
        assert len(bounds) >= len(self.targets)
        assert set(bounds) == {"bytes"}
