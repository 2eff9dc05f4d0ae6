"""The captured loop on the stand-in for graphs: the eager loop's bits, for every solver and option."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.captured_cases import (
    GUIDANCES,
    SHAPE,
    TABLES,
    UNADDED,
    B,
    Model,
    build,
    conditioning,
    draw,
    gradient,
    halve,
)
from support.captured_loop import REPRESENTED
from support.pairwise import pairwise
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastcfg import CFG, AdaptiveCFG, DynamicThreshold, Sampler, solvers
from fastcfg.ops import triton_problem

# Captured equals eager

FACTORS: dict[str, list[Any]] = {
    "table": list(TABLES),
    "guidance": list(GUIDANCES),
    "clip": ["none", "number", "per sample", "threshold"],
    "noise": ["philox", "torch", "recorded"],
    "functions": ["none", "denoised_fn", "cond_fn"],
    "watched": [False, True],
    "repeat": [1, 2],
    "batching": ["batched", "serial"],
    "dtype": [torch.float32, torch.bfloat16],
    "layout": [torch.contiguous_format, torch.channels_last],
    "backend": ["reference", "inductor", "triton"],
}
CLIPS = {"none": None, "number": 1.0, "per sample": [0.8, 1.2], "threshold": DynamicThreshold(0.9)}
INTERPRETER = not triton_problem(torch.device("cpu"))


def forbidden(case: Any) -> bool:
    table = TABLES.get(case.get("table", ""))
    raw = table is not None and (table.uses_unconditional or table.uses_raw_output or bool(table["k_m"].any()))
    return (
        (case.get("functions") == "denoised_fn" and raw)
        or (case.get("functions") == "cond_fn" and table is not None and not table.uses_gradient)
        or (case.get("guidance") in UNADDED and table is not None and table.uses_unconditional)
        or (case.get("backend") == "triton" and not INTERPRETER)
    )


def cases() -> list[Any]:
    """Every pair of options, but for Inductor, which compiles for seconds, and for the interpreter and Philox in plain
    torch, which are slow: a few cases stand for each."""
    found, left, philox = [], {"reference": 1000, "inductor": 3, "triton": 5}, 16
    for case in pairwise(FACTORS, forbidden):
        slow = case["clip"] == "threshold" or TABLES[str(case["table"])].num_rows > 6 or case["noise"] == "philox"
        if not left[str(case["backend"])] or (slow and case["backend"] == "triton"):
            case["backend"] = "reference"
        left[str(case["backend"])] -= 1
        philox -= case["noise"] == "philox"
        if philox < 0 and case["noise"] == "philox":
            case["noise"] = "torch"
        found.append(pytest.param(case, id="-".join(str(value).removeprefix("torch.") for value in case.values())))
    return found


@pytest.mark.parametrize("case", cases())
def test_captured_equals_eager(case: dict[str, Any]) -> None:
    table, guidance = TABLES[case["table"]], GUIDANCES[case["guidance"]]
    model = Model(table.learned_variance, case["dtype"]).to(memory_format=case["layout"])
    noise: Any = None
    if case["noise"] == "recorded":
        noise = torch.randn((table.num_rows, *SHAPE), generator=torch.Generator().manual_seed(1))
    results: dict[bool, list[Any]] = {}
    for graph in (False, True):
        sampler = Sampler(
            model,
            table,
            guidance=guidance,
            clip=CLIPS[case["clip"]],
            denoised_fn=halve if case["functions"] == "denoised_fn" else None,
            cond_fn=gradient if case["functions"] == "cond_fn" else None,
            noise_source="torch" if case["noise"] == "torch" else "philox",
            backend=case["backend"],
            graph=graph,
            batching=case["batching"],
            rows_per_graph=case["repeat"],
            memory_format=case["layout"],
        )
        watched: list[Tensor] = []
        for seed in (5, 6):
            watched.append(
                sampler.sample(
                    SHAPE,
                    branches=conditioning(guidance, case["dtype"]),
                    seed=seed,
                    noise=noise,
                    callback=(lambda step, seen=watched: seen.extend([step.x, step.x0])) if case["watched"] else None,
                )
            )
        assert sampler.report()["graph"] == ("stand-in" if graph else "none"), sampler.report()
        assert sampler.report()["graph_reason"] == ("" if graph else "graph=False")
        results[graph] = [*watched, sampler.report()["branches"]]
    captured, eager = results[True], results[False]
    assert captured.pop() == eager.pop()
    assert len(captured) == len(eager)
    assert all(map(torch.equal, captured, eager))
    assert not torch.equal(eager[-1], eager[0])


def test_every_pair_of_options_is_covered() -> None:
    covered = {item for param in cases() for item in (param.values[0]["table"], param.values[0]["guidance"])}
    assert covered == {*TABLES, *GUIDANCES}
    assert set(solvers.__all__) - REPRESENTED <= {name.split()[0] for name in TABLES}


# How the rows are run


@pytest.mark.parametrize("noise", ["philox", "torch"])
def test_several_rows_in_one_graph(noise: str) -> None:
    one, _ = build(noise_source=noise)
    want = draw(one)
    for steps, launches in ((2, [2, 2, 1]), (3, [3, 1, 1]), (100, [5])):
        several, _ = build(noise_source=noise, rows_per_graph=steps)
        run = several._prepare(SHAPE, branches=conditioning(CFG()), seed=1)
        counts = np.diff([-1, *run.rows()]).tolist()
        assert counts == launches
        assert torch.equal(draw(several), want)


def test_rows_with_fewer_branches_end_a_graph_of_several() -> None:
    guidance = CFG(3.0, interval=(0.2, 0.8))
    one, _ = build(guidance)
    several, _ = build(guidance, rows_per_graph=2)
    run = several._prepare(SHAPE, branches=conditioning(guidance), seed=1)
    assert np.diff([-1, *run.rows()]).tolist() == [1, 2, 1, 1]
    assert torch.equal(draw(several), draw(one))


@pytest.mark.parametrize(("batching", "sizes"), [("batched", [4] * 5), ("serial", [2] * 10), ("auto", [4] * 5)])
def test_branches_run_together_or_one_by_one(batching: str, sizes: list[int]) -> None:
    sampler, model = build(graph=False, batching=batching)
    draw(sampler)
    assert model.log.sizes == sizes


def test_serial_branches_give_the_batched_result() -> None:
    for guidance in (CFG(3.0), GUIDANCES["compose"]):
        batched, _ = build(guidance, batching="batched")
        serial, _ = build(guidance, batching="serial")
        torch.testing.assert_close(draw(serial), draw(batched), rtol=0, atol=1e-6)


def test_buffers_begin_at_any_row() -> None:
    sampler, _ = build(table="history", graph=False)
    run = sampler._prepare(SHAPE, branches=conditioning(CFG()), seed=1)
    memory, table = run.buffers, TABLES["history"]
    for row in (4, 0):
        memory.rehearse(row)
        buffers = memory.step
        assert buffers.counter.tolist() == [row, 0]
        assert buffers.time.tolist() == [table["t"][row]] * (2 * B)
        want = (float(table["c_in"][row]) * torch.linspace(-1, 1, buffers.x.numel())).view(SHAPE)
        assert torch.equal(buffers.model_input, torch.cat([want, want]))


# What needs a new capture


def configure(sampler: Sampler, **options: Any) -> None:
    sampler.config = replace(sampler.config, **options)


OPTIONS: dict[str, Callable[[Sampler, Model], object]] = {
    "table": lambda sampler, model: setattr(sampler, "table", TABLES["ddim"]),
    "guidance": lambda sampler, model: setattr(sampler, "guidance", CFG(3.0, formulation="original")),
    "interval": lambda sampler, model: setattr(sampler, "guidance", CFG(3.0, interval=(0.0, 0.5))),
    "adaptive": lambda sampler, model: setattr(sampler, "guidance", AdaptiveCFG(3.0, threshold=-1)),
    "no clip": lambda sampler, model: setattr(sampler, "clip", None),
    "threshold": lambda sampler, model: setattr(sampler, "clip", DynamicThreshold(0.5)),
    "denoised_fn": lambda sampler, model: setattr(sampler, "denoised_fn", halve),
    "cond_fn": lambda sampler, model: setattr(sampler, "cond_fn", gradient),
    "noise": lambda sampler, model: configure(sampler, noise_source="philox"),
    "model": lambda sampler, model: setattr(sampler, "model", lambda x, t, y: 0.5 * model(x, t, y)),
    "state_dtype": lambda sampler, model: configure(sampler, state_dtype=torch.float64),
    "dtype": lambda sampler, model: (configure(sampler, dtype=torch.bfloat16), model.to(torch.bfloat16)),
    "batching": lambda sampler, model: configure(sampler, batching="serial"),
    "graph": lambda sampler, model: configure(sampler, graph=False),
    "rows_per_graph": lambda sampler, model: configure(sampler, rows_per_graph=2),
    "memory_format": lambda sampler, model: configure(sampler, memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changed_between_calls_acts_as_on_a_fresh_sampler(name: str) -> None:
    used, used_model = build()
    first = draw(used)
    OPTIONS[name](used, used_model)
    fresh, fresh_model = build()
    OPTIONS[name](fresh, fresh_model)
    changed = draw(used)
    assert torch.equal(changed, draw(fresh))
    assert used.report()["captures"] == 2
    if name not in ("rows_per_graph", "graph", "batching", "memory_format", "guidance"):
        assert not torch.equal(changed.float(), first)


def test_torchs_settings_are_captured() -> None:
    sampler, _ = build()
    outside = draw(sampler)
    with torch.autocast("cpu", torch.bfloat16):
        inside = draw(sampler)
        fresh, _ = build()
        assert torch.equal(inside, draw(fresh))
    assert not torch.equal(inside, outside)
    assert torch.equal(draw(sampler), outside)
    assert sampler.report()["captures"] == 2
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        draw(sampler)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert sampler.report()["captures"] == 3


def test_numbers_changed_in_python_act_at_the_next_call() -> None:
    gain = 1.0

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return gain * x * y.view(-1, 1, 1, 1)

    sampler = Sampler(model, TABLES["ddim"], guidance=CFG(3.0), graph=True)
    first = draw(sampler)
    gain = 0.5
    assert not torch.equal(draw(sampler), first)
    assert sampler.report()["recaptured"] == "model.gain replaced"


def test_refresh_captures_what_only_python_knows() -> None:
    class Gain:
        value = 1.0

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return Gain.value * x * y.view(-1, 1, 1, 1)

    sampler = Sampler(model, TABLES["ddim"], guidance=CFG(3.0), graph=True)
    first = draw(sampler)
    Gain.value = 0.5
    assert torch.equal(draw(sampler), first)
    sampler.refresh()
    assert not torch.equal(draw(sampler), first)
    assert sampler.report()["recaptured"] == "refresh() was called"
    draw(sampler)
    assert sampler.report()["captures"] == 2


def test_a_sampler_does_not_keep_weights_alive() -> None:
    sampler, model = build()
    draw(sampler)
    sampler.release()
    storage = StorageWeakRef(model.conv.weight.untyped_storage())
    model.conv.weight.data = torch.zeros(3, 3, 3, 3)
    gc.collect()
    assert storage.expired()


def test_what_a_model_remembers_for_one_shape_is_noticed_at_another() -> None:
    """As rotary embeddings do: the graph of the first shape would read what is no longer there."""

    class Remembering(Model):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if getattr(self, "ramp", torch.empty(0)).shape != x.shape[-1:]:
                self.ramp = torch.linspace(0, 1, x.shape[-1])
            return super().forward(x, t, y) + self.ramp

    sampler = Sampler(Remembering(), TABLES["ddim"], guidance=CFG(3.0), graph=True)
    first = draw(sampler)
    conditions = {"branches": conditioning(CFG()), "seed": 1}
    sampler.sample((2, 3, 6, 6), **conditions)
    assert torch.equal(draw(sampler), first)
    assert sampler.report()["captures"] == 3
    assert sampler.report()["recaptured"] == "model.ramp replaced"
