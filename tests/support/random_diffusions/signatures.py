"""Loops with other arguments: each takes a class and a number, and gives a subclass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .edits import extended


def signature(kind: Any, n: int) -> type:
    """Other defaults, orders and arguments; `arrange` says how a call is made."""
    parent: Any = kind

    def unclipped(
        self: Any, model: Any, shape: Any, noise: Any = None, clip_denoised: bool = False, **more: Any
    ) -> Any:
        return parent.p_sample_loop(self, model, shape, noise=noise, clip_denoised=clip_denoised, **more)

    def swapped(self: Any, shape: Any, model: Any, **more: Any) -> Any:
        return parent.p_sample_loop(self, model, shape, **more)

    def warm(self: Any, model: Any, shape: Any, *, temp: float = 1.0, **more: Any) -> Any:
        return parent.p_sample_loop(self, model, shape, **more) * temp

    def told(self: Any, model: Any, shape: Any, callback: Any = None, **more: Any) -> Any:
        out = None
        for i, out in enumerate(self.p_sample_loop_progressive(model, shape, **more)):
            if callback is not None:
                callback(i, out["sample"])
        return out["sample"]  # type: ignore[index]

    def sized(self: Any, model: Any, batch: int, size: Any, **more: Any) -> Any:
        return parent.p_sample_loop(self, model, (batch, *size), **more)

    def named(self: Any, net: Any, shape: Any, clip: bool = True, cond: Any = None, **more: Any) -> Any:
        return parent.p_sample_loop(self, net, shape, clip_denoised=clip, model_kwargs=cond, **more)

    def no_clip(kwargs: Any, **more: Any) -> Any:
        return {name: value for name, value in kwargs.items() if name != "clip_denoised"} | more

    ways: tuple[tuple[Any, Any], ...] = (
        (unclipped, lambda model, args, kwargs: ((model, *args), no_clip(kwargs))),
        (swapped, lambda model, args, kwargs: ((*args, model), kwargs)),
        (warm, lambda model, args, kwargs: ((model, *args), {**kwargs, "temp": 0.5 if n % 2 else 1.0})),
        (told, lambda model, args, kwargs: ((model, *args), {**kwargs, "callback": _halving})),
        (sized, lambda model, args, kwargs: ((model, args[0][0], args[0][1:]), kwargs)),
        (named, lambda model, args, kwargs: ((), {"net": model, "shape": args[0], "device": "cpu", "clip": n % 2 > 0})),
    )
    method, arranged = ways[n // 2 % len(ways)]
    return extended(kind, p_sample_loop=method, arrange=staticmethod(arranged))


def _halving(i: int, x: Tensor) -> None:
    if i == 2:
        x.mul_(0.5)
