"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """The average of a model's weights over the steps of training, which samples better than the last weights.

    Update `n` (counted from 0) makes `average = d * average + (1 - d) * weights` with `d = min(decay, (1 + n) / (10 +
    n))`: the small early `d` soon forgets the random start. (`torch.optim.swa_utils.AveragedModel` begins with a copy
    after the first update instead, and deep-copies the model with its hooks.)

    The parameters of `model` start the average; `decay` is in [0, 1), or ValueError. `shadow` is the average by
    parameter name, float32, and `updates` the number of updates made.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected 0 <= decay < 1")
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone().float() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(model.named_parameters())
        targets = [parameters[name].detach().float() for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), targets, 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def reset(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Restart the average of the named parameters from their present values."""
        for name, parameter in parameters:
            self.shadow[name].copy_(parameter)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """The average and the number of updates."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.updates = state["updates"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])
