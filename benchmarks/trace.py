"""What rows of the embedded model's loop make host and device do, eager and captured, by torch's profiler.

On a CPU, where a stand-in replaces the graph, operators and their own time are counted instead of kernels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from benchmarks.command import add_json, parser_of, write_json
from benchmarks.environment import environment, load_average
from benchmarks.suite.architectures import ARCHITECTURES
from benchmarks.suite.device import calls, profiled_rows
from fastcfg import CFG, Sampler, solvers
from fastcfg.cli.parser import integer
from fastcfg.pipelines.text_to_image import TextToImage


def trace(device: torch.device, rows: int, graph: bool) -> dict[str, Any]:
    """Trace DDPM's loop with guidance, for 4 pictures of a prompt.

    Returns:
        graph (its kind); by row: calls of CUDA's functions, launches, copies and waits among them, kernels (copies are
        some), us in them and idle_us between them; and work, what took longest in all rows: [name, count, us].
    """
    stage = TextToImage.load(device=device)
    table = solvers.ddpm(stage.schedule.respace(rows), variance="learned_range")
    options = {"guidance": CFG(3.0), "clip": 1.0, "graph": graph, "memory_format": torch.channels_last}
    sampler, size = Sampler(stage.model, table, **options), stage.meta.image_size
    texts = [stage._encode(stage._tokens("prompt", "a red circle above a blue square")), stage._encode([])]
    shape, given = (4, 3, size, size), {"cond": texts[0], "uncond": texts[1], "seed": 0}
    list(sampler._prepare(shape, **given).rows())  # compiles and captures
    cuda, count, us = device.type == "cuda", Counter[str](), Counter[str]()
    host, events = profiled_rows(sampler._prepare(shape, **given), rows, cuda)
    events = sorted(events if cuda else host, key=lambda event: event.time_range.start)
    for event in events:
        count[event.name[:100]] += 1
        us[event.name[:100]] += event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
    busy_until = accumulate((event.time_range.end for event in events), max)
    idle = sum(max(0.0, event.time_range.start - end) for event, end in zip(events[1:], busy_until, strict=False))
    called = calls(host)
    words = {"launches": "Launch", "copies": "Mem", "waits": "Synchronize"}
    by_row = {name: sum(n for call, n in called.items() if word in call) for name, word in words.items()}
    by_row |= {"kernels": count.total(), "us": us.total(), "idle_us": idle}
    found = {"graph": sampler.report()["graph"], "calls": {call: round(n / rows, 2) for call, n in called.items()}}
    work = [(name, count[name], round(spent, 1)) for name, spent in us.most_common(30)]
    return {**found, **{name: round(n / rows, 2) for name, n in by_row.items()}, "work": work}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = parser_of("trace", __doc__)
    parser.add_argument("--rows", metavar="N", type=integer(1), default=5, help="of the loop (default: %(default)s)")
    add_json(parser)
    arguments = parser.parse_args(argv)
    device, before = torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_average()
    if problem := ARCHITECTURES["embedded"].problem():
        print(f"trace: skipped: {problem}")
        write_json(arguments.json, {"status": "skipped", "reason": problem})
        return 0
    ways = {name: trace(device, arguments.rows, name == "captured") for name in ("eager", "captured")}
    for name, way in ways.items():
        print(name, json.dumps({key: value for key, value in way.items() if key != "work"}))
    settings = {"rows": arguments.rows}
    write_json(arguments.json, {"environment": environment(device, before), "settings": settings, "ways": ways})
    return 0
