"""The originals' training losses and variational bound (guided-diffusion's `training_losses` and `calc_bpd_loop`),
operation for operation.

Throughout, x is [B, C, ...] (x_start: x0 in [-1, 1]; x_t: the model's input, x0 diffused to t) and t int64 [B], indices
into the (re-spaced) process; losses are [B], the bound's in bits per dimension. Functions take outputs, not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..schedule import Schedule
from ..utils.checks import check_one_of
from .originals import p_mean_variance, predict_eps_from_xstart, q_mean_variance, q_posterior_mean_variance, q_sample

LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def vb_terms(schedule: Schedule, p: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The bound's term at t, as "output" [B] with p's "pred_xstart": a KL divergence, or at t = 0 the likelihood of
    8-bit values. p is the result of `p_mean_variance` at x_t."""
    true_mean, _, true_log_variance = q_posterior_mean_variance(schedule, x_start, x_t, t)
    divergence = _mean_flat(_normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])) / math.log(2.0)
    likelihood = _discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
    first = _mean_flat(-likelihood) / math.log(2.0)
    return {"output": torch.where(t == 0, first, divergence), "pred_xstart": p["pred_xstart"]}


def training_losses(
    schedule: Schedule,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    loss: str = "mse",
) -> dict[str, Tensor]:
    """The loss of a model's output at x_t.

    Args:
        model_output, prediction, variance: as in `p_mean_variance`.
        noise: the noise in x_t.
        loss: "mse" or "rescaled_mse" (plus the bound with learned variances, which takes the mean detached;
            "rescaled_mse" scales the bound by T / 1000), "kl" or "rescaled_kl" (the bound, or T times the bound).

    Returns:
        "loss" [B], and its parts "mse" and "vb" if it has them.

    Raises:
        ValueError: unknown loss, or what `p_mean_variance` raises.
    """
    check_one_of("loss", loss, LOSSES)

    def bound(output: Tensor) -> Tensor:
        p = p_mean_variance(schedule, output, x_t, t, prediction=prediction, variance=variance, clip_denoised=False)
        return vb_terms(schedule, p, x_start, x_t, t)["output"]

    if loss.endswith("kl"):
        term = bound(model_output)
        return {"loss": term * schedule.num_timesteps if loss == "rescaled_kl" else term}

    terms, output, channels = {}, model_output, x_t.shape[1]
    if variance.startswith("learned"):
        output, values = model_output[:, :channels], model_output[:, channels:]
        terms["vb"] = bound(torch.cat([output.detach(), values], dim=1))
        if loss == "rescaled_mse":
            terms["vb"] = terms["vb"] * (schedule.num_timesteps / 1000.0)
    target = x_start if prediction == "x0" else noise
    if prediction == "previous_x":
        target = q_posterior_mean_variance(schedule, x_start, x_t, t)[0]
    if output.shape != target.shape:
        raise ValueError(f"model_output: got shape {tuple(output.shape)}, expected {tuple(target.shape)}")
    terms["mse"] = _mean_flat((target - output) ** 2)
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def prior_bpd(schedule: Schedule, x_start: Tensor) -> Tensor:
    """[B]: the divergence of q(x_T | x0) from the standard normal."""
    t = torch.full((len(x_start),), schedule.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = q_mean_variance(schedule, x_start, t)
    zero = mean.new_zeros(())
    return _mean_flat(_normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


@torch.no_grad()
def bits_per_dimension(
    schedule: Schedule, predict: Callable[[Tensor, Tensor], dict[str, Tensor]], x_start: Tensor
) -> dict[str, Tensor]:
    """The whole bound of some images, for which predict(x_t, t) returns the result of `p_mean_variance`. Noise is drawn
    from torch's generator.

    Returns:
        total_bpd and prior_bpd [B]; by timestep, noisiest first, [B, T]: vb, xstart_mse, and mse (of ε).
    """
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for step in reversed(range(schedule.num_timesteps)):
        t = torch.full((len(x_start),), step, device=x_start.device)
        noise = torch.randn_like(x_start)
        x_t = q_sample(schedule, x_start, t, noise)
        terms = vb_terms(schedule, predict(x_t, t), x_start, x_t, t)
        eps = predict_eps_from_xstart(schedule, x_t, t, terms["pred_xstart"])
        columns["vb"].append(terms["output"])
        columns["xstart_mse"].append(_mean_flat((terms["pred_xstart"] - x_start) ** 2))
        columns["mse"].append(_mean_flat((eps - noise) ** 2))
    stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    prior = prior_bpd(schedule, x_start)
    return {"total_bpd": stacked["vb"].sum(dim=1) + prior, "prior_bpd": prior, **stacked}


def _mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch axis."""
    return x.mean(dim=list(range(1, x.ndim)))


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two normal distributions, in nats per element."""
    scaled = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + scaled)


def _approx_standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability in nats of the 8-bit value x; the outermost values reach to infinity."""
    centered, inverse = x - means, torch.exp(-log_scales)
    above = _approx_standard_normal_cdf(inverse * (centered + 1.0 / 255.0))
    below = _approx_standard_normal_cdf(inverse * (centered - 1.0 / 255.0))
    inner = torch.log((above - below).clamp(min=1e-12))
    last = torch.where(x > 0.999, torch.log((1.0 - below).clamp(min=1e-12)), inner)
    return torch.where(x < -0.999, torch.log(above.clamp(min=1e-12)), last)
