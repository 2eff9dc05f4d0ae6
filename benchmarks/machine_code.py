"""Compile a launch for a GPU that is not there, and read what the machine code says."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class MachineCode:
    """The code of one kernel.

    Attributes:
        target: one of `TARGETS`.
        elements_per_thread: state elements each thread handles.
        registers: per thread (vector registers on AMD).
        stack_bytes: local memory per thread: stack, spills and scratch.
        spills: instructions that move registers to or from local memory (on AMD the assembler's count of spilled
            registers).
        shared_bytes: shared memory per program.
        instructions: all instructions of the kernel: each counted once, padding (NOP, and what stands after the end)
            not at all, subroutines included.
        vector_instructions: of these, the ones that occupy the vector units; on NVIDIA all of them, on AMD those named
            v_* (scalar and memory instructions issue beside them).
        subroutine_instructions: of `instructions`, those of subroutines: slow paths that ordinary values never call.
        backward_branches: loops; 0 means that no instruction runs twice, so that the counts bound what is executed.
        barriers_before_ticket: barriers of the program right before the first atomic operation whose result is used:
            after any atomic without one.
        loads, stores: from and to global memory by each thread, by width in bytes.
        opcodes: instructions by their first name.
    """

    target: str
    elements_per_thread: float
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: int
    vector_instructions: int
    subroutine_instructions: int
    backward_branches: int
    barriers_before_ticket: int
    loads: dict[int, int]
    stores: dict[int, int]
    opcodes: dict[str, int]


def compile_launch(launch: Callable[[], None], module: ModuleType, kernel_name: str, target: str) -> MachineCode:
    """The code of the one kernel that `launch` launches, compiled as Triton would compile it on `target`.

    Args:
        launch: calls a launcher of `module`, on tensors that may be on torch's meta device. It must pass BLOCK, the
            elements per program.
        module: the module that holds the kernel.
        kernel_name: the kernel's name in it.
        target: one of `TARGETS`.

    Raises:
        ValueError: unknown target.
        RuntimeError: kernels defined with TRITON_INTERPRET set, which have nothing to compile.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(TARGETS)}")
    kernel = getattr(module, kernel_name)
    if not hasattr(kernel, "device_caches"):
        raise RuntimeError("TRITON_INTERPRET was set when the kernels were imported: there is nothing to compile")
    cuda = target.startswith("sm_")
    recorder = _Recorder(kernel)
    driver.set_active(_AbsentGpu(GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)))
    setattr(module, kernel_name, recorder)
    try:
        launch()
    finally:
        setattr(module, kernel_name, kernel)
    (compiled,) = recorder.compiled
    elements = recorder.block / (32 if cuda else 64) / compiled.metadata.num_warps
    if cuda:
        return read_sass(_disassemble(compiled.asm["cubin"]), target, elements)
    return read_amdgcn(compiled.asm["amdgcn"], target, elements)


class _Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.block = kernel, 0
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            self.block = kwargs["BLOCK"]
            self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return compile_only


class _AbsentGpu:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def _disassemble(cubin: bytes) -> str:
    """The resource usage and the machine code, by the cuobjdump that Triton ships."""
    import triton.backends.nvidia
    from triton.runtime.cache import get_cache_manager

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    cache = get_cache_manager(hashlib.sha256(cubin + str(tool.stat().st_mtime_ns).encode()).hexdigest())
    if kept := cache.get_file("kernel.sass"):
        return Path(kept).read_text()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cache.put(text, "kernel.sass", binary=False)
    return text


def read_sass(sass: str, target: str, elements_per_thread: float) -> MachineCode:
    """Read the output of `cuobjdump -res-usage -sass` for a file of one kernel."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^\s;]+)\s*([^;]*?)\s*;", sass, re.MULTILINE)
    code = [(int(address, 16), name, operands) for address, name, operands in lines if name != "NOP"]
    branches, calls = (
        [(address, int(operands.split()[-1], 16)) for address, name, operands in code if name.split(".")[0] == kind]
        for kind in ("BRA", "CALL")
    )
    padding = {address for address, to in branches if to == address}
    code = [line for line in code if line[0] not in padding]
    subroutines = min((to for _, to in calls), default=code[-1][0] + 1)
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", sass)}
    opcodes = Counter(name.split(".")[0] for _, name, _ in code)
    return MachineCode(
        target=target,
        elements_per_thread=elements_per_thread,
        registers=resources["REG"],
        stack_bytes=resources["STACK"] + resources["LOCAL"],
        spills=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=resources["SHARED"],
        instructions=len(code),
        vector_instructions=len(code),
        subroutine_instructions=sum(address >= subroutines for address, _, _ in code),
        backward_branches=sum(to < address for address, to in branches),
        barriers_before_ticket=_barriers_before_ticket(
            [name for _, name, _ in code], r"BAR\.", r"REDG?\.", r"ATOMG?\."
        ),
        loads=_widths("LDG", code),
        stores=_widths("STG", code),
        opcodes=dict(opcodes.most_common()),
    )


def _barriers_before_ticket(names: list[str], barrier: str, without: str, ticket: str) -> int:
    """How many names match `barrier` between the last `without` and the first `ticket`; 0 where there is no ticket."""
    barriers = 0
    for name in names:
        if re.match(ticket, name):
            return barriers
        barriers = 0 if re.match(without, name) else barriers + (re.match(barrier, name) is not None)
    return 0


def _widths(prefix: str, code: list[tuple[int, str, str]]) -> dict[int, int]:
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    suffixes = (name.split(".")[1:] for _, name, _ in code if name.split(".")[0] == prefix)
    widths = Counter(next((bits[s] for s in names if s in bits), 32) // 8 for names in suffixes)
    return dict(sorted(widths.items(), reverse=True))


def read_amdgcn(assembly: str, target: str, elements_per_thread: float) -> MachineCode:
    """Read the assembly that Triton's AMD backend prints for one kernel."""
    body = assembly[: assembly.index("\ts_endpgm")]
    labels, names, backward = set(), [], 0
    for line in body.splitlines():
        text = line.split(";")[0].rstrip()
        if text.endswith(":"):
            labels.add(text[:-1])
        elif re.match(r"\t[a-z]", text) and not text.startswith("\ts_nop"):
            name, *operands = text.split()
            # An atomic returns what it found if told so by its last operand.
            names.append(f"{name}.returning" if "_atomic_" in name and operands[-1] in ("sc0", "glc") else name)
            if name.startswith(("s_branch", "s_cbranch")):
                backward += operands[0] in labels

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, key
        return int(found[1])

    def widths(kind: str) -> dict[int, int]:
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
        matches = (re.match(rf"(?:global|buffer|flat)_{kind}_[us]?(dwordx\d|dword|short|byte)", name) for name in names)
        found = Counter(sizes[match[1]] for match in matches if match)
        return dict(sorted(found.items(), reverse=True))

    return MachineCode(
        target=target,
        elements_per_thread=elements_per_thread,
        registers=number("vgpr_count") + number("agpr_count"),
        stack_bytes=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared_bytes=number("group_segment_fixed_size"),
        instructions=len(names),
        vector_instructions=sum(name.startswith("v_") for name in names),
        subroutine_instructions=0,
        backward_branches=backward,
        barriers_before_ticket=_barriers_before_ticket(
            names, "s_barrier", r"\w+_atomic_\w+$", r"\w+_atomic_\w+\.returning"
        ),
        loads=widths("load"),
        stores=widths("store"),
        opcodes=dict(Counter(names).most_common()),
    )
