"""Brownian noise: one path whatever the steps, standard normals in every row, kernel = torch."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcfg import Sampler, Schedule, StepTable, ops, sigmas, solvers
from fastcfg.kernels import brownian
from fastcfg.reference.brownian import DEPTH, brownian_normal, brownian_terms, interval_terms
from fastcfg.reference.philox import BROWNIAN_STREAM, sample_seeds

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

SHAPE, SMALL = (2, 3, 5, 7), (2, 5)
# Within an octave, over octaves, from 0, from below the lowest octave, short, and long.
INTERVALS = [(1.0, 1.5), (0.3, 0.7), (0.11, 14.6), (0.0, 0.02), (1e-9, 1e-7), (1.0, 1.0001), (0.002, 700.0), (2.0, 4.0)]


def noise(low: float, high: float, seeds: Tensor, shape: tuple[int, ...] = SHAPE) -> Tensor:
    terms = interval_terms(low, high)
    nodes, factors = torch.tensor(list(terms)), torch.tensor(list(terms.values()), dtype=torch.float32)
    return brownian_normal(seeds, nodes, factors, len(terms), torch.full(shape, math.nan))


@pytest.mark.quick
@pytest.mark.parametrize(("low", "high"), INTERVALS)
def test_the_factors_have_the_variance_of_the_interval(low: float, high: float) -> None:
    terms = interval_terms(low, high)
    assert math.isclose(sum(factor**2 for factor in terms.values()), 1, rel_tol=1e-12)
    assert len(terms) <= 2 * DEPTH + 50
    assert all(0 <= node < 2**32 for node in terms)


@pytest.mark.quick
def test_the_path_has_the_covariance_of_brownian_motion() -> None:
    """Cov(W(b) - W(a), W(d) - W(c)) is the length of what the intervals share, for levels on the grid."""
    levels = [0.0, 2**-26, 3 * 2**-24, 0.25, 0.375, 0.5, 0.8125, 1.0, 1 + 2**-16, 1.5, 3.0, 7.25, 8.0, 1024.5]
    intervals = [(a, b) for i, a in enumerate(levels) for b in levels[i + 1 :]]
    terms = {interval: interval_terms(*interval) for interval in intervals}
    for (a, b), (c, d) in [(one, other) for one in intervals for other in intervals]:
        product = sum(factor * terms[c, d].get(node, 0.0) for node, factor in terms[a, b].items())
        shared = max(min(b, d) - max(a, c), 0.0)
        assert math.isclose(product, shared / math.sqrt((b - a) * (d - c)), rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.quick
def test_the_noise_of_an_interval_is_made_of_its_parts() -> None:
    seeds, levels = sample_seeds(5, 2), [0.03125, 0.25, 0.5625, 1.75, 2.0, 9.5]
    whole = noise(levels[0], levels[-1], seeds) * math.sqrt(levels[-1] - levels[0])
    parts = sum(noise(a, b, seeds) * math.sqrt(b - a) for a, b in pairwise(levels))
    assert torch.allclose(whole, parts, atol=1e-5)  # type: ignore[arg-type]


def test_each_interval_has_standard_normals_and_disjoint_ones_are_independent() -> None:
    seeds = sample_seeds(0, 4)
    drawn = [
        noise(low, high, seeds, (4, 50_000)).flatten().double() for low, high in [(0.3, 0.7), (0.7, 14.6), (0, 0.02)]
    ]
    count = len(drawn[0])
    for z in drawn:
        assert abs(z.mean()) < 5 / math.sqrt(count)
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / count)
        assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / count)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs((drawn[a] * drawn[b]).mean()) < 5 / math.sqrt(count)


@interpreted
@pytest.mark.parametrize(("shape", "most"), [((1, 1), 99), ((3, 37), 99), ((2, 1030), 4), ((1, 2, 2, 512), 3)])
def test_the_kernel_draws_the_same_bits(shape: tuple[int, ...], most: int) -> None:
    seeds = sample_seeds([7, 2**63, -1][: shape[0]], shape[0])
    nodes, factors, counts = brownian_terms(solvers.dpmpp_2m_sde(sigmas.karras(5, 0.03, 14.6)))
    size, row = math.prod(shape), 3
    memory = torch.full((size + 4096,), math.nan)
    given = torch.from_numpy(nodes[row]), torch.from_numpy(factors[row]), min(counts[row], most)
    brownian.launch_brownian(memory[:size].view(shape), seeds, *given, BROWNIAN_STREAM)
    want = brownian_normal(seeds, *given, torch.empty(shape))
    assert torch.equal(memory[:size].view(shape).view(torch.int32), want.view(torch.int32))
    assert memory[size:].isnan().all()


@interpreted
def test_the_engine_runs_the_kernel() -> None:
    table = solvers.euler_ancestral([4.0, 2.0, 1.0, 0.0])
    samplers = (Sampler(denoise, table, noise_source="brownian", backend=name) for name in ("triton", "reference"))
    got, want = (one.sample((1, 5), seed=3) for one in samplers)
    assert torch.equal(got, want)


@interpreted
def test_the_operation_runs_the_kernel() -> None:
    seeds, nodes, factors = torch.tensor([5]), torch.tensor([3, 4]), torch.tensor([0.6, 0.8])
    got = ops.brownian_noise(torch.empty(1, 5), seeds, nodes, factors, 2, "triton")
    assert torch.equal(got, ops.brownian_noise(torch.empty(1, 5), seeds, nodes, factors, 2, "reference"))


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The x0 expected of data N(0.5, 0.25)."""
    variance = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
    return (0.25 * x + variance * 0.5) / (0.25 + variance)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "euler_ancestral", "sa_solver"])
def test_more_steps_give_the_same_picture(solver: str) -> None:
    """They converge to the path's picture; with a normal of its own for every row they do not."""

    def run(steps: int, source: str) -> Tensor:
        table = getattr(solvers, solver)(sigmas.karras(steps, 0.02, 10.0))
        return Sampler(denoise, table, noise_source=source, graph=False).sample((2, 100), seed=3)

    coarse, fine, last = (run(steps, "brownian") for steps in (6, 24, 72))
    assert (fine - last).std() < 0.35 * (coarse - last).std()
    assert (fine - last).std() < 0.15 * last.std()
    fine, last = (run(steps, "philox") for steps in (24, 72))
    assert (fine - last).std() > 0.9 * last.std()


OPTIONS = [{}, {"graph": True, "rows_per_graph": 2}, {"state_dtype": torch.float64}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_run_draws_it_as_given_noise(options: dict[str, Any]) -> None:
    table = solvers.ddim(Schedule.named("linear").respace(4), eta=0.8)
    one = Sampler(lambda x, t: 0.3 * x, table, noise_source="brownian", clip=1.0, **{"graph": False, **options})
    got = one.sample(SMALL, seed=[4, 9])
    nodes, factors, counts = brownian_terms(table)
    recorded = torch.zeros(4, *SMALL)
    for row in range(4):
        given = torch.from_numpy(nodes[row]), torch.from_numpy(factors[row]), counts[row]
        brownian_normal(sample_seeds([4, 9], 2), *given, recorded[row])
    assert torch.equal(one.sample(SMALL, seed=[4, 9], noise=recorded), got)
    assert torch.equal(one.sample((1, 5), seed=[9])[0], got[1])
    assert not torch.equal(one.sample(SMALL, seed=[4, 10])[1], got[1])
    assert torch.equal(one.resume(one.export(SMALL, stop=2, seed=[4, 9])), got)
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    drawn = one.sample(SMALL, generator=generators)
    assert torch.equal(drawn, one.sample(SMALL, generator=[torch.Generator().manual_seed(i) for i in (1, 2)]))


@pytest.mark.quick
def test_learned_variances_take_it_too() -> None:
    table = solvers.ddpm(Schedule.named("linear").respace(6))
    *_, counts = brownian_terms(table)
    assert [count > 0 for count in counts] == [True] * 5 + [False]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (StepTable.from_columns(t=[1, 0], a_0=1.0, s=0.5), "its noise levels are not known, or infinite"),
        (solvers.langevin(Schedule.named("linear").respace(4), steps_per_level=2), "row 0 adds noise in a step"),
        (solvers.sgld(Schedule.named("linear").respace(4), 2, 3), "row 0 adds noise in a step"),
        (solvers.euler_ancestral([2.0, 1.0, 1.0 - 1e-7, 0.0]), "row 1 adds noise from level 1 to"),
        (solvers.ddpm(Schedule.named("linear").zero_terminal_snr().respace(4), prediction="v"), "or infinite"),
    ],
)
def test_tables_that_it_does_not_fit_are_refused(table: StepTable, message: str) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=f"noise_source: got 'brownian' with the table .*{message}"):
        Sampler(never, table, noise_source="brownian", graph=False).sample(SHAPE, seed=0)


@pytest.mark.quick
def test_bad_arguments_are_named() -> None:
    out, seeds, nodes, factors = torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(4).long(), torch.zeros(4)
    for given, message in [
        ((out.double(), seeds, nodes, factors, 4), "out: got torch.float64"),
        ((out, seeds.int(), nodes, factors, 4), "seeds: got torch.int32"),
        ((out, seeds, nodes.int(), factors, 4), "nodes: got torch.int32"),
        ((out, seeds, nodes, factors[:3], 4), "nodes: got torch.int64"),
        ((out, seeds, nodes, factors.double(), 4), "factors: got torch.float64"),
        ((out, seeds, nodes, factors, 5), "terms: got 5, expected 0 to 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.brownian_noise(*given)
