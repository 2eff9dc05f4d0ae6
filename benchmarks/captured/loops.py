"""Checks of what a captured loop computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.captured.registry import Details, check, require, require_same
from benchmarks.captured.rig import (
    GUIDANCES,
    REPRESENTED,
    TABLES,
    Conv,
    build,
    conditions,
    conv,
    draw,
    no_eager_runs,
    require_captured,
    shape_on,
)
from fastcfg import CFG, AdaptiveCFG, DynamicThreshold, Sampler, Schedule, solvers
from fastcfg.ops.backend import inductor_problem

_CLIPS = {"number": 1.0, "threshold": DynamicThreshold(0.9)}
_LATER = list(itertools.product(_CLIPS, ("philox", "torch"), (1, 3)))

# Branches that come to agree at different rows.
_AGREEING, _THRESHOLD = (1.6, 1.0), 0.93
_LONG = solvers.ddim(Schedule.named("squaredcos_cap_v2", 100).respace(12))


def combinations(full: bool) -> Iterator[tuple[str, str, str, str, int]]:
    """Solver, guidance, clip, noise and steps_per_graph: all, or every solver once with the rest in turns."""
    if full:
        yield from ((*pair, *rest) for pair in itertools.product(TABLES, GUIDANCES) for rest in _LATER)
        return
    for number, solver in enumerate(TABLES):
        yield solver, list(GUIDANCES)[number % len(GUIDANCES)], *_LATER[5 * number % len(_LATER)]


def require_captured_equals_eager(device: torch.device, model: Any, table: Any, **options: Any) -> None:
    """Two runs, captured, have the bits and the numbers of branches of eager ones."""
    eager, captured = (build(device, model, table, **options, graph=graph) for graph in (False, True))
    for seed in (5, 6):
        require_same(draw(captured, seed), draw(eager, seed), f"captured against eager, seed {seed}")
    require_captured(captured)
    branches = [sampler.report()["branches"] for sampler in (captured, eager)]
    require(branches[0] == branches[1], f"branches evaluated: {branches[0]} captured, {branches[1]} eager")


@check()
def captured_equals_eager(device: torch.device) -> Details:
    """Captured equals eager bit for bit for every solver, guidance, clip, noise source and number of rows in a graph.

    On a CPU each solver is run once, and the options take turns (tests/engine/graphs/test_captured.py has
    every pair of them).
    """
    missing = set(solvers.__all__) - REPRESENTED - set(TABLES)
    require(not missing, f"tables {sorted(TABLES)}, none of {sorted(missing)}")
    number = 0
    with no_eager_runs():
        for solver, guidance, clip, noise, repeat in combinations(device.type == "cuda"):
            table = TABLES[solver]
            options = {"guidance": GUIDANCES[guidance], "clip": _CLIPS[clip], "noise": noise, "steps_per_graph": repeat}
            try:
                require_captured_equals_eager(device, conv(device, table), table, **options)
            except Exception as error:
                error.args = (f"{solver}, {guidance}, {clip}, {noise} x{repeat}: {error}",)
                raise
            number += 1
    return {"combinations": number}


@check(needs_cuda=True)
def captured_equals_eager_on_every_backend(device: torch.device) -> Details:
    """Captured equals eager bit for bit on the reference, Inductor and Triton paths."""
    problem = inductor_problem(device)
    backends = ["triton", "reference"] + ([] if problem else ["inductor"])
    with no_eager_runs():
        for backend, solver, noise in itertools.product(backends, ("ddpm", "plms"), ("philox", "torch")):
            table = TABLES[solver]
            try:
                require_captured_equals_eager(device, conv(device, table), table, backend=backend, noise=noise)
            except Exception as error:
                error.args = (f"{backend}, {solver}, {noise}: {error}",)
                raise
    return {"backends": backends, "inductor": problem or "compiles"}


@check()
def outputs_are_the_callers_own(device: torch.device) -> Details:
    """A call's result is not changed by the next call, nor the next call by what is done to the result."""
    sampler = build(device)
    first = draw(sampler, 0)
    kept = first.clone()
    second = draw(sampler, 1)
    require_same(first, kept, "the first result after the second call")
    require(not torch.equal(first, second), "two seeds gave one result")
    first.zero_()
    second.fill_(torch.nan)
    require_same(draw(sampler, 0), kept, "the first seed again")
    require_captured(sampler)
    return {"captures": sampler.report()["captures"]}


@check()
def schedules_change_without_a_capture(device: torch.device) -> Details:
    """Guidance scales, conditioning, clip, seeds and x_T change without a capture."""
    model, batch = conv(device), shape_on(device)[0]
    sampler = build(device, model)
    rows = len(sampler.table)
    results = [draw(sampler)]
    other = {name: {"y": -value["y"] + 0.1} for name, value in conditions(sampler, batch).items()}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "scale by row": ({"guidance": CFG(np.linspace(1.5, 4, rows)[:, None])}, {}),
        "scale by sample": ({"guidance": CFG(np.linspace(2, 5, batch))}, {}),
        "clip": ({"clip": 0.5}, {}),
        "seed": ({}, {"seed": 7}),
        "conditioning": ({}, {"branches": other}),
        "x_T": ({}, {"x_T": torch.full(shape_on(device), 0.5, device=device)}),
    }
    options: dict[str, Any] = {}
    for name, (attributes, arguments) in changes.items():
        for attribute, value in attributes.items():
            setattr(sampler, attribute, value)
        options |= attributes
        results.append(draw(sampler, **arguments))
        require_same(results[-1], draw(build(device, model, **options), **arguments), f"changed {name}")
        captures = sampler.report()["captures"]
        require(captures == 1, f"{captures} captures after a change of {name}")
        require(not torch.equal(results[-1], results[-2]), f"a change of {name} changed nothing")
    require_captured(sampler)
    return {"changes": list(changes), "captures": 1}


class _Sized(Conv):
    """Notes the sizes of the batches it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x, t, y)


@check()
def unguided_rows_run_the_batch_alone(device: torch.device) -> Details:
    """Outside the interval of guidance the model is run on B samples, by a graph of its own."""
    batch = shape_on(device)[0]
    sizes, results = {}, {}
    for graph in (False, True):
        model = _Sized().to(device).eval()
        sampler = build(device, model, guidance=CFG(3.0, interval=(0.2, 0.7)), graph=graph)
        results[graph] = draw(sampler)
        sizes[graph] = model.sizes
    require_same(results[True], results[False], "captured against eager")
    # int(0.2 * 5) <= step < int(0.7 * 5)
    want = [batch, 2 * batch, 2 * batch, batch, batch]
    require(sizes[False] == want, f"the model ran on {sizes[False]} samples, not {want}")
    require(set(sizes[True]) == {batch, 2 * batch}, f"the graphs were captured with {sorted(set(sizes[True]))} samples")
    report = sampler.report()
    require(report["branches"] == [1, 2, 2, 1, 1], f"branches {report['branches']}")
    require_captured(sampler)
    sets = [program["branches"] for program in report["programs"]]
    require(sorted(map(len, sets)) == [1, 2], f"graphs of the branches {sets}")
    return {"samples_by_row": want, "graphs": [list(branches) for branches in sets]}


class _Converging(nn.Module):
    """Branches that come together sample by sample: their cosine depends on t and on the sample's own y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        base = torch.tanh(x)
        return base + base.flip(1) * (y * t.to(x.dtype) / 100).view(-1, 1, 1, 1)


@check()
def adaptive_guidance_ends_when_branches_agree(device: torch.device) -> Details:
    """Adaptive guidance equals CFG until a sample's branches agree, and when all do one branch is left."""
    values = {"cond": _AGREEING, "uncond": (0.0, 0.0)}
    branches = {name: {"y": torch.tensor(value, device=device)} for name, value in values.items()}
    states, counts = {}, {}
    for name, guidance in (("cfg", CFG(2.0)), ("adaptive", AdaptiveCFG(2.0, threshold=_THRESHOLD))):
        for graph in (False, True):
            sampler = Sampler(_Converging(), _LONG, guidance=guidance, graph=graph, device=device)
            for _ in range(2):  # the second run starts anew
                steps = list(sampler.iterate((2, 3, 4, 4), branches=branches, seed=0))
            states[name, graph] = torch.stack([step.x for step in steps])
            counts[name, graph] = sampler.report()["branches"]
        require_captured(sampler)
        require_same(states[name, True], states[name, False], f"{name}: captured against eager")
        require(counts[name, True] == counts[name, False], f"{name}: branches {counts}")
    equal = (states["adaptive", True] == states["cfg", True]).flatten(2).all(2)  # [R, B]
    left = [int((~equal[:, i]).nonzero()[0]) if not equal[:, i].all() else len(equal) for i in range(2)]
    for i, row in enumerate(left):
        require(bool(equal[:row, i].all()), f"sample {i} leaves guidance before row {row}")
    # A decision acts two rows later.
    require(2 < min(left) < max(left) < len(_LONG), f"the samples leave guidance at rows {left} of {len(_LONG)}")
    want = [2] * max(left) + [1] * (len(_LONG) - max(left))
    found = counts["adaptive", True]
    require(found == want, f"branches by row {found}, not {want}")
    return {"guided_until_row": left, "branches_by_row": found}


@check()
def previews_come_one_row_late(device: torch.device) -> Details:
    """Previews are delivered when the next row has been enqueued, in the host's memory, with the bits of `iterate`."""
    shape, every = shape_on(device), 2
    sampler = build(device)
    steps = list(sampler.iterate(shape, branches=conditions(sampler, shape[0]), seed=1))
    rows = len(steps)
    seen: list[Any] = []
    enqueued: list[int] = []
    result = draw(
        sampler,
        1,
        callback=lambda step: enqueued.append(step.row),
        preview=lambda preview: seen.append((preview, len(enqueued))),
        preview_every=every,
    )
    require_captured(sampler)
    require_same(result, steps[-1].x, "the samples beside previews")
    want = [(row, min(row + 2, rows)) for row in range(rows) if row % every == 0 or row == rows - 1]
    got = [(preview.row, after) for preview, after in seen]
    require(got == want, f"(row, rows enqueued by then): {got}, not {want}")
    for preview, _ in seen:
        require(preview.x0.device.type == "cpu", f"a preview on {preview.x0.device}")
        require_same(preview.x0, steps[preview.row].x0.cpu(), f"preview of row {preview.row}")
    return {"row_and_rows_enqueued": got}
