"""Stand-ins for the projects that changed their copy of guided-diffusion, accelerated beside themselves: the same
samples, `pred_xstart`s and generators, or run as the original, with a line that says so."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from support.families.base import SpacedDiffusion
from support.families.beside import Beside, Call
from support.families.table import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [(name, call) for name, family in FAMILIES.items() for call in family.calls]
AS_IT_IS = {"accelerate": copy.deepcopy, "report": lambda diffusion: {"run": "the original", "reason": "it is"}}


def progressive(call: Call) -> Call:
    return call._replace(loop=f"{call.loop}_progressive")


def turns(name: str, call: str, **options: Any) -> tuple[Beside, list[str]]:
    """A call made four times, the third of another batch, and then step by step; and step by step first. What is not
    the same."""
    family = FAMILIES[name]
    made = family.calls[call]
    few, many = family.batches
    beside, said = Beside(family, **options), []
    for turn, batch in enumerate((few, few, many, few)):
        said.append(beside.turn(lambda batch=batch: made(batch), seed=turn))
    if hasattr(beside.theirs, progressive(made(few)).loop) and "dump_steps" not in made(few).kwargs:
        said.append(beside.turn(lambda: progressive(made(few)), seed=9))
        fresh = Beside(family, **options)
        for turn, batch in enumerate((many, few)):
            said.append(fresh.turn(lambda batch=batch: progressive(made(batch)), seed=turn))
        said.append(fresh.turn(lambda: made(few), seed=3))
        beside.ran += fresh.ran
    return beside, [
        f"turn {i} ({ran}): {one}" for i, (one, ran) in enumerate(zip(said, beside.ran, strict=True)) if one
    ]


@pytest.mark.parametrize(("name", "call"), CASES, ids=[f"{name}: {call}" for name, call in CASES])
def test_a_family_samples_the_same(name: str, call: str) -> None:
    _, said = turns(name, call)
    assert not said, "\n".join(said)


# Faults that must be found


def of_class(kind: Any) -> Any:
    """A form of an object that is of another class."""

    def accelerate(diffusion: Any) -> Any:
        made = object.__new__(kind(type(diffusion)))
        made.__dict__.update(vars(diffusion))
        return made

    return accelerate


def without_overrides(kind: type) -> type:
    return SpacedDiffusion


def drawing(kind: type) -> type:
    def p_sample_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.p_sample_loop(self, *args, **kwargs)
        torch.rand(1)
        return result

    return type(kind.__name__, (kind,), {"p_sample_loop": p_sample_loop})


def rounding(kind: type) -> type:
    def p_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.p_sample(self, *args, **kwargs)
        out["pred_xstart"] = out["pred_xstart"] + 1e-3
        return out

    return type(kind.__name__, (kind,), {"p_sample": p_sample})


def leaving(kind: type) -> type:
    def p_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.kept = True
        return kind.p_sample(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"p_sample": p_sample})


@pytest.mark.parametrize(
    ("kind", "name", "call", "message"),
    [
        (without_overrides, "motion diffusion", "editing", "result"),
        (without_overrides, "OmniControl", "hint", "result"),
        (without_overrides, "point-e", "script", "result"),
        (without_overrides, "semantic diffusion", "script", "result"),
        (without_overrides, "glid-3-xl", "script", "result"),
        (drawing, "DiT", "script", "torch's generator"),
        (rounding, "PixArt", "script", "pred_xstart: 0.001 apart"),
        (leaving, "PixArt", "script", "left behind"),
    ],
)
def test_a_family_finds_faults(kind: Any, name: str, call: str, message: str) -> None:
    assert not turns(name, call, **AS_IT_IS)[1]
    said = turns(name, call, accelerate=of_class(kind), report=lambda diffusion: {"run": "engine"})[1]
    assert message in "\n".join(said)


def test_a_fall_through_without_a_word_is_a_fault() -> None:
    family = FAMILIES["RePaint"]
    made = functools.partial(family.calls["script"], 1)
    assert "nothing says why" in Beside(
        family, copy.deepcopy, lambda diffusion: {"run": "the original", "reason": ""}
    ).turn(made, 0)
