"""The mixture and the chain that other tests take for the truth: against derivatives, integrals and a known chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcfg import Schedule
from fastcfg.reference import originals
from support.chain import GRID, Chain, assert_distribution
from support.golden_data import error
from support.mixture import NULL, Mixture

pytestmark = pytest.mark.quick

MIXTURE = Mixture(weights=(0.5, 0.3, 0.2), means=(-1.5, 0.5, 1.6), stds=(0.3, 0.4, 0.2), classes=(0, 1, 1))
Y = torch.tensor([NULL, 0, 1])


@pytest.mark.parametrize("ᾱ", [0.001, 0.5, 0.99])
def test_the_mixture_agrees_with_its_density(ᾱ: float) -> None:
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64).repeat(3, 1, 1).requires_grad_()
    density = MIXTURE.log_density(x, ᾱ, Y)
    (gradient,) = torch.autograd.grad(density.sum(), x)
    (posterior_gradient,) = torch.autograd.grad(MIXTURE.log_posterior(x, ᾱ, Y).sum(), x)
    (slope,) = torch.autograd.grad(MIXTURE.cdf(x, ᾱ, Y).sum(), x)
    x, density = x.detach(), density.detach()
    # Measured: 1.4e-14.
    assert error(MIXTURE.score(x, ᾱ, Y), gradient) < 1e-12
    assert error(MIXTURE.log_posterior_gradient(x, ᾱ, Y), posterior_gradient) < 1e-12
    assert error(slope, density.exp()) < 1e-12
    assert error(MIXTURE.eps(x, torch.full((3,), ᾱ, dtype=x.dtype), Y), -((1 - ᾱ) ** 0.5) * gradient) < 1e-12
    # p(x) = p(0) p(x | 0) + p(1) p(x | 1), and Bayes.
    assert error(density[0].exp(), 0.5 * density[1].exp() + 0.5 * density[2].exp()) < 1e-12
    assert error(MIXTURE.log_posterior(x, ᾱ, Y)[1], density[1] + np.log(0.5) - density[0]) < 1e-12


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
def test_the_model_predicts_what_it_should(prediction: str, rescale: bool) -> None:
    schedule = Schedule.named("linear", 500).respace(9)
    x, level = torch.randn(3, 1, 50, dtype=torch.float64), torch.tensor([8, 0, 3])
    t = torch.from_numpy(schedule.model_timesteps(rescale))[level]
    output = MIXTURE.model(schedule, prediction, rescale)(x, t, Y)
    ᾱ = torch.from_numpy(schedule.alphas_cumprod)[level].view(3, 1, 1)
    eps = torch.cat([MIXTURE.eps(x[i : i + 1], float(ᾱ[i]), Y[i : i + 1]) for i in range(3)])
    x0 = (x - (1 - ᾱ) ** 0.5 * eps) / ᾱ**0.5
    want = {
        "epsilon": eps,
        "x0": x0,
        "v": ᾱ**0.5 * eps - (1 - ᾱ) ** 0.5 * x0,
        "previous_x": originals.q_posterior_mean_variance(schedule, x0, x, level)[0],
    }
    # The posterior's coefficients are rounded to float32.
    assert error(output, want[prediction]) < (1e-6 if prediction == "previous_x" else 1e-12)


def test_the_chain_is_that_of_a_linear_process() -> None:
    chain = Chain()
    chain.move(lambda x: 0.5 * x + 1)
    chain.move(lambda x: -x)
    assert abs(chain.moment(1) + 1) < 1e-6
    assert abs(chain.moment(2, -1) - 0.25) < 1e-6
    chain = Chain()
    for _ in range(3):
        chain.move(lambda x: 0.5 * x + 0.2, 0.3)
    variance = 0.5**6 + 0.3**2 * (1 + 0.5**2 + 0.5**4)
    assert abs(chain.moment(1) - 0.35) < 1e-6
    assert abs(chain.moment(2, 0.35) - variance) < 1e-6
    # Between grid points the distribution function is interpolated.
    assert chain.distance(lambda x: torch.special.ndtr((x - 0.35) / variance**0.5)) < 3e-4
    chain.assert_drew(torch.from_numpy(0.35 + variance**0.5 * np.random.default_rng(0).standard_normal(100_000)))


@pytest.mark.parametrize(("shift", "scale"), [(0.02, 1.0), (0.0, 1.02), (0.02, 0.98)])
def test_samples_of_another_distribution_are_refused(shift: float, scale: float) -> None:
    samples = torch.from_numpy(shift + scale * np.random.default_rng(0).standard_normal(100_000))
    with pytest.raises(AssertionError):
        Chain().assert_drew(samples)
    with pytest.raises(AssertionError):
        assert_distribution(samples + 0.05, torch.special.ndtr)


def test_a_step_finer_than_the_grid_is_refused() -> None:
    with pytest.raises(AssertionError):
        Chain().move(lambda x: x, 0.5 * (GRID[1] - GRID[0]))
