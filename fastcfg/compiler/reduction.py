"""From the coefficients of whole runs to rows that keep few tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..table import MAX_HISTORY
from .probe import Array, Response

_TOLERANCE = 30  # of a sum, in roundings; measured: 12
_REACH = 5  # rows that a saved tensor may lie back
_HORIZON = 12  # samples of those that follow that tell what is needed
_RANK = 100  # of singular values of what is needed, in roundings of the largest
_LARGER = 2  # times the squares of another's terms that a family may have which is tried before it
_DISTANCE = 1000  # of a unit vector from a span that it lies in, in roundings


@dataclass(frozen=True, eq=False)
class Rows:
    """A run as rows: x' = a_x*x + a_m*m + sum_j a_h[j]*h_j + s*z, h_slot <- k_x*x + k_m*m.

    Attributes:
        a_x, a_m, s, k_x, k_m: [C].
        a_h: [C, 3].
        slot: [C], -1 where nothing is saved.
        draws: for every row the coefficients of its draws, of which s is the root of the sum of squares.
    """

    a_x: Array
    a_m: Array
    a_h: Array
    s: Array
    k_x: Array
    k_m: Array
    slot: Array
    draws: tuple[tuple[float, ...], ...]


def reduce(response: Response, limited: bool = True, start: float = 1.0) -> Rows:
    """The rows of a run.

    Candidates for the saved tensors are families of one tensor a row: x0, what the scheduler converts outputs to, the
    outputs, x - x0 (k-diffusion's derivative but for its factor), the states, and last what later rows need.

    Args:
        response: what the run makes of basis vectors.
        limited: whether x0 is, by a clip or thresholding, and so is what is saved of it. Then the first family that
            does is taken. Else, of those that keep the fewest, one whose terms are not much larger than what comes of
            them, which is what is lost to rounding, and states or outputs rather than sums: copies lose nothing.
            (Heun's last stage multiplies the difference of two x0 by 8, that of two states by a half; but states that
            a run starts from are a hundred times as large as those where it ends.)
        start: the deviation of the starting noise, beside outputs of about 1.

    Raises:
        ValueError: it needs more than three saved tensors, with the number, or tensors that no single row has.
    """
    states, outputs = response.states, np.eye(response.states.shape[1])[1 : 1 + response.calls]
    if not np.isfinite(states).all():
        raise ValueError("sampler: got samples that are not finite, expected finite ones")
    x0 = [family for family in (response.predictions, response.converted) if family is not None]
    slopes = [] if response.predictions is None else [states[:-1] - response.predictions]
    families = [*x0, outputs, *slopes, states[:-1]] if limited else [states[:-1], outputs, *x0, *slopes]
    found: list[tuple[Rows, float]] = []
    for family in families:
        if (rows := _with(family, response, outputs)) is None:
            continue
        if limited or rows.slot.max() < 0:
            return rows
        found.append((rows, _terms(rows, family, response, start)))
    if found:
        fewest = min(int(rows.slot.max()) for rows, _ in found)
        found = [(rows, terms) for rows, terms in found if rows.slot.max() == fewest]
        least = min(terms for _, terms in found)
        return next(rows for rows, terms in found if terms <= _LARGER * least)
    futures = list(_futures(response))
    rank = max(map(len, futures)) - 1
    if rank > MAX_HISTORY:
        raise ValueError(f"sampler: got one that needs {rank} saved tensors, expected at most {MAX_HISTORY}")
    if (rows := _with(_general(response, outputs, futures), response, outputs)) is not None:
        return rows
    raise ValueError(
        f"sampler: got one whose {rank} saved tensors are no sums of one row's state and output, expected such ones"
    )


def _terms(rows: Rows, family: Array, response: Response, start: float) -> float:
    """How large the terms of rows are beside what comes of them: squares, summed over the rows."""
    scale = np.ones(response.states.shape[1])
    scale[0] = start
    states, saved = (np.linalg.norm(vectors * scale, axis=1) for vectors in (response.states, family))
    history, total = np.zeros(MAX_HISTORY), 0.0
    for i, slot in enumerate(rows.slot):
        terms = abs(rows.a_x[i]) * states[i] + abs(rows.a_m[i]) + np.abs(rows.a_h[i]) @ history
        total += float((terms / max(states[i + 1], 1e-12)) ** 2)
        if slot >= 0:
            history[slot] = saved[i]
    return total


def _general(response: Response, outputs: Array, futures: list[Array]) -> Array:
    """For every row the sum of its state and output that later rows need, whatever its proportions.

    What is saved at a call lies, beside its state, in the span of what later samples need: a row's tensor is the
    line in which the plane of its state and output meets the spans of as many later calls as have one in common. Near
    the end these hold sums of several rows' tensors, so those already found that are still kept are added to them.
    """
    states, family, kept = response.states, np.zeros_like(outputs), max(map(len, futures)) - 1
    distance = _DISTANCE * response.rounding
    for r in range(response.calls - 1):
        plane = np.array([states[r] / max(float(np.linalg.norm(states[r])), 1e-300), outputs[r]])  # orthonormal
        apart = np.zeros((2, 0))
        for j in range(r + 1, min(r + 1 + kept, response.calls)):
            within = _span(np.concatenate([futures[j], family[max(j - kept, 0) : r]]), response)
            apart = np.concatenate([apart, plane - plane @ within.T @ within], axis=1)
            left, lengths, _ = np.linalg.svd(apart, full_matrices=False)
            if lengths[-1] > distance:
                break
            # All of the plane: what is no part of the next state, which is at hand anyway.
            line = left[:, -1] if lengths[0] > distance else np.array([[0, -1], [1, 0]]) @ plane @ states[r + 1]
            family[r] = line @ plane
    return family


def _futures(response: Response) -> Iterator[Array]:
    """For every call orthonormal vectors that span what the samples after it need of what is known by then."""
    calls, states = response.calls, response.states
    states = states / np.maximum(np.abs(states).max(axis=1, keepdims=True), 1e-300)
    reached = np.logical_or.accumulate(states != 0)
    for i in range(calls):
        known = reached[i] | (np.arange(states.shape[1]) <= i)
        yield _span(np.where(known, states[i : i + _HORIZON], 0.0), response)


def _span(vectors: Array, response: Response) -> Array:
    """Orthonormal vectors that span the same, but for rounding."""
    _, lengths, basis = np.linalg.svd(vectors, full_matrices=False)
    found: Array = basis[lengths > _RANK * response.rounding * lengths[0]]
    return found


def _without_draws(response: Response, row: int) -> tuple[Array, Array]:
    """What comes out of a row without the noise that it draws, and the coefficients of that noise."""
    first, last = (1 + response.calls + drawn for drawn in response.drawn[row : row + 2])
    target = response.states[row + 1].copy()
    drawn, target[first:last] = target[first:last].copy(), 0.0
    return target, drawn


def _with(family: Array, response: Response, outputs: Array) -> Rows | None:
    """The rows with saved tensors of a family; None if these do not do, or not with three at a time."""
    calls, states = response.calls, response.states
    a_x, a_m, s = (np.zeros(calls) for _ in range(3))
    used: list[dict[int, float]] = []
    draws = []
    for i in range(calls):
        target, drawn = _without_draws(response, i)
        found = _fitted(target, [states[i], outputs[i]], family[:i], np.abs(states[i + 1]).max(), response.rounding)
        if found is None:
            return None
        (a_x[i], a_m[i]), past = found
        used.append(past)
        draws.append(tuple(drawn.tolist()))
        s[i] = np.sqrt(np.sum(np.square(draws[-1])))
    slots = _slots(used, calls)
    if slots is None:
        return None
    a_h = np.zeros((calls, MAX_HISTORY))
    for i, past in enumerate(used):
        for r, coefficient in past.items():
            a_h[i, slots[r]] = coefficient
    k = [
        _fitted(family[r], [states[r], outputs[r]], family[:0], np.abs(family[r]).max(), response.rounding)
        for r in range(calls)
    ]
    if any(k[r] is None for r in range(calls) if slots[r] >= 0):
        return None
    k_x, k_m = np.array([fit[0] if fit and slots[r] >= 0 else (0.0, 0.0) for r, fit in enumerate(k)]).T
    k_x[np.abs(k_x - 1) < response.rounding] = 1.0  # copies of states are known by it
    return Rows(a_x, a_m, a_h, s, k_x, k_m, slots, tuple(draws))


def _fitted(
    target: Array, present: list[Array], past: Array, scale: float, rounding: float
) -> tuple[tuple[float, float], dict[int, float]] | None:
    """The target as a sum of what is present and of past tensors, as few of the newest as it takes: coefficients of
    both; None if it is no such sum."""
    scale, fits = max(scale, 1e-12), []
    for count in range(min(len(past), _REACH) + 1):
        chosen = list(range(len(past) - 1, len(past) - 1 - count, -1))
        vectors = np.array([*present, *(past[r] for r in chosen)])
        sizes = np.abs(vectors).max(axis=1)
        sizes[sizes == 0] = 1.0
        terms = np.linalg.lstsq((vectors / sizes[:, None]).T, target, rcond=1e-12)[0]
        fits.append((np.abs(terms @ (vectors / sizes[:, None]) - target).max() / scale, chosen, terms, sizes))
        if fits[-1][0] <= rounding:
            break
    least = min(fit[0] for fit in fits)
    if not least <= _TOLERANCE * rounding:
        return None
    # Further tensors that only fit a scheduler's rounding are none of it.
    _, chosen, terms, sizes = next(fit for fit in fits if fit[0] <= max(2 * least, rounding))
    terms[np.abs(terms) < rounding * scale] = 0.0
    weights = terms / sizes
    used = {r: float(w) for r, w in zip(chosen, weights[2:], strict=True) if w}
    return (float(weights[0]), float(weights[1])), used


def _slots(used: list[dict[int, float]], calls: int) -> Array | None:
    """Where each row's tensor is kept, -1 for rows whose tensor nobody reads; None if three places are too few.

    A row reads before it saves, so its own tensor may take the place of one that it is the last to read."""
    last = {r: i for i, past in enumerate(used) for r in past}
    slots, busy = np.full(calls, -1), [-1] * MAX_HISTORY
    for r in range(calls):
        if r in last:
            place = next((j for j, until in enumerate(busy) if until <= r), None)
            if place is None:
                return None
            slots[r], busy[place] = place, last[r]
    return slots
