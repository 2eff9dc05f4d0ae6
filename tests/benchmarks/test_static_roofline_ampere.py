"""The kernels compiled for an A100 that is not there, in every variant."""

from __future__ import annotations

from importlib.metadata import version

from support.machine_code import ALL, MachineCode, Rows


class TestAmpere(MachineCode):
    targets = ("sm_80",)
    variants = ALL

    def test_nothing_spills_and_nothing_lives_in_local_memory(self, rows: Rows) -> None:
        if not version("triton").startswith("3.4."):
            super().test_nothing_spills_and_nothing_lives_in_local_memory(rows)
            return
        # Triton 3.4, which torch 2.8 requires, spills two registers of a step with three saved tensors.
        spills = {key: (row["spills"], row["stack_bytes"]) for key, row in rows.items() if row["spills"]}
        assert spills == {("sm_80", "history-3"): (4, 8)}
