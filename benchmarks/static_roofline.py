"""What the kernels' machine code costs on GPUs that are not there: `python -m benchmarks static_roofline`.

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

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from typing import Any

from fastcfg.cli.parser import UsageError, integer

from .command import add_json, parser_of, write_json
from .launches import BY_DTYPE, VARIANTS
from .machine_code import TARGETS, compile_launch
from .report.tables import aligned


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


KERNELS = VARIANTS | BY_DTYPE

GPUS = (
    Gpu("A100 SXM 80GB", "sm_80", 2.039e12, 108, 128, 1.41e9),
    Gpu("H100 SXM", "sm_90", 3.35e12, 132, 128, 1.98e9),
    Gpu("H200 SXM", "sm_90", 4.8e12, 132, 128, 1.98e9),
    Gpu("B200", "sm_100", 8.0e12, 148, 128, 1.965e9),
    Gpu("MI300X", "gfx942", 5.3e12, 304, 64, 2.1e9),
)


def report_row(variant: str, target: str) -> dict[str, Any]:
    """Everything about one of `KERNELS` on one target, for JSON."""
    launch = KERNELS[variant]()
    code = compile_launch(launch.call, launch.module, launch.kernel, target)
    size = launch.bytes_per_element
    row: dict[str, Any] = {"variant": variant, **asdict(code)}
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


def report_rows(cases: Sequence[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows of variants and targets, in their order, from so many processes."""
    # Not forked: torch has threads.
    with ProcessPoolExecutor(max(1, jobs), get_context("spawn")) as pool:
        yield from pool.map(report_row, *zip(*cases, strict=True))


def as_report(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows with what they rest on, for JSON."""
    return {"triton": version("triton"), "gpus": [asdict(gpu) for gpu in GPUS], "rows": list(rows)}


def table_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of one target as lines of text."""
    heads = ["variant", "el/thr", "regs", "local", "spill", "smem", "loads", "stores", "instr/el", "B/el"]
    for gpu in rows[0]["gpus"]:
        heads += [f"{gpu}: bytes", "instr", "roofline", "bound"]
    cells = []
    for row in rows:
        widths = ("/".join(str(row[kind].get(width, 0)) for width in (16, 8, 4, 2)) for kind in ("loads", "stores"))
        counts = (row["registers"], row["stack_bytes"], row["spills"], row["shared_bytes"])
        cells.append([row["variant"], f"{row['elements_per_thread']:g}", *map(str, counts), *widths])
        cells[-1] += [f"{row['instructions_per_element']:.1f}", str(row["bytes_per_element"])]
        for found in row["gpus"].values():
            cells[-1] += [f"{found['bytes_ps']:.2f}", f"{found['instructions_ps']:.2f}"]
            cells[-1] += [f"{found['bandwidth_fraction']:.0%}", found["bound"]]
    return aligned(heads, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = parser_of("static_roofline", __doc__, _EPILOG)
    names = ", ".join(KERNELS)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, help="default: all")
    parser.add_argument("--variant", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="NAME", help=names)
    parser.add_argument("--jobs", type=integer(1), default=os.cpu_count(), metavar="N", help="default: one per core")
    add_json(parser, "also write every figure there")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("TRITON_INTERPRET is set, which leaves nothing to compile: unset it and run again")
    print(f"Triton {version('triton')}; times in ps per element, roofline: share of the bandwidth that can be reached")
    cases = [(variant, target) for target in arguments.target for variant in arguments.variant]
    measured = report_rows(cases, arguments.jobs) if arguments.jobs > 1 else (report_row(*case) for case in cases)
    rows: list[dict[str, Any]] = []
    for target in arguments.target:
        rows += (found := list(islice(measured, len(arguments.variant))))
        print("\n".join(["", target, *table_of(found)]), flush=True)
    write_json(arguments.json, as_report(rows))
    return 0


_EPILOG = """variants: the model's dtype is bfloat16 unless the name says fp16 or fp32

columns:
  el/thr    state elements per thread          local     bytes of stack, spills and scratch per thread
  regs      registers per thread               spill     instructions that spill or restore a register
  smem      bytes of shared memory per program
  loads, stores   accesses of each thread of 16/8/4/2 bytes; x is float32, so 16 bytes are 4 elements
  instr/el  all instructions per element (on AMD the bound takes only the vector ones)
  B/el      bytes per element

examples:
  python -m benchmarks static_roofline
  python -m benchmarks static_roofline --target sm_90 --variant main block-512 --json roofline.json
"""
