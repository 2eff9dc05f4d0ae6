"""A diffusion object and its accelerated form, called alike: what they give and leave behind must be the same."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastcfg
from fastcfg.frontends._fused import fall_through
from support.same import leaves_of

# Of the largest value, or of 1 if that is larger.
CLOSE = 2e-5


class Call(NamedTuple):
    """A loop, and its arguments after the model."""

    loop: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    # What of the model is called: itself, or a method.
    model: str = ""
    # (model, args, kwargs) to what the loop is given, where its first arguments are not model and shape.
    arrange: Callable[..., Any] | None = None


class Family(NamedTuple):
    """A project's diffusion object and network, and the calls of its scripts, by batch."""

    make: Callable[[], Any]
    network: Callable[[], Any]
    calls: dict[str, Callable[[int], Call]]
    batches: tuple[int, int] = (1, 3)


class Outcome(NamedTuple):
    """What a call gave: its results or error, step by step if they are a generator's, the state of every generator
    after each, what became of its arguments and of the object, and what the network noted."""

    results: list[Any]
    generators: list[Any]
    left: dict[str, Any]
    failed: bool


def run(diffusion: Any, network: Any, call: Call, seed: int, by_hand: Callable[..., Any] = iter) -> Outcome:
    """Call a loop after seeding all generators; `by_hand` passes a generator's steps on, and may change them."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    results: list[Any] = []
    states: list[Any] = []
    args, kwargs, failed = call.args, dict(call.kwargs), False
    model = getattr(network, call.model) if call.model else network

    def note(result: Any) -> None:
        results.append(leaves_of(copied(result), "result"))
        states.append((torch.get_rng_state(), str(np.random.get_state()), random.getstate()))  # noqa: NPY002

    try:
        with np.errstate(all="ignore"):
            given, named = ((model, *args), kwargs) if call.arrange is None else call.arrange(model, args, kwargs)
            result = getattr(diffusion, call.loop)(*given, **named)
            if isinstance(result, Iterator):
                for one in by_hand(result):
                    note(one)
            else:
                note(result)
    except Exception as error:
        failed = True
        note((type(error).__name__, *lines_of(error)))
    left = {"arguments": leaves_of((args, kwargs), "arguments"), **state_of(diffusion)}
    return Outcome(results, states, left, failed)


def lines_of(error: Exception) -> list[str]:
    return str(error).splitlines()[:1]


def state_of(diffusion: Any) -> dict[str, Any]:
    """What an object's attributes are by now, but for those that are fastcfg's."""
    state = {name: copied(value) for name, value in vars(diffusion).items() if not name.startswith("_fastcfg")}
    return {"object": leaves_of(state, "object")}


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(copied, value)) if type(value) in (list, tuple) else value
    return copy.copy(value) if isinstance(value, np.ndarray) else value


def unlike(want: Outcome, got: Outcome, *, exactly: bool = False, close: float = CLOSE) -> str:
    """What is not the same; empty if nothing is."""
    if want.failed and got.failed and _refused(got):
        return ""
    if len(want.results) != len(got.results):
        return f"got {len(got.results)} results, expected {len(want.results)}"
    for i, (theirs, ours) in enumerate(zip(want.results, got.results, strict=True)):
        if said := _differing(theirs, ours, exactly, close):
            return f"result {i}: {said}"
    for i, (theirs, ours) in enumerate(zip(want.generators, got.generators, strict=True)):
        if not torch.equal(theirs[0], ours[0]):
            return f"after result {i} torch's generator is elsewhere"
        if theirs[1:] != ours[1:]:
            return f"after result {i} numpy's or random's generator is elsewhere"
    for name in want.left:
        if said := _differing(want.left[name], got.left[name], exactly):
            return f"left behind: {said}"
    return ""


def _refused(outcome: Outcome) -> bool:
    """Whether the error says what was got and what is expected, in place of the object's own error."""
    kind, *lines = (value[1] for value in list(outcome.results[-1].values())[1:])
    return kind in ("'ValueError'", "'TypeError'") and bool(lines) and ": got " in lines[-1] and "expected" in lines[-1]


def _differing(want: dict[str, Any], got: dict[str, Any], exactly: bool, close: float = CLOSE) -> str:
    if want.keys() != got.keys():
        return f"got {sorted(got.keys() - want.keys())}, expected {sorted(want.keys() - got.keys())}"
    for path, theirs in want.items():
        ours = got[path]
        if not isinstance(theirs, Tensor):
            if isinstance(ours, Tensor) or theirs != ours:
                return f"{path}: got {str(ours)[:200]}, expected {str(theirs)[:200]}"
            continue
        if not isinstance(ours, Tensor) or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return f"{path}: got {_of(ours)}, expected {_of(theirs)}"
        if theirs.requires_grad != ours.requires_grad:
            return f"{path}: got requires_grad {ours.requires_grad}"
        if theirs.numel() and not _close(theirs, ours, exactly, close):
            apart = (theirs.double() - ours.double()).abs().max().item()
            return f"{path}: {apart:.2g} apart, of values up to {theirs.double().abs().max().item():.2g}"
    return ""


def _of(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:100]


def _close(want: Tensor, got: Tensor, exactly: bool, close: float) -> bool:
    if exactly or not want.is_floating_point():
        return torch.equal(want.nan_to_num(), got.nan_to_num())
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    want, got = want[finite].double(), got[finite].double()
    return not want.numel() or bool((want - got).abs().max() <= close * max(1.0, want.abs().max().item()))


@dataclass
class Beside:
    """An object and its accelerated form; `said` is what was logged about it, and `ran` how each call ran."""

    family: Family
    accelerate: Callable[[Any], Any] = fastcfg.accelerate
    report: Callable[[Any], dict[str, Any]] | None = None
    said: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.networks = self.family.network(), self.family.network()
        with logged(self.said):
            self.theirs, self.ours = self.family.make(), self.accelerate(self.family.make())

    def turn(self, call: Callable[[], Call], seed: int) -> str:
        """Make a call of both; what is not the same."""
        want = run(self.theirs, self.networks[0], call(), seed)
        with logged(self.said):
            got = run(self.ours, self.networks[1], call(), seed)
        report = (self.report or reported)(self.ours)
        self.ran.append(report.get("run", "its own method"))
        # Only where the engine had a part may anything be rounded differently.
        said = unlike(want, got, exactly=self.ran[-1] in ("the original", "its own method"))
        if not said and "original" in self.ran[-1] and not report.get("reason") and not want.failed:
            said = f"{self.ran[-1]} ran, and nothing says why"
        return said


def reported(diffusion: Any) -> dict[str, Any]:
    """How the last call of an accelerated object ran."""
    return fastcfg.report(diffusion)


@contextmanager
def logged(said: list[str]) -> Iterator[None]:
    """Context in which what fastcfg logs is added to a list, and nothing counts as said before."""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fastcfg")
    before, propagates = set(fall_through._logged), logger.propagate
    fall_through._logged.clear()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        fall_through._logged.clear()
        fall_through._logged.update(before)
