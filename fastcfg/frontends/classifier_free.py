"""Classifier-free guidance as GLIDE's notebooks write it: a function of a doubled batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.conditioning import Shared
from ..utils.checks import check_count, check_finite

# Up to so many channels all are guided, in every project.
_PLAIN = 3


class ClassifierFree:
    """GLIDE's `model_fn`: guides a model on a batch [conditional; unconditional].

    A call does what the notebook's function does: both halves get the first half's x, the first C output channels are
    blended as uncond + s (cond - uncond), and all 2B samples are returned. The loops of `fastcfg.frontends` recognise
    the class: they keep B samples and run model, blend and step as one program, with the same first half.

    Args:
        model: called as model(x [2B, C, ...], t [2B], **conditioning), the conditional half first.
        guidance_scale: s.
        channels: how many of the state's C channels are guided, the first ones; the others are each half's own, as in
            DiT's and point-e's functions, which guide 3. None guides all of up to 3, and must be given for more:
            projects differ in what they do then.

    Raises:
        TypeError: the model is not callable.
        ValueError: the scale is not finite, or channels is not a positive integer.

    Example:
        >>> model_fn = ClassifierFree(lambda x, t, y: x * y.view(-1, 1, 1, 1), 3.0)
        >>> model_fn(torch.ones(2, 3, 4, 4), torch.zeros(2), y=torch.tensor([1.0, 0.0]))[0, 0, 0, 0]
        tensor(3.)
    """

    def __init__(self, model: Callable[..., Any], guidance_scale: float, channels: int | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model: got {type(model).__name__}, expected a callable")
        self.model = model
        self.guidance_scale = check_finite("guidance_scale", guidance_scale)
        self.channels = None if channels is None else check_count("channels", channels)

    def guided(self, channels: int) -> int:
        """How many of a state's channels are guided. ValueError where that is not said, or more than there are."""
        if self.channels is None and channels > _PLAIN:
            expected = f"the number that is guided: 3 as in DiT's forward_with_cfg, {channels} for all"
            raise ValueError(f"channels: got None for a state of {channels}, expected {expected}")
        return channels if self.channels is None else check_count("channels", self.channels, most=channels)

    def __call__(self, x_t: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        """x_t [2B, C, ...] at times ts [2B] to [2B, C or 2C, ...]. Raises ValueError for an odd batch, or as
        `guided`."""
        if len(x_t) % 2:
            raise ValueError(f"x_t: got a batch of {len(x_t)}, expected an even one: [conditional; unconditional]")
        half = x_t[: len(x_t) // 2]
        output = self.model(torch.cat([half, half]), ts, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        channels = self.guided(x_t.shape[1])
        cond, uncond = output[:, :channels].chunk(2)
        blended = uncond + self.guidance_scale * (cond - uncond)
        return torch.cat([torch.cat([blended, blended]), output[:, channels:]], dim=1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, if it has any: the originals' loops take the device from them."""
        return self.model.parameters() if isinstance(self.model, nn.Module) else iter(())


def split_by_branch(model_kwargs: Mapping[str, Any], batch: int, *, halves: bool) -> dict[str, dict[str, Any]]:
    """Keyword arguments of a model by branch of a `Sampler`: tensors of `batch` samples, which are [conditional;
    unconditional] with `halves`, and values all samples share."""
    cond: dict[str, Any] = {}
    uncond: dict[str, Any] = {}
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            cond[name], uncond[name] = value.chunk(2) if halves else (value, value)
        else:
            cond[name] = uncond[name] = Shared(value)
    return {"cond": cond, "uncond": uncond} if halves else {"cond": cond}
