"""The registry of workloads: what is measured, at which shapes, and what comes first when time is short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Samples without their batch.
SHAPES: dict[str, tuple[int, ...]] = {
    "pixel-64": (3, 64, 64),  # GLIDE's base, ADM-64
    "pixel-128": (3, 128, 128),  # ADM-128
    "pixel-256": (3, 256, 256),  # GLIDE's upsampler, ADM-256
    "pixel-512": (3, 512, 512),  # ADM-512
    "latent-64": (4, 64, 64),  # Stable Diffusion 1.5 at 512
    "latent-128": (4, 128, 128),  # SDXL at 1024
    "latent16-128": (16, 128, 128),  # SD3 and Flux at 1024
    "video-latent": (16, 21, 60, 104),  # Wan, 81 frames at 480 x 832
    "audio-latent": (64, 1024),  # Stable Audio, 47 seconds
}
SOLVERS = ("ddpm", "ddim", "ddpm-fixed")
OPTION_SETS = ("history", "gradient", "x0 kept")
MODELS = ("embedded", "glide-base", "glide-upsampler", "adm-64", "adm-256", "sd15", "sdxl")
ROWS = 10  # of a loop

_MAIN = (("pixel-64", 1), ("pixel-64", 16), ("latent-128", 1))
# A sample's state beyond this is left out: [2B, 2C, ...] of model output alone is four times it.
_LARGEST = 2**27


@dataclass(frozen=True)
class Workload:
    """One thing to do.

    Attributes:
        kind: "step" (the fused step after a model's output), "option" (the same with other terms), "op" (one public
            operation) or "loop".
        what: the solver; the option set; the operation.
        family: a name of `SHAPES`; in loops a name of `MODELS`, or "null-" and a shape's name for a model that
            returns a tensor that is there.
        batch: samples.
        dtype: the model's.
        importance: less comes first.
        on_cpu: whether a CPU runs it unless it is asked for by name.
    """

    kind: str
    what: str
    family: str
    batch: int
    dtype: str
    importance: int
    on_cpu: bool = False

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.kind}/{self.what}/{self.family}/b{self.batch}/{self.dtype}".replace(" ", "-")

    @property
    def noises(self) -> tuple[str, ...]:
        """Whether the noise is "given" or "drawn", or there is "none". The originals draw it for DDIM too."""
        return {"step": ("given", "drawn"), "loop": ("drawn",)}.get(self.kind, ("none",))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The model's dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def _registered() -> Iterator[Workload]:
    for (family, batch), solver in product(_MAIN, SOLVERS):
        yield Workload("step", solver, family, batch, "float32", 0, on_cpu=True)
    for solver in ("ddpm", "ddim"):
        yield Workload("step", solver, "pixel-64", 16, "bfloat16", 1)
        yield Workload("loop", solver, "null-pixel-64", 1, "float32", 1, on_cpu=True)
        yield Workload("loop", solver, "null-pixel-64", 16, "float32", 2, on_cpu=True)
        yield Workload("loop", solver, "null-latent-128", 1, "float32", 2, on_cpu=True)
    for batch in (1, 4, 16):
        yield Workload("loop", "ddpm", "embedded", batch, "float32", 1 if batch == 1 else 4, on_cpu=batch == 1)
    for model, batch in product(MODELS[1:], (1, 4, 16)):
        solver = "ddim" if model.startswith("sd") else "ddpm"
        yield Workload("loop", solver, model, batch, "bfloat16", {1: 2, 4: 4, 16: 6}[batch] + 2 * (model == "adm-64"))
    # Speed-up by batch, and bandwidth by size.
    for batch in (4, 64, 256):
        yield Workload("step", "ddpm", "pixel-64", batch, "bfloat16", 3)
        yield Workload("step", "ddpm", "pixel-64", batch, "float32", 3, on_cpu=batch == 4)
        yield Workload("step", "ddim", "pixel-64", batch, "float32", 3, on_cpu=batch == 4)
    for name in ("guidance-blend", "predict-x0", "posterior", "dynamic-threshold"):
        yield Workload("op", name, "pixel-64", 16, "float32", 4, on_cpu=True)
        yield Workload("op", name, "pixel-64", 16, "bfloat16", 4)
        yield Workload("op", name, "latent-128", 16, "bfloat16", 7)
    for options in OPTION_SETS:
        yield Workload("option", options, "pixel-64", 16, "float32", 4, on_cpu=True)
        yield Workload("option", options, "pixel-64", 16, "bfloat16", 6)
    for family, batch, dtype, solver in product(
        SHAPES, (1, 4, 16, 64, 256), ("bfloat16", "float32", "float16"), SOLVERS
    ):
        if batch * math.prod(SHAPES[family]) <= _LARGEST:
            yield Workload("step", solver, family, batch, dtype, 5 if dtype == "bfloat16" and batch < 64 else 8)


def registry() -> dict[str, Workload]:
    """All workloads by name, the important ones first."""
    found: dict[str, Workload] = {}
    for workload in _registered():
        if workload.name not in found or workload.importance < found[workload.name].importance:
            found[workload.name] = workload
    return dict(sorted(found.items(), key=lambda item: item[1].importance))


def select(patterns: list[str], device: str) -> tuple[list[Workload], dict[str, str]]:
    """The workloads to run, in order, and why the others are left out.

    Args:
        patterns: shell patterns or beginnings of names; none takes all that suit the device.
        device: "cpu" or "cuda".

    Raises:
        ValueError: a pattern that fits nothing.
    """
    known = registry()
    if not patterns:
        left = {} if device == "cuda" else {n: "needs a GPU" for n, w in known.items() if not w.on_cpu}
        return [workload for name, workload in known.items() if name not in left], left
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in known):
            raise ValueError(f"only: got {pattern!r}, expected (the beginning of) a name such as {next(iter(known))}")
    return [w for name, w in known.items() if any(_fits(name, pattern) for pattern in patterns)], {}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f"{pattern.rstrip('/')}/") or fnmatch(name, pattern)
