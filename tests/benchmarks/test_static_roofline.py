"""The kernels compiled for an H100 that is not there, in every variant, and the command that does it."""

from __future__ import annotations

import pytest
from support.machine_code import ALL, MachineCode, Rows

from benchmarks.__main__ import main


class TestHopper(MachineCode):
    targets = ("sm_90",)
    variants = ALL

    def test_the_main_step_moves_18_bytes_per_element(self, rows: Rows) -> None:
        assert rows["sm_90", "main"]["bytes_per_element"] == 18

    def test_the_main_step_costs_at_most_80_instructions_per_element(self, rows: Rows) -> None:
        row = rows["sm_90", "main"]
        assert row["elements_per_thread"] == 16
        # 69.6 with Triton 3.9, 71.1 with 3.6.
        assert row["instructions_per_element"] <= 80

    def test_the_passes_over_x0_cost_few_instructions(self, rows: Rows) -> None:
        """Counting and predicting x0, for 16 elements in a thread."""
        # 32.6, 21.1, 23.9, 28.4 with Triton 3.9, which counts with atomics; 99, 72.6, 72.6, 73.8 with 3.6's ballots.
        most = {"step-bound": 110, "quantile-first": 80, "quantile-pass": 80, "quantile-last": 80}
        measured = {variant: rows["sm_90", variant]["instructions_per_element"] for variant in most}
        assert {variant: n for variant, n in measured.items() if n > most[variant]} == {}


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["--target", "sm_90"], "1", "TRITON_INTERPRET is set"),
        (["--json", "/no/such/folder/rows.json"], "0", "argument --json: got '/no/such/folder/rows.json'"),
        (["--target", "sm_75"], "0", "argument --target: invalid choice: 'sm_75'"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    arguments: list[str],
    interpret: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert main(["static_roofline", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("static_roofline: error: ")
    assert message in err
    assert err.count("\n") == 1
