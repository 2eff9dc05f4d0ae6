"""The host's time per row of a captured loop: `python -m benchmarks host_time`.

"beside a replay" is Python's own work, measured with programs that do nothing; with noise of torch, the drawing (on a
GPU its launch) is part of it. A GPU also shows rows of a tiny network in real time, eager and captured, and how long
enqueueing them keeps the host busy. Times are in microseconds per row, of runs from the first row's start to the last
row's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import add_json, parser_of, write_json
from benchmarks.environment import environment, load_average
from fastcfg import CFG, Sampler, Schedule, solvers
from fastcfg.engine.loop import Run

RUNS = 15
TABLE = solvers.ddpm(Schedule.named("squaredcos_cap_v2", 100).respace(50), variance="fixed_large")
_WAYS: dict[str, dict[str, Any]] = {
    "eager": {"graph": False},
    "captured": {},
    "captured, noise of torch": {"noise_source": "torch"},
    "captured, 5 rows in a graph": {"rows_per_graph": 5},
}


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(x + (y + 0.01 * t.to(x.dtype)).view(-1, 1, 1, 1))


class _Loop:
    """A sampler of the tiny network that has run once, and its prepared runs."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        self._shape = (4, 3, 64, 64) if device.type == "cuda" else (2, 3, 8, 8)
        self._branches = {"cond": {"y": torch.ones(1, device=device)}, "uncond": {"y": torch.zeros(1, device=device)}}
        given = {"guidance": CFG(3.0), "clip": 1.0, "graph": True, **options}
        self.sampler = Sampler(_Tiny().to(device).eval(), TABLE, **given)
        self.sampler.sample(self._shape, branches=self._branches, seed=0)
        expected = "none" if not given["graph"] else "cuda" if device.type == "cuda" else "stand-in"
        assert self.sampler.report()["graph"] == expected, self.sampler.report()

    def silence(self) -> None:
        """Let its programs do nothing."""
        for kept in self.sampler._cache._kept.values():
            for programs in (kept.programs._single, kept.programs._repeated):
                programs.update(dict.fromkeys(programs, lambda: None))

    def run(self) -> Run:
        """A run whose rows have not begun."""
        return self.sampler._prepare(self._shape, branches=self._branches, seed=0)

    def microseconds(self, wait: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Median and extremes per row; `wait` is called before the first row and, within the time, after the last."""
        times, programs = [], len(list(self.run().rows()))
        for _ in range(RUNS):
            rows = self.run().rows()
            wait()
            start = time.perf_counter()
            for _ in range(programs):
                next(rows)
            wait()
            times.append((time.perf_counter() - start) / len(TABLE) * 1e6)
            list(rows)
        return {"median": median(times), "least": min(times), "most": max(times)}


def measure(device: torch.device) -> dict[str, dict[str, Any]]:
    """By what was timed: "beside a replay, SOURCE" for both noise sources, and on a GPU each way to run."""
    found: dict[str, dict[str, Any]] = {}
    for source in ("philox", "torch"):
        loop = _Loop(device, noise_source=source)
        loop.silence()
        found[f"beside a replay, {source}"] = {"host_us": loop.microseconds()}
    for name, options in _WAYS.items() if device.type == "cuda" else ():
        loop = _Loop(device, **options)
        # Without a wait: the host's part, as long as the queue of launches is not full.
        found[name] = {"us": loop.microseconds(torch.cuda.synchronize), "host_us": loop.microseconds()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = parser_of("host_time", __doc__)
    add_json(parser)
    arguments = parser.parse_args(argv)
    device, load = torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_average()
    found = measure(device)
    for name, times in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value['median']:.1f}" for key, value in times.items()))
    settings = {"runs": RUNS, "rows": len(TABLE), "threads": torch.get_num_threads()}
    write_json(arguments.json, {"environment": environment(device, load), "settings": settings, "results": found})
    return 0
