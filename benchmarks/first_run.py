"""What `make demo` draws, with each --quality in turn: seconds of sampling, without imports; with one thread its CPU
time, else wall time."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.adherence import PICTURE_PROMPT
from fastcfg.cli.quality import QUALITIES
from fastcfg.utils.progress import progress_bar

if TYPE_CHECKING:
    from fastcfg.pipelines.text_to_image import TextToImage

PICTURES = 16


def compare(pipeline: TextToImage, turns: int) -> dict[str, Any]:
    """Median seconds of each quality, which take turns, and the quartiles of the ratio best / fast in a turn."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in QUALITIES}
    pipeline.sample(PICTURE_PROMPT, num_samples=PICTURES, seed=0, **asdict(QUALITIES["fast"]))  # to warm up
    for turn in progress_bar("make demo", range(turns), unit="turn"):
        for name, quality in QUALITIES.items():
            started = clock()
            pipeline.sample(PICTURE_PROMPT, num_samples=PICTURES, seed=turn, **asdict(quality))
            seconds[name].append(clock() - started)
    times = {name: np.array(taken) for name, taken in seconds.items()}
    found: dict[str, Any] = {f"{name}_s": round(float(np.median(taken)), 4) for name, taken in times.items()}
    ratio = np.quantile(times["best"] / times["fast"], [0.25, 0.5, 0.75])
    return found | {"ratio": ratio.round(3).tolist(), "turns": turns, "threads": torch.get_num_threads()}
