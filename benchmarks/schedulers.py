"""Steps of diffusers' schedulers, fused and not, beside a copy of the sample: `python -m benchmarks schedulers`.

The original's loop (`scale_model_input` and `step`, without a model), the fused one's and as many copies take turns, as
in the suite; the ratio is that of original and fused in a turn: its quartiles are reported. On a CPU times are wall
time, or with one thread its CPU time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastcfg.cli.parser import UsageError, choose_device, integer
from fastcfg.frontends.diffusers import fuse

from .command import add_device, add_json, parser_of, write_json
from .environment import environment, load_average
from .report.tables import aligned
from .suite.cases import Provider
from .suite.foreign import load_diffusers
from .suite.measure import Turns

# Those that fuse, but for UnCLIP's, whose `step` needs the previous timestep.
NAMES = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "CogVideoXDDIM", "DDPM", "DDPMParallel", "LCM", "TCD"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("LMSDiscrete", "IPNDM", "PNDM", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep"),
        *("UniPCMultistep", "DEISMultistep", "SASolver", "EDMEuler", "EDMDPMSolverMultistep"),
        *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM"),
    )
)
STEPS = 30


def loop(scheduler: Any, x: Tensor) -> Provider:
    """A scheduler's run from a sample, [B, ...] in any floating dtype."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator(x.device).manual_seed(0)} if takes else {}
    timesteps: list[Any] = []

    def prepare() -> None:
        scheduler.set_timesteps(STEPS, device=x.device)
        timesteps[:] = scheduler.timesteps

    @torch.no_grad()
    def run(draw: bool) -> None:
        for t in timesteps:
            output = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            scheduler.step(output, t, x, **options, return_dict=False)

    return Provider(prepare, run, None)


def measure(make: Callable[[], Any], x: Tensor, turns: int) -> dict[str, Any]:
    """Median seconds per timestep of original, fused and copy, and the quartiles of original / fused in a turn."""
    original, fused, target = make(), fuse(make()), torch.empty_like(x)
    providers = {"original": loop(original, x), "fused": loop(fused, x)}
    providers["copy"] = Provider(lambda: None, lambda draw: [target.copy_(x) for _ in range(STEPS)], None)
    taken = Turns(providers, {}, x.device, str)
    for _ in range(1 + turns):
        taken.take(False)
    if taken.failed:
        raise RuntimeError(f"failed: {taken.failed}")
    rows = {name: STEPS if name == "copy" else len(original.timesteps) for name in providers}
    times = {name: np.array(us[1:]) / 1e6 / rows[name] for name, us in taken.whole.items()}
    found: dict[str, Any] = {f"{name}_s": float(np.median(values)) for name, values in times.items()}
    return found | {"ratio": np.quantile(times["original"] / times["fused"], [0.25, 0.5, 0.75]).tolist()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser, default = parser_of("schedulers", __doc__), "default: %(default)s"
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help=default)
    parser.add_argument("--shape", type=integer(1), nargs="+", default=[1, 4, 64, 64], metavar="N", help=default)
    parser.add_argument("--turns", type=integer(2), default=9, metavar="N", help=default)
    parser.add_argument("--scheduler", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    add_json(parser)
    arguments = parser.parse_args(argv)
    diffusers, device, load = load_diffusers(), torch.device(choose_device(arguments.device)), load_average()
    if diffusers is None:
        raise UsageError("diffusers is not installed")
    x = torch.randn(arguments.shape, device=device).to(getattr(torch, arguments.dtype))
    # Not every version has them all.
    known = [name for name in arguments.scheduler if hasattr(diffusers, name)]
    rows = {name: measure(getattr(diffusers, name), x, arguments.turns) for name in tqdm(known, disable=None)}
    copied = float(np.median([row.pop("copy_s") for row in rows.values()]))
    shape = "x".join(map(str, arguments.shape))
    print(f"µs per step of {shape} in {arguments.dtype} on {device.type}; a copy of it takes {copied * 1e6:.1f}")
    cells = []
    for name, row in rows.items():
        low, middle, high = row["ratio"]
        times = (f"{row[key] * 1e6:.1f}" for key in ("original_s", "fused_s"))
        cells.append([name, *times, f"{middle:.2f} ({low:.2f}-{high:.2f})"])
    print("\n".join(aligned(("scheduler", "original", "fused", "original/fused (quartiles)"), cells)))
    medians = [row["ratio"][1] for row in rows.values()]
    print(f"geometric mean {np.exp(np.mean(np.log(medians))):.2f}, least {min(medians):.2f}")
    settings = {"shape": arguments.shape, "dtype": arguments.dtype, "threads": torch.get_num_threads(), "steps": STEPS}
    report = {"schema": 1, "environment": environment(device, load), **settings, "copy_s": copied, "schedulers": rows}
    write_json(arguments.json, report)
    return 0
