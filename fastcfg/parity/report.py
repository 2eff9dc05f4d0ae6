"""Findings as text, as JSON and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..utils.files import replacing
from .findings import Finding

_HEADS = ("check", "backend", "dtype", "options", "way", "bitwise", "max ulp", "RMS ulp", "torch", "bound", "")
_NUMBERS = range(6, 10)


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One dictionary per finding; numbers that are not finite become None."""
    return [
        _plain({**asdict(f), "bound_ulp": f.bound_ulp, "ok": not f.problem, "problem": f.problem}) for f in findings
    ]


def as_text(findings: Sequence[Finding]) -> list[str]:
    """A table's lines: one per check, backend, dtype, option set and way, each with its worst shape and tensor."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.check, f.backend, f.dtype, f.options, f.way), []).append(f)
    rows: list[tuple[str, ...]] = [_HEADS]
    for key, group in groups.items():
        worst = max(group, key=lambda f: f.load)
        errors = (worst.error and worst.error.ulp, worst.error and worst.error.rms_ulp, worst.torch and worst.torch.ulp)
        numbers = ("" if number is None else f"{number:.2f}" for number in (*errors, worst.bound_ulp))
        rows.append((*key, _bits(group), *numbers, _verdict(group)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [f"{'>' if i in _NUMBERS else '<'}{width}" for i, width in enumerate(widths)]
    return ["  ".join(map(format, row, sides)).rstrip() for row in rows]


def _bits(group: Sequence[Finding]) -> str:
    compared = [f for f in group if f.bitwise is not None]
    if not all(f.bitwise for f in compared):
        return "no"
    return "" if not compared else "same code" if all(f.same_code for f in compared) else "yes"


def _verdict(group: Sequence[Finding]) -> str:
    if any(f.problem for f in group):
        return "FAILED"
    return "ok" if any(f.allowed_ulp is not None or f.bound_ulp is not None for f in group) else "no bound"


def plot(findings: Sequence[Finding], path: str | os.PathLike[str]) -> None:
    """Draw the errors along the trajectories of loops or a user's model as a PNG; needs matplotlib. The file is written
    whole or not at all.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot: matplotlib is not installed (pip install matplotlib)") from error

    loops = [f for f in findings if f.trajectory]
    names = list(dict.fromkeys((f.options, f.dtype) for f in loops))
    figure = Figure(figsize=(6 * max(len(names), 1), 4), layout="constrained")
    for i, (options, dtype) in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        own = [f for f in loops if (f.options, f.dtype) == (options, dtype)]
        for f in own:
            axes.plot(range(1, len(f.trajectory) + 1), f.trajectory, label=f"fastcfg, {f.backend}, {f.way}")
        plain = own[0].torch_trajectory
        axes.plot(range(1, len(plain) + 1), plain, "k--", label="plain torch")
        axes.set(title=f"{options}, {dtype}", xlabel="row", ylabel="max relative error from float64", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _plain(value: Any) -> Any:
    """Values that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
