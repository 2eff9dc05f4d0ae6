"""What runs before a capture leaves a model as it was: its counters, caches, buffers and generators."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastcfg import CFG, Sampler, Schedule, solvers
from fastcfg.engine.snapshot import Snapshot

pytestmark = pytest.mark.quick

STEPS, SHAPE = 8, (1, 3, 4, 4)
TABLE = solvers.ddim(Schedule.named("linear").respace(STEPS))


def net(x: Tensor) -> Tensor:
    return 0.5 * x + 0.2 * torch.tanh(3 * x)


class Counted(nn.Module):
    """Computes every second step, and reuses that in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kept = 0, None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.count % 2 == 0:
            self.kept = net(x)  # type: ignore[assignment]
        self.count = (self.count + 1) % STEPS
        return self.kept  # type: ignore[return-value]

    def state(self) -> Any:
        return self.count, self.kept is None


class Rarely(nn.Module):
    """Computes the first of eight calls: those that are compared are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {"calls": 0}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.cache["calls"] % 8 == 0:
            self.cache["difference"] = net(x) - x
        self.cache["calls"] += 1
        return x + self.cache["difference"]

    def state(self) -> Any:
        return self.cache["calls"], list(self.cache)


class InAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache = SimpleNamespace(step=0, past=[])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.cache.step += 1
        self.cache.past.append(net(x))
        return sum(self.cache.past[-2:]) / 2  # type: ignore[return-value]

    def state(self) -> Any:
        return self.cache.step, len(self.cache.past)


class Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.past: deque[Tensor] = deque(maxlen=3)
        self.seen: set[int] = set()
        self.calls = itertools.count(1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.past.append(net(x))
        self.seen.add(next(self.calls))
        return torch.stack(list(self.past)).mean(0)

    def state(self) -> Any:
        return len(self.past), self.seen, repr(self.calls)


class Slotted:
    """As a denoiser of a web UI: no module, and its step is a class's attribute until its first call."""

    __slots__ = ("scale",)
    calls: ClassVar[list[int]] = []
    total: ClassVar[int] = 0

    def __init__(self) -> None:
        self.scale = 1.0
        type(self).total = 0
        self.calls.clear()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.scale *= 0.9
        type(self).total += 1
        self.calls.append(1)
        return self.scale * net(x)

    def state(self) -> Any:
        return self.scale, self.total, len(self.calls)


@dataclass(frozen=True)
class Frozen:
    """Changes itself as frozen objects do, past its own __setattr__."""

    __slots__ = ("scale",)
    scale: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        object.__setattr__(self, "scale", 0.9 * self.scale)
        return self.scale * net(x)

    def state(self) -> Any:
        return self.scale


class Array:
    def __init__(self) -> None:
        self.count = np.zeros(2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return float(1 / self.count[0]) * net(x)

    def state(self) -> Any:
        return self.count.tolist()


class Closed:
    """A closure's counter, and a mutable default."""

    def __init__(self) -> None:
        count = 0

        def model(x: Tensor, t: Tensor, past: list[int] = []) -> Tensor:  # noqa: B006
            nonlocal count
            count += 1
            past.append(count)
            return net(x) / count

        model.__defaults__ = ([],)  # type: ignore[attr-defined]
        self.model, self.state = model, lambda: (count, list(model.__defaults__[0]))  # type: ignore[index]


calls = 0


class InAGlobal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        global calls
        calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.counted() * net(x)

    def counted(self) -> float:
        global calls
        calls += 1
        return 1 / calls

    def state(self) -> Any:
        return calls


shared = ModuleType("shared")  # as web UIs keep their progress
shared.state, shared.total = SimpleNamespace(step=0), 0  # type: ignore[attr-defined]


class InAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared.state.step = shared.total = 0  # type: ignore[attr-defined]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shared.state.step += 1  # type: ignore[attr-defined]
        shared.total += 1  # type: ignore[attr-defined]
        return net(x) / shared.total  # type: ignore[attr-defined]

    def state(self) -> Any:
        return shared.state.step, shared.total  # type: ignore[attr-defined]


class OfTheClass(nn.Module):
    """As TeaCache is put into networks: by attributes of the class, which the first call makes the object's own."""

    cnt: ClassVar[int] = 0
    previous: ClassVar[Any] = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.cnt % 4 == 0:
            self.previous = net(x) - x  # type: ignore[misc]
        self.cnt = 0 if self.cnt + 1 == STEPS else self.cnt + 1  # type: ignore[misc]
        return x + self.previous

    def state(self) -> Any:
        return self.cnt, "previous" in vars(self)


class Hooked(nn.Module):
    """A counter that a hook of a submodule keeps, as caches that are put into networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.kept = {"n": 0}

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.kept["n"] += 1
            return output / self.kept["n"]

        self.part.register_forward_hook(hook)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.part(net(x))

    def state(self) -> Any:
        return self.kept["n"]


class Drawing(nn.Module):
    """Chooses by Python's, numpy's and its own generators."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.mine = random.Random(3), np.random.default_rng(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        drawn = random.random(), np.random.rand(), self.own.random(), self.mine.random()  # noqa: NPY002
        return net(x) * sum(drawn) / 4

    def state(self) -> Any:
        return random.random(), np.random.rand(), self.own.random(), self.mine.random()  # noqa: NPY002


class Filling(nn.Module):
    """Its first call is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.initialised = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, self.initialised = not self.initialised, True
        return net(x) * (0.5 if first else 1.0)

    def state(self) -> Any:
        return self.initialised


class FromData(nn.Module):
    """Sets its scale by the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.std() + t.float().mean() / 1000
        return net(x) / self.scale

    def state(self) -> Any:
        return self.scale.item()


EAGER: dict[str, tuple[Callable[[], Any], str]] = {
    "counter and kept tensor": (Counted, "model.count, model.kept"),
    "dictionary": (Rarely, "model.cache.calls, model.cache.difference"),
    "object": (InAnObject, "model.cache.past.0, model.cache.past.1, model.cache.step"),
    "queue, set and counter": (Queue, "model.calls, model.past.0, model.past.1 and 1 more"),
    "slots and class": (Slotted, "model.calls.1, model.scale, model.total"),
    "frozen slots": (lambda: Frozen(1.0), "model.scale"),
    "array": (Array, "model.count"),
    "closure": (Closed, "model.count, model.defaults.0.1"),
    "global": (InAGlobal, "model.calls"),
    "module": (InAModule, "model.shared.state.step, model.shared.total"),
    "attributes of the class": (OfTheClass, "model.cnt, model.previous"),
    "hook": (Hooked, "model.kept.n"),
    "generators": (Drawing, "Python's random, model.mine, model.own and 1 more"),
    "from data": (FromData, "model.scale"),
}


def run(make: Callable[[], Any], graph: bool, runs: int = 1, wrap: Callable[[Any], Any] = lambda model: model) -> Any:
    model = make()
    sampler = Sampler(wrap(getattr(model, "model", model)), TABLE, graph=graph, clip=1.0)
    samples = [sampler.sample(SHAPE, seed=seed) for seed in range(runs)]
    return torch.stack(samples), model.state(), sampler.report()


@pytest.mark.filterwarnings("ignore:running eagerly")
@pytest.mark.parametrize("name", EAGER)
def test_state_that_changes_from_call_to_call_is_put_back_and_named(name: str) -> None:
    make, changed = EAGER[name]
    for runs in (1, 2):
        want, state, _ = run(make, False, runs)
        got, mine, report = run(make, True, runs)
        assert torch.equal(got, want)
        assert mine == state
        assert report["graph"] == "none"
    assert report["graph_reason"] == f"cannot be captured: its state changes from call to call: {changed}"


def partial_of(model: Any) -> Any:
    return partial(model)


def wrapped(model: Any) -> Any:
    def function(x: Tensor, t: Tensor) -> Any:
        return model(x, t)

    return function


@pytest.mark.filterwarnings("ignore:running eagerly")
@pytest.mark.parametrize(
    "wrap", [partial_of, wrapped, lambda model: model.forward], ids=["partial", "closure", "method"]
)
def test_state_is_found_behind_wrappers(wrap: Any) -> None:
    want, state, _ = run(Counted, False, wrap=wrap)
    got, mine, report = run(Counted, True, wrap=wrap)
    assert torch.equal(got, want)
    assert mine == state
    assert report["graph"] == "none"


def test_one_warning_says_why() -> None:
    with pytest.warns(UserWarning, match=r"running eagerly: .* from call to call: model\.count, model\.kept") as caught:
        run(Counted, True, runs=2)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:running eagerly")
def test_a_first_call_unlike_later_ones_is_made_in_the_run() -> None:
    want, state, _ = run(Filling, False)
    got, mine, report = run(Filling, True)
    assert torch.equal(got, want)
    assert mine == state
    assert "its first call, in which it sets model.initialised, gives other numbers" in report["graph_reason"]


# What a graph can follow


class Positions(nn.Module):
    """Fills a cache in its first call, by what does not depend on the data, and one per size of batch."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Tensor | None = None
        self.by_size: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0.5, 1, x.shape[-1])
        if len(x) not in self.by_size:
            self.by_size[len(x)] = torch.full((), 0.1)
        return net(x) * self.ramp + self.by_size[len(x)]


class Buffered(nn.Module):
    """Counts and averages in tensors, in place: a graph does so too."""

    def __init__(self, large: bool = False) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(()))
        self.register_buffer("past", torch.zeros(300_000 if large else 48))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.step += 1
        self.past[:48].mul_(0.5).add_(x.flatten()[:48])
        return self.norm(net(x)) / self.step + 0.01 * self.past[:48].reshape(x.shape)

    def state(self) -> Any:
        return [value.tolist() for value in (self.step, self.past[:48], self.norm.running_mean, self.norm.running_var)]


class Generating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return net(x) + 0.1 * torch.randn(x.shape, generator=self.generator) + 0.1 * torch.randn_like(x)

    def state(self) -> Any:
        return self.generator.get_state().tolist()


@pytest.mark.parametrize("make", [Buffered, partial(Buffered, True), Generating], ids=["buffers", "large", "generator"])
def test_what_a_graph_follows_is_put_back_before_the_run(make: Callable[[], Any]) -> None:
    results = []
    for graph in (False, True):
        torch.manual_seed(2)
        results.append((*run(make, graph, runs=2), torch.get_rng_state()))
    (want, state, _, after), (got, mine, report, moved) = results
    assert report["graph"] == "stand-in"
    assert torch.equal(got, want)
    assert mine == state
    assert torch.equal(after, moved)


def test_what_is_filled_once_does_not_prevent_a_capture() -> None:
    results = []
    for graph in (False, True):
        model = Positions()
        sampler = Sampler(model, TABLE, guidance=CFG(2.0, interval=(0.0, 0.5)), graph=graph)
        branches = {"cond": {"y": torch.ones(1)}, "uncond": {"y": torch.zeros(1)}}
        results.append([sampler.sample(SHAPE, seed=seed, branches=branches) for seed in range(3)])
        assert sorted(model.by_size) == [1, 2]
    assert sampler.report()["graph"] == "stand-in"
    assert sampler.report()["captures"] == 1
    assert all(map(torch.equal, *results))


def test_rows_recorded_together_are_put_back_too() -> None:
    results = []
    for rows in (1, 4):
        model = Buffered(large=True)
        sampler = Sampler(model, TABLE, graph=True, rows_per_graph=rows)
        results.append((sampler.sample(SHAPE, seed=0), model.state()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_model_that_raises_is_left_as_it_was(error: type[BaseException]) -> None:
    class Raising(Counted):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            super().forward(x, t)
            raise error

    model = Raising()
    state = torch.get_rng_state()
    with pytest.raises(error):
        Sampler(model, TABLE, graph=True).sample(SHAPE, seed=0)
    assert model.state() == (0, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_functions_beside_the_model_are_put_back() -> None:
    """denoised_fn, cond_fn, output= and objects among the keyword arguments."""
    results = []
    for graph in (False, True):
        counts = {"denoised": 0, "output": 0, "keyword": 0}

        def counted(name: str, value: Any, counts: dict[str, int] = counts) -> Any:
            counts[name] += 1
            return value / counts[name]

        def model(x: Tensor, t: Tensor, cache: Any) -> Tensor:
            cache["n"] += 1
            return net(x) / cache["n"]

        cache = {"n": 0}
        sampler = Sampler(model, TABLE, graph=graph, output=partial(counted, "output"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fastcfg.engine.conditioning import Shared

            samples = sampler.sample(
                SHAPE, seed=0, cond={"cache": Shared(cache)}, denoised_fn=partial(counted, "denoised")
            )
        results.append((samples, counts, cache))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert results[0][1]["denoised"] == STEPS


def test_a_snapshot_restores_order_and_what_is_gone() -> None:
    model = nn.Module()
    model.first, model.table = 1, {"a": 1, "b": 2, "c": [1, 2]}
    before = Snapshot({"model": model})
    model.table["c"].append(3)
    del model.first
    model.table["a"] = model.table.pop("a")
    model.table["d"] = float("nan")
    assert sorted(before.changes()) == ["model.first", "model.table.c.2", "model.table.d"]
    before.restore()
    assert (model.first, list(model.table.items())) == (1, [("a", 1), ("b", 2), ("c", [1, 2])])
    assert before.changes() == {}
