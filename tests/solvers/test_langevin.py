"""Langevin dynamics: its formula row by row, and its samples against the chain's exact distribution and the mixture."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.chain import GRID, Chain, Guided, assert_distribution
from support.golden_data import error
from support.mixture import NULL, Mixture
from torch import Tensor

from fastcfg import CFG, Sampler, Schedule, StepTable, solvers

pytestmark = pytest.mark.quick

MIXTURE = Mixture((0.35, 0.15, 0.3, 0.2), means=(-1.5, 0.2, 0.6, 1.6), stds=(0.3, 0.2, 0.3, 0.25), classes=(0, 1, 1, 2))
# Its least noisy level has a std of 0.045, within the reach of the chain's grid.
SCHEDULE = Schedule.named("linear", 25)


def anneal(paper: Guided, chain: Chain, t: int, number: int, step_size: float = 0.5) -> None:
    """Langevin steps at one level."""
    δ = step_size * (1 - paper.ᾱ[t])
    chain.move(lambda x: paper.langevin(x, t, δ), float(np.sqrt(δ)), number)


def draw(
    table: StepTable,
    model: Callable[..., Tensor],
    label: int,
    scale: float = 1.0,
    number: int = 30_000,
) -> tuple[Tensor, Tensor]:
    """x after the last two rows, each of its elements a sample."""
    sampler = Sampler(model, table, guidance=CFG(scale), noise_source="torch", backend="reference")
    cond, uncond = torch.tensor([label]), torch.tensor([NULL])
    x = deque(sampler.iterate((1, 1, number), cond={"y": cond}, uncond={"y": uncond}, seed=0), maxlen=2)
    return x[0].x, x[1].x


@pytest.mark.parametrize(("label", "scale"), [(NULL, 1.0), (1, 3.0)])
def test_annealed_dynamics_are_their_chain(label: int, scale: float) -> None:
    paper, chain = Guided(MIXTURE, SCHEDULE, label, scale), Chain()
    for t in reversed(range(SCHEDULE.num_timesteps)):
        anneal(paper, chain, t, 4)
    table = solvers.langevin(SCHEDULE, steps_per_level=4, step_size=0.5)
    noisy, denoised = draw(table, MIXTURE.model(SCHEDULE), label, scale)
    chain.assert_drew(noisy)
    chain.move(lambda x: paper.x0(x, 0))
    chain.assert_drew(denoised)


@pytest.mark.parametrize("label", [NULL, 1])
def test_more_annealed_steps_come_nearer_to_the_mixture(label: int) -> None:
    def distances(steps_per_level: int) -> tuple[float, float]:
        paper, chain = Guided(MIXTURE, SCHEDULE, label), Chain()
        for t in reversed(range(SCHEDULE.num_timesteps)):
            anneal(paper, chain, t, steps_per_level)
        noisy = chain.distance(lambda x: MIXTURE.cdf(x, paper.ᾱ[0], label))
        chain.move(lambda x: paper.x0(x, 0))
        return noisy, chain.distance(lambda x: MIXTURE.cdf(x, 1.0, label))

    # Measured: 0.059 and 0.012 for the whole mixture, 0.094 and 0.011 for one class; a little less denoised.
    few, many = distances(4), distances(64)
    assert max(many) < 0.014
    assert min(few) > 4 * max(many)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_dynamics_at_one_level_sample_the_guided_density(scale: float) -> None:
    t, label, sizes = 4, 1, [0.3] * 40 + [0.08] * 80
    paper, chain = Guided(MIXTURE, SCHEDULE, label, scale), Chain()
    anneal(paper, chain, t, 40, 0.3)
    anneal(paper, chain, t, 80, 0.08)
    table = solvers.sgld(SCHEDULE, t, len(sizes), step_size=sizes)
    _, samples = draw(table, MIXTURE.model(SCHEDULE), label, scale)
    chain.assert_drew(samples)

    # p(x)^(1 - scale) p(x | y)^scale, which is what Langevin dynamics sample, and no sampler that changes level does.
    x = torch.from_numpy(GRID)
    log_density = (1 - scale) * MIXTURE.log_density(x, paper.ᾱ[t]) + scale * MIXTURE.log_density(x, paper.ᾱ[t], label)
    mass = log_density.softmax(0)
    below = mass.cumsum(0) - mass / 2
    # Measured: 0.0018, 0.0020 and 0.0045, from steps that are not infinitely small.
    assert chain.distance(lambda _: below) < 0.005
    assert_distribution(samples, lambda x: torch.from_numpy(np.interp(x, GRID, below)), bias=0.005)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("predictor", ["ddim", "ddpm"])
def test_a_corrected_predictor_is_its_chain(predictor: str, scale: float) -> None:
    schedule, label = SCHEDULE.respace(8), 1
    paper, alone, corrected = Guided(MIXTURE, schedule, label, scale), Chain(), Chain()
    log_β = np.log(schedule.betas)
    for t in reversed(range(schedule.num_timesteps)):
        anneal(paper, corrected, t, 4)
        for chain in (alone, corrected):
            if predictor == "ddim":
                chain.move(lambda x, t=t: paper.ddim(x, t))
            else:
                std = lambda x, t=t: np.exp((log_β[t] + 0.3 * np.sin(3 * x)) / 2)  # noqa: E731
                chain.move(lambda x, t=t: paper.posterior_mean(x, t), std if t > 0 else 0.0)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_variance = log_β[np.searchsorted(schedule.timestep_map, int(t[0]))] + 0.3 * torch.sin(3 * x)
        return torch.cat([MIXTURE.model(schedule)(x, t, y), log_variance], dim=1)

    table = solvers.ddim(schedule) if predictor == "ddim" else solvers.ddpm(schedule, variance="learned")
    table = solvers.predictor_corrector(table, schedule, corrector_steps=4, step_size=0.5)
    corrected.assert_drew(draw(table, model, label, scale)[1])
    if scale == 1:
        # Measured: 0.123 to 0.086 for DDIM, 0.108 to 0.094 for DDPM; the one step from the last level is not corrected.
        before, after = (chain.distance(lambda x: MIXTURE.cdf(x, 1.0, label)) for chain in (alone, corrected))
        assert after < 0.9 * before


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
@pytest.mark.parametrize("builder", ["langevin", "sgld", "predictor_corrector"])
def test_rows_are_the_papers_steps(builder: str, prediction: str, clip: float | None) -> None:
    schedule = Schedule.named("cosine", 500).respace(6)
    options: dict[str, Any] = {"prediction": prediction, "rescale_timesteps": True}
    if builder == "langevin":
        table = solvers.langevin(schedule, steps_per_level=2, step_size=0.7, **options)
        rows = [(t, 0.7) for t in (5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0)] + [(0, None)]
    elif builder == "sgld":
        table = solvers.sgld(schedule, 3, 4, step_size=[0.9, 0.5, 0.2, 0.1], denoise=True, **options)
        rows = [(3, 0.9), (3, 0.5), (3, 0.2), (3, 0.1), (3, None)]
    else:
        table = solvers.predictor_corrector(solvers.ddim(schedule, **options), schedule, corrector_steps=2)
        rows = [step for t in range(5, -1, -1) for step in ((t, 0.1), (t, 0.1), (t, "ddim"))]

    generator = torch.Generator().manual_seed(0)
    x, *noise = torch.randn(1 + len(rows), 2, 1, 40, dtype=torch.float64, generator=generator)
    sampler = Sampler(
        MIXTURE.model(schedule, prediction, rescale=True),
        table,
        clip=clip,
        backend="reference",
        dtype=x.dtype,
        state_dtype=x.dtype,
    )
    y = torch.tensor([0, 1])
    run = sampler.iterate(x.shape, cond={"y": y}, x_T=x, noise=torch.stack(noise))
    for step, (t, size), z in zip(run, rows, noise, strict=True):
        ᾱ, ᾱ_prev = (float(levels[t]) for levels in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev))
        x0 = (x - (1 - ᾱ) ** 0.5 * MIXTURE.eps(x, ᾱ, y)) / ᾱ**0.5
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        eps = (x - ᾱ**0.5 * x0) / (1 - ᾱ) ** 0.5
        if size is None:
            x = x0
        elif size == "ddim":
            x = ᾱ_prev**0.5 * x0 + (1 - ᾱ_prev) ** 0.5 * eps
        else:
            δ = size * (1 - ᾱ)
            x = x + δ / 2 * (-eps / (1 - ᾱ) ** 0.5) + δ**0.5 * z
        # Measured: 5.5e-13.
        assert error(step.x, x) < 1e-11
        x = step.x


def test_rows_of_a_level_share_a_step() -> None:
    schedule = Schedule.named("linear", 1000).respace(3)
    table = solvers.langevin(schedule, steps_per_level=2)
    assert table.steps.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert table["t"].tolist() == [999, 999, 500, 500, 0, 0, 0]
    assert len(solvers.langevin(schedule, steps_per_level=2, denoise=False)) == 6
    table = solvers.sgld(schedule, 1, 3, denoise=True)
    assert table.steps.tolist() == [0, 1, 2, 2]
    assert table["t"].tolist() == [500] * 4
    assert len(solvers.sgld(schedule, 1, 3)) == 3


@pytest.mark.parametrize("build", [solvers.ddpm, solvers.ddim, solvers.plms, solvers.prk, solvers.ddim_reverse])
@pytest.mark.parametrize("rescale", [False, True])
def test_corrector_rows_come_first_in_each_step(build: Callable[..., StepTable], rescale: bool) -> None:
    schedule = Schedule.named("linear", 500).respace(5)
    predictor = build(schedule, rescale_timesteps=rescale)
    table = solvers.predictor_corrector(predictor, schedule, corrector_steps=2, step_size=0.2)
    stages = len(predictor) // predictor.num_steps
    is_corrector = np.tile([True, True, *[False] * stages], predictor.num_steps)
    assert len(table) == len(is_corrector)
    assert np.array_equal(table.rows[~is_corrector], predictor.rows)
    assert table.steps.tolist() == np.repeat(np.arange(predictor.num_steps), 2 + stages).tolist()
    for name in ("t", "p_x", "p_m"):
        assert np.array_equal(table[name][is_corrector], np.repeat(predictor[name][::stages], 2))
    assert (table["slot"][is_corrector] == -1).all()
    levels = np.searchsorted(schedule.model_timesteps(rescale), table["t"][is_corrector])
    std = np.sqrt(0.2 * (1 - schedule.alphas_cumprod[levels]))
    got = 2 ** table["l_0"] if predictor.learned_variance else table["s"]
    np.testing.assert_allclose(got[is_corrector], std, rtol=1e-14)
    assert not table["l_v"][is_corrector].any()
    for name in ("learned_variance", "integer_time", "initial_scale"):
        assert getattr(table, name) == getattr(predictor, name)
    # An interval of guidance covers the correctors of the steps it covers.
    inside = CFG(3.0, interval=(0.0, 0.5)).inside(table)
    assert np.array_equal(inside[~is_corrector], CFG(3.0, interval=(0.0, 0.5)).inside(predictor))
    assert np.array_equal(inside[is_corrector][::2], inside[~is_corrector][::stages])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: solvers.langevin(s, steps_per_level=0), "steps_per_level: got 0, expected an integer of at least 1"),
        (lambda s: solvers.langevin(s, step_size=0.0), r"step_size: got 0.0, expected values in \(0, 4\)"),
        (lambda s: solvers.langevin(s, step_size=float("nan")), r"step_size: got nan, expected values in \(0, 4\)"),
        (
            lambda s: solvers.langevin(s, prediction="eps"),
            "prediction: got 'eps', expected one of epsilon, x0, v, prev",
        ),
        (lambda s: solvers.sgld(s, 5, 3), r"timestep: got 5, expected 0 \.\.\. 4"),
        (lambda s: solvers.sgld(s, -1, 3), r"timestep: got -1, expected 0 \.\.\. 4"),
        (lambda s: solvers.sgld(s, 1, 0), "num_steps: got 0, expected an integer of at least 1"),
        (
            lambda s: solvers.sgld(s, 1, 3, step_size=[0.1, 0.2]),
            r"step_size: got shape \(2,\), expected a number or 3 n",
        ),
        (lambda s: solvers.sgld(s, 1, 2, step_size=[0.1, 4.0]), r"step_size: got \[0.1, 4.0\], expected values in"),
        (
            lambda s: solvers.predictor_corrector(solvers.ddim(s), s, corrector_steps=0),
            "corrector_steps: got 0, expected",
        ),
        (
            lambda s: solvers.predictor_corrector(solvers.ddim(s), s, step_size=4.0),
            "step_size: got 4.0, expected values",
        ),
        (
            lambda s: solvers.predictor_corrector(solvers.ddim(s), s.respace(2)),
            "predictor: got the table ddim with steps",
        ),
        (
            lambda s: solvers.predictor_corrector(StepTable.from_columns(t=[999, 0], c_in=0.5, name="edm"), s),
            "predictor: got the table edm with c_in other than 1",
        ),
    ],
)
def test_bad_options_are_refused(build: Callable[[Schedule], StepTable], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Schedule.named("linear", 1000).respace(5))


def test_a_predictor_must_be_a_table() -> None:
    with pytest.raises(TypeError, match="predictor: got str, expected a StepTable"):
        solvers.predictor_corrector("ddim", Schedule.named("linear"))  # type: ignore[arg-type]
