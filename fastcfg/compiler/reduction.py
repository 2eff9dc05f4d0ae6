"""From the coefficients of whole runs to rows that keep few tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..table import MAX_HISTORY
from .probe import Array, Response

_TOLERANCE = 30  # of a sum, in roundings; measured: 12
_REACH = 5  # rows that a saved tensor may lie back


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


def reduce(response: Response) -> Rows:
    """The rows of a run.

    Candidates for the saved tensors are families of one tensor a row: x0, what the scheduler converts outputs to, the
    outputs, x - x0 (k-diffusion's derivative but for its factor), the states, and last what the next row asks for. The
    first that does is taken.

    Raises:
        ValueError: it needs more than three saved tensors, with the number, or tensors that no single row has.
    """
    states, outputs = response.states, np.eye(response.states.shape[1])[1 : 1 + response.calls]
    families = [response.predictions, response.converted, outputs]
    if response.predictions is not None:
        families.append(states[:-1] - response.predictions)
    families += [states[:-1], _asked_for(response, outputs)]
    for family in (family for family in families if family is not None):
        if (rows := _with(family, response, outputs)) is not None:
            return rows
    rank = max(_ranks(response))
    if rank > MAX_HISTORY:
        raise ValueError(f"sampler: got one that needs {rank} saved tensors, expected at most {MAX_HISTORY}")
    raise ValueError(
        f"sampler: got one whose {rank} saved tensors are no sums of one row's state and output, expected such ones"
    )


def _asked_for(response: Response, outputs: Array) -> Array:
    """For every row the sum of its state and output that the next row needs: of methods of two stages."""
    states, family = response.states, np.zeros_like(outputs)
    for i in range(1, response.calls):
        target, _ = _without_draws(response, i)
        vectors = np.array([states[i], outputs[i], states[i - 1], outputs[i - 1]])
        sizes = np.maximum(np.abs(vectors).max(axis=1), 1e-300)[:, None]
        terms = np.linalg.lstsq((vectors / sizes).T, target, rcond=1e-12)[0]
        family[i - 1] = terms[2:] @ (vectors / sizes)[2:]
    return family


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


def _ranks(response: Response) -> Iterator[int]:
    """Saved tensors needed beside x at every call: the rank of the map from all that is known to all later samples."""
    states, calls = response.states, response.calls
    for i in range(calls):
        noise = [j for j in range(1 + calls, states.shape[1]) if np.abs(states[: i + 1, j]).max() > 0]
        singular = np.linalg.svd(states[i:, [*range(1 + i), *noise]], compute_uv=False)
        yield int((singular > 1e-5 * singular[0]).sum()) - 1
