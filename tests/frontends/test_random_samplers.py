"""Random sampling functions, fused beside themselves: the same images, callbacks and generators, however they ran."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.random_samplers import CALLBACKS, DRAWS, EDITS, IN_PLACE, MODELS, Model, Outcome, Plan

from fastcfg.frontends._fused.sampler import fused

ran: Counter[str] = Counter()


def often(first: str, *others: str) -> st.SearchStrategy[str]:
    """Half of the time the first."""
    return st.one_of(st.just(first), st.sampled_from(others))


plans = st.builds(
    Plan,
    stages=st.integers(1, 2),
    history=st.integers(0, 2),
    draw=st.sampled_from(DRAWS),
    callback=st.sampled_from(CALLBACKS),
    in_place=often(*IN_PLACE),
    edit=often(*EDITS),
    edited_step=st.integers(0, 4),
    model=often(*MODELS),
    no_grad=often("yes", "no").map(lambda word: word == "yes"),
    curved=st.integers(0, 9).map(lambda n: n == 9),
    observed=st.booleans(),
)


def check(plan: Plan) -> None:
    """Run the original and its fused form two times each: the second run may be captured."""
    original = plan.function()
    ours = fused(original, "auto", "auto")
    models = Model(plan.model), Model(plan.model)
    for run in range(2):
        Outcome(plan, ours, run, models[0]).check(Outcome(plan, original, run, models[1]))
        ran[ours.report()["run"]] += 1  # type: ignore[attr-defined]


@seed(0)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(plan=plans)
def test_a_random_sampler_is_the_original(plan: Plan) -> None:
    logging.getLogger("fastcfg").disabled = True
    try:
        check(plan)
    finally:
        logging.getLogger("fastcfg").disabled = False


@pytest.mark.quick
@pytest.mark.parametrize("draw", DRAWS)
def test_every_kind_of_draw(draw: str) -> None:
    plan = Plan(1, 1, draw, "middle", "nothing", "nothing", 0, "plain", True, False, False)
    ran.clear()
    check(plan)
    assert ran == ({"the original": 2} if draw in ("numpy", "rand") else {"stepped": 1, "engine": 1})
