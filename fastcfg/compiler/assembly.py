"""From rows to a table, and the proof that the table is the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..clip import DynamicThreshold
from ..reference.plain import PlainTable
from ..step import StepSpec
from ..table import StepTable
from .probe import ROUNDING, ROUNDING_FLOAT32, Array, Response
from .reduction import Rows

# In shares of the largest value, of schedulers that compute in float32.
TOLERANCE = 5e-6
# Between a table and the original on random inputs, in roundings of the coefficients. Measured: 2.
_APART = 50


def of_known_rounding(response: Response, shorter: Response, what: str) -> Response:
    """The response with the rounding that basis vectors of another length, which is no power of two, show.

    Raises:
        ValueError: these give other coefficients, or some are not finite.
    """
    if not np.isfinite(response.states).all():
        raise ValueError(f"{what}, whose samples are not finite, expected finite ones")
    largest = np.maximum(np.abs(response.states).max(axis=1), 1.0)
    apart = np.abs(response.states - shorter.states).max(axis=1) / largest
    if (apart > TOLERANCE).any():
        row = int((apart > TOLERANCE).argmax()) - 1
        raise ValueError(
            f"{what}, whose step {row} gives other coefficients for other samples, expected one whose steps are linear"
        )
    return replace(response, rounding=ROUNDING if apart.max() < ROUNDING else ROUNDING_FLOAT32)


def columns(rows: Rows, p_x: Array, p_m: Array, limited: bool = True) -> dict[str, Array]:
    """A table's columns: in terms of x0 where it is known (p_m is not 0) and is either limited on the way or what is
    saved, else in those of state and output, which are fewer roundings."""
    copies = p_x.any() and not limited and not (rows.k_x * rows.k_m).any()
    known = (p_m != 0) & (not copies)
    factor = np.where(known, p_m, 1.0)
    a_0, k_0 = (np.where(known, values / factor, 0.0) for values in (rows.a_m, rows.k_m))
    found = {"p_x": p_x, "p_m": p_m, "s": rows.s, "slot": rows.slot}
    found |= {"a_0": a_0, "a_x": _less(rows.a_x, a_0 * p_x), "a_m": np.where(known, 0.0, rows.a_m)}
    found |= {"k_0": k_0, "k_x": _less(rows.k_x, k_0 * p_x), "k_m": np.where(known, 0.0, rows.k_m)}
    return found | {f"a_h{j}": rows.a_h[:, j] for j in range(rows.a_h.shape[1])}


def _less(values: Array, others: Array) -> Array:
    """The difference, 0 where it is nothing but rounding."""
    difference = values - others
    return np.where(np.abs(difference) < 1e-9 * np.abs(others), 0.0, difference)


def verify(
    table: StepTable,
    draws: Sequence[Sequence[float]],
    outputs: Sequence[Tensor],
    drawn: Sequence[Sequence[Tensor]],
    states: Sequence[Tensor],
    clip: float | DynamicThreshold | None,
    rounding: float,
    what: str,
) -> list[Tensor]:
    """Raise ValueError unless a table makes of random inputs what the original has made of them.

    Args:
        table: the table.
        draws: the coefficients of every row's draws, of which the table's s is the joint deviation.
        outputs: the model's, float64 [B, C or 2C, ...], one a row.
        drawn: what every row drew, float64 [B, C, ...].
        states: the original's, float64: the start, and after every row.
        clip: of x0.
        rounding: of the original's coefficients.
        what: the original in words.

    Returns:
        x0 of every row.
    """
    x, predicted, plain = states[0], [], PlainTable(table, states[0])
    bound = x.new_full((len(x),), clip) if isinstance(clip, float) else clip
    spec = StepSpec.of(table, clip=clip is not None, rescale=isinstance(clip, DynamicThreshold))
    for row, (output, noise, state) in enumerate(zip(outputs, drawn, states[1:], strict=True)):
        c = {name: float(table[name][row]) for name in ("p_x", "p_m", "a_x", "a_0", "a_m")}
        m = output[:, : x.shape[1]]
        noisy = replace(spec, noise_source="tensor" if table.learned_variance and noise else "none")
        made = plain(row, x, output, noisy, bound=bound, noise=noise[0] if noise else None)
        predicted.append(made["x0"])
        y = made["x"]
        if not table.learned_variance:
            y += sum(coefficient * z for coefficient, z in zip(draws[row], noise, strict=True))
        # Large terms that cancel, and a state that falls far, leave the rounding of an original in float32.
        of_x, of_m = float(x.abs().max()), float(m.abs().max())
        through_x0 = abs(c["a_0"]) * (abs(c["p_x"]) * of_x + abs(c["p_m"]) * of_m)
        size = max(of_x, abs(c["a_x"]) * of_x, abs(c["a_m"]) * of_m, through_x0)
        if not (apart := distance(y, state, size)) <= _APART * rounding:
            raise ValueError(
                f"{what}, from which its table differs by {apart:.1e} in row {row}, expected at most "
                f"{_APART * rounding:.0e}: its steps are not linear"
            )
        x = state
    return predicted


def distance(got: Tensor, want: Tensor, size: float = 1.0) -> float:
    """The largest difference, in shares of the largest value or of `size`, whichever is larger (and of 1)."""
    return float((got - want).abs().max()) / max(1.0, size, float(want.abs().max()))
