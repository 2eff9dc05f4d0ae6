"""The originals' own formulas: one step of guided-diffusion's and GLIDE's `GaussianDiffusion`, operation for operation.

Every table is float64; its entries are rounded to float32 when looked up, whatever the dtype of x, and the arithmetic
is float32 in the originals' order. On a CPU the results therefore equal the originals' bit for bit, dtypes included:
float16 and bfloat16 become float32 as soon as they meet a table, float64 stays.

The functions take a model's output and a classifier's gradient, not the model and the classifier, and the noise as a
tensor. The originals' steps are

    p = p_mean_variance(schedule, model(x, ...), x, t)
    p["mean"] = condition_mean(p, gradient)                    # p_sample with a cond_fn
    x = p_sample(p, t, noise)

    p = condition_score(schedule, p, x, t, gradient)           # DDIM with a cond_fn
    x = ddim_sample(schedule, p, x, t, noise, eta=0.0)

Throughout, x is [B, C, ...] of any floating dtype and t int64 [B] on x's device: indices into the (re-spaced) process,
0 for the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schedule import Schedule
from ..utils.checks import check_one_of

__all__ = ["condition_mean", "condition_score", "ddim_reverse_sample", "ddim_sample", "p_mean_variance", "p_sample"]
__all__ += ["predict_eps_from_xstart", "predict_xstart_from_eps", "predict_xstart_from_xprev", "q_mean_variance"]
__all__ += ["q_posterior_mean_variance", "q_sample"]

PREDICTIONS = ("epsilon", "x0", "previous_x")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def q_mean_variance(schedule: Schedule, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log variance of q(x_t | x0), each shaped like x_start."""
    mean = _look_up(schedule, "sqrt_alphas_cumprod", t, x_start) * x_start
    variance = _look_up(schedule, "variance", t, x_start)
    return mean, variance, _look_up(schedule, "log_one_minus_alphas_cumprod", t, x_start)


def q_sample(schedule: Schedule, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ x0 + √(1-ᾱ) noise."""
    signal = _look_up(schedule, "sqrt_alphas_cumprod", t, x_start) * x_start
    return signal + _look_up(schedule, "sqrt_one_minus_alphas_cumprod", t, x_start) * noise


def q_posterior_mean_variance(
    schedule: Schedule, x_start: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0), each shaped like x_t."""
    mean, variance = _posterior_mean(schedule, x_start, x_t, t), _look_up(schedule, "posterior_variance", t, x_t)
    return mean, variance, _look_up(schedule, "posterior_log_variance_clipped", t, x_t)


def predict_xstart_from_eps(schedule: Schedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x0 = √(1/ᾱ) x_t - √(1/ᾱ - 1) ε."""
    scaled = _look_up(schedule, "sqrt_recip_alphas_cumprod", t, x_t) * x_t
    return scaled - _look_up(schedule, "sqrt_recipm1_alphas_cumprod", t, x_t) * eps


def predict_xstart_from_xprev(schedule: Schedule, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
    """The x0 whose posterior mean is xprev."""
    scaled = _look_up(schedule, "recip_coef1", t, x_t) * xprev
    return scaled - _look_up(schedule, "coef2_by_coef1", t, x_t) * x_t


def predict_eps_from_xstart(schedule: Schedule, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
    """ε = (√(1/ᾱ) x_t - x0) / √(1/ᾱ - 1)."""
    scaled = _look_up(schedule, "sqrt_recip_alphas_cumprod", t, x_t) * x_t
    return (scaled - pred_xstart) / _look_up(schedule, "sqrt_recipm1_alphas_cumprod", t, x_t)


def p_mean_variance(
    schedule: Schedule,
    model_output: Tensor,
    x: Tensor,
    t: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "learned_range",
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    methods: Any = None,
) -> dict[str, Tensor]:
    """p(x_{t-1} | x_t) from a model's output.

    Args:
        model_output: [B, 2C, ...] for the learned variances, else [B, C, ...]; any floating dtype.
        prediction: of the output's first C channels: "epsilon", "x0" or "previous_x".
        variance: "fixed_small", "fixed_large", "learned" or "learned_range", as in `fastcfg.solvers.ddpm`.
        clip_denoised: clamp x0 to [-1, 1].
        denoised_fn: applied to x0 before the clamp.
        methods: an object whose `_predict_xstart_from_eps`, `_predict_xstart_from_xprev`, `_predict_eps_from_xstart`
            and `q_posterior_mean_variance` are called as the originals call their own; None for those of this module.

    Returns:
        mean, variance, log_variance and pred_xstart, each shaped like x. With "previous_x" the mean is the output
        itself, without denoised_fn and clamp.

    Raises:
        ValueError: unknown prediction or variance, or an output of another shape.

    Example:
        >>> schedule, x = Schedule.named("linear", 1000), torch.zeros(1, 3, 8, 8)
        >>> p = p_mean_variance(schedule, torch.zeros(1, 6, 8, 8), x, torch.tensor([999]))
        >>> sorted(p)
        ['log_variance', 'mean', 'pred_xstart', 'variance']
    """
    check_one_of("prediction", prediction, PREDICTIONS)
    check_one_of("variance", variance, VARIANCES)
    channels = x.shape[1]
    shape = (len(x), 2 * channels if variance.startswith("learned") else channels, *x.shape[2:])
    if model_output.shape != shape:
        got = tuple(model_output.shape)
        raise ValueError(f"model_output: got shape {got}, expected {shape} for {variance} variance")
    output = model_output[:, :channels]
    log_variance, sigma2 = _variance(schedule, variance, model_output[:, channels:], x, t)

    methods, pred_xstart = methods or _Methods(schedule), output
    if prediction == "epsilon":
        pred_xstart = methods._predict_xstart_from_eps(x_t=x, t=t, eps=output)
    elif prediction == "previous_x":
        pred_xstart = methods._predict_xstart_from_xprev(x_t=x, t=t, xprev=output)
    if denoised_fn is not None:
        pred_xstart = denoised_fn(pred_xstart)
    if clip_denoised:
        pred_xstart = pred_xstart.clamp(-1, 1)

    mean = output
    if prediction != "previous_x":
        mean = methods.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)[0]
    return {"mean": mean, "variance": sigma2, "log_variance": log_variance, "pred_xstart": pred_xstart}


def condition_mean(p: dict[str, Tensor], gradient: Tensor) -> Tensor:
    """p's mean plus variance times ∇ log p(y | x_t) (Sohl-Dickstein et al. 2015), both rounded to float32 first."""
    return p["mean"].float() + p["variance"] * gradient.float()


def condition_score(
    schedule: Schedule, p: dict[str, Tensor], x: Tensor, t: Tensor, gradient: Tensor, methods: Any = None
) -> dict[str, Tensor]:
    """p with mean and pred_xstart from ε - √(1-ᾱ) ∇ log p(y | x_t) (Dhariwal & Nichol 2021); not clamped again.
    `methods` as for `p_mean_variance`."""
    methods = methods or _Methods(schedule)
    eps = methods._predict_eps_from_xstart(x, t, p["pred_xstart"])
    eps = eps - (1 - _look_up(schedule, "alphas_cumprod", t, x)).sqrt() * gradient
    pred_xstart = methods._predict_xstart_from_eps(x, t, eps)
    mean = methods.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)[0]
    return {**p, "pred_xstart": pred_xstart, "mean": mean}


def p_sample(p: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
    """x_{t-1} = mean + σ noise, without noise at t = 0."""
    not_last = (t != 0).float().view(-1, *[1] * (noise.ndim - 1))
    return p["mean"] + not_last * torch.exp(0.5 * p["log_variance"]) * noise


def ddim_sample(
    schedule: Schedule,
    p: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    *,
    eta: float = 0.0,
    methods: Any = None,
) -> Tensor:
    """x_{t-1} of DDIM (Song et al. 2020, equation 12), with ε re-derived from pred_xstart; σ is 0 at t = 0. `methods`
    as for `p_mean_variance`."""
    eps = (methods or _Methods(schedule))._predict_eps_from_xstart(x, t, p["pred_xstart"])
    alpha_bar = _look_up(schedule, "alphas_cumprod", t, x)
    alpha_bar_prev = _look_up(schedule, "alphas_cumprod_prev", t, x)
    sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
    mean = p["pred_xstart"] * torch.sqrt(alpha_bar_prev) + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
    return mean + sigma * noise


def ddim_reverse_sample(schedule: Schedule, p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """x_{t+1} of the deterministic ODE run towards noise."""
    eps = predict_eps_from_xstart(schedule, x, t, p["pred_xstart"])
    alpha_bar_next = _look_up(schedule, "alphas_cumprod_next", t, x)
    return p["pred_xstart"] * torch.sqrt(alpha_bar_next) + torch.sqrt(1 - alpha_bar_next) * eps


class _Methods:
    """The functions of this module as an object's methods."""

    def __init__(self, schedule: Schedule) -> None:
        self._predict_xstart_from_eps = partial(predict_xstart_from_eps, schedule)
        self._predict_xstart_from_xprev = partial(predict_xstart_from_xprev, schedule)
        self._predict_eps_from_xstart = partial(predict_eps_from_xstart, schedule)
        self.q_posterior_mean_variance = partial(q_posterior_mean_variance, schedule)


def _variance(schedule: Schedule, variance: str, values: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Log variance and variance; `values` are the model's variance channels, if it has any."""
    low = _look_up(schedule, "posterior_log_variance_clipped", t, x)
    if variance == "fixed_small":
        return low, _look_up(schedule, "posterior_variance", t, x)
    if variance == "fixed_large":
        large = "fixed_large_variance"
        return _look_up(schedule, f"log_{large}", t, x), _look_up(schedule, large, t, x)
    if variance == "learned":
        return values, torch.exp(values)
    high, fraction = _look_up(schedule, "log_betas", t, x), (values + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    return log_variance, torch.exp(log_variance)


def _posterior_mean(schedule: Schedule, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x0)."""
    towards_start = _look_up(schedule, "posterior_mean_coef1", t, x_t) * x_start
    return towards_start + _look_up(schedule, "posterior_mean_coef2", t, x_t) * x_t


def _look_up(schedule: Schedule, name: str, t: Tensor, like: Tensor) -> Tensor:
    """A table's entries at t in float32, expanded to the shape of `like`."""
    entries = _table(schedule, name, t.device)[t]
    return entries.view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


# By schedule, the tables used, by name and device: each is copied once.
_tables: WeakKeyDictionary[Schedule, dict[tuple[str, torch.device], Tensor]] = WeakKeyDictionary()

_DERIVED: dict[str, Callable[[Schedule], NDArray[np.float64]]] = {
    "variance": lambda schedule: 1.0 - schedule.alphas_cumprod,
    "log_betas": lambda schedule: np.log(schedule.betas),
    "log_fixed_large_variance": lambda schedule: np.log(schedule.fixed_large_variance),
    "recip_coef1": lambda schedule: 1.0 / schedule.posterior_mean_coef1,
    "coef2_by_coef1": lambda schedule: schedule.posterior_mean_coef2 / schedule.posterior_mean_coef1,
}


def _table(schedule: Schedule, name: str, device: torch.device) -> Tensor:
    """float32 [T] on a device: an attribute of the schedule, or one derived from these."""
    tables = _tables.setdefault(schedule, {})
    if (name, device) not in tables:
        values = _DERIVED[name](schedule) if name in _DERIVED else getattr(schedule, name)
        tables[name, device] = torch.as_tensor(values, dtype=torch.float32, device=device)
    return tables[name, device]
