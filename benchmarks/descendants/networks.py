"""Small random networks with the interfaces of the projects' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Network(torch.nn.Module):
    """Mixes channels and a hyperbolic tangent: output = W2 tanh(W1 x + time + conditions), by position.

    Args:
        channels: of what it is called with.
        outputs: of its result; None: as many.
        axis: where the channels are.
        output: what is made of the result: a dict, a tuple.
        size: about how large its results are.
        order: of its results' dimensions in memory, the outermost first; None: as they are.
        **attributes: what samplers read off the project's own network.
    """

    def __init__(
        self,
        channels: int,
        outputs: int | None = None,
        axis: int = 1,
        output: Callable[[Tensor], Any] = lambda y: y,
        size: float = 1.0,
        order: Sequence[int] | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(channels)
        first = torch.randn((channels, 16), generator=draw) / channels**0.5
        second = size * 0.4 * torch.randn((16, outputs or channels), generator=draw)
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)
        self.register_buffer("frequencies", torch.linspace(0.001, 0.02, 16))
        self.axis, self.output, self.order, self.calls = axis, output, order, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, t: Tensor, *conditions: Any, **named: Any) -> Any:
        """The result for x [B, ...] at the times t [B] or [B, 1]."""
        self.calls += 1
        batch, inner = len(x), [1] * (x.ndim - 2)
        time = torch.sin(t.reshape(batch, -1)[:, :1].to(x.dtype) * self.frequencies)
        time = (time + share((*conditions, named), batch).to(x)).reshape(batch, *inner, 16)
        y = torch.tanh(x.movedim(self.axis, -1) @ self.first + time) @ self.second
        y = y.movedim(-1, self.axis)
        if self.order is None:
            return self.output(y.contiguous())
        return self.output(y.permute(*self.order).contiguous().permute(*np.argsort(self.order).tolist()))


def share(condition: Any, batch: int) -> Tensor:
    """One number a sample [B, 1] of whatever a network is conditioned on: tensors, texts and flags, nested."""
    if isinstance(condition, Tensor):
        condition = condition.detach()
        if condition.ndim and len(condition) == batch:
            return 0.3 * condition.reshape(batch, -1).float().mean(1, keepdim=True)
        return 0.1 * condition.float().mean().reshape(1, 1)
    if isinstance(condition, Mapping):
        condition = [condition[name] for name in sorted(condition)]
    if isinstance(condition, list | tuple):
        if len(condition) == batch and all(isinstance(text, str) for text in condition):
            return torch.cat([share(text, 1) for text in condition])
        return sum((share(part, batch) for part in condition), torch.zeros(1, 1))
    if isinstance(condition, str):
        return torch.tensor([[sum(map(ord, condition)) % 97 / 97]])
    return torch.tensor([[0.1 * condition]]) if isinstance(condition, bool | int | float) else torch.zeros(1, 1)


def with_guidance(forward: Callable[..., Any], network: Network) -> Callable[..., Any]:
    """A project's own `forward_with_cfg` around a network that stands for its `self`."""
    return lambda *args, **kwargs: forward(network, *args, **kwargs)
