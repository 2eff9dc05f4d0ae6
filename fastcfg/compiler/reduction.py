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

from dataclasses import dataclass

import numpy as np

from ..table import MAX_HISTORY
from .coordinates import HORIZON, REACH, TOLERANCE, Run, Window
from .probe import Array, Response

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


def reduce(response: Response, clipped: bool = True, start: float = 1.0, what: str = "sampler: got one") -> Rows:
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
        what: the beginning of messages.

    Raises:
        ValueError: it needs more than three saved tensors, with the number, or tensors that are not linear in one row's
            state and output.
    """
    if not np.isfinite(response.states).all():
        raise ValueError(f"{what} with samples that are not finite, expected finite ones")
    run = Run(response)
    response = run.response
    states, outputs = np.tile([1.0, 0.0], (run.calls, 1)), np.tile([0.0, 1.0], (run.calls, 1))
    x0 = [run.pairs(vectors) for vectors in (response.predictions, response.converted) if vectors is not None]
    slopes = [] if response.predictions is None else [states - x0[0]]
    families = [*x0, outputs, *slopes, states] if clipped else [states, outputs, *x0, *slopes]
    found: list[tuple[Rows, float]] = []
    for family in families:
        if (rows := _rows_saving(family, run)) is None:
            continue
        if clipped or rows.slot.max() < 0:
            return rows
        found.append((rows, _size_of_terms(rows, family, response, start)))
    if found:
        fewest = min(int(rows.slot.max()) for rows, _ in found)
        found = [(rows, size) for rows, size in found if rows.slot.max() == fewest]
        least = min(size for _, size in found)
        return next(rows for rows, size in found if size <= _LARGER * least)
    futures = [_futures(window, run) for window in run.windows]
    rank = max(len(span) for spans in futures for span in spans) - 1
    if rank > MAX_HISTORY:
        raise ValueError(f"{what} that needs {rank} saved tensors, expected at most {MAX_HISTORY}")
    if (rows := _rows_saving(_needed_later(run, futures, rank), run)) is not None:
        return rows
    raise ValueError(
        f"{what} that needs {rank} tensors that are not linear in one row's state and output, expected "
        "saved tensors that are"
    )


def _size_of_terms(rows: Rows, family: Array, response: Response, start: float) -> float:
    """The size of the rows' terms relative to their sums: squares, summed over the rows."""
    scale = np.ones(response.states.shape[1])
    scale[0] = start
    states = np.linalg.norm(response.states * scale, axis=1)
    # A row's state has no share of its output.
    saved = np.hypot(family[:, 0] * states[:-1], family[:, 1])
    alone = np.abs(rows.a_x) * states[:-1] + np.abs(rows.a_m)
    history, past = np.zeros(MAX_HISTORY), np.zeros(len(alone))
    for i in np.flatnonzero(rows.a_h.any(axis=1) | (rows.slot >= 0)):
        past[i] = np.abs(rows.a_h[i]) @ history
        if rows.slot[i] >= 0:
            history[rows.slot[i]] = saved[i]
    return float(np.square((alone + past) / np.maximum(states[1:], 1e-12)).sum())


def _needed_later(run: Run, futures: list[list[Array]], saved: int) -> Array:
    """The family of what later rows need: for every row a sum of its state and output, in whatever proportion.

    A row's tensor is the line in which the plane of its state and output meets the spans of as many later calls as have
    one in common. Near the end these spans contain sums of several rows' tensors, so found tensors that are still saved
    are added to them.
    """
    family, distance = np.zeros((run.calls, 2)), _DISTANCE * run.rounding
    sizes = np.maximum(np.linalg.norm(run.states, axis=1), 1e-300)
    for window, spans in zip(run.windows, futures, strict=True):
        for r in range(window.first, min(window.last, run.calls - 1)):
            units = np.array([1 / sizes[r], 1 / run.weights[r]])
            plane = np.stack([window.vector(r, pair) for pair in np.diag(units)])
            outside = np.zeros((2, 0))
            for j in range(r + 1, min(r + 1 + saved, run.calls)):
                earlier = [window.vector(k, family[k]) for k in range(max(j - saved, 0), r)]
                within = _span(np.array([*spans[j - window.first], *earlier]), run)
                outside = np.concatenate([outside, plane - plane @ within.T @ within], axis=1)
                left, lengths, _ = np.linalg.svd(outside, full_matrices=False)
                if lengths[-1] > distance:
                    break
                line = left[:, -1]
                if lengths[0] <= distance:
                    # The whole plane is in common: the part that the next state, at hand anyway, lacks.
                    following = run.states[r + 1]
                    line = np.array([-following[1 + r], run.states[r] @ following / sizes[r]])
                family[r] = line * units
    return family


def _futures(window: Window, run: Run) -> list[Array]:
    """For every call of a window, and those that follow it, orthonormal vectors that span the known part of later
    samples."""
    states = window.states / np.maximum(np.abs(window.states).max(axis=1, keepdims=True), 1e-300)
    reached = np.logical_or.accumulate(states != 0)
    reached[:, : window.old] = True
    spans = []
    for i in range(window.first, min(window.last + MAX_HISTORY, run.calls)):
        known = reached[i - window.start] | (np.arange(states.shape[1]) < window.output(i))
        spans.append(_span(np.where(known, states[i - window.start :][:HORIZON], 0.0), run))
    return spans


def _span(vectors: Array, run: Run) -> Array:
    """Orthonormal vectors with the same span, up to rounding."""
    _, lengths, basis = np.linalg.svd(vectors, full_matrices=False)
    found: Array = basis[lengths > _RANK * run.rounding * lengths[0]]
    return found


def _rows_saving(family: Array, run: Run) -> Rows | None:
    """The rows that save tensors of a family, [C, 2] as `Run.pairs`; None if these do not fit, or not with three at a
    time."""
    states, calls, scale = run.response.states, run.calls, np.maximum(run.largest[1:], 1e-12)
    rows = np.arange(calls)
    draws = [states[i + 1, slice(*(1 + calls + n for n in run.response.drawn[i : i + 2]))] for i in rows]
    a_m = states[rows + 1, 1 + rows]
    a_m = np.where(np.abs(a_m) * run.weights < run.rounding * scale, 0.0, a_m)
    a_x, errors = run.alone[0].copy(), run.alone[1]
    a_x[np.abs(a_x) * run.largest[:-1] < run.rounding * scale] = 0.0
    used: list[dict[int, float]] = [{} for _ in range(calls)]
    known = np.nan_to_num(family)
    for window in run.windows:
        for i in range(window.first, window.last):
            if errors[i] <= run.rounding * scale[i]:
                continue
            if (found := _fit(window, i, known, (a_x[i], errors[i]), scale[i], run.rounding)) is None:
                return None
            a_x[i], used[i] = found
    slots = _slots(used, calls)
    if slots is None:
        return None
    a_h, saved = np.zeros((calls, MAX_HISTORY)), slots >= 0
    if np.isnan(family[saved]).any():
        return None
    for i, past in enumerate(used):
        for r, coefficient in past.items():
            a_h[i, slots[r]] = coefficient
    k_x, k_m = np.where(saved[:, None], family, 0.0).T
    s = np.array([np.sqrt(np.sum(np.square(row))) for row in draws])
    return Rows(a_x, a_m, a_h, s, k_x, k_m, slots, tuple(tuple(row.tolist()) for row in draws))


def _fit(
    window: Window, row: int, family: Array, alone: tuple[float, float], scale: float, rounding: float
) -> tuple[float, dict[int, float]] | None:
    """The next state of a row as a sum of its state and as few of the newest saved tensors as it takes: coefficients of
    both; None if there is no such sum. `alone` is the coefficient without saved tensors, and its error."""
    target = window.state(row + 1).copy()
    target[window.output(row)] = 0.0
    target[window.draws(row)] = 0.0
    chosen, sizes = [window.state(row)], [float(np.abs(window.state(row)).max()) or 1.0]
    chosen[0] = chosen[0] / sizes[0]
    past = range(row - 1, max(row - 1 - REACH, -1), -1)
    fits = [(alone[1] / scale, np.array([alone[0] * sizes[0]]))]
    for r in past:
        vector = window.vector(r, family[r])
        sizes.append(float(np.abs(vector).max()) or 1.0)
        chosen.append(vector / sizes[-1])
        vectors = np.array(chosen)
        terms = np.linalg.lstsq(vectors.T, target, rcond=1e-12)[0]
        fits.append((float(np.abs(terms @ vectors - target).max()) / scale, terms))
        if fits[-1][0] <= rounding:
            break
    least = min(error for error, _ in fits)
    if not least <= TOLERANCE * rounding:
        return None
    # More tensors that only fit the scheduler's rounding are not part of the method.
    terms = next(terms for error, terms in fits if error <= max(2 * least, rounding))
    terms[np.abs(terms) < rounding * scale] = 0.0
    weights = (terms / np.array(sizes[: len(terms)])).tolist()
    return weights[0], {r: weight for r, weight in zip(past, weights[1:], strict=False) if weight}


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
