"""The README's short table: fastcfg's default backend beside the others, slower cases included."""

from __future__ import annotations

from typing import Any

from .reading import condition, duration, timed
from .tables import table

OTHERS = ("guided-diffusion", "GLIDE", "diffusers", "k-diffusion", "torch eager", "torch.compile")
# By name in the report: what is measured, in words. What a CPU runs by default is "native", in loops "fastcfg".
WORK = {
    "step/ddpm/pixel-64/b1/float32/drawn": "DDPM step, 1 × 3×64×64",
    "step/ddim/pixel-64/b1/float32/drawn": "DDIM step, 1 × 3×64×64",
    "step/ddpm/pixel-64/b16/float32/drawn": "DDPM step, 16 × 3×64×64",
    "step/ddim/pixel-64/b16/float32/drawn": "DDIM step, 16 × 3×64×64",
    "loop/ddpm/embedded/b1/float32/drawn": "10 DDPM steps with the embedded model",
}
SCHEDULERS = {
    "UniPCMultistepScheduler": "UniPC",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
    "DDPMScheduler": "DDPM",
    "LCMScheduler": "LCM",
    "EulerAncestralDiscreteScheduler": "ancestral Euler",
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "FlowMatchEulerDiscreteScheduler": "flow-matching Euler",
}


def summary(report: dict[str, Any], schedulers: dict[str, Any]) -> str:
    """Two tables in Markdown: steps and a loop by the default backend, and fused schedulers of diffusers.

    Args:
        report: a CPU's bench.json.
        schedulers: its schedulers.json.
    """
    results = [(words, report["results"][name]) for name, words in WORK.items() if name in report["results"]]
    # Without a compiler a CPU runs the reference.
    default = "native" if any("native" in result["ratios"] for _, result in results) else "reference"
    rows, heads = [], ("", "fastcfg", *OTHERS, "inductor, opt-in")
    for words, result in results:
        own, faster = ("fastcfg", "fastcfg inductor") if result["kind"] == "loop" else (default, "inductor")
        times, ratios = timed(result), [result["ratios"][own].get(other) for other in OTHERS]
        time, compiled = (times[name]["us"]["p50"] if name in times else None for name in (own, faster))
        row = [words, duration(time), *(_times(ratio["p50"]) if ratio else "" for ratio in ratios)]
        rows.append([*row, _times(compiled / time) if compiled else ""])
    fused = [(words, schedulers["schedulers"].get(name)) for name, words in SCHEDULERS.items()]
    shape = "×".join(map(str, schedulers["shape"]))
    lines = [
        f"{condition(report)}, float32, torch {report['environment']['torch']}; medians:",
        table(heads, rows),
        f"A scheduler of diffusers beside its fused version ({shape}, {schedulers['threads']} threads):",
        ", ".join(f"{words} {_times(found['ratio'][1])}" for words, found in fused if found) + ".",
    ]
    return "\n\n".join(lines[:3]) + "\n" + lines[3]


def _times(ratio: float) -> str:
    """How many times as long, as text."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"
