"""Classifier-free guidance the way GLIDE's notebooks write it: a function on a doubled batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class ClassifierFree:
    """GLIDE's `model_fn`: guides a model on a batch whose halves are the conditional and the unconditional samples.

    Called, it does what the notebook's function does: both halves get the first half's x, the first C output channels
    are blended as uncond + s (cond - uncond), and all 2B rows come back. The loops of `fastcfg.frontends` recognise it:
    they keep B samples and run model, blend and step as one program, with the same first half.

    Args:
        model: called as model(x [2B, C, ...], t [2B], **conditioning), the conditional half first.
        guidance_scale: s.

    Raises:
        TypeError: a model that is not callable.
        ValueError: a scale that is not finite.

    Example:
        >>> model_fn = ClassifierFree(lambda x, t, y: x * y.view(-1, 1, 1, 1), 3.0)
        >>> model_fn(torch.ones(2, 3, 4, 4), torch.zeros(2), y=torch.tensor([1.0, 0.0]))[0, 0, 0, 0]
        tensor(3.)
    """

    def __init__(self, model: Callable[..., Any], guidance_scale: float) -> None:
        if not callable(model):
            raise TypeError(f"model: got {type(model).__name__}, expected a callable")
        if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale!r}, expected a finite number")
        self.model = model
        self.guidance_scale = guidance_scale

    def __call__(self, x_t: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        """Args: x_t: [2B, C, ...]; ts: [2B]; **kwargs: for the model. Returns [2B, C or 2C, ...].

        Raises:
            ValueError: an odd batch.
        """
        if len(x_t) % 2:
            raise ValueError(f"x_t: got a batch of {len(x_t)}, expected an even one: [conditional; unconditional]")
        half = x_t[: len(x_t) // 2]
        output = self.model(torch.cat([half, half]), ts, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        channels = x_t.shape[1]
        cond, uncond = output[:, :channels].chunk(2)
        blended = uncond + self.guidance_scale * (cond - uncond)
        return torch.cat([torch.cat([blended, blended]), output[:, channels:]], dim=1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model, if it has any: the originals' loops look there for the device."""
        return self.model.parameters() if isinstance(self.model, nn.Module) else iter(())
