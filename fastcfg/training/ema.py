"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages weights over the steps of training; the averaged model samples better than the last one.

    After update ``n`` (counted from 0) the average moves by ``average = d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + n) / (10 + n))``: early on it follows fast, so that the random start is soon forgotten.

    Args:
        model: the model whose parameters are averaged; they start the average.
        decay: the decay approached, in [0, 1).

    Attributes:
        shadow: the average by parameter name, float32.
        updates: how many updates were made.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected 0 <= decay < 1")
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights.

        Args:
            model: the model given at the start.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(model.named_parameters())
        targets = [parameters[name].detach().float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), targets, 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def reset(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Start the average of some parameters anew from their present values.

        Args:
            parameters: their names and themselves.
        """
        for name, parameter in parameters:
            self.shadow[name].copy_(parameter)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model's parameters by the average.

        Args:
            model: a model with the same parameters.
        """
        for name, parameter in model.named_parameters():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What ``load_state_dict`` takes: the average and the number of updates."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved average.

        Args:
            state: from ``state_dict``.
        """
        self.updates = state["updates"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])
