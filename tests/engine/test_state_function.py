"""A state_fn: what it is given and where, that captured equals eager, and that it costs one more pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.captured_cases import SHAPE, TABLES, Model, build, conditioning, draw
from support.pairwise import pairwise
from torch import Tensor

from fastcfg import CFG, AdaptiveCFG, ByRow, Sampler, StateFunction, inpaint, solvers
from fastcfg.ops import triton_problem

INTERPRETED = not triton_problem(torch.device("cpu"))
HEUN = solvers.heun([14.6, 4.0, 1.2, 0.0])
TABLES = TABLES | {"heun": HEUN}


def limit(x: Tensor, x0: Tensor, row: Tensor) -> Tensor:
    """Uses everything: a threshold that falls by row, and a part of x0."""
    bound = 2.0 - 0.2 * row
    return torch.where(x0 > 0.2, x.clamp(-bound, bound), x)


def sampler_of(name: str, **options: Any) -> Sampler:
    table = TABLES[name]
    model = Model(table.learned_variance, options.get("dtype", torch.float32))
    options = {"clip": 1.0, "graph": True, "noise_source": "torch", **options}
    return Sampler(model, table, **{"guidance": CFG(3.0), **options})


def by_hand(sampler: Sampler, function: Any, when: str, **options: Any) -> Tensor:
    """The same changes between the rows of a loop of one's own."""
    run = sampler.start(SHAPE, branches=conditioning(sampler.guidance), seed=1, state_fn=None, **options)
    x, x0 = run.buffers.step.x.clone(), torch.zeros(SHAPE, dtype=sampler.config.state_dtype)
    if when == "before":
        run.set_state(0, function(x, x0, torch.tensor(0)))
    for row in run.rows():
        step, following = run.step(row), row + (when == "before")
        if following < len(sampler.table):
            x = function(step.x, step.x0, torch.tensor(following))
            if row + 1 < len(sampler.table):
                run.set_state(row + 1, x)
        else:
            x = step.x
    return x


CASES = pairwise(
    {
        "table": ["ddpm learned_range", "ddim", "plms", "history", "heun", "sgld"],
        "when": ["after", "before"],
        "graph": [True, False],
        "backend": ["reference", "triton"] if INTERPRETED else ["reference"],
        "noise_source": ["philox", "torch"],
        "clip": [1.0, None],
        "dtype": [torch.float32, torch.float16],
        "rows_per_graph": [1, 3],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(str(value) for value in case.values()))
def test_a_change_is_what_a_loop_of_ones_own_makes(case: dict[str, Any]) -> None:
    options = {name: value for name, value in case.items() if name not in ("table", "when")}
    when, name = case["when"], case["table"]
    got = draw(sampler_of(name, state_fn=StateFunction(limit, when), **options))
    want = by_hand(sampler_of(name, **options | {"graph": False}), limit, when)
    assert torch.equal(got, want)
    assert not torch.equal(got, draw(sampler_of(name, **options)))


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("backend", ["reference", "triton"] if INTERPRETED else ["reference"])
def test_a_function_that_changes_nothing_changes_no_bit(when: str, backend: str) -> None:
    for name in ("ddpm learned_range", "history", "heun"):
        nothing = StateFunction(lambda x, x0, row: x, when)
        options: dict[str, Any] = {"backend": backend, "memory_format": torch.channels_last}
        assert torch.equal(draw(sampler_of(name, state_fn=nothing, **options)), draw(sampler_of(name, **options)))


def test_rows_are_the_tables_and_x0_is_the_rows() -> None:
    seen: list[tuple[int, float, float]] = []

    def look(x: Tensor, x0: Tensor, row: Tensor) -> Tensor:
        assert row.dtype == torch.int64
        assert row.ndim == 0
        seen.append((int(row), float(x.sum()), float(x0.sum())))
        return x

    sampler = build(graph=False, state_fn=look)[0]
    steps = list(sampler.iterate(SHAPE, branches=conditioning(sampler.guidance), seed=1))
    assert seen == [(step.row, float(step.x.sum()), float(step.x0.sum())) for step in steps]
    before = StateFunction(look, "before")
    draw(sampler, state_fn=before)
    seen.clear()
    draw(sampler, state_fn=before)  # on the same buffers
    assert [row for row, *_ in seen] == list(range(len(sampler.table)))
    assert seen[0][2] == 0
    assert [x0 for *_, x0 in seen[1:]] == [float(step.x0.sum()) for step in steps[:-1]]


def test_a_function_for_one_call_replaces_the_samplers_and_a_new_one_is_not_stale() -> None:
    sampler, _ = build(state_fn=limit)
    with_it = draw(sampler)
    assert torch.equal(draw(sampler, state_fn=None), draw(build()[0]))
    assert torch.equal(
        draw(sampler, state_fn=lambda x, x0, row: 0.5 * x), draw(sampler, state_fn=lambda x, _, r: x / 2)
    )
    assert torch.equal(draw(sampler), with_it)


def test_with_adaptive_guidance_functions_and_float64() -> None:
    options: dict[str, Any] = {
        "guidance": AdaptiveCFG(3.0, threshold=0.9),
        "denoised_fn": lambda x0: 0.5 * x0,
        "state_dtype": torch.float64,
    }
    captured = draw(build(state_fn=limit, **options)[0])
    assert torch.equal(captured, draw(build(state_fn=limit, graph=False, **options)[0]))
    assert captured.dtype == torch.float64


def test_with_models_by_row_and_scales_by_place_beside_other_additions() -> None:
    first, second = Model(True), Model(True)
    with torch.no_grad():
        second.conv.weight.mul_(0.5)
    scales = torch.linspace(1, 4, 16).view(1, 1, 4, 4)
    pixels = inpaint(torch.linspace(0, 1, 4).view(1, 1, 1, 4), torch.zeros(1, 3, 4, 4), noise="fresh")
    runs: list[list[Any]] = []
    for graph in (False, True):
        options: dict[str, Any] = {"clip": 1.0, "graph": graph, "check_finite": "raise", "check_every": 2}
        sampler = Sampler(ByRow(first, second, row=2), TABLES["ddpm learned_range"], guidance=CFG(scales), **options)
        drawn: Any = draw(sampler, log_prob=True, trajectory=True)
        runs.append([draw(sampler, state_fn=pixels), draw(sampler, state_fn=limit), drawn.log_prob, drawn.states])
        assert {program["passes"] for program in sampler.report()["programs"]} == {4}
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_it_costs_one_pass_and_no_capture_more() -> None:
    plain, changed = build()[0], build(state_fn=limit)[0]
    draw(plain)
    draw(changed)
    draw(changed, seed=2)
    reports = plain.report(), changed.report()
    assert [report["programs"][0]["passes"] for report in reports] == [1, 2]
    assert [report["captures"] for report in reports] == [1, 1]


@pytest.mark.parametrize(
    ("state_fn", "error", "message"),
    [
        (3, TypeError, "state_fn: got int, expected a function"),
        (lambda x, x0, row: None, TypeError, "state_fn: got NoneType from it, expected the state"),
        (lambda x, x0, row: x[:1], ValueError, r"state_fn: got torch.float32 \(1, 3, 4, 4\) from it, expected a state"),
        (lambda x, x0, row: x > 0, ValueError, r"state_fn: got torch.bool \(2, 3, 4, 4\) from it"),
    ],
)
def test_what_is_no_state_function_is_refused(state_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(build(state_fn=state_fn)[0])


def test_another_place_is_refused() -> None:
    with pytest.raises(ValueError, match="when: got 'between', expected one of before, after"):
        StateFunction(limit, "between")
