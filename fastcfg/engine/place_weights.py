"""Blend weights that differ within a sample, as tensors that the step reads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..guidance.places import PlaceWeights


def empty_place_weights(x: Tensor, by: str, values: NDArray[np.float64]) -> Tensor:
    """Memory like the state x [B, C, ...] for values [1 or R, N, K]: by "channel" [1 or R, B, K, C], by "element" [1 or
    R, B, K, C, ...]."""
    places = x.shape[1:2] if by == "channel" else x.shape[1:]
    return x.new_zeros((len(values), len(x), values.shape[2], *places))


def write_place_weights(weights: Tensor, places: PlaceWeights, values: NDArray[np.float64]) -> None:
    """Fill memory from `empty_place_weights`, row by row: on the device, from the values that occur."""
    index = torch.from_numpy(places.index).to(weights.device)
    index = index.reshape(index.shape[: weights.ndim - 2]).expand(weights.shape[1], *weights.shape[3:])
    for row, found in zip(weights, torch.from_numpy(values).to(weights.device, weights.dtype), strict=True):
        for k in range(weights.shape[2]):
            row[:, k].copy_(found[:, k][index])
