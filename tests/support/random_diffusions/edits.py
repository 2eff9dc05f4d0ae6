"""Terms that a step's values are changed by, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLACES = ("x", "output", "x0", "mean", "log_variance", "sample", "pred_xstart")


def _clamped(value: Tensor, x: Tensor, t: Tensor, n: int) -> Tensor:
    limit = (0.5, 2.0, 4.0, 8.0)[n % 4]
    return value.clamp(-limit, limit)


def _along(value: Tensor, dim: int) -> Tensor:
    shape = [1] * value.ndim
    shape[dim] = value.shape[dim]
    return torch.arange(value.shape[dim], dtype=value.dtype).reshape(shape)


def _like(x: Tensor, value: Tensor) -> Tensor:
    return x if x.shape == value.shape else torch.cat([x] * (value.shape[1] // x.shape[1]), 1)


TERMS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "scaled": lambda value, x, t, n: value * (1 + 0.02 * (n + 1)),
    "shifted": lambda value, x, t, n: value + 0.05 * (n + 1),
    "squared": lambda value, x, t, n: value + 0.02 * value**2,
    "saturated": lambda value, x, t, n: 3 * torch.tanh(value / 3),
    "clamped": _clamped,
    "bent": lambda value, x, t, n: torch.where(value > 2, 2 + 0.1 * (value - 2), value),
    "x": lambda value, x, t, n: value + 0.05 * _like(x, value),
    "t": lambda value, x, t, n: value + 0.01 * t.reshape(-1, *[1] * (x.ndim - 1)),
    "batch's mean": lambda value, x, t, n: value - 0.1 * value.mean(0, keepdim=True),
    "first sample": lambda value, x, t, n: value + 0.1 * value[:1],
    "neighbours": lambda value, x, t, n: value + 0.05 * value.roll(1, -1),
    "channels": lambda value, x, t, n: value * (1 + 0.02 * _along(value, 1)),
    "samples": lambda value, x, t, n: value * (1 + 0.02 * _along(value, 0)),
    "largest": lambda value, x, t, n: value / value.abs().max().clamp(min=2.0) * 2,
    "deviation": lambda value, x, t, n: value / value.std(unbiased=False).clamp(min=0.5),
    "quantile": lambda value, x, t, n: value / torch.quantile(value.abs().float(), 0.9).clamp(min=1.0),
    "in place": lambda value, x, t, n: value.mul_(0.97) if value.is_contiguous() else value * 0.97,
    "in place, a part": lambda value, x, t, n: _part(value),
    "half": lambda value, x, t, n: value.to(torch.bfloat16).to(value.dtype),
    "double": lambda value, x, t, n: value.double(),
    "noise": lambda value, x, t, n: value + 0.05 * torch.randn_like(value),
    "one noise": lambda value, x, t, n: value + 0.05 * torch.randn(1).to(value.dtype),
    "item": lambda value, x, t, n: value * (1 + 0.01 * float(value.reshape(-1)[0].clamp(-1, 1))),
    "nothing": lambda value, x, t, n: value,
    "clone": lambda value, x, t, n: value.clone(),
    "transposed": lambda value, x, t, n: value.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def _part(value: Tensor) -> Tensor:
    value = value.clone() if not value.is_contiguous() else value
    value[:, 0] = value[:, 0] * 0.9
    return value


def _count(owner: Any, name: str) -> int:
    vars(owner)[name] = vars(owner).get(name, 0) + 1
    return vars(owner)[name]


@dataclass
class Moment:
    """A step: what is known in it."""

    owner: Any
    model: Any
    x: Tensor
    t: Tensor
    clip: bool
    kwargs: dict[str, Any]


def _went_up(m: Moment) -> bool:
    before, m.owner.last_t = vars(m.owner).get("last_t"), int(m.t[0])
    return before is not None and before < m.owner.last_t


WHENS: dict[str, Callable[[Moment, int], Any]] = {
    "always": lambda m, n: True,
    "at": lambda m, n: bool(m.t[0] == n),
    "below": lambda m, n: bool(m.t[0] < 1 + n % 4),
    "above": lambda m, n: bool(m.t[0] > n % 4),
    "each at": lambda m, n: m.t == n,
    "each below": lambda m, n: m.t < 1 + n % 4,
    "clip": lambda m, n: m.clip,
    "no clip": lambda m, n: not m.clip,
    "key": lambda m, n: "extra" in m.kwargs,
    "value": lambda m, n: m.kwargs.get("s", 0) > 1,
    "label": lambda m, n: "y" in m.kwargs and bool(m.kwargs["y"][0] > 0),
    "large": lambda m, n: bool(m.x.abs().max() > 2.5),
    "small": lambda m, n: float(m.x.std()) < 0.8,
    "many": lambda m, n: len(m.x) > 2,
    "wide": lambda m, n: m.x.shape[-1] > 4,
    "float64": lambda m, n: m.x.dtype == torch.float64,
    "gradients": lambda m, n: torch.is_grad_enabled(),
    "training": lambda m, n: bool(getattr(m.model, "training", False)),
    "every third": lambda m, n: _count(m.owner, "thirds") % 3 == 0,
    "from the 8th": lambda m, n: _count(m.owner, "eighths") > 7,
    "once": lambda m, n: _count(m.owner, "once") == 1 + n,
    "begun again": lambda m, n: _went_up(m),
}


@dataclass(frozen=True)
class Edit:
    """A change of a value of a step, with a number that varies it."""

    place: str
    term: str
    when: str
    n: int

    def __call__(self, kind: type) -> type:
        def changed(value: Tensor, moment: Moment) -> Tensor:
            chosen = WHENS[self.when](moment, self.n)
            if chosen is False:
                return value
            result = TERMS[self.term](value, moment.x, moment.t, self.n)
            if chosen is True:
                return result
            return torch.where(chosen.reshape(-1, *[1] * (value.ndim - 1)), result, value)

        place = self.place

        def p_mean_variance(
            self: Any,
            model: Any,
            x: Tensor,
            t: Tensor,
            clip_denoised: bool = True,
            denoised_fn: Any = None,
            model_kwargs: Any = None,
        ) -> Any:
            moment = Moment(self, model, x, t, clip_denoised, model_kwargs or {})
            if place == "x":
                x = changed(x, moment)

            def wrapped(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
                return changed(model(x, t, **kwargs), moment)

            def denoised(x0: Tensor) -> Tensor:
                return changed(x0 if denoised_fn is None else denoised_fn(x0), moment)

            out = kind.p_mean_variance(  # type: ignore[attr-defined]
                self,
                wrapped if place == "output" else model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised if place == "x0" else denoised_fn,
                model_kwargs=model_kwargs,
            )
            if place in ("mean", "log_variance"):
                out[place] = changed(out[place], moment)
            return out

        def stepped(name: str) -> Any:
            def step(self: Any, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
                clip = args[0] if args else kwargs.get("clip_denoised", True)
                moment = Moment(self, model, x, t, clip, kwargs.get("model_kwargs") or {})
                out = getattr(kind, name)(self, model, x, t, *args, **kwargs)
                out[place] = changed(out[place], moment)
                return out

            return step

        if place in ("sample", "pred_xstart"):
            return extended(kind, p_sample=stepped("p_sample"), ddim_sample=stepped("ddim_sample"))
        return extended(kind, p_mean_variance=p_mean_variance)


def extended(kind: type, **methods: Any) -> type:
    """A subclass with some methods."""
    return type(kind.__name__, (kind,), methods)
