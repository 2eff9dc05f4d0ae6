"""What the kernels' machine code costs on GPUs that are not there: `python -m benchmarks.static_roofline`.

Every kernel variant is compiled through its own launcher, as Triton would compile it on the target, and the machine
code is read: registers, local memory, spills, the width of memory accesses, instructions. Two lower bounds of the time
per state element follow, and the larger one holds:

    bytes          bytes per element / memory bandwidth
    instructions   instructions per element / (units x lanes issued per clock x clock)

Bytes count every tensor once, as if nothing were read twice and nothing stayed in a cache; scalars (table row, weights,
seeds) are not counted. Instructions are all those of the kernel, each once (it has no loops; padding does not count),
divided by the elements per thread: index arithmetic, the row look-up, the ticket and the slow path of sqrt, which
ordinary values skip, are in it. On AMD only vector instructions count, as scalar and memory ones issue beside them.
Nothing here is a measurement on a GPU: latency, clocks below boost and bandwidth below the datasheet's add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .machine_code import TARGETS, MachineCode, compile_launch

if TYPE_CHECKING:
    from fastcfg.step import StepBuffers, StepSpec


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet.

    Attributes:
        name: its name.
        target: the machine code it runs.
        bandwidth: bytes per second.
        units: streaming multiprocessors or compute units.
        lanes: lanes of 32-bit instructions that a unit issues per clock: 4 schedulers x 32 on NVIDIA; on AMD 4 SIMDs x
            16, as a wave of 64 takes four clocks.
        clock: boost clock in Hz.
    """

    name: str
    target: str
    bandwidth: float
    units: int
    lanes: int
    clock: float

    def bounds(self, bytes_per_element: float, instructions_per_element: float) -> tuple[float, float]:
        """Picoseconds per element: by bytes, by instructions."""
        issue = self.units * self.lanes * self.clock
        return bytes_per_element / self.bandwidth * 1e12, instructions_per_element / issue * 1e12


GPUS = (
    Gpu("A100 SXM 80GB", "sm_80", 2.039e12, 108, 128, 1.41e9),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132, 128, 1.98e9),
    Gpu("H200 SXM", "sm_90", 4.8e12, 132, 128, 1.98e9),
    Gpu("B200", "sm_100", 8.0e12, 148, 128, 1.965e9),
    Gpu("MI300X", "gfx942", 5.3e12, 304, 64, 2.1e9),
)


@dataclass(frozen=True)
class Variant:
    """One way to call a launcher.

    Attributes:
        name: as given to --variant.
        shape: of the state, [B, C, ...].
        dtype: of the model's output and input.
        channels_last: the layout of both.
        spec: the fields of a `StepSpec`; None is the starting noise.
    """

    name: str
    shape: tuple[int, ...] = (64, 3, 64, 64)
    dtype: str = "bfloat16"
    channels_last: bool = False
    spec: dict[str, Any] | None = field(default_factory=dict)


# Two branches, learned variance, clip and in-kernel noise unless the name says otherwise.
CFG = {"branches": 2, "base": 1}
MAIN = {**CFG, "learned_variance": True, "clip": True, "noise": "philox"}
VARIANTS = (
    Variant("main", spec=MAIN),
    Variant("block-1024", (32, 3, 64, 64), spec=MAIN),
    Variant("block-512", (1, 3, 64, 64), spec=MAIN),
    Variant("noise-tensor", spec={**MAIN, "noise": "tensor"}),
    Variant("fixed-variance", spec={**MAIN, "learned_variance": False}),
    Variant("ddim", spec={**CFG, "clip": True}),
    Variant("fp16", dtype="float16", spec=MAIN),
    Variant("fp32", dtype="float32", spec=MAIN),
    Variant("k3", spec={**MAIN, "branches": 3, "base": 2}),
    Variant("history-3", spec={**CFG, "history": 3}),
    Variant("x0", spec={**MAIN, "keep_x0": True}),
    Variant("channels-last", channels_last=True, spec=MAIN),
    Variant("odd-size", (64, 3, 63, 65), spec=MAIN),
    Variant("starting-noise", spec=None),
)


def measure(variant: Variant, target: str) -> tuple[MachineCode, int]:
    """Machine code of a variant, and the bytes per element it moves.

    Args:
        variant: what to launch.
        target: one of `machine_code.TARGETS`.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    launch, module, kernel, bytes_per_element = _launcher(variant)
    return compile_launch(launch, module, kernel, target), bytes_per_element


def _launcher(variant: Variant) -> tuple[Callable[[], None], ModuleType, str, int]:
    import torch

    from fastcfg.kernels import guided_step, normal
    from fastcfg.step import StepBuffers, StepSpec
    from fastcfg.table import COLUMNS

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, channels, *rest = shape = variant.shape
    if variant.spec is None:
        out, seeds = tensor(*shape), tensor(batch, dtype=torch.int64)
        return lambda: normal.launch_normal(out, seeds, 0, 0), normal, "_normal_kernel", 4

    spec = StepSpec(**variant.spec)
    dtype = getattr(torch, variant.dtype)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    rows = spec.branches * batch
    buffers = StepBuffers(
        x=tensor(*shape),
        table=tensor(51, len(COLUMNS)),
        counter=tensor(2, dtype=torch.int32),
        weights=tensor(50, batch, spec.branches),
        bound=tensor(batch),
        noise=tensor(*shape),
        seeds=tensor(batch, dtype=torch.int64),
        history=tensor(spec.history + 1, *shape),
        x0=tensor(*shape),
        model_input=tensor(rows, *shape[1:], dtype=dtype).contiguous(memory_format=layout),
        time=tensor(rows, dtype=torch.int64),
    )
    output = tensor(rows, 2 * channels, *rest, dtype=dtype).contiguous(memory_format=layout)

    def launch() -> None:
        guided_step.launch_guided_step(output, spec, buffers)

    return launch, guided_step, "_guided_step_kernel", bytes_per_element(spec, buffers)


def bytes_per_element(spec: StepSpec, buffers: StepBuffers) -> int:
    """Bytes that a step must move for one element of the state, in a row that saves a tensor if any does."""
    model = buffers.model_input.dtype.itemsize  # type: ignore[union-attr]
    state = buffers.x.dtype.itemsize
    variance = spec.learned_variance and spec.noise != "none"
    read = state + (spec.branches + variance) * model + state * spec.history + state * (spec.noise == "tensor")
    slots = len(buffers.model_input) // len(buffers.x)  # type: ignore[arg-type]
    return read + state + slots * model + state * (spec.history > 0) + state * spec.keep_x0


def report_row(variant: Variant, target: str) -> dict[str, Any]:
    """Everything about one variant on one target, for JSON."""
    code, size = measure(variant, target)
    row: dict[str, Any] = {"variant": variant.name, **asdict(code)}
    row["instructions_per_element"] = code.instructions / code.elements_per_thread
    row["bytes_per_element"] = size
    row["gpus"] = {}
    for gpu in GPUS:
        if gpu.target == target:
            by_bytes, by_instructions = gpu.bounds(size, code.vector_instructions / code.elements_per_thread)
            row["gpus"][gpu.name] = {
                "bytes_ps": by_bytes,
                "instructions_ps": by_instructions,
                "bound": "bytes" if by_bytes >= by_instructions else "instr",
                "bandwidth_fraction": min(1.0, by_bytes / by_instructions),
            }
    return row


def table_lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """The rows of one target as text, each line as soon as its row is there."""
    for i, row in enumerate(rows):
        gpus = row["gpus"]
        if not i:
            head = f"{'variant':15s} el/thr  regs local spill smem  loads 16/8/4/2 B  stores 16/8/4/2 B  instr/el  B/el"
            yield f"\n{row['target']:{len(head)}s}" + "".join(f"  {name:^24s}" for name in gpus)
            yield head + "   bytes  instr  roofline " * len(gpus)
        loads, stores = ("/".join(f"{row[kind].get(n, 0)}" for n in (16, 8, 4, 2)) for kind in ("loads", "stores"))
        line = (
            f"{row['variant']:15s} {row['elements_per_thread']:6.0f} {row['registers']:5d} {row['stack_bytes']:5d} "
            f"{row['spills']:5d} {row['shared_bytes']:4d}  {loads:>16s}  {stores:>17s}  "
            f"{row['instructions_per_element']:8.1f}  {row['bytes_per_element']:4d}"
        )
        for bounds in gpus.values():
            line += f"  {bounds['bytes_ps']:6.2f} {bounds['instructions_ps']:6.2f} "
            line += f"{100 * bounds['bandwidth_fraction']:4.0f}% {bounds['bound']:5s}"
        yield line.rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_roofline",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--variant", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every figure there, whole or not at all")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, which leaves nothing to compile: unset it and run again", file=sys.stderr)
        return 2
    if arguments.json and not os.access(arguments.json.absolute().parent, os.W_OK):
        print(f"--json: got {arguments.json}, expected a path in a folder that can be written to", file=sys.stderr)
        return 2

    import triton

    print(f"Triton {triton.__version__}; times in ps per element, roofline: share of the bandwidth that can be reached")
    chosen = [variant for variant in VARIANTS if variant.name in arguments.variant]
    rows: list[dict[str, Any]] = []
    for target in arguments.target:
        measured = (report_row(variant, target) for variant in chosen)
        for line in table_lines(_kept(measured, rows)):
            print(line, flush=True)
    if arguments.json:
        from fastcfg.files import write_text

        report = {"triton": triton.__version__, "gpus": [asdict(gpu) for gpu in GPUS], "rows": rows}
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return 0


def _kept(rows: Iterable[dict[str, Any]], kept: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for row in rows:
        kept.append(row)
        yield row


_EPILOG = """columns:
  el/thr    state elements per thread          local     bytes of stack, spills and scratch per thread
  regs      registers per thread               spill     instructions that spill or restore a register
  smem      bytes of shared memory per program
  loads, stores   global accesses of each thread by width; x is float32, so 16 bytes hold 4 elements
  instr/el  all instructions per element (on AMD the bound takes only the vector ones)
  B/el      bytes per element

examples:
  python -m benchmarks.static_roofline
  python -m benchmarks.static_roofline --target sm_90 --variant main block-512 --json roofline.json
"""

if __name__ == "__main__":
    sys.exit(main())
