"""What a step of diffusers' schedulers takes, fused and not, beside a copy of the sample.

In turns of one run: the original's loop (`scale_model_input` and `step`, without a model), then the fused one's; the
ratio is that of the two in a turn, of which the median and the quartiles are told.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcfg.frontends.diffusers import fuse
from fastcfg.utils.files import write_text

from .environment import environment, load_average
from .suite.foreign import load_diffusers

NAMES = (
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"),
    "FlowMatchEulerDiscreteScheduler",
)
STEPS = 30


def loop(scheduler: Any, x: Tensor) -> Callable[[], float]:
    """() -> seconds per step of a run of a scheduler from a sample, whose shape and dtype x has."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator(x.device).manual_seed(0)} if takes else {}
    wait = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None

    @torch.no_grad()
    def run() -> float:
        scheduler.set_timesteps(STEPS, device=x.device)
        timesteps = list(scheduler.timesteps)
        wait()
        begin = time.perf_counter()
        for t in timesteps:
            output = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            scheduler.step(output, t, x, **options, return_dict=False)
        wait()
        return (time.perf_counter() - begin) / len(timesteps)

    return run


def measure(make: Callable[[], Any], x: Tensor, turns: int) -> dict[str, Any]:
    """Medians of both, and the quartiles of their ratio in a turn."""
    original, fused = loop(make(), x), loop(fuse(make()), x)
    original(), fused()
    pairs = [(original(), fused()) for _ in range(turns)]
    low, middle, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4)
    seconds = {"original_s": [pair[0] for pair in pairs], "fused_s": [pair[1] for pair in pairs]}
    return {name: statistics.median(values) for name, values in seconds.items()} | {"ratio": [low, middle, high]}


def floor(x: Tensor, turns: int) -> float:
    """Seconds that a copy of the sample takes."""
    copy, seconds = torch.empty_like(x), []
    wait = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    for _ in range(turns):
        wait()
        begin = time.perf_counter()
        for _ in range(STEPS):
            copy.copy_(x)
        wait()
        seconds.append((time.perf_counter() - begin) / STEPS)
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks schedulers", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64], metavar="N", help="default: 1 4 64 64")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="at least 2; default: %(default)s")
    parser.add_argument("--scheduler", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every figure there, whole or not at all")
    arguments = parser.parse_args(argv)
    if arguments.turns < 2:
        parser.error(f"--turns: got {arguments.turns}, expected at least 2")
    diffusers = load_diffusers()
    if diffusers is None:
        parser.error("diffusers is not installed")
    device = torch.device(arguments.device)
    x = torch.randn(arguments.shape, device=device).to(getattr(torch, arguments.dtype))
    load, copied = load_average(), floor(x, arguments.turns)
    shape = "x".join(map(str, arguments.shape))
    print(f"µs per step of {shape} in {arguments.dtype} on {device.type}; a copy of it takes {copied * 1e6:.1f}")
    print(f"{'scheduler':34s} original    fused    original/fused (quartiles)")
    rows: dict[str, Any] = {}
    for name in arguments.scheduler:
        rows[name] = row = measure(getattr(diffusers, name), x, arguments.turns)
        low, middle, high = row["ratio"]
        times = f"{row['original_s'] * 1e6:8.1f} {row['fused_s'] * 1e6:8.1f}"
        print(f"{name:34s} {times}    {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    if arguments.json:
        told = {"schema": 1, "environment": environment(device, load), "shape": arguments.shape}
        report = told | {
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "steps": STEPS,
            "copy_s": copied,
            "schedulers": rows,
        }
        write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    return 0
