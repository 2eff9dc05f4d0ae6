"""Whether the process's random generators moved is told from their memory, as from their states."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastcfg.compiler.step.random_states import GLOBAL_GENERATORS

pytestmark = pytest.mark.quick
NAMES = ("torch", "numpy", "python")
# numpy and Python draw two normals at a time and keep the second.
DRAWS: list[tuple[str, Callable[[], Any]]] = [
    ("torch", lambda: torch.randn(3).tolist()),
    ("numpy", np.random.rand),
    ("numpy", np.random.randn),
    ("numpy", np.random.randn),
    ("python", random.random),
    ("python", lambda: random.gauss(0, 1)),
    ("python", lambda: random.gauss(0, 1)),
]


@pytest.mark.parametrize("read_before", [False, True])
def test_every_draw_is_noticed_and_taken_back(read_before: bool) -> None:
    for name, draw in DRAWS:
        for _ in range(1 + read_before):
            states = [one.state() for one in GLOBAL_GENERATORS]
        assert all(one.is_in(state) for one, state in zip(GLOBAL_GENERATORS, states, strict=True))
        drawn = draw()
        moved = [not one.is_in(state) for one, state in zip(GLOBAL_GENERATORS, states, strict=True)]
        assert moved == [name == other for other in NAMES]
        for one, state in zip(GLOBAL_GENERATORS, states, strict=True):
            one.put(state)
        assert draw() == drawn


def test_a_state_that_was_put_is_read_anew() -> None:
    for one, draw in zip(GLOBAL_GENERATORS, (torch.rand, np.random.rand, random.random), strict=True):
        options = (1,) if draw is torch.rand else ()
        first = one.state()
        draw(*options)
        second = one.state()
        one.put(first)
        assert one.is_in(first)
        assert not one.is_in(second)
        one.put(second)
        assert one.is_in(second)


def test_other_generators_of_numpy_are_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(np.random, "set_bit_generator"):
        pytest.skip("numpy has no set_bit_generator before 1.24")
    draw_one: Any = np.random.rand
    _, ours, _ = GLOBAL_GENERATORS
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        state = ours.state()
        assert ours.is_in(state)
        draw_one()
        assert not ours.is_in(state)
    finally:
        np.random.set_bit_generator(before)
