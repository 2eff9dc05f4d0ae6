"""The kernels compiled for other GPUs that are not there, in the variants that between them have every feature."""

from __future__ import annotations

from support.machine_code import CHOSEN, MachineCode


class TestOthers(MachineCode):
    targets = ("sm_80", "sm_100", "gfx942")
    variants = CHOSEN
