"""The share of a GPU's datasheet that the kernel reaches: the static roofline's bound by the measured time."""

from __future__ import annotations

import math
from typing import Any

# The step with the options that change its cost most; all kernels: python -m benchmarks static_roofline.
VARIANTS = {
    ("ddpm", "drawn", "bfloat16"): "main",
    ("ddpm", "drawn", "float16"): "fp16",
    ("ddpm", "drawn", "float32"): "fp32",
    ("ddpm", "given", "bfloat16"): "noise-tensor",
    ("ddpm-fixed", "drawn", "bfloat16"): "fixed-variance",
    ("ddim", "given", "bfloat16"): "ddim",
}
TARGETS = ("sm_80", "sm_90", "sm_100")


def add_shares(report: dict[str, Any]) -> None:
    """Write `of_roofline` where the kernel was measured on a GPU of the static roofline.

    Args:
        report: as docs/benchmarks.md describes it.
    """
    device, rows = report["environment"]["device"], (report["roofline"] or {}).get("rows", [])
    bounds = {
        row["variant"]: max(bound["bytes_ps"], bound["instructions_ps"])
        for row in rows
        for name, bound in row["gpus"].items()
        if name.split()[0] in device
    }
    for record in report["results"].values():
        bound = bounds.get(VARIANTS.get((record["solver"], record["noise"], record["dtype"]), ""))
        found = record["providers"].get("triton", {})
        times = found.get("device_us") or found.get("us")
        if record["kind"] == "step" and bound is not None and times is not None:
            found["of_roofline"] = bound * math.prod(record["shape"]) / 1e6 / times["p50"]
