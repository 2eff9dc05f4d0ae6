"""The loss curve of a run: its log, averaged over stretches, as numbers and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.files import replacing

_LINES = {
    "mse": "mean squared error of the noise",
    "vlb": "variational bound of the variance",
    "layout": "naming the layout",
    "reading": "reading the captions",
}


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read a log of one JSON object per line; ValueError for a line that is not JSON."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def thin(entries: Sequence[dict[str, float]], points: int = 200) -> dict[str, list[float]]:
    """Average a log over at most `points` stretches of equal length: means by key, to 6 significant digits.

    `step` is each stretch's last step. All entries have the same numeric keys.
    """
    curve: dict[str, list[float]] = {}
    for key in entries[0] if entries else ():
        values = np.array([entry[key] for entry in entries], dtype=np.float64)
        stretches = np.array_split(values, min(points, len(entries)))
        curve[key] = [int(part[-1]) if key == "step" else float(f"{part.mean():.6g}") for part in stretches]
    return curve


def plot(entries: Sequence[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw the loss curve of a log as a PNG, written whole or not at all; needs matplotlib."""
    from matplotlib.figure import Figure

    curve = thin(entries)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in _LINES.items():
        values = np.array(curve.get(key, []), dtype=np.float64)
        if values.any():
            axes.plot(curve["step"], np.where(values > 0, values, np.nan), label=label)
    axes.set(xlabel="step", ylabel="loss (unweighted)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
