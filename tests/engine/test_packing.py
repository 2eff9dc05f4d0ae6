"""Conditioning of any shape: nested, of unequal lengths, padded, without batch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastcfg import CFG, ByRow, Compose, Guidance, Sampler, Schedule, solvers
from fastcfg.engine.conditioning import Padded, Shared, check_conditioning
from fastcfg.engine.packing import Packed

pytestmark = pytest.mark.quick

B, SHAPE = 2, (2, 3, 4, 4)
SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(4)
TABLES = {
    "ddpm learned": solvers.ddpm(SCHEDULE),
    "ddim": solvers.ddim(SCHEDULE),
    "heun": solvers.heun([14.6, 4.0, 1.2, 0.0]),
    "plms": solvers.plms(SCHEDULE),
}


def text(length: int, seed: int, batch: int = B) -> Tensor:
    return torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Attends to text [B, L, 3], which may have a mask, and takes everything else that networks take."""

    def __init__(self, variance: bool = False) -> None:
        super().__init__()
        self.variance = variance

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        added: dict[str, Any] | None = None,
        residuals: Any = (),
        strength: Any = 1.0,
    ) -> Tensor:
        scores = torch.einsum("bchw,blc->bl", x, text) / 8
        if text_mask is not None:
            scores = scores.masked_fill(~text_mask, -torch.inf)
        value = torch.einsum("bl,blc->bc", scores.softmax(-1), text)[:, :, None, None]
        m = torch.tanh(0.7 * x + value * strength) - 0.002 * t.to(x.dtype).view(-1, 1, 1, 1)
        if added is not None:
            m = m + 0.1 * added["pooled"][:, :, None, None] * added["size"][0]
        for residual in residuals:
            m = m + 0.1 * residual
        return torch.cat([m, torch.sin(3 * x)], dim=1) if self.variance else m


def sampler(table: str = "ddim", guidance: Guidance | None = None, **options: Any) -> Sampler:
    model = Attention(TABLES[table].learned_variance)
    return Sampler(model, TABLES[table], guidance=guidance or CFG(3.0), **{"clip": 1.0, **options})


def one_by_one(of: Sampler, **given: Any) -> Tensor:
    """The same run with a forward for each branch, by a model that is given every branch's own conditioning."""
    branches = {name: dict(given[name]) for name in of.guidance.branches}
    model, names = of.model, of.guidance.branches

    def by_branch(x: Tensor, t: Tensor, **index: Tensor) -> Tensor:
        return torch.cat(
            [
                model(part, t[: len(part)], **branches[name])
                for name, part in zip(names, x.chunk(len(names)), strict=True)
            ]
        )

    plain = Sampler(by_branch, of.table, guidance=of.guidance, clip=1.0, graph=False)
    return plain.sample(SHAPE, branches={name: {} for name in names}, seed=0)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_unequal_lengths_are_run_one_after_the_other(table: str, graph: bool) -> None:
    run = sampler(table, graph=graph)
    cond, uncond = {"text": text(5, 0)}, {"text": text(2, 1)}
    got = run.sample(SHAPE, cond=cond, uncond=uncond, seed=0)
    assert torch.equal(got, one_by_one(run, cond=cond, uncond=uncond))
    (program,) = run.report()["programs"]
    assert program["batching"] == "serial"
    assert program["conditioning"] == "text has [2, 5, 3] and [2, 2, 3]: 2 forwards"
    assert program["passes"] == 1
    assert program["graph"] == ("stand-in" if graph else "none")


def test_neighbours_of_one_length_share_a_forward() -> None:
    sizes = []
    run = sampler(guidance=Compose({"cond": 2.0, "other": 1.0}), graph=False)
    run.model.register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    given = {"cond": {"text": text(5, 0)}, "other": {"text": text(5, 2)}, "uncond": {"text": text(2, 1)}}
    got = run.sample(SHAPE, branches=given, seed=0)
    assert sizes == [4, 2] * 4
    assert torch.allclose(got, one_by_one(run, **given), rtol=0, atol=1e-6)
    assert run.report()["programs"][0]["batching"] == "batched"


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("batching", ["batched", "serial"])
def test_a_padded_run_is_the_one_without_padding(graph: bool, batching: str) -> None:
    run, cond, uncond = sampler(graph=graph, batching=batching), text(5, 0), text(2, 1)
    want = one_by_one(run, cond={"text": cond}, uncond={"text": uncond})
    got = run.sample(
        SHAPE, cond={"text": Padded(cond, "text_mask")}, uncond={"text": Padded(uncond, "text_mask")}, seed=0
    )
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    (program,) = run.report()["programs"]
    assert program["conditioning"] == "text has [2, 5, 3] and [2, 2, 3]: padded"
    assert (program["batching"], program["graph"]) == (batching, "stand-in" if graph else "none")
    # A later call's padding holds nothing of an earlier one's sequence: all of it is overwritten.
    swapped = run.sample(
        SHAPE, cond={"text": Padded(uncond, "text_mask")}, uncond={"text": Padded(cond, "text_mask")}, seed=0
    )
    want = one_by_one(run, cond={"text": uncond}, uncond={"text": cond})
    assert torch.allclose(swapped, want, rtol=0, atol=1e-5)


def test_a_mask_of_the_callers_own_is_padded_with_false() -> None:
    run = sampler(graph=True)
    masks = {"cond": torch.ones(B, 5, dtype=torch.bool), "uncond": torch.tensor([[True, False], [True, True]])}
    texts = {"cond": text(5, 0), "uncond": text(2, 1)}
    given = {name: {"text": Padded(texts[name]), "text_mask": Padded(masks[name])} for name in masks}
    want = one_by_one(run, **{name: {"text": texts[name], "text_mask": masks[name]} for name in masks})
    assert torch.allclose(run.sample(SHAPE, branches=given, seed=0), want, rtol=0, atol=1e-5)


def nested(seed: int, kind: type = list) -> dict[str, Any]:
    pooled = text(1, seed)[:, 0]
    residuals = kind([text(16, seed + 1).mT.reshape(SHAPE), text(16, seed + 2, batch=1).mT.reshape(1, *SHAPE[1:])])
    return {"text": text(4, seed), "added": {"pooled": pooled, "size": [0.5, 2.0]}, "residuals": residuals}


def repeated(value: Any) -> Any:
    """Tensors of one sample for all of them, as the model gets them."""
    if isinstance(value, Tensor):
        return value.expand(B, *value.shape[1:])
    if isinstance(value, dict):
        return {name: repeated(item) for name, item in value.items()}
    return type(value)(map(repeated, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("batching", ["batched", "serial"])
@pytest.mark.parametrize(("graph", "kind"), [(False, list), (True, tuple)])
def test_dictionaries_and_lists_of_tensors(graph: bool, kind: type, batching: str) -> None:
    run = sampler(graph=graph, batching=batching)
    cond, uncond = nested(0, kind), nested(7, kind)
    uncond = dict(reversed(uncond.items()))
    got = run.sample(SHAPE, cond=cond, uncond=uncond, seed=0)
    want = one_by_one(run, cond=repeated(cond), uncond=repeated(uncond))
    assert torch.allclose(got, want, rtol=0, atol=1e-6)
    # Other contents need no other program, other plain values do.
    run.sample(SHAPE, cond=uncond, uncond=cond, seed=0)
    assert run.report()["captures"] == 1
    for given in (cond, uncond):
        given["added"] = {**given["added"], "size": [0.25, 2.0]}
    got = run.sample(SHAPE, cond=cond, uncond=uncond, seed=0)
    assert torch.allclose(got, one_by_one(run, cond=repeated(cond), uncond=repeated(uncond)), rtol=0, atol=1e-6)
    assert run.report()["captures"] == 2


@pytest.mark.parametrize("graph", [False, True])
def test_values_without_batch(graph: bool) -> None:
    run, words = sampler(graph=graph), {"cond": text(4, 0), "uncond": text(4, 1)}
    for strengths, forwards in (((0.5, 0.5), 1), ((0.5, 2.0), 2)):
        tensors = [torch.tensor(value) for value in strengths]
        tensors = tensors if forwards == 2 else tensors[:1] * 2
        given = {name: {"text": words[name], "strength": value} for name, value in zip(words, tensors, strict=True)}
        marked = {
            name: {"text": words[name], "strength": Shared(value)} for name, value in zip(words, strengths, strict=True)
        }
        want = one_by_one(run, **given)
        for branches in (given, marked):
            got = run.sample(SHAPE, branches=branches, seed=0)
            assert torch.allclose(got, want, rtol=0, atol=1e-6)
            (program,) = run.report()["programs"]
            assert (program["batching"] == "serial") is (forwards == 2)
            assert bool(program["conditioning"]) is (forwards == 2)
    # A tensor without batch is a static one: its value is copied.
    captures = run.report()["captures"]
    other = torch.tensor(0.25)
    given = {name: {"text": words[name], "strength": other} for name in words}
    got = run.sample(SHAPE, branches=given, seed=0)
    assert torch.allclose(got, one_by_one(run, **given), rtol=0, atol=1e-6)
    assert run.report()["captures"] == captures


def test_a_classifier_gets_the_conditional_branchs_own() -> None:
    seen = []

    def cond_fn(x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        seen.append((tuple(text.shape), tuple(text_mask.shape), bool(text_mask.all())))
        return torch.zeros_like(x)

    run = sampler("ddpm learned", cond_fn=cond_fn, graph=False)
    given = {"cond": {"text": Padded(text(2, 0), "text_mask")}, "uncond": {"text": Padded(text(5, 1), "text_mask")}}
    run.sample(SHAPE, branches=given, seed=0)
    assert set(seen) == {((2, 2, 3), (2, 2), True)}


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        (
            {"a": {"b": 1, "c": torch.ones(2)}},
            {"a": {"c": torch.ones(2)}},
            r"uncond\['a'\]: got keys c, expected those",
        ),
        ({"a": [torch.ones(2)]}, {"a": [torch.ones(2)] * 2}, r"uncond\['a'\]: got keys 0, 1, expected those of cond"),
        ({"a": [torch.ones(2)]}, {"a": (torch.ones(2),)}, r"uncond\['a'\]: got a tuple, expected a list"),
        ({"a": [torch.ones(2)]}, {"a": [3]}, r"uncond\['a'\]: got list, expected a container"),
        ({"a": 3}, {"a": torch.ones(2)}, r"uncond\['a'\]: got a tensor, expected no tensor"),
        ({"a": 3}, {"a": [torch.ones(2)]}, r"uncond\['a'\]: got list, expected no tensor"),
        (
            {"a": {"b": torch.ones(3)}},
            {"a": {"b": torch.ones(3)}},
            r"cond\['a'\]\['b'\]: got shape \(3,\), expected a f",
        ),
        ({"a": Padded(torch.ones(2))}, {"a": Padded(torch.ones(2))}, r"cond\['a'\]: got shape \(2,\) as padded"),
        ({"a": Padded(3)}, {"a": Padded(3)}, r"cond\['a'\]: got int as padded"),
        ({"a": Padded(torch.ones(2, 1))}, {"a": torch.ones(2, 1)}, r"uncond\['a'\]: got torch.float32 \(2, 1\), exp"),
        (
            {"a": Padded(torch.ones(2, 1), "a")},
            {"a": torch.ones(2, 1)},
            r"cond\['a'\]: got mask='a', expected a name",
        ),
        ({"a": [Padded(torch.ones(2, 1), "m")]}, {"a": []}, r"cond\['a'\]\[0\]: got mask='m', expected a name"),
    ],
)
def test_what_does_not_fit_is_refused(cond: Any, uncond: Any, message: str) -> None:
    with pytest.raises(TypeError, match="branches: got list, expected a mapping"):
        sampler().sample(SHAPE, branches=[cond, uncond], seed=0)
    with pytest.raises(ValueError, match=message):
        sampler().sample(SHAPE, cond=cond, uncond=uncond, seed=0)


def test_padding_holds_zeros_and_nothing_of_an_earlier_call() -> None:
    def read(cond: Tensor, uncond: Tensor) -> Any:
        given = {"cond": {"text": Padded(cond, "mask")}, "uncond": {"text": Padded(uncond, "mask")}}
        return check_conditioning(("cond", "uncond"), given, B, torch.device("cpu"))

    long, short = text(5, 0), text(2, 1)
    packed = Packed(read(short, long), (0, 1))
    packed.load(read(long, short))
    found = packed.keywords(0, 2)
    assert torch.equal(found["text"], torch.cat([long, torch.cat([short, torch.zeros(B, 3, 3)], dim=1)]))
    assert found["mask"].tolist() == [[True] * 5] * B + [[True] * 2 + [False] * 3] * B
    # What is loaded already is not copied again.
    same = read(long, short)
    assert [packed.enter(same), packed.enter(same)] == [True, False]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Output(OrderedDict):  # as the outputs of diffusers' networks
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            self[name] = value


def ordered(a: Any, b: Any) -> Any:
    return OrderedDict(b=b, a=a)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("kind", "read"),
    [(Pair, attrgetter("a", "b")), (Output, attrgetter("a", "b")), (ordered, lambda pair: tuple(pair.values())[::-1])],
    ids=["named tuple", "network's output", "ordered"],
)
def test_containers_of_other_kinds_are_read_and_built_again(kind: Any, read: Any, graph: bool) -> None:
    a, b, other = (torch.linspace(start, 1, B) for start in (0, -1, 0.5))

    def model(x: Tensor, t: Tensor, pair: Any) -> Tensor:
        first, second = read(pair)
        return torch.tanh(x) * first.view(-1, 1, 1, 1) + second.view(-1, 1, 1, 1)

    def plain(x: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x) * a.view(-1, 1, 1, 1) + b.view(-1, 1, 1, 1)

    run = Sampler(model, TABLES["ddim"], guidance=CFG(2.0), graph=graph)
    turns = {"pair": kind(a, ByRow(b, other, row=2))}
    got = run.sample(SHAPE, cond=turns, uncond={"pair": kind(b, a)}, seed=0)
    expected = Sampler(plain, TABLES["ddim"], guidance=CFG(2.0), graph=False)
    turned = {"a": a, "b": ByRow(b, other, row=2)}
    assert torch.equal(got, expected.sample(SHAPE, cond=turned, uncond={"a": b, "b": a}, seed=0))


@pytest.mark.parametrize("graph", [False, True])
def test_items_come_in_the_order_in_which_they_were_given(graph: bool) -> None:
    """Networks loop over residuals by level: 2 comes before 10."""

    def model(x: Tensor, t: Tensor, residuals: dict[str, Tensor]) -> Tensor:
        for residual in residuals.values():
            x = torch.tanh(2 * x + residual)
        return x

    level = {f"level {k}": torch.full(SHAPE, float(k % 3)) for k in (2, 10)}
    run = Sampler(model, TABLES["ddim"], guidance=CFG(2.0), graph=graph)
    orders = [dict(level), dict(reversed(level.items()))]
    got = [run.sample(SHAPE, cond={"residuals": one}, uncond={"residuals": one}, seed=0) for one in orders]
    for one, images in zip(orders, got, strict=True):
        bound = Sampler(partial(model, residuals=one), TABLES["ddim"], graph=False)
        assert torch.allclose(images, bound.sample(SHAPE, seed=0), atol=1e-6)
    assert not torch.allclose(*got, atol=1e-3)
