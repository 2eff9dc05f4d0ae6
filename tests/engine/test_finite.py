"""The stop at NaN and infinity: it names row, sample and maker, on both backends, captured and eager, and costs nothing
where it is not asked for."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from support.captured_cases import SCHEDULE, SHAPE, TABLES, B, build, conditioning, draw
from torch import Tensor

from fastcfg import CFG, AdaptiveCFG, Sampler, SamplerConfig, StateFunction, StepTable
from fastcfg.engine.finite import FiniteRecord
from fastcfg.ops import FiniteCheck, triton_problem
from fastcfg.reference.finite import FINITE

INTERPRETED = not triton_problem(torch.device("cpu"))
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]
TIMES = [int(t) for t in SCHEDULE.timestep_map[::-1]]


class Breaking:
    """A model whose output is broken at one time, in one branch and sample."""

    def __init__(self, row: int, place: int, value: float = math.nan, variance: bool = False) -> None:
        self.t, self.place, self.value, self.variance = TIMES[row], place, value, variance

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        m = torch.tanh(x + y.view(-1, 1, 1, 1))
        v = torch.sin(3 * x)
        here = torch.arange(len(x)) == self.place
        broken = torch.where(here & (t == self.t), self.value, 0.0).view(-1, 1, 1, 1)
        return torch.cat([m, v + broken], dim=1) if self.variance else m + broken


def sampler_of(model: Any, table: str = "ddim", **options: Any) -> Sampler:
    given = {"guidance": CFG(3.0), "check_finite": "raise", "noise_source": "torch", "graph": False, **options}
    return Sampler(model, TABLES[table], **given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "place", "value", "variance", "graph"),
    [
        (0, 0, math.nan, False, False),
        (2, 3, math.inf, True, True),
        (4, 2, -math.inf, False, True),
        (3, 1, math.nan, True, False),
    ],
)
def test_what_the_model_breaks_is_named(
    row: int, place: int, value: float, variance: bool, graph: bool, backend: str
) -> None:
    model = Breaking(row, place, value, variance)
    options: dict[str, Any] = {"graph": graph, "backend": backend}
    sampler = sampler_of(model, "ddpm learned_range" if variance else "ddim", **options)
    branch, sample = sampler.guidance.branches[place // B], place % B
    expected = (
        rf"check_finite: row {row} \(t = {TIMES[row]}\), sample {sample}: NaN or infinity in the model's output in"
    )
    expected += f" branch '{branch}', made by the model, of a finite state"
    with pytest.raises(FloatingPointError, match=expected):
        draw(sampler)
    model.t = -1
    assert draw(sampler).isfinite().all()
    if graph:
        assert sampler.report()["programs"][0]["graph"] == "stand-in", sampler.report()["graph_reason"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", [False, True])
def test_what_the_step_breaks_is_named(backend: str, graph: bool) -> None:
    table = StepTable.from_columns(t=[3, 2, 1, 0], p_m=1.0, a_0=[1.0, 1.0, 3e38, 1.0], a_x=1.0, name="overflowing")
    sampler = Sampler(
        lambda x, t: x.new_full((), 2.0).expand_as(x).clone(), table, check_finite="raise", graph=graph, backend=backend
    )
    with pytest.raises(
        FloatingPointError, match=r"row 2 \(t = 1\), sample 0: .* in the state, made by the step, of finite"
    ):
        sampler.sample(SHAPE, cond={}, seed=0)
    spoil = StateFunction(lambda x, x0, row: torch.where(row == 1, x / 0, x))
    with pytest.raises(FloatingPointError, match=r"row 1 .* in the state, made by the step or state_fn"):
        sampler.sample(SHAPE, cond={}, seed=0, state_fn=spoil)


def test_a_start_that_is_not_finite_is_named() -> None:
    sampler = sampler_of(Breaking(0, -1))
    with pytest.raises(FloatingPointError, match="check_finite: the run starts from NaN or infinity"):
        draw(sampler, x_T=torch.full(SHAPE, math.nan))
    assert draw(sampler).isfinite().all()


def test_the_run_stops_a_row_later() -> None:
    sampler = sampler_of(Breaking(1, 0))
    steps = sampler.iterate(SHAPE, branches=conditioning(sampler.guidance), seed=1)
    assert [next(steps).row, next(steps).row] == [0, 1]
    with pytest.raises(FloatingPointError, match="row 1 "):
        next(steps)


def test_a_warning_comes_once_and_the_run_goes_on() -> None:
    sampler = sampler_of(Breaking(1, 0), check_finite="warn")
    with pytest.warns(RuntimeWarning, match=r"row 1 .*'cond'") as caught:
        result = draw(sampler)
    assert len(caught) == 1
    assert caught[0].filename.endswith("captured_cases.py")
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("row", "every", "expected"),
    [
        (1, 3, r"rows 0 to 2, sample 1: NaN or infinity, found in the model's output in branch 'cond' of row 2 "),
        (2, 3, r"rows 0 to 2, sample 1: NaN or infinity, found in the model's output in branch 'cond' of row 2 "),
        (3, 3, r"rows 3 to 4, sample 1: NaN or infinity, found in the state of row 4 \(check_every=3\)"),
        (4, 100, r"rows 0 to 4, sample 1: NaN or infinity, found in the state of row 4 "),
    ],
)
def test_checks_of_some_rows_name_all_that_they_are_for(row: int, every: int, expected: str, backend: str) -> None:
    for graph in (False, True):
        sampler = sampler_of(Breaking(row, 1), check_every=every, backend=backend, graph=graph, rows_per_graph=2)
        with pytest.raises(FloatingPointError, match=expected):
            draw(sampler)


def test_with_adaptive_guidance_intervals_and_float64() -> None:
    for guidance in (CFG(3.0, interval=(0.0, 0.5)), AdaptiveCFG(3.0, threshold=-1.0)):
        with pytest.raises(FloatingPointError, match=r"row 4 .*branch 'cond'"):
            draw(sampler_of(Breaking(4, 0), guidance=guidance, graph=True, state_dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_and_reference_find_the_same(dtype: torch.dtype) -> None:
    shape, sources = (3, 2, 700), torch.tensor([2, 0, 3], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for case in range(12):
        output = torch.randn(6, 4, 700, generator=generator).to(dtype)
        x = torch.randn(shape, generator=generator)
        for target in ([output], [x], [output, x], [])[case % 4]:
            place = int(torch.randint(target.numel(), (), generator=generator))
            target.view(-1)[place] = (math.nan, math.inf, -math.inf)[case % 3]
        found = []
        for backend in BACKENDS:
            record = torch.full((1,), FINITE)
            counter = torch.tensor([8, 0], dtype=torch.int32)
            FiniteCheck(x, counter, sources, record, 1, backend)(output)
            unchecked = torch.full((1,), FINITE)
            FiniteCheck(x, counter, sources, unchecked, 3, backend)(output)
            assert int(unchecked) == FINITE
            found.append(int(record))
        assert len(set(found)) == 1
        assert (found[0] == FINITE) == (case % 4 == 3)
        if case % 4 == 1:
            sample = int((~x.isfinite()).flatten(1).any(1).nonzero())
            assert found[0] == (7 * 4 + 3) * 3 + sample


def test_it_changes_no_bit_and_costs_one_pass() -> None:
    plain, checked = sampler_of(Breaking(0, -1), check_finite=None), sampler_of(Breaking(0, -1))
    assert torch.equal(draw(plain), draw(checked))
    passes = [sampler.report()["programs"][0]["passes"] for sampler in (plain, checked)]
    assert passes == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(sampler_of(Breaking(0, -1), check_finite="warn", check_every=2, graph=True))


def test_without_it_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(FiniteRecord, "__init__", fail)
    draw(build()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_finite": True}, "check_finite: got True, expected one of None, 'raise', 'warn'"),
        ({"check_every": 0}, "check_every: got 0, expected an integer of at least 1"),
        ({"check_every": 1.5}, "check_every: got 1.5, expected an integer"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)
    assert SamplerConfig(check_every=torch.tensor(3)).check_every == 3  # type: ignore[arg-type]
