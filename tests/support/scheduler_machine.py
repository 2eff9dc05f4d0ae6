"""Sequences of operations on a scheduler and on its drop-in, compared after every one.

An operation is a line of text, so that a failing sequence can be read, and run again:

    beside("UniPCMultistepScheduler", {}, ["set 5", "step", "copied deepcopy copy", "step sample=masked"])

The first word names the operation (`OPERATIONS`), the others are its arguments. Both sides are given the same numbers:
what the drop-in's side returns and saves is compared, then set to the original's bits without the tensors' version
changing, so that what is judged is each operation alone, never the growth of a rounding.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastcfg import accelerate
from support.same import Leaves, differences, largest, leaves_of, make_equal
from support.scheduler_operations import OPERATIONS, STATE, World, new_world, snapshot

SHAPES = ((2, 3, 4, 5), (1, 3, 4, 4), (2, 6), (1, 3, 2, 4, 3), (2, 5, 4))


# The two sides


class Mismatch(AssertionError):  # noqa: N818
    """Where the drop-in is not the original."""


def beside(
    name: str,
    config: dict[str, Any],
    operations: Sequence[str],
    shape: tuple[int, ...] = SHAPES[0],
    drop_in: Callable[[Any], Any] = accelerate,
) -> None:
    """Run operations on a scheduler and on its drop-in.

    Raises:
        Mismatch: the class, the configuration, the operations so far, and where the two differ.
    """
    torch.manual_seed(0)
    original, ours = new_world(make(name, config), shape), new_world(make(name, config), shape, drop_in)
    for done, line in enumerate(operations, 1):
        found = _apply(line, original, ours)
        if not found and done == len(operations):
            found = _compare_rest(original, ours)
        if found:
            described = f"{name}(**{config}), samples of {shape}, after {list(operations[:done])}:"
            raise Mismatch("\n".join([described, *(f"  {one}" for one in found[:8])]))


@functools.cache
def _made(name: str, config: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(**ast.literal_eval(config))


def make(name: str, config: dict[str, Any]) -> Any:
    """A scheduler. Some constructors take a second, copies do not."""
    return copy.deepcopy(_made(name, repr(config)))


@dataclass
class _Outcome:
    value: Any = None
    error: str = ""


def _run(line: str, world: World) -> _Outcome:
    verb, *arguments = line.split()
    torch.set_grad_enabled(True)
    try:
        return _Outcome(OPERATIONS[verb](world, *arguments))
    except Exception as error:
        said = re.sub(r"0x[0-9a-f]+", "0x", str(error))
        return _Outcome(error=f"{type(error).__name__}: {said}")


def _apply(line: str, original: World, ours: World) -> list[str]:
    """What differs after an operation."""
    drawn = [generator.get_state() for generator in original.generators()]
    global_state, earlier = torch.get_rng_state(), slice(max(0, len(original.kept) - 6), len(original.kept))
    original.tape.clear()
    original.call = None
    want = _run(line, original)
    left = torch.get_rng_state()
    torch.set_rng_state(global_state)
    ours.playing = iter(list(original.tape))
    got = _run(line, ours)
    if got.error != want.error:
        return [f"raised {got.error or 'nothing'!r}, expected {want.error or 'nothing'!r}"]
    found = [] if torch.equal(torch.get_rng_state(), left) else ["the global generator is left in another state"]
    states = zip(original.generators(), ours.generators(), strict=True)
    if not all(torch.equal(a.get_state(), b.get_state()) for a, b in states):
        found.append("the generators are left in other states")
    theirs, own = _leaves(original, want, earlier), _leaves(ours, got, earlier)
    # Where terms nearly cancel, a rounding is one of the terms.
    terms = [] if original.call is None else original.kept[earlier.stop : earlier.stop + 2]
    floor = max((largest(term) for term in terms), default=0.0) / 16
    wrong = differences(theirs, own, floor=floor)
    if wrong and original.call is not None and not want.error:
        wrong = differences(theirs, own, _truth(original, drawn, global_state), floor)
        torch.set_rng_state(left)
    found += wrong
    if not found:
        make_equal(theirs, own)
    return found


def _compare_rest(original: World, ours: World) -> list[str]:
    """The second scheduler, and all that was passed and returned: nothing may have been overwritten."""
    found = [f"second scheduler: {one}" for one in differences(*(_state(w.other) for w in (original, ours)))]
    kept = [leaves_of(world.kept, "passed or returned") for world in (original, ours)]
    return found + differences(*kept)


def _leaves(world: World, outcome: _Outcome, earlier: slice) -> Leaves:
    kept = leaves_of(world.kept[earlier], "passed or returned before")
    return leaves_of(outcome.value, "result") | kept | _state(world.scheduler)


def _state(scheduler: Any) -> Leaves:
    return leaves_of({k: v for k, v in vars(scheduler).items() if not k.startswith(STATE)}, "state")


# The same step in float64, made only where the two differ by more than rounding


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_wide(one) for one in value)
    return value


def _truth(original: World, drawn: list[Tensor], global_state: Tensor) -> Leaves | None:
    """The last step of the original in float64, with the noise of the step that was made."""
    assert original.call is not None
    call = original.call
    noises: list[Tensor] = []
    states = [generator.get_state() for generator in original.generators()]
    randn = torch.randn

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        noises.append(randn(*args, **kwargs))
        return noises[-1]

    def playing(*args: Any, **kwargs: Any) -> Tensor:
        return noises.pop(0).double()

    try:
        for generator, state in zip(original.generators(), drawn, strict=True):
            generator.set_state(state)
        torch.set_rng_state(global_state)
        with torch.no_grad(), patch.object(torch, "randn", noting):
            getattr(snapshot(call.before), call.method)(*call.args, **call.kwargs)
        wide = snapshot(call.before)
        wide.__dict__.update({name: _wide(value) for name, value in vars(wide).items()})
        with torch.no_grad(), patch.object(torch, "randn", playing):
            result = getattr(wide, call.method)(*_wide(call.args), **{k: _wide(v) for k, v in call.kwargs.items()})
    except Exception:
        return None
    finally:
        for generator, state in zip(original.generators(), states, strict=True):
            generator.set_state(state)
    return leaves_of({"step": result}, "result") | _state(wide)
