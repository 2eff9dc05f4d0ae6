"""Coefficients of a whole run, reduced to rows that save few tensors.

Run on basis vectors, a sampler shows its samples as vectors of coefficients over x_T, the model outputs m_0 ... m_{C-1}
and the draws of noise. Let s_i be the sample before model call i, and e_i the unit vector of its output. A row is

    s_{i+1} = a_x s_i + a_m e_i + sum_j a_h[j] h_j + (its own draws)

where the h_j were saved by earlier rows, each as h = k_x s_r + k_m e_r for one row r < i. Reducing a run means finding
tensors h, at most three at a time, that satisfy all of these equations up to rounding; the coefficients are then
a least-squares solution without residual.

An example is DPM-Solver++ 2M, written for a denoiser (m = x0) at sigma = 4, 2, 1, where every step halves sigma:

    x_1 = 1/2 x_0 + 1/2 m_0                                  first step: order 1
    x_2 = 1/2 x_1 + 1/2 (3/2 m_1 - 1/2 m_0)                  second step: order 2

    over (x_0, m_0, m_1):  s_0 = (1, 0, 0),  s_1 = (1/2, 1/2, 0),  s_2 = (1/4, 0, 3/4)

Row 0 needs nothing saved: s_1 = 1/2 s_0 + 1/2 e_0. Row 1 does, since s_2 is not in the span of s_1 and e_1. One tensor
of row 0 is enough, and there is a choice: saving the output (h = e_0) gives s_2 = 1/2 s_1 + 3/4 e_1 - 1/4 e_0, the
formula above; saving the state (h = s_0) gives s_2 = 0 s_1 + 3/4 e_1 + 1/4 s_0. Such choices, one tensor per row, are
the *families* that `reduce` tries; it prefers few saved tensors, then terms that cancel little. A method whose saved
tensors belong to no family known beforehand (UniPC, with its corrector) still reveals them: row r's tensor lies
in the plane of s_r and e_r and, beside the state, in the span of what later samples need (`_needed_later`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..table import MAX_HISTORY
from .probe import Array, Response

_TOLERANCE = 30  # of a fit, in roundings; measured: 12
_REACH = 5  # rows that a saved tensor may lie back
_HORIZON = 12  # later samples that show what must be saved
_RANK = 100  # singular values of what must be saved count from here, in roundings of the largest
_LARGER = 2  # an earlier family may have terms this many times the smallest, in squares
_DISTANCE = 1000  # of a unit vector from a span it lies in, in roundings


@dataclass(frozen=True, eq=False)
class Rows:
    """A run as rows: x' = a_x*x + a_m*m + sum_j a_h[j]*h_j + s*z, h_slot <- k_x*x + k_m*m. All are [C], but a_h is
    [C, 3]; slot is -1 where nothing is saved, and s the root of the sum of squares of a row's draws."""

    a_x: Array
    a_m: Array
    a_h: Array
    s: Array
    k_x: Array
    k_m: Array
    slot: Array
    draws: tuple[tuple[float, ...], ...]


def reduce(response: Response, clipped: bool = True, start: float = 1.0) -> Rows:
    """The rows of a run.

    The families are x0, the result of `convert_model_output`, the outputs, x - x0 (k-diffusion's derivative up to a
    factor), the states, and last what later rows need.

    Args:
        response: the run on basis vectors.
        clipped: whether x0 is clipped or thresholded, also where it is saved. Then the first family that fits
            is taken. If not: of the families that save the fewest tensors, the first with terms not much larger than
            their sum, since that is what rounding costs; states and outputs come first, as copies lose nothing.
            (Heun's last stage multiplies the difference of two x0 by 8, that of two states by a half; but the states a
            run starts from are a hundred times as large as those where it ends.)
        start: the deviation of the starting noise, next to outputs of about 1.

    Raises:
        ValueError: it needs more than three saved tensors, with the number, or tensors that are not linear in one row's
            state and output.
    """
    states, outputs = response.states, np.eye(response.states.shape[1])[1 : 1 + response.calls]
    if not np.isfinite(states).all():
        raise ValueError("sampler: got samples that are not finite, expected finite ones")
    x0 = [family for family in (response.predictions, response.converted) if family is not None]
    slopes = [] if response.predictions is None else [states[:-1] - response.predictions]
    families = [*x0, outputs, *slopes, states[:-1]] if clipped else [states[:-1], outputs, *x0, *slopes]
    found: list[tuple[Rows, float]] = []
    for family in families:
        if (rows := _rows_saving(family, response, outputs)) is None:
            continue
        if clipped or rows.slot.max() < 0:
            return rows
        found.append((rows, _size_of_terms(rows, family, response, start)))
    if found:
        fewest = min(int(rows.slot.max()) for rows, _ in found)
        found = [(rows, size) for rows, size in found if rows.slot.max() == fewest]
        least = min(size for _, size in found)
        return next(rows for rows, size in found if size <= _LARGER * least)
    futures = list(_futures(response))
    rank = max(map(len, futures)) - 1
    if rank > MAX_HISTORY:
        raise ValueError(f"sampler: got one that needs {rank} saved tensors, expected at most {MAX_HISTORY}")
    if (rows := _rows_saving(_needed_later(response, outputs, futures), response, outputs)) is not None:
        return rows
    raise ValueError(
        f"sampler: got one that needs {rank} tensors that are not linear in one row's state and output, expected "
        "saved tensors that are"
    )


def _size_of_terms(rows: Rows, family: Array, response: Response, start: float) -> float:
    """The size of the rows' terms relative to their sums: squares, summed over the rows."""
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


def _needed_later(response: Response, outputs: Array, futures: list[Array]) -> Array:
    """The family of what later rows need: for every row a sum of its state and output, in whatever proportion.

    A row's tensor is the line in which the plane of its state and output meets the spans of as many later calls as have
    one in common. Near the end these spans contain sums of several rows' tensors, so found tensors that are still saved
    are added to them.
    """
    states, family, saved = response.states, np.zeros_like(outputs), max(map(len, futures)) - 1
    distance = _DISTANCE * response.rounding
    for r in range(response.calls - 1):
        plane = np.array([states[r] / max(float(np.linalg.norm(states[r])), 1e-300), outputs[r]])  # orthonormal
        outside = np.zeros((2, 0))
        for j in range(r + 1, min(r + 1 + saved, response.calls)):
            within = _span(np.concatenate([futures[j], family[max(j - saved, 0) : r]]), response)
            outside = np.concatenate([outside, plane - plane @ within.T @ within], axis=1)
            left, lengths, _ = np.linalg.svd(outside, full_matrices=False)
            if lengths[-1] > distance:
                break
            # If the whole plane is in common: the part that the next state, at hand anyway, lacks.
            line = left[:, -1] if lengths[0] > distance else np.array([[0, -1], [1, 0]]) @ plane @ states[r + 1]
            family[r] = line @ plane
    return family


def _futures(response: Response) -> Iterator[Array]:
    """For every call orthonormal vectors that span the known part of later samples."""
    calls, states = response.calls, response.states
    states = states / np.maximum(np.abs(states).max(axis=1, keepdims=True), 1e-300)
    reached = np.logical_or.accumulate(states != 0)
    for i in range(calls):
        known = reached[i] | (np.arange(states.shape[1]) <= i)
        yield _span(np.where(known, states[i : i + _HORIZON], 0.0), response)


def _span(vectors: Array, response: Response) -> Array:
    """Orthonormal vectors with the same span, up to rounding."""
    _, lengths, basis = np.linalg.svd(vectors, full_matrices=False)
    found: Array = basis[lengths > _RANK * response.rounding * lengths[0]]
    return found


def _rows_saving(family: Array, response: Response, outputs: Array) -> Rows | None:
    """The rows that save tensors of a family; None if these do not fit, or not with three at a time."""
    calls, states = response.calls, response.states
    a_x, a_m, s = (np.zeros(calls) for _ in range(3))
    used: list[dict[int, float]] = []
    draws = []
    for i in range(calls):
        first, last = (1 + calls + drawn for drawn in response.drawn[i : i + 2])
        target, row_draws = states[i + 1].copy(), states[i + 1, first:last]
        target[first:last] = 0.0
        found = _fit(target, [states[i], outputs[i]], family[:i], np.abs(states[i + 1]).max(), response.rounding)
        if found is None:
            return None
        (a_x[i], a_m[i]), past = found
        used.append(past)
        draws.append(tuple(row_draws.tolist()))
        s[i] = np.sqrt(np.sum(np.square(row_draws)))
    slots = _slots(used, calls)
    if slots is None:
        return None
    a_h, k_x, k_m = np.zeros((calls, MAX_HISTORY)), np.zeros(calls), np.zeros(calls)
    for i, past in enumerate(used):
        for r, coefficient in past.items():
            a_h[i, slots[r]] = coefficient
    for r in np.flatnonzero(slots >= 0).tolist():
        fit = _fit(family[r], [states[r], outputs[r]], family[:0], np.abs(family[r]).max(), response.rounding)
        if fit is None:
            return None
        k_x[r], k_m[r] = fit[0]
    k_x[np.abs(k_x - 1) < response.rounding] = 1.0  # marks copies of states
    return Rows(a_x, a_m, a_h, s, k_x, k_m, slots, tuple(draws))


def _fit(
    target: Array, present: list[Array], past: Array, scale: float, rounding: float
) -> tuple[tuple[float, float], dict[int, float]] | None:
    """The target as a sum of the present vectors and as few of the newest past ones as it takes: coefficients of both;
    None if there is no such sum."""
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
    # More tensors that only fit the scheduler's rounding are not part of the method.
    _, chosen, terms, sizes = next(fit for fit in fits if fit[0] <= max(2 * least, rounding))
    terms[np.abs(terms) < rounding * scale] = 0.0
    weights = terms / sizes
    used = {r: float(w) for r, w in zip(chosen, weights[2:], strict=True) if w}
    return (float(weights[0]), float(weights[1])), used


def _slots(used: list[dict[int, float]], calls: int) -> Array | None:
    """The history slot of each row's tensor, -1 for tensors that no row reads; None if three are too few.

    A row reads before it saves, so its tensor may take the slot of one that it is the last to read."""
    last = {r: i for i, past in enumerate(used) for r in past}
    slots, busy = np.full(calls, -1), [-1] * MAX_HISTORY
    for r in sorted(last):
        slot = next((j for j, until in enumerate(busy) if until <= r), None)
        if slot is None:
            return None
        slots[r], busy[slot] = slot, last[r]
    return slots
