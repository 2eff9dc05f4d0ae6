"""Time of one sampling step beside the model: ours against the originals' operations in their order, in one run.

    python -m benchmarks.step [--shape 16,3,64,64] [--device cpu] [--json PATH]

The model is a stub that returns a ready tensor, so what is timed is everything else a step does under classifier-free
guidance with learned
variances: doubling the batch, split, blend, x0, posterior, noise. The originals work on the doubled batch (their
    samplers keep 2B samples); ours keeps
B. Noise is drawn beforehand on both sides ("step") or drawn in the step from torch ("step + noise"). Providers
alternate, and the ratio is taken pair by pair: it holds on a machine whose speed drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcfg import Schedule, solvers
from fastcfg.files import write_text
from fastcfg.ops import GuidedStep, resolve_backend
from fastcfg.reference import gaussian
from fastcfg.step import StepBuffers, StepSpec

SCALE = 3.0
T = 10  # the timestep that is timed; every one does the same work


def originals(
    name: str, schedule: Schedule, shape: tuple[int, ...], device: torch.device, draw: bool
) -> Callable[[], Any]:
    """One step as guided-diffusion does it with GLIDE's guidance function, on 2B samples."""
    batch, channels = shape[:2]
    x = torch.randn((2 * batch, *shape[1:]), device=device)
    raw = torch.randn((2 * batch, 2 * channels, *shape[2:]), device=device)
    recorded = torch.randn_like(x)

    def model() -> torch.Tensor:
        half = x[:batch]
        torch.cat([half, half])  # the doubled input that the network would be given
        eps, rest = raw[:, :channels], raw[:, channels:]
        cond, uncond = torch.split(eps, batch)
        blended = uncond + SCALE * (cond - uncond)
        return torch.cat([torch.cat([blended, blended]), rest], dim=1)

    def step() -> None:
        t = torch.tensor([T] * (2 * batch), device=device)
        p = gaussian.p_mean_variance(schedule, model(), x, t)
        noise = torch.randn_like(x) if draw else recorded
        if name == "ddpm":
            gaussian.p_sample(p, t, noise)
        else:
            gaussian.ddim_sample(schedule, p, x, t, noise)

    return step


def ours(name: str, schedule: Schedule, shape: tuple[int, ...], device: torch.device, draw: bool) -> Callable[[], Any]:
    """One step of the engine on B samples."""
    batch, channels = shape[:2]
    table = solvers.ddpm(schedule) if name == "ddpm" else solvers.ddim(schedule)
    noise = "tensor" if table.uses_noise else "none"
    buffers = StepBuffers(
        x=torch.randn(shape, device=device),
        table=table.on(device),
        counter=torch.zeros(2, dtype=torch.int32, device=device),
        weights=torch.tensor([SCALE, 0.0], device=device).expand(table.num_rows, batch, 2).contiguous(),
        bound=torch.ones(batch, device=device),
        noise=torch.randn(shape, device=device),
        model_input=torch.empty((2 * batch, *shape[1:]), device=device),
        time=torch.empty(2 * batch, dtype=torch.int64, device=device),
    )
    spec = StepSpec(branches=2, base=1, clip=True, noise=noise, learned_variance=table.learned_variance)
    run = GuidedStep(spec, buffers)
    raw = torch.randn((2 * batch, 2 * channels, *shape[2:]), device=device)

    def step() -> None:
        # The same row again: the counter stands still.
        buffers.counter.zero_()
        if draw and noise == "tensor":
            buffers.noise.normal_()  # type: ignore[union-attr]
        run(raw)

    return step


def measure(providers: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each provider, one call of each in turn."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for provider in providers.values():
        provider()
    times: dict[str, list[float]] = {name: [] for name in providers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 20:
        for name, provider in providers.items():
            sync()
            start = time.perf_counter()
            provider()
            sync()
            times[name].append(time.perf_counter() - start)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="B,C,H,W; several allowed (default 1,3,64,64 and 16,3,64,64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement (default 2)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    schedule = Schedule.named("squaredcos_cap_v2").respace(100)
    results = []
    print(f"{'shape':>16s} {'step':6s} {'noise':9s} {'originals':>12s} {'fastcfg':>12s} {'ratio (20-80 %)':>22s}")
    for shape in [tuple(int(n) for n in text.split(",")) for text in args.shape or ["1,3,64,64", "16,3,64,64"]]:
        for name in ("ddpm", "ddim"):
            for draw in (False, True):
                providers = {
                    "originals": originals(name, schedule, shape, device, draw),
                    "ours": ours(name, schedule, shape, device, draw),
                }
                times = measure(providers, device, args.seconds)
                ratios = sorted(a / b for a, b in zip(times["originals"], times["ours"], strict=True))
                low, middle, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.2, 0.5, 0.8))
                medians = {key: statistics.median(value) * 1e6 for key, value in times.items()}
                noise = "drawn" if draw else "given"
                times_text = f"{medians['originals']:9.0f} us {medians['ours']:9.0f} us"
                size = "x".join(map(str, shape))
                print(f"{size:>16s} {name:6s} {noise:9s} {times_text} {middle:8.1f}x ({low:.1f}-{high:.1f})")
                results.append(
                    {
                        "shape": shape,
                        "step": name,
                        "noise": noise,
                        "us": medians,
                        "ratio": {"p20": low, "p50": middle, "p80": high},
                    }
                )
    if args.json:
        environment = {
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability(),
            "threads": args.threads,
            "torch": torch.__version__,
            "backend": resolve_backend("auto", device),
        }
        write_text(args.json, json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
