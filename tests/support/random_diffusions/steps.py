"""Steps, tables and time mappings changed in their own ways: each takes a class and a number, and gives a subclass."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.families.base import GaussianDiffusion
from support.families.process import extract

from .edits import extended
from .models import model_calls, scaled_times, times

TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


def _made(kind: Any, edit: Any) -> type:
    """A class whose objects are edited when they are made."""

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        edit(self)

    return extended(kind, __init__=made)


def table_entry(kind: Any, n: int) -> type:
    def edit(self: Any) -> None:
        getattr(self, TABLES[n % len(TABLES)])[n % self.num_timesteps] *= 1.07

    return _made(kind, edit)


def table_scaled(kind: Any, n: int) -> type:
    return _made(
        kind, lambda self: setattr(self, TABLES[n % len(TABLES)], getattr(self, TABLES[n % len(TABLES)]) * 1.02)
    )


def tables_of_another_type(kind: Any, n: int) -> type:
    turned = (np.float32, torch.from_numpy, lambda table: [float(one) for one in table], np.asfortranarray)[n % 4]
    return _made(kind, lambda self: [setattr(self, name, turned(np.asarray(getattr(self, name)))) for name in TABLES])


def table_computed(kind: Any, n: int) -> type:
    """A table that is a property, of what was last called."""

    def read(self: Any) -> Any:
        return self.kept * (1 + 0.05 * (n % 2))

    def write(self: Any, value: Any) -> None:
        self.kept = value

    return extended(kind, posterior_mean_coef1=property(read, write))


NOISES: tuple[Any, ...] = (
    lambda x, own: torch.randn_like(x) * 0.9,
    lambda x, own: (torch.randn_like(x), torch.randn_like(x))[1],
    lambda x, own: torch.randn_like(x[:1]).expand_as(x),
    lambda x, own: torch.randn(x.shape),
    lambda x, own: torch.randn(x.shape, generator=own),
    lambda x, own: torch.randn(x.shape, dtype=torch.float64).to(x.dtype),
    lambda x, own: torch.empty_like(x).normal_(0, 1.1),
    lambda x, own: 2 * torch.rand_like(x) - 1,
    lambda x, own: torch.stack([torch.randn_like(one) for one in x]),
    lambda x, own: torch.from_numpy(np.random.standard_normal(x.shape)).to(x.dtype),  # noqa: NPY002
    lambda x, own: torch.randn_like(x).clamp(-2, 2),
    lambda x, own: torch.randn_like(x) * random.random(),
    lambda x, own: torch.randn_like(x.transpose(-1, -2)).transpose(-1, -2),
    lambda x, own: (torch.randn_like(x) + torch.randn_like(x)) / 2**0.5,
    lambda x, own: torch.randn_like(x[:, :1]).expand_as(x),
    lambda x, own: torch.randn_like(x) * (torch.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) + 1) / 2,
)


def noise(kind: Any, n: int) -> type:
    """Noise of another kind, drawn before the model, after it, or but for the last step."""
    draw, order = NOISES[n % len(NOISES)], n // len(NOISES) % 3

    def p_sample(self: Any, model: Any, x: Tensor, t: Tensor, clip_denoised: bool = True, denoised_fn: Any = None,
                 cond_fn: Any = None, model_kwargs: Any = None) -> Any:  # fmt: skip
        own = vars(self).setdefault("own", torch.Generator().manual_seed(3))
        noise = draw(x, own) if order == 1 else None
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = out["mean"]
        if order < 2 or t[0] > 0:
            noise = draw(x, own) if noise is None else noise
            sample = sample + self._not_last(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    return extended(kind, p_sample=p_sample)


def history(kind: Any, n: int) -> type:
    """Multi-step: what the step before found is used again; forgotten at the first step, or kept from call to call."""

    def stepped(name: str) -> Any:
        def step(self: Any, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if n % 2 and t[0] == self.num_timesteps - 1:
                self.past = None
            out = getattr(kind, name)(self, model, x, t, *args, **kwargs)
            past, now = getattr(self, "past", None), out["pred_xstart"]
            if past is not None and past.shape == now.shape:
                out["sample"] = out["sample"] + 0.1 * (now - past)
            self.past = now
            return out

        return step

    return extended(kind, p_sample=stepped("p_sample"), ddim_sample=stepped("ddim_sample"))


def counters(kind: Any, n: int) -> type:
    """A counter of the object, the class or the function that the step goes by."""
    counts = {"function": 0}

    def p_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = kind.p_sample(self, *args, **kwargs)
        if n % 3 == 0:
            self.count = getattr(self, "count", 0) + 1
            count = self.count
        elif n % 3 == 1:
            type(self).count = count = getattr(type(self), "count", 0) + 1
        else:
            counts["function"] += 1
            count = counts["function"]
        out["sample"] = out["sample"] * (1 + 0.01 * (count % 4))
        return out

    return extended(kind, p_sample=p_sample)


def results(kind: Any, n: int) -> type:
    """Results with more in them, or of other types."""

    def stepped(name: str) -> Any:
        def step(self: Any, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = getattr(kind, name)(self, model, x, t, *args, **kwargs)
            more = (
                {"t": t, "x": x},
                {"eps": out["sample"] - x},
                {"pred_xstart": out["sample"]},
                {"pred_xstart": None},
                {"sample": x.copy_(out["sample"]) if not x.requires_grad and x.is_contiguous() else out["sample"]},
                {"mean": out["sample"].mean()},
            )[n % 7] if n % 7 < 6 else {}  # fmt: skip
            out = {**out, **more}
            return _Out(out) if n % 7 == 6 else out

        return step

    return extended(kind, p_sample=stepped("p_sample"), ddim_sample=stepped("ddim_sample"))


class _Out(dict[str, Any]):
    """A dictionary with its items as attributes."""

    __getattr__ = dict.__getitem__


def conditioning(kind: Any, n: int) -> type:
    """Gradients applied in other ways."""

    def condition_mean(self: Any, cond_fn: Any, p: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Tensor:
        mean: Tensor = kind.condition_mean(self, cond_fn, p, x, t, model_kwargs)
        return (p["mean"], 2 * mean - p["mean"], mean.clamp(-3, 3), p["mean"] + 0.1 * (mean - p["mean"]))[n % 4]

    def condition_score(self: Any, cond_fn: Any, p: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Any:
        out = kind.condition_score(self, cond_fn, p, x, t, model_kwargs)
        return p if n % 2 else {**out, "pred_xstart": 0.9 * out["pred_xstart"]}

    return extended(kind, condition_mean=condition_mean, condition_score=condition_score)


def helpers(kind: Any, n: int) -> type:
    """One of the functions that steps are made of."""

    def posterior(self: Any, x_start: Tensor, x_t: Tensor, t: Tensor) -> Any:
        mean, *rest = kind.q_posterior_mean_variance(self, x_start, x_t, t)
        return mean * 1.03, *rest

    def velocity(self: Any, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        signal = extract(self.sqrt_alphas_cumprod, t, x_t.shape)
        return signal * x_t - extract(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * eps

    def from_eps(self: Any, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return 1.02 * kind._predict_xstart_from_eps(self, x_t, t, eps)

    def to_eps(self: Any, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return 0.97 * kind._predict_eps_from_xstart(self, x_t, t, pred_xstart)

    methods = (
        {"q_posterior_mean_variance": posterior},
        {"_predict_xstart_from_eps": from_eps},
        {"_predict_eps_from_xstart": to_eps},
        {"_predict_xstart_from_eps": velocity},
        {"_std": lambda self, out: out["variance"].sqrt()},
        {"_not_last": lambda self, t, x: (t > 1).float().view(-1, *[1] * (x.ndim - 1))},
        {"q_sample": lambda self, x_start, t, noise=None: kind.q_sample(self, x_start, t, noise) * 1.1},
    )[n % 7]
    return extended(kind, **methods)


def types(kind: Any, n: int) -> type:
    """Types spelled in other ways, or not there at all."""

    def spelled(value: Any) -> Any:
        return SimpleNamespace(name=value.name, value=value.value)

    def edit(self: Any) -> None:
        if n % 4 == 0:
            vars(self).pop("rescale_timesteps", None)
        elif n % 4 == 1:
            vars(self).pop("loss_type", None)
        elif n % 4 == 2:
            self.model_mean_type, self.model_var_type = spelled(self.model_mean_type), spelled(self.model_var_type)
        else:
            self.loss_type = "e2e_mse"

    return _made(kind, edit)


def gradients(kind: Any, n: int) -> type:
    """Steps with gradients off, on, or in inference mode."""
    context = (torch.no_grad, torch.enable_grad, torch.inference_mode)[n % 3]

    def p_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        with context():
            return kind.p_sample(self, *args, **kwargs)

    return extended(kind, p_sample=p_sample)


def the_base_class_s_step(kind: Any, n: int) -> type:
    """A step that goes around the class's own."""

    def p_sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (GaussianDiffusion if n % 2 else kind).p_sample(self, *args, **kwargs)

    return extended(kind, p_sample=p_sample)


STEPS: tuple[Any, ...] = (table_entry, table_scaled, tables_of_another_type, table_computed, noise)
STEPS += (
    times,
    scaled_times,
    model_calls,
    history,
    counters,
    results,
    conditioning,
    helpers,
    types,
    gradients,
    the_base_class_s_step,
)
