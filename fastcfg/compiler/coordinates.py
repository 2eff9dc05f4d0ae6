"""Short coordinates for a few rows of a long run.

A row depends on a few rows before it, and on the many outputs further back only through these. So in the equations of a
few rows all coordinates that are older than these rows can be replaced by a few random sums of them: what holds for
the sums holds for the coordinates, since a random sum of what is not zero is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..table import MAX_HISTORY
from .probe import Array, Response

REACH = 5  # rows that a saved tensor may lie back
TOLERANCE = 30  # of a fit, in roundings; measured: 12
HORIZON = 12  # later samples that show what must be saved
_ROWS = 64  # per window
_OLD = 64  # older coordinates that are kept as they are
_SUMS = 24  # random sums that stand for more
_GROWN = 1024.0  # states this many times the start are measured by their own size


@dataclass(frozen=True, eq=False)
class Window:
    """Rows of a run, whose vectors are written over short coordinates: older ones, then outputs, then draws.

    Attributes:
        first, last: the rows, without the last.
        start: the row that `states` begins with, and the first whose output and draws have coordinates.
        states: [rows, D], the samples before the rows from `start` on.
        weights: [C], the length of every row's output.
        old, outputs: the number of older coordinates and of outputs.
        drawn: [C + 1], the number of draws before every row, and in all.
    """

    first: int
    last: int
    start: int
    states: Array
    weights: Array
    old: int
    outputs: int
    drawn: tuple[int, ...]

    def state(self, row: int) -> Array:
        """The sample before the model call of a row."""
        found: Array = self.states[row - self.start]
        return found

    def output(self, row: int) -> int:
        """The coordinate of a row's output."""
        return self.old + row - self.start

    def draws(self, row: int) -> slice:
        """The coordinates of the draws of a row."""
        begin, end = self.drawn[row], self.drawn[row + 1]
        before = self.old + self.outputs - self.drawn[self.start]
        return slice(before + begin, before + end)

    def vector(self, row: int, pair: Array) -> Array:
        """A sum of a row's state and output."""
        vector = pair[0] * self.state(row)
        vector[self.output(row)] += pair[1] * self.weights[row]
        found: Array = vector
        return found


class Run:
    """A response whose outputs and draws are measured by the size of the model's input where that is large, so that a
    row's terms count in shares of the row's own values."""

    def __init__(self, response: Response) -> None:
        used = slice(1 + response.calls + response.drawn[-1])  # without draws that were not made
        predictions, converted = (
            None if vectors is None else vectors[:, used] for vectors in (response.predictions, response.converted)
        )
        states, inputs = response.states[:, used], response.inputs[:, used]
        response = replace(response, states=states, inputs=inputs, predictions=predictions, converted=converted)
        self.response, self.calls, self.rounding = response, response.calls, response.rounding
        self.weights = self._weights()
        self.states = response.states
        if (self.weights != 1).any():
            self.states = response.states * self._columns(self.weights)
        self.largest = np.abs(self.states).max(axis=1)

    def _columns(self, weights: Array) -> Array:
        """The weight of every coordinate."""
        counts = np.diff(self.response.drawn)
        return np.concatenate([[1.0], weights, np.repeat(weights, counts)])

    def _weights(self) -> Array:
        """Powers of two, 1 but for states that have grown a thousandfold."""
        response, weights = self.response, np.ones(self.calls)
        states, inputs = (np.abs(vectors).max(axis=1) for vectors in (response.states[:-1], response.inputs))
        scale = inputs / np.where(states == 0, 1.0, states)
        if (states * scale).max(initial=0.0) <= _GROWN:
            return weights
        columns = np.ones(response.states.shape[1])
        for i in range(self.calls):
            size = scale[i] * float((np.abs(response.states[i]) * columns).max()) / _GROWN
            weights[i] = 2.0 ** np.clip(np.round(np.log2(max(size, 1.0))), 0, 300)
            columns[1 + i] = weights[i]
            columns[slice(*(1 + self.calls + drawn for drawn in response.drawn[i : i + 2]))] = weights[i]
        return weights

    @cached_property
    def windows(self) -> list[Window]:
        """The rows, in windows that reach as far back and ahead as their equations."""
        return list(self._windows())

    def _windows(self) -> Iterator[Window]:
        response, drawn = self.response, self.response.drawn
        sums = np.random.default_rng(0).standard_normal((self.states.shape[1], _SUMS)) / np.sqrt(_SUMS)
        for first in range(0, self.calls, _ROWS):
            last = min(first + _ROWS, self.calls)
            start, end = max(0, first - REACH - 1), min(last + MAX_HISTORY + HORIZON, self.calls)
            draws = 1 + self.calls
            old = [*range(1 + start), *range(draws, draws + drawn[start])]
            new = [*range(1 + start, 1 + end), *range(draws + drawn[start], draws + drawn[end])]
            states = self.states[start : end + 1]
            older = states[:, old]
            if len(old) > _OLD:
                older = older @ sums[old]
            width, outputs = older.shape[1], end - start
            vectors = np.concatenate([older, states[:, new]], axis=1)
            yield Window(first, last, start, vectors, self.weights, width, outputs, response.drawn)

    @cached_property
    def alone(self) -> tuple[Array, Array]:
        """For every row the best a_x if nothing is saved, and the largest error that it leaves in the next state."""
        rows, drawn = np.arange(self.calls), self.response.drawn
        states, targets = self.states[:-1], self.states[1:].copy()
        targets[rows, 1 + rows] = 0.0
        for i in rows:
            targets[i, 1 + self.calls + drawn[i] : 1 + self.calls + drawn[i + 1]] = 0.0
        a_x = (targets * states).sum(axis=1) / np.maximum((states * states).sum(axis=1), 1e-300)
        return a_x, np.abs(targets - a_x[:, None] * states).max(axis=1)

    def pairs(self, vectors: Array) -> Array:
        """Vectors, one per row, as sums of the row's state and output: the coefficients of both, [C, 2]; NaN where a
        vector is none."""
        rows = np.arange(self.calls)
        weighted = vectors * self._columns(self.weights)
        of_m = weighted[rows, 1 + rows].copy()
        weighted[rows, 1 + rows] = 0.0
        states = self.states[:-1]
        of_x = (weighted * states).sum(axis=1) / np.maximum((states * states).sum(axis=1), 1e-300)
        scale = np.maximum(np.abs(weighted).max(axis=1), np.abs(of_m))
        error = np.abs(weighted - of_x[:, None] * states).max(axis=1)
        of_m[np.abs(of_m) < self.rounding * scale] = 0.0
        of_x[np.abs(of_x) * self.largest[:-1] < self.rounding * scale] = 0.0
        found = np.stack([of_x, of_m / self.weights], axis=1)
        found[error > TOLERANCE * self.rounding * np.maximum(scale, 1e-12)] = np.nan
        return found
