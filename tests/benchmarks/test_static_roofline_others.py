"""The kernels compiled for other GPUs that are not there, in the variants that between them have every feature."""

from __future__ import annotations

from importlib.metadata import version

from support.machine_code import CHOSEN, MachineCode

# Triton 3.4 links AMD's code with ROCm's own linker, which only such a machine has.
AMD = () if version("triton").startswith("3.4.") else ("gfx942",)


class TestOthers(MachineCode):
    targets = ("sm_100", *AMD)
    variants = CHOSEN
