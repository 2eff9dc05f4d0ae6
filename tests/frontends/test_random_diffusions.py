"""Diffusion objects with methods, tables, clamps, loops and signatures changed at random, accelerated beside
themselves: the same or as the original, never silently different.

The suite runs a hundred, always the same. To run others, for instance 5,000 of them:

    FASTCFG_EXAMPLES=5000 FASTCFG_SEED=1 pytest tests/frontends/test_random_diffusions.py

A failure prints its plan, which `check` takes. `FASTCFG_SHRINK=0` reports failures as they were found, which is sooner.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.families.base import Mean, Var
from support.random_diffusions import edits, plans
from support.random_diffusions.edits import Edit
from support.random_diffusions.plans import CallPlan, Plan, check

pytestmark = pytest.mark.filterwarnings("ignore")

MANY = int(os.environ.get("FASTCFG_EXAMPLES", "0"))
PHASES = [Phase.explicit, Phase.generate] + ([] if os.environ.get("FASTCFG_SHRINK") == "0" else [Phase.shrink])
ran: Counter[str] = Counter()


def often(first: Any, others: Any) -> st.SearchStrategy[Any]:
    """Half of the time the first."""
    return st.one_of(st.just(first), st.sampled_from(list(others)))


numbers = st.integers(0, 47)
term = st.builds(
    Edit,
    st.sampled_from(edits.PLACES),
    st.sampled_from(list(edits.TERMS)),
    often("always", edits.WHENS),
    st.integers(0, 5),
)
change = st.one_of(term, st.tuples(st.sampled_from(list(plans.CHANGES)), numbers))
changes = st.lists(change, max_size=3).map(tuple)
call = st.builds(
    CallPlan,
    loop=often("p_sample_loop", ["ddim_sample_loop"]),
    progressive=st.booleans(),
    clip=st.booleans(),
    denoised=often("none", plans.FUNCTIONS),
    classifier=st.integers(0, 5).map(lambda n: n == 5),
    kwargs=st.sampled_from(plans.KWARGS),
    noise=often("none", plans.NOISES),
    batch=st.sampled_from([1, 2, 3]),
    eta=st.sampled_from([0.0, 0.7]),
    by_hand=often("nothing", plans.BY_HAND),
)


@st.composite
def calls(draw: Any) -> tuple[CallPlan, ...]:
    """Two to four, often the same again."""
    made = [draw(call)]
    for _ in range(draw(st.integers(1, 3))):
        made.append(made[-1] if draw(st.booleans()) else draw(call))
    return tuple(made)


objects = st.builds(
    Plan,
    spaced=st.booleans(),
    steps=st.integers(4, 6),
    mean=often(Mean.EPSILON, Mean),
    var=often(Var.FIXED_LARGE, Var),
    rescale=st.booleans(),
    changes=st.one_of(st.just(()), changes, changes),
    model=often("plain", plans.MODELS),
    size=st.sampled_from(plans.SIZES),
    calls=calls(),
    edits=st.lists(st.tuples(often("nothing", plans.EDITS), numbers), max_size=3).map(tuple),
)


@settings(
    max_examples=MANY or 100,
    derandomize=not MANY,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
@seed(int(os.environ.get("FASTCFG_SEED", "0")))
@given(plan=objects)
def test_a_random_diffusion_is_the_original(plan: Plan) -> None:
    checked = check(plan)
    ran.update(checked.ran)
    assert not checked.unlike, checked.unlike


A, DDIM = CallPlan(), CallPlan("ddim_sample_loop")
# What random ones have found.
FOUND: dict[str, Plan] = {
    "previous x": Plan(mean=Mean.PREVIOUS_X),
    "half noise, the second call": Plan(calls=(CallPlan(noise="half"),) * 3),
    "a table edited between steps": Plan(calls=(CallPlan(progressive=True, by_hand="table"),) * 3),
    "arguments edited between steps": Plan(calls=(CallPlan(progressive=True, kwargs="y", by_hand="kwargs"),) * 3),
    "seeded before the first step": Plan(calls=(CallPlan(progressive=True, by_hand="late"),) * 3),
    "types edited by the loop": Plan(changes=(("loops: between", 20),)),
    "arguments edited by the loop": Plan(changes=(("loops: between", 16),), calls=(CallPlan(kwargs="y"),) * 2),
    "steps that fail": Plan(changes=(("times", 4),)),
    "functions that draw, and a model that counts": Plan(model="counts", calls=(CallPlan(denoised="draws"),) * 2),
    "layouts of a compiled step": Plan(model="transposed", calls=(A, A, A), edits=(("timesteps", 1), ("nothing", 0))),
    "half outputs": Plan(mean=Mean.START_X, model="half", calls=(CallPlan(progressive=True, clip=False),) * 2),
    "another memory order": Plan(changes=(Edit("x0", "transposed", "always", 0),), calls=(CallPlan(eta=0.7),) * 2),
    "branches on samples": Plan(changes=(Edit("x", "scaled", "small", 0),), calls=(DDIM, DDIM)),
    "branches on arguments": Plan(
        changes=(Edit("mean", "scaled", "label", 0),), calls=(CallPlan(kwargs="y"), CallPlan(kwargs="negative"))
    ),
    "a limit far out": Plan(
        changes=(Edit("mean", "clamped", "always", 3),), calls=(CallPlan(noise="huge", clip=False),)
    ),
    "one time of each sample": Plan(
        steps=6, changes=(Edit("mean", "scaled", "each at", 2),), calls=(CallPlan(kwargs="y"),)
    ),
    "one entry of a table": Plan(
        spaced=False, steps=12, changes=(("table_entry", 30),), calls=(CallPlan(kwargs="y"),) * 2
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    checked = check(FOUND[name])
    assert not checked.unlike, checked.unlike


def test_each_way_was_taken() -> None:
    if not ran:
        pytest.skip("no random diffusion was run")
    assert ran["engine"] > 20
    assert ran["the original"] > 20
    assert ran["refused"] == 0


# Faults that must be found


def as_it_is(diffusion: Any) -> Any:
    return copy.deepcopy(diffusion)


def plain(diffusion: Any) -> Any:
    """Without what the class changed."""
    kind = next(base for base in type(diffusion).__mro__ if base.__module__.startswith("support.families"))
    made = object.__new__(kind)
    made.__dict__.update(vars(diffusion))
    return made


def told(diffusion: Any) -> dict[str, Any]:
    return {"run": "engine", "reason": ""}


FAULTY: dict[str, Plan] = {
    "a mean": Plan(changes=(Edit("mean", "x", "always", 0),)),
    "one step": Plan(changes=(Edit("sample", "shifted", "at", 2),)),
    "a clamp": Plan(changes=(Edit("x0", "clamped", "always", 1),), calls=(CallPlan(noise="large", clip=False),)),
    "noise": Plan(changes=(("noise", 0),)),
    "draws": Plan(changes=(("loops: between", 5),)),
    "times": Plan(changes=(("times", 2),)),
    "a counter": Plan(changes=(("counters", 0),)),
    "history": Plan(changes=(("history", 0),)),
    "what is left": Plan(changes=(("loops: between", 18),)),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_found(name: str) -> None:
    assert not check(FAULTY[name], as_it_is, told).unlike
    assert check(FAULTY[name], plain, told).unlike


def test_a_fall_through_without_a_word_is_found() -> None:
    assert "nothing says" in check(Plan(), as_it_is, lambda diffusion: {"run": "the original", "reason": ""}).unlike
