"""Steps that ask the model in other ways: at other times, more often, of other samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .edits import extended


def times(kind: Any, n: int) -> type:
    """Other times for the model."""
    turned = (
        lambda t: t.float() * 0.5,
        lambda t: (t + 1) % 24,
        lambda t: 23 - t,
        lambda t: t.to(torch.int32),
        lambda t: t.float(),
        lambda t: t[:1].expand(len(t)),
        lambda t: t.double() * 3,
        lambda t: t.clamp(min=2),
    )[n % 8]

    def p_mean_variance(self: Any, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrapped = self._wrap_model(model) if hasattr(self, "_wrap_model") else model
        return kind.p_mean_variance(
            self, Unwrapped(lambda x, t, **more: wrapped(x, turned(t), **more)), x, t, *args, **kwargs
        )

    return extended(kind, p_mean_variance=p_mean_variance, _wrap_model=_wrap_once(kind))


class Unwrapped:
    """A model that is not wrapped again."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _wrap_once(kind: Any) -> Any:
    def _wrap_model(self: Any, model: Any) -> Any:
        wrap = getattr(kind, "_wrap_model", None)
        return model if wrap is None or isinstance(model, Unwrapped) else wrap(self, model)

    return _wrap_model


def scaled_times(kind: Any, n: int) -> type:
    return extended(kind, _scale_timesteps=lambda self, t: (t.float() * 1.5, t + 0, t // 2)[n % 3])


def model_calls(kind: Any, n: int) -> type:
    """The model called in other ways."""

    def twice(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return (model(x, t, **kwargs) + model(x.flip(-1), t, **kwargs).flip(-1)) / 2

    def without(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        cond = model(x, t, **kwargs)
        if "y" not in kwargs:
            return cond
        uncond = model(x, t, **{**kwargs, "y": torch.zeros_like(kwargs["y"])})
        return uncond + 2.0 * (cond - uncond)

    def by_sample(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        split = [{name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in kwargs.items()}
                 for i in range(len(x))]  # fmt: skip
        return torch.cat([model(x[i : i + 1], t[i : i + 1], **split[i]) for i in range(len(x))])

    def consuming(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        if "y" in kwargs:
            kwargs["y"].mul_(0.9)
        return model(x, t, **kwargs)

    def with_grad(model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = model(x, t, **kwargs)
            return (output + 0.01 * _doubled(torch.autograd.grad(output.sum(), x)[0], output)).detach()

    called = (
        twice,
        without,
        by_sample,
        consuming,
        with_grad,
        lambda model, x, t, **kwargs: model(x * 0.9, t, **kwargs),
        lambda model, x, t, **kwargs: model(x.double(), t, **kwargs).float(),
        lambda model, x, t, **kwargs: model(x.to(torch.bfloat16), t, **kwargs).float(),
        lambda model, x, t, **kwargs: model(x, t),
        lambda model, x, t, **kwargs: model(x, t, **{**kwargs, "y": kwargs["y"] * 2} if "y" in kwargs else kwargs),
        lambda model, x, t, **kwargs: model(torch.cat([x, x]), torch.cat([t, t]))[: len(x)],
        lambda model, x, t, **kwargs: model(x.clamp(-2, 2), t, **kwargs),
        lambda model, x, t, **kwargs: model(x.clone(), t.clone(), **kwargs),
        lambda model, x, t, **kwargs: model(x + 0.01 * torch.randn_like(x), t, **kwargs),
        lambda model, x, t, **kwargs: model(x.contiguous(memory_format=torch.channels_last), t, **kwargs),
    )[n % 15]

    def p_mean_variance(self: Any, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind.p_mean_variance(self, lambda *a, **k: called(model, *a, **k), x, t, *args, **kwargs)

    return extended(kind, p_mean_variance=p_mean_variance)


def _doubled(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape == like.shape else torch.cat([x, x], 1)
