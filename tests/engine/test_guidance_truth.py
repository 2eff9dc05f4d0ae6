"""Guidance of a perfect model, without a classifier and by a perfect one: what samplers should return, computed
without them, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from support.chain import GRID, Array, Chain, Guided, assert_distribution
from support.mixture import NULL, Mixture
from torch import Tensor

from fastcfg import CFG, Sampler, Schedule, StepTable, solvers

MIXTURE = Mixture((0.35, 0.15, 0.3, 0.2), means=(-1.5, 0.2, 0.6, 1.6), stds=(0.3, 0.2, 0.3, 0.25), classes=(0, 1, 1, 2))


def table_of(solver: str, schedule: Schedule) -> StepTable:
    if solver == "ddim":
        return solvers.ddim(schedule)
    return solvers.ddpm(schedule, variance="learned" if solver == "ddpm_learned" else "fixed_large")


def guided_chain(solver: str, schedule: Schedule, label: int, scale: float) -> Chain:
    """The distribution of a sampler's answer, by its formulas."""
    paper, chain = Guided(MIXTURE, schedule, label, scale), Chain()
    for t in reversed(range(schedule.num_timesteps)):
        σ = float(np.sqrt(schedule.betas[t]))
        if solver == "ddim":
            chain.move(lambda x, t=t: paper.ddim(x, t))
        elif solver == "ddpm":
            chain.move(lambda x, t=t: paper.posterior_mean(x, t), σ if t > 0 else 0.0)
        else:
            learned = partial(learned_std, σ)
            chain.move(lambda x, t=t: paper.posterior_mean(x, t), learned if t > 0 else 0.0)
    return chain


def learned_std(σ: float, x: Array) -> Array:
    """What the variance channels of `draw`'s model say: log σ² + 0.3 sin(3x) is the log variance."""
    return σ * np.exp(0.15 * np.sin(3 * x))


def draw(
    solver: str, schedule: Schedule, labels: Sequence[int], scale: float, number: int, noise: str = "philox"
) -> Tensor:
    """[L, 1, number]: samples of each label, each element one."""
    predict, log_β = MIXTURE.model(schedule), torch.from_numpy(np.log(schedule.betas)).float()

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = torch.searchsorted(torch.from_numpy(schedule.timestep_map), t)
        log_variance = log_β[level].view(-1, 1, 1) + 0.3 * torch.sin(3 * x)
        return torch.cat([predict(x, t, y), log_variance], dim=1)

    sampler = Sampler(model, table_of(solver, schedule), guidance=CFG(scale), noise_source=noise, backend="reference")
    cond, uncond = {"y": torch.tensor(labels)}, {"y": torch.full((len(labels),), NULL)}
    return sampler.sample((len(labels), 1, number), cond=cond, uncond=uncond, seed=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("solver", "noise"), [("ddpm", "philox"), ("ddpm_learned", "torch"), ("ddim", "philox")])
def test_guided_samples_are_those_of_the_guided_chain(solver: str, noise: str, scale: float) -> None:
    schedule, labels = Schedule.named("linear", 1000).respace(20), (1, 2)
    for label, samples in zip(labels, draw(solver, schedule, labels, scale, 50_000, noise), strict=True):
        guided_chain(solver, schedule, label, scale).assert_drew(samples)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_scales_0_and_1_sample_the_mixture_and_the_class(solver: str, scale: float) -> None:
    def truth(x: Tensor) -> Tensor:
        return MIXTURE.cdf(x, 1.0, 1 if scale == 1 else NULL)

    schedules = [Schedule.named("cosine", 1000).respace(steps) for steps in (25, 50)]
    few, many = (guided_chain(solver, schedule, 1, scale).distance(truth) for schedule in schedules)
    # Measured: 0.0081 and 0.0078 for DDPM, 0.0078 and 0.0114 for DDIM, and twice that with half the steps.
    assert many < 0.012
    assert 1.9 < few / many < 2.2
    assert_distribution(draw(solver, schedules[1], [1], scale, 20_000), truth, bias=0.012)


# With scale 3 the samplers do not return the density proportional to p(x) p(y | x)^3 that the guided score suggests:
# it holds at each level by itself, and their steps do not carry one level's to the next.
@pytest.mark.parametrize(("solver", "distance"), [("ddpm", 0.07), ("ddim", 0.35)])
def test_guided_samples_are_not_of_the_product_density(solver: str, distance: float) -> None:
    x = torch.from_numpy(GRID)
    mass = (MIXTURE.log_density(x) + 3 * MIXTURE.log_posterior(x, 1.0, 1)).softmax(0)
    below = mass.cumsum(0) - mass / 2
    for steps in (25, 50):
        chain = guided_chain(solver, Schedule.named("cosine", 1000).respace(steps), 1, 3.0)
        # Measured: 0.0710 and 0.0715, 0.367 and 0.354.
        assert distance < chain.distance(lambda _: below) < 1.1 * distance


# With a classifier of noisy samples DDIM moves ε, as classifier-free guidance does, and DDPM moves the mean by σ² times
# the gradient, at the last step too.


def classified_chain(solver: str, schedule: Schedule, label: int, scale: float) -> Chain:
    """The distribution of a sampler's answer, by Dhariwal & Nichol's algorithms 1 and 2."""
    if solver == "ddim":
        return guided_chain(solver, schedule, label, scale)
    paper, chain = Guided(MIXTURE, schedule, label, 0.0), Chain()
    for t in reversed(range(schedule.num_timesteps)):
        # The last variance is the one before it, by which the originals replace 0.
        variance = schedule.betas[t] if t > 0 else schedule.posterior_variance[1]

        def mean(x: Array, t: int = t, variance: float = variance) -> Array:
            gradient = MIXTURE.log_posterior_gradient(torch.from_numpy(x), paper.ᾱ[t], label).numpy()
            return paper.posterior_mean(x, t) + scale * variance * gradient

        chain.move(mean, float(np.sqrt(variance)) if t > 0 else 0.0)
    return chain


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_classifier_guided_samples_are_those_of_the_guided_chain(solver: str, scale: float) -> None:
    schedule, labels = Schedule.named("linear", 1000).respace(20), (1, 2)
    predict = MIXTURE.model(schedule)
    times, ᾱ = torch.from_numpy(schedule.timestep_map), torch.from_numpy(schedule.alphas_cumprod)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return predict(x, t, torch.full_like(y, NULL))

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return scale * MIXTURE.log_posterior_gradient(x, ᾱ[torch.searchsorted(times, t)], y)

    sampler = Sampler(model, table_of(solver, schedule), cond_fn=cond_fn, backend="reference")
    drawn = sampler.sample((2, 1, 50_000), cond={"y": torch.tensor(labels)}, seed=0)
    for label, samples in zip(labels, drawn, strict=True):
        classified_chain(solver, schedule, label, scale).assert_drew(samples)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_classifier_at_scale_1_samples_the_class(solver: str) -> None:
    few, many = (
        classified_chain(solver, Schedule.named("cosine", 1000).respace(steps), 1, 1.0).distance(
            lambda x: MIXTURE.cdf(x, 1.0, 1)
        )
        for steps in (25, 50)
    )
    # Measured: 0.0100 for DDPM, 0.0114 for DDIM, and twice that with half the steps.
    assert many < 0.012
    assert 1.9 < few / many < 2.2
