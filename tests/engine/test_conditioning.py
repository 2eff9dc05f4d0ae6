"""Re-created functions are recognised, others are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcfg import CFG, Sampler, Schedule, solvers
from fastcfg.engine.conditioning import Alike

pytestmark = pytest.mark.quick

NET = nn.Linear(2, 2)


class Holder:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def model(self, x: Tensor) -> Tensor:
        return self.scale * x

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


HOLDER = Holder(2.0)


def closure(net: Any = NET, scale: float = 3.0) -> Any:
    return lambda x: scale * net(x)


def default(scale: float = 3.0) -> Any:
    return lambda x, *, net=NET, scale=scale: scale * net(x)


def nested(scale: float = 3.0) -> Any:
    inner = closure(scale=scale)
    return lambda x: inner(x)


def recursive(scale: float = 3.0) -> Any:
    def function(x: int) -> float:
        return scale if x == 0 else function(x - 1)

    return function


SAME: dict[str, Callable[[], Any]] = {
    "closure": closure,
    "default": default,
    "nested": nested,
    "method": lambda: HOLDER.model,
    "partial": lambda: partial(closure(), net=NET, scale=2.0),
    "partial of a method": lambda: partial(HOLDER.model, torch),
    "module": lambda: NET,
    "object": lambda: HOLDER,
    "nothing": lambda: None,
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_made_anew_and_does_the_same_is_alike(name: str) -> None:
    first, second = Alike(SAME[name]()), Alike(SAME[name]())
    assert first == second
    assert hash(first) == hash(second)


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "number in a closure": (closure(scale=1.0), closure(scale=2.0)),
    "type of a number": (closure(scale=1), closure(scale=True)),
    "object in a closure": (closure(NET), closure(nn.Linear(2, 2))),
    "tensor in a closure": (closure(torch.ones(1)), closure(torch.ones(1))),
    "default": (default(1.0), default(2.0)),
    "deeper": (nested(1.0), nested(2.0)),
    "code": (lambda x: x, lambda x: x),
    "object of a method": (Holder(1.0).model, Holder(1.0).model),
    "argument of a partial": (partial(closure, NET), partial(closure, HOLDER)),
    "keyword of a partial": (partial(closure, scale=1.0), partial(closure, scale=2.0)),
    "objects": (Holder(1.0), Holder(1.0)),
    "functions that lead to themselves": (recursive(), recursive()),
    "nothing": (None, NET),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_may_do_something_else_is_not(name: str) -> None:
    first, second = map(Alike, DIFFERENT[name])
    assert first != second
    assert first == Alike(DIFFERENT[name][0])


def test_a_function_made_in_every_call_is_captured_once() -> None:
    table = solvers.ddim(Schedule.named("linear").respace(3))
    sampler = Sampler(closure(), table, guidance=CFG(2.0), graph=True)
    given = {"cond": {}, "uncond": {}}

    def run(scale: float) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(scale * x)

        sampler.model, sampler.denoised_fn = model, lambda x0: 0.5 * x0
        return sampler.sample((2, 1, 2, 2), seed=0, **given)

    first = run(1.0)
    assert torch.equal(run(1.0), first)
    assert sampler.report()["captures"] == 1
    assert not torch.equal(run(2.0), first)
    assert sampler.report()["captures"] == 2
    assert torch.equal(run(1.0), first)
    assert sampler.report()["captures"] == 2
