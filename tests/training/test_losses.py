"""The hybrid loss against its definition, written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastcfg.schedule import Schedule
from fastcfg.training.losses import HybridLoss

pytestmark = pytest.mark.quick

T = 100
SCHEDULE = Schedule.named("squaredcos_cap_v2", T)


def inputs(t: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), 3, 8, 8)
    x_start = torch.randint(256, shape, generator=generator, dtype=torch.float64) / 127.5 - 1
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    guess = noise + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    fraction = torch.rand(shape, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    return x_start, noise, torch.cat([guess, fraction], dim=1)


def direct(x0: torch.Tensor, noise: torch.Tensor, output: torch.Tensor, t: int) -> tuple[float, float]:
    """Mean squared error and bound of one sample, from betas alone."""
    beta = SCHEDULE.betas
    bar = np.cumprod(1 - beta)
    before = bar[t - 1] if t else 1.0
    x_t = math.sqrt(bar[t]) * x0 + math.sqrt(1 - bar[t]) * noise
    epsilon, v = output[:3], output[3:]
    x0_hat = (x_t - math.sqrt(1 - bar[t]) * epsilon) / math.sqrt(bar[t])
    on_x0 = beta[t] * math.sqrt(before) / (1 - bar[t])
    on_xt = (1 - before) * math.sqrt(1 - beta[t]) / (1 - bar[t])
    floor = t or 1
    low = math.log(beta[floor] * (1 - bar[floor - 1]) / (1 - bar[floor]))
    sigma = torch.exp(0.5 * ((v + 1) / 2 * math.log(beta[t]) + (1 - v) / 2 * low))
    model = Normal(on_x0 * x0_hat + on_xt * x_t, sigma)
    if t:
        truth = Normal(on_x0 * x0 + on_xt * x_t, math.exp(0.5 * low))
        nats = kl_divergence(truth, model)
    else:
        upper = torch.where(x0 > 0.999, torch.inf, x0 + 1 / 255)
        lower = torch.where(x0 < -0.999, -torch.inf, x0 - 1 / 255)
        nats = -(model.cdf(upper) - model.cdf(lower)).clamp(min=1e-12).log()
    return float(((epsilon - noise) ** 2).mean()), float(nats.mean()) / math.log(2) * T / 1000


@pytest.mark.parametrize("cap", [1.0, 5.0])
def test_terms_equal_the_definition(cap: float) -> None:
    t = torch.tensor([0, 1, 2, 50, 98, 99])
    x_start, noise, output = inputs(t)
    loss = HybridLoss(SCHEDULE, mse_weight_cap=cap, dtype=torch.float64)
    terms = loss(output, x_start, loss.q_sample(x_start, t, noise), t, noise)
    for index, step in enumerate(t.tolist()):
        mse, vlb = direct(x_start[index], noise[index], output[index], step)
        weight = min(1 / np.prod(1 - SCHEDULE.betas[: step + 1]), cap)
        # Measured: 3e-14.
        assert terms.mse[index].item() == pytest.approx(mse, rel=1e-12)
        assert terms.vlb[index].item() == pytest.approx(vlb, rel=1e-12)
        assert terms.loss[index].item() == pytest.approx(weight * mse + vlb, rel=1e-12)


def test_float32_is_close_to_float64() -> None:
    t = torch.arange(T)
    x_start, noise, output = inputs(t)
    results = []
    for dtype in (torch.float32, torch.float64):
        loss = HybridLoss(SCHEDULE, dtype=dtype)
        clean, eps, out = (x.to(dtype) for x in (x_start, noise, output))
        results.append(loss(out, clean, loss.q_sample(clean, t, eps), t, eps).loss.double())
    # Measured: 2.3e-7.
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=0)


def test_the_bound_does_not_pull_at_the_mean() -> None:
    t = torch.tensor([0, 3, 60])
    x_start, noise, output = inputs(t)
    output.requires_grad_()
    loss = HybridLoss(SCHEDULE, dtype=torch.float64)
    terms = loss(output, x_start, loss.q_sample(x_start, t, noise), t, noise)
    (of_bound,) = torch.autograd.grad(terms.vlb.sum(), output, retain_graph=True)
    (of_error,) = torch.autograd.grad(terms.mse.sum(), output)
    assert of_bound[:, :3].abs().max() == 0
    assert of_bound[:, 3:].abs().min() > 0
    assert of_error[:, :3].abs().max() > 0
    assert of_error[:, 3:].abs().max() == 0


def test_probabilities_of_all_values_sum_to_one() -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    t = torch.zeros(256, dtype=torch.int64)
    x_start = values.view(256, 1, 1, 1)
    x_t = torch.full_like(x_start, 0.1)
    output = torch.full((256, 2, 1, 1), 0.2, dtype=torch.float64)
    loss = HybridLoss(Schedule(np.full(T, 0.3)), dtype=torch.float64)
    bits = loss(output, x_start, x_t, t, torch.zeros_like(x_start)).vlb / (T / 1000)
    assert torch.exp2(-bits).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mse_weight_cap: got 0.5, expected at least 1"):
        HybridLoss(SCHEDULE, mse_weight_cap=0.5)
    t = torch.tensor([1])
    x_start, noise, output = inputs(t)
    with pytest.raises(ValueError, match=r"model_output: got shape \(1, 3, 8, 8\), expected \(1, 6, 8, 8\)"):
        HybridLoss(SCHEDULE)(output[:, :3], x_start, x_start, t, noise)
