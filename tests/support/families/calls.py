"""What the calls of the families are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Mean, Var
from .beside import Call

IMAGE = (3, 4, 4)
LATENT = (4, 4, 4)
MOTION = (5, 1, 7)
VIDEO = (2, 4, 4, 4)
EPS, X0, PREVIOUS = Mean.EPSILON, Mean.START_X, Mean.PREVIOUS_X
SMALL, LARGE, RANGE, LEARNED = Var.FIXED_SMALL, Var.FIXED_LARGE, Var.LEARNED_RANGE, Var.LEARNED


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(batch: int) -> Tensor:
    return torch.linspace(-1, 1, batch)


def p(batch: int, size: Any = IMAGE, *args: Any, model: str = "", loop: str = "p_sample_loop", **kwargs: Any) -> Call:
    return Call(loop, ((batch, *size), *args), {"device": "cpu", **kwargs}, model)


ddim = partial(p, loop="ddim_sample_loop")


def label(batch: int) -> dict[str, Tensor]:
    return {"y": labels(batch)}
