"""Functions that lay branches side by side and blend what their model returns: what the blend is, and a response in
terms of blends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .probe import Array

_EXACT = 1e-9

# Per model call, the weight of every branch.
Weights = tuple[tuple[float, ...], ...]


def blended(states: Array, branches: Sequence[int]) -> tuple[Array, Weights]:
    """States [rows, 1 + outputs + draws] with one output for each call, and the weights of its branches, whose sum is
    1.

    Raises:
        ValueError: a function uses a call's branches in more ways than one.
    """
    first, weights, columns = 1, list[tuple[float, ...]](), [states[:, :1]]
    for count in branches:
        outputs = states[:, first : first + count]
        first += count
        if count == 1:
            weights.append((1.0,))
            columns.append(outputs)
            continue
        blend = outputs.sum(axis=1)
        size = float(np.abs(outputs).max())
        if not size:
            shares = np.full(count, 1 / count)
        elif float(blend @ blend) < (1e-6 * size) ** 2:
            raise ValueError("sample_fn: got one that takes the difference of its branches alone, expected a blend")
        else:
            shares = outputs.T @ blend / (blend @ blend)
            if np.abs(outputs - np.outer(blend, shares)).max() > _EXACT * size:
                raise ValueError("sample_fn: got one that uses its branches in several ways, expected one blend")
        weights.append(tuple(shares.tolist()))
        columns.append(blend[:, None])
    return np.concatenate([*columns, states[:, first:]], axis=1), tuple(weights)


def mixed(outputs: Sequence[Sequence[Tensor]], blend: Sequence[Sequence[float]]) -> list[Tensor]:
    """The blends of the branches' outputs."""
    return [
        torch.stack([weight * output for weight, output in zip(weights, branches, strict=True)]).sum(0)
        if len(branches) > 1
        else branches[0]
        for branches, weights in zip(outputs, blend, strict=True)
    ]
