"""Brownian noise: the normals of a run are the increments of one path W(σ) of the noise level, drawn from Philox.

The noise of a step from σ to σ' is (W(σ) - W(σ')) / √(σ - σ'). It is a pure function of seed and interval: the noise of
an interval is made of the noises of its parts, so that a run of more steps follows the same path, and solvers of an SDE
give the same picture (Brownian trees: Kidger et al. 2021, https://arxiv.org/abs/2105.13493; the series is Lévy's).

The path is a sum of hat functions, each times a normal of its own: every octave [2^j, 2^(j+1)) of σ has one for its
whole increment, and one for each of its halves, quarters, ... down to 2^-16 of it, between which levels are rounded.
Only the hats that have one of the interval's ends below them count, about thirty, and their heights are known on the
host. So a row's noise is a sum of normals with given factors, whose squares sum to 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from ..table import NO_NOISE, StepTable
from ._fma import fma
from .philox import BROWNIAN_STREAM, philox_normal

__all__ = ["brownian_normal", "brownian_terms", "interval_terms"]

# Halvings of an octave. Steps are longer than 2^-16 of their level.
DEPTH = 16
# Levels below 2^-24 are one octave down to 0, and none is above 2^24.
_LOWEST, _HIGHEST = -24, 24


@lru_cache(maxsize=16)
def brownian_terms(table: StepTable) -> tuple[NDArray[np.int64], NDArray[np.float32], list[int]]:
    """What the noise of each row of a table is made of: the nodes of the path [R, K] and their factors [R, K], padded
    with zeros, and how many of them count in each row.

    Raises:
        ValueError: a table whose levels are not known, or a row that adds noise in a step in which they do not fall, or
            fall by less than 2^-16 of the level, or in a step with another such row.
    """
    found: list[dict[int, float]] = []
    for row, (high, low) in enumerate(_intervals(table)):
        terms = {} if high == low else interval_terms(low, high)
        if high != low and not terms:
            raise _unfit(table, f"row {row} adds noise from level {high:g} to {low:g}")
        found.append(terms)
    width = max(map(len, found), default=0)
    nodes, factors = np.zeros((len(found), max(width, 1)), np.int64), np.zeros((len(found), max(width, 1)), np.float32)
    for row, terms in enumerate(found):
        nodes[row, : len(terms)], factors[row, : len(terms)] = list(terms), list(terms.values())
    return nodes, factors, [len(terms) for terms in found]


def interval_terms(low: float, high: float) -> dict[int, float]:
    """Factors of (W(high) - W(low)) / √(high - low) by node, for 0 <= low < high; none if both round to one level."""
    (first, start), (last, end) = _position(low), _position(high)
    terms = _hats(last, end)
    for octave in range(first, last):
        node, height = _whole(octave)
        terms[node] = height
    for node, height in _hats(first, start).items():
        terms[node] = terms.get(node, 0.0) - height
    length = math.sqrt(sum(height**2 for height in terms.values()))
    return {node: height / length for node, height in sorted(terms.items()) if abs(height) > 1e-12 * length}


def brownian_normal(
    seeds: torch.Tensor, nodes: torch.Tensor, factors: torch.Tensor, terms: int, out: torch.Tensor
) -> torch.Tensor:
    """Fill `out`, float32 [B, ...], with a row's noise: the sum of the first of its `nodes`, int64 [K], with their
    `factors`, float32 [K]. Seeds are int64 [B], one per sample."""
    out.zero_()
    for node, factor in zip(nodes[:terms], factors[:terms], strict=True):
        normals = philox_normal(seeds, out.shape[1:], row=node, stream=BROWNIAN_STREAM)
        out.copy_(fma(factor, normals, out))
    return out


def _intervals(table: StepTable) -> list[tuple[float, float]]:
    """The levels between which each row adds noise: those of its step. Equal where it adds none."""
    if table.levels is None or not (table.levels[:, 0] > 0).all():
        raise _unfit(table, "its noise levels are not known, or infinite")
    levels = (table.levels[:, 1] / table.levels[:, 0]).tolist()
    noisy = table["l_0"] > NO_NOISE if table.learned_variance else table["s"] > 0
    found = []
    for row, step in enumerate(table.steps):
        begin, end = np.searchsorted(table.steps, step), np.searchsorted(table.steps, step, side="right")
        if noisy[row] and (noisy[begin:end].sum() > 1 or not levels[end] < levels[begin] < 2.0**_HIGHEST):
            raise _unfit(table, f"row {row} adds noise in a step with another such row, or in which levels do not fall")
        found.append((levels[begin], levels[end]) if noisy[row] else (0.0, 0.0))
    return found


def _unfit(table: StepTable, reason: str) -> ValueError:
    expected = "one that adds noise between falling noise levels"
    return ValueError(f"noise_source: got 'brownian' with the table {table.name}, expected {expected}: {reason}")


def _position(level: float) -> tuple[int, int]:
    """The octave of a level, and how far up it is, in 2^-16 of the octave."""
    octave = max(math.frexp(level)[1] - 1, _LOWEST - 1) if level else _LOWEST - 1
    start, length = _bounds(octave)
    steps = round((level - start) / length * 2**DEPTH)
    return (octave, steps) if steps < 2**DEPTH else (octave + 1, 0)


def _bounds(octave: int) -> tuple[float, float]:
    """Where an octave begins, and its length."""
    return (0.0, 2.0**_LOWEST) if octave < _LOWEST else (2.0**octave, 2.0**octave)


def _whole(octave: int) -> tuple[int, float]:
    """The node of an octave's whole increment, and its height at the octave's end."""
    return (octave - _LOWEST + 1) << DEPTH, math.sqrt(_bounds(octave)[1])


def _hats(octave: int, steps: int) -> dict[int, float]:
    """Heights at a place in an octave, by node, of W there minus W at the octave's beginning."""
    whole, end = _whole(octave)
    found = {whole: end * steps / 2**DEPTH}
    for depth in range(DEPTH):
        half = 2 ** (DEPTH - depth - 1)
        cell, place = divmod(steps, 2 * half)
        if not place:
            break  # the end of a cell, below no smaller hat
        # A hat stands on its cell, with the standard deviation of a bridge's middle, √length / 2, at its top.
        found[whole + 2**depth + cell] = end * 2.0 ** (-depth / 2) / 2 * (1 - abs(place / half - 1))
    return {node: height for node, height in found.items() if height}
