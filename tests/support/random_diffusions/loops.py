"""Loops changed in their own ways: each takes a class and a number, and gives a subclass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .edits import extended
from .signatures import signature

Hook = Callable[..., Any]


def _own(
    kind: Any,
    begin: Hook = lambda self, x: x,
    indices: Hook = lambda steps: list(range(steps))[::-1],
    times: Hook = lambda i, batch: torch.tensor([i] * batch),
    between: Hook = lambda self, out, x, i, kwargs: None,
    step: Hook = lambda self, name, *args, **kwargs: getattr(self, name)(*args, **kwargs),
    stop: Hook = lambda out, i: False,
) -> type:
    """A class with loops of its own, changed in some places."""

    def progressive(name: str, **defaults: Any) -> Any:
        def loop(
            self: Any,
            model: Any,
            shape: Any,
            noise: Any = None,
            clip_denoised: bool = True,
            denoised_fn: Any = None,
            cond_fn: Any = None,
            model_kwargs: Any = None,
            device: Any = None,
            progress: bool = False,
            **more: Any,
        ) -> Iterator[Any]:
            x = torch.randn(*shape, device=device) if noise is None else noise
            x = begin(self, x)
            for i in indices(self.num_timesteps):
                with torch.no_grad():
                    options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
                    out = step(
                        self,
                        name,
                        model,
                        x,
                        times(i, shape[0]),
                        **options,
                        model_kwargs=model_kwargs,
                        **defaults,
                        **more,
                    )
                    between(self, out, x, i, model_kwargs or {})
                    yield out
                    x = out["sample"]
                if stop(out, i):
                    break

        return loop

    def final(name: str) -> Any:
        def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
            *_, out = getattr(self, f"{name}_progressive")(*args, **kwargs)
            return out["sample"]

        return loop

    names = {"p_sample_loop": "p_sample", "ddim_sample_loop": "ddim_sample"}
    methods = {f"{loop}_progressive": progressive(step) for loop, step in names.items()}
    return extended(kind, **methods, **{loop: final(loop) for loop in names})


def _seeded(seed: int, x: Any) -> Any:
    torch.manual_seed(seed)
    return x


BEGINNINGS: tuple[Hook, ...] = (
    lambda self, x: x * 0.8,
    lambda self, x: x.clamp(-1.5, 1.5),
    lambda self, x: x + 0.1 * torch.randn_like(x),
    lambda self, x: x.clone(),
    lambda self, x: (torch.rand(1), x)[1],
    lambda self, x: x.double(),
    lambda self, x: x.mul_(0.9),
    lambda self, x: x.flip(0),
    lambda self, x: torch.randn_like(x),
    lambda self, x: _seeded(5, x),
    lambda self, x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    lambda self, x: x.to(torch.bfloat16),
    lambda self, x: self.q_sample(torch.ones_like(x), torch.full((len(x),), self.num_timesteps - 1), x),
    lambda self, x: x - x.mean(0, keepdim=True),
)


def beginning(kind: Any, n: int) -> type:
    return _own(kind, begin=BEGINNINGS[n % len(BEGINNINGS)])


def indices(kind: Any, n: int) -> type:
    chosen = (
        lambda steps: list(range(steps))[::-1][1:],
        lambda steps: list(range(steps))[::-2],
        lambda steps: list(range(steps)),
        lambda steps: [steps - 1, *list(range(steps))[::-1]],
        lambda steps: list(range(1, steps))[::-1],
        lambda steps: [*list(range(steps))[::-1], 0],
        lambda steps: [steps - 1, steps - 2, steps - 1, *list(range(steps - 1))[::-1]],
        lambda steps: [0],
    )[n % 8]
    return _own(kind, indices=chosen)


def times(kind: Any, n: int) -> type:
    chosen = (
        lambda i, batch: torch.tensor([max(i - 1, 0)] + [i] * (batch - 1)),
        lambda i, batch: torch.tensor([i] * (batch - 1) + [max(i - 1, 0)]),
        lambda i, batch: torch.tensor([i]).expand(batch),
        lambda i, batch: torch.full((batch,), i, dtype=torch.int32),
        lambda i, batch: torch.arange(batch) % (i + 1),
    )[n % 5]
    return _own(kind, times=chosen)


def _set(out: Any, value: Tensor) -> None:
    out["sample"] = value


def _write(out: Any, value: Tensor) -> None:
    out["sample"].copy_(value)


def _averaged(self: Any, out: Any) -> None:
    past = getattr(self, "averaged", None)
    if past is not None and past.shape == out["sample"].shape:
        out["sample"] = 0.9 * out["sample"] + 0.1 * past
    self.averaged = out["sample"]


def _renoised(self: Any, out: Any, i: int) -> Tensor:
    noised: Tensor = self.q_sample(out["pred_xstart"], torch.full((len(out["sample"]),), i))
    return noised


def _second(out: Any) -> Tensor:
    sample = out["sample"]
    index = torch.arange(len(sample)).reshape(-1, *[1] * (sample.ndim - 1))
    return torch.where(index == 1, sample * 0.9, sample)


def _halved(out: Any) -> None:
    if float(out["sample"].abs().max()) > 2:
        out["sample"] = out["sample"] * 0.5


BETWEEN: tuple[Hook, ...] = (
    lambda self, out, x, i, kwargs: _set(out, out["sample"] * 0.98),
    lambda self, out, x, i, kwargs: _set(out, out["sample"].clamp(-1.5, 1.5)),
    lambda self, out, x, i, kwargs: _set(out, out["sample"] + 0.3) if i == 2 else None,
    lambda self, out, x, i, kwargs: _set(out, 0.9 * out["sample"] + 0.1 * x),
    lambda self, out, x, i, kwargs: out["sample"].mul_(0.97),
    lambda self, out, x, i, kwargs: torch.randn(1),
    lambda self, out, x, i, kwargs: torch.randn(2) if i == 1 else None,
    lambda self, out, x, i, kwargs: torch.manual_seed(i),
    lambda self, out, x, i, kwargs: _averaged(self, out),
    lambda self, out, x, i, kwargs: _set(out, out["sample"] * 0.9) if kwargs.get("s", 0) > 1 else None,
    lambda self, out, x, i, kwargs: _set(out, out["sample"] * 0.9) if "extra" in kwargs else None,
    lambda self, out, x, i, kwargs: _halved(out),
    lambda self, out, x, i, kwargs: _set(out, _renoised(self, out, i)) if i else None,
    lambda self, out, x, i, kwargs: _write(out, out["sample"] + 0.1) if i == 1 else None,
    lambda self, out, x, i, kwargs: out.update(t=i, before=x),
    lambda self, out, x, i, kwargs: out["pred_xstart"].add_(0.1),
    lambda self, out, x, i, kwargs: kwargs.update(y=kwargs["y"] * 0.9) if "y" in kwargs else None,
    lambda self, out, x, i, kwargs: _set(out, out["sample"].contiguous(memory_format=torch.channels_last)),
    lambda self, out, x, i, kwargs: setattr(self, "seen", getattr(self, "seen", 0) + 1),
    lambda self, out, x, i, kwargs: _set(out, _second(out)),
    lambda self, out, x, i, kwargs: setattr(self, "model_var_type", type(self.model_var_type)(i % 2 + 1)),
)  # fmt: skip


def between(kind: Any, n: int) -> type:
    return _own(kind, between=BETWEEN[n % len(BETWEEN)])


def step_calls(kind: Any, n: int) -> type:
    """Steps called in other ways, or others in their place."""

    def by_position(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        return getattr(self, name)(model, x, t, *options.values())

    def twice(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        out = getattr(self, name)(model, x, t, **options)
        return getattr(self, name)(model, out["sample"], t, **options)

    def mixed(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        name = "ddim_sample" if t[0] < 2 else name
        if name == "p_sample":
            options.pop("eta", None)
        return getattr(self, name)(model, x, t, **options)

    def inline(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        given = {key: options[key] for key in ("clip_denoised", "denoised_fn", "model_kwargs")}
        out = self.p_mean_variance(model, x, t, **given)
        return {"sample": out["mean"] + 0.1 * torch.randn_like(x), "pred_xstart": out["pred_xstart"]}

    def of_the_class(self: Any, name: str, *args: Any, **options: Any) -> Any:
        return getattr(kind, name)(self, *args, **options)

    def bound(self: Any, name: str, model: Any, *args: Any, **options: Any) -> Any:
        return functools.partial(getattr(self, name), model)(*args, **options)

    def other_options(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        options["clip_denoised"] = bool(t[0] < 3)
        return getattr(self, name)(model, x, t, **options)

    def other_models(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        def scaled(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            return 0.9 * model(x, t, **kwargs)

        return getattr(self, name)(scaled if t[0] < 3 else model, x, t, **options)

    def half(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        outs = [getattr(self, name)(model, x[part], t[part], **options) for part in (slice(0, 1), slice(1, None))]
        return {key: torch.cat([out[key] for out in outs]) for key in ("sample", "pred_xstart")}

    def guided(self: Any, name: str, model: Any, x: Tensor, t: Tensor, **options: Any) -> Any:
        kwargs = dict(options.pop("model_kwargs") or {})
        kwargs.pop("s", None)
        return getattr(self, name)(model, x, t, model_kwargs=kwargs, **options)

    ways = (by_position, twice, mixed, inline, of_the_class, bound, other_options, other_models, half, guided)
    return _own(kind, step=ways[n % len(ways)])


def stopping(kind: Any, n: int) -> type:
    stops = (
        lambda out, i: i == 1,
        lambda out, i: float(out["sample"].abs().mean()) < 0.6,
        lambda out, i: bool((out["pred_xstart"].abs() < 1).all()),
    )
    return _own(kind, stop=stops[n % 3])


def ending(kind: Any, n: int) -> type:
    """What becomes of the samples at the end."""
    ended = (
        lambda x: (x + 1) / 2,
        lambda x: x.clamp_(-0.5, 0.5),
        lambda x: (x, x.mean()),
        lambda x: {"samples": x, "count": len(x)},
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: list(x),
        lambda x: x + 0.1 * torch.randn_like(x),
    )[n % 8]

    def loop(name: str) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            return ended(getattr(kind, name)(self, *args, **kwargs))

        return run

    return extended(kind, p_sample_loop=loop("p_sample_loop"), ddim_sample_loop=loop("ddim_sample_loop"))


LOOPS = (beginning, indices, times, between, step_calls, stopping, ending, signature)
