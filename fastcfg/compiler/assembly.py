"""From rows to a table, and the proof that the table reproduces the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..reference.plain import PlainTable
from ..step import StepSpec
from ..table import COLUMNS, StepTable
from .probe import ROUNDING, ROUNDING_FLOAT32, Array, Recording, Response
from .reduction import Rows

# Of x0, as `clip` of `Sampler`.
Clip = float | DynamicThreshold | None
# A row, coefficients of its x, of its output and of the x that it makes, and a constant.
Other = tuple[int, float, float, float, float]

# Relative to the largest value, for schedulers that compute in float32.
TOLERANCE = 5e-6
# Between a table and the original on random inputs, in roundings of the coefficients. Measured: 2.
_MAX_ROUNDINGS = 50


@dataclass(frozen=True, eq=False)
class Compiled:
    """A table, and the original's own draws of noise in its order, which make the images of its seeds.

    Attributes:
        table: s is the joint deviation of a row's draws, initial_scale that of the start.
        draws: per row the coefficients of the draws after its model call, 0 for an unused draw:
            s * z = sum_k draws[row][k] * z_k; with learned variances, the coefficients at v = 0.
        start: the share of the given x in the first state.
        start_draws: coefficients of the draws before the first model call: x_T = start*x + sum_k start_draws[k] * z_k.
        blend: per row the weights of the branches that a function's model returns side by side; (1.0,) if it is one.
        others: of the tensors that a function tells beside its samples: (row, a, b, c, d) where one is the row's
            a*x + b*m + c*x' + d.
        clip: the bound to which the function clamps x0, None if it does not.
        offset: what it adds to the samples at the end.
    """

    table: StepTable
    draws: tuple[tuple[float, ...], ...]
    start: float = 1.0
    start_draws: tuple[float, ...] = ()
    blend: tuple[tuple[float, ...], ...] = ()
    others: tuple[Other, ...] = ()
    clip: float | None = None
    offset: float = 0.0

    def noise(self, draw: Callable[[], Tensor], row: int) -> Tensor | None:
        """A row's noise with deviation 1, or None if it adds none. `draw` is called for every draw of the original,
        used or not, so that a generator moves as it does there."""
        weights = self.draws[row]
        total = math.hypot(*weights)
        return _weighted_sum(draw, [weight / total if total else 0.0 for weight in weights])

    def start_noise(self, draw: Callable[[], Tensor]) -> Tensor | None:
        """The noise added before the first model call, weighted by `start_draws`; None if there is none."""
        return _weighted_sum(draw, self.start_draws)


def _weighted_sum(draw: Callable[[], Tensor], weights: Sequence[float]) -> Tensor | None:
    """The next draws, weighted, in float32 or wider. A single draw of weight 1 is returned as drawn."""
    total: Tensor | None = None
    for weight in weights:
        z = draw()
        if weight and weight != 1.0:
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * weight
        if weight:
            total = z if total is None else total + z
    return total


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Context in which any exception of an original becomes a ValueError: it cannot be compiled."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{what}, which does not run on basis vectors ({type(error).__name__}: {error}), expected linear steps"
        ) from error


def with_rounding(response: Response, shorter: Response, what: str) -> Response:
    """The response with its rounding, estimated from a run on basis vectors of another length (not a power of two).
    Raises ValueError if the coefficients differ by more than rounding, or some are not finite."""
    if not np.isfinite(response.states).all():
        raise ValueError(f"{what} with samples that are not finite, expected finite ones")
    largest = np.maximum(np.abs(response.states).max(axis=1), 1.0)
    error = np.abs(response.states - shorter.states).max(axis=1) / largest
    if (error > TOLERANCE).any():
        row = int((error > TOLERANCE).argmax()) - 1
        raise ValueError(f"{what}: step {row} has coefficients that depend on the sample, expected linear steps")
    return replace(response, rounding=ROUNDING if error.max() < ROUNDING else ROUNDING_FLOAT32)


class UnprovedError(ValueError):
    """A response or a table does not reproduce its original."""


def rounding_of(response: Response, run: Recording, what: str) -> float:
    """The rounding of a response, estimated from a run on numbers: from the difference between its samples and their
    sums over the response. Raises `UnprovedError` if it is more than rounding."""
    drawn = [z for row in run.drawn for z in row]
    channels, elements = run.states[0].shape[1], slice(None, None, 5)  # a fifth will do
    given = [vector[:, :channels].reshape(-1)[elements] for vector in (run.states[0], *run.outputs, *drawn)]
    inputs, states = (torch.stack(v).numpy() for v in (given, [s.reshape(-1)[elements] for s in run.states]))
    sums, sizes = response.states @ inputs, np.abs(response.states) @ np.abs(inputs)
    error = np.abs(sums - states).max(axis=1) / np.maximum(sizes.max(axis=1), 1e-300)
    if (error > TOLERANCE).any():
        row = int((error > TOLERANCE).argmax()) - 1
        raise UnprovedError(f"{what}: step {row} has coefficients that depend on the sample, expected linear steps")
    return ROUNDING if error.max() < ROUNDING else ROUNDING_FLOAT32


def columns(rows: Rows, p_x: Array, p_m: Array, clipped: bool = True) -> dict[str, Array]:
    """A table's columns. Rows are written over x and x0 where x0 is known (p_m is not 0) and needed, because it is
    clipped or saved; elsewhere over x and the output, which rounds less often."""
    saves_copies = p_x.any() and not clipped and not (rows.k_x * rows.k_m).any()
    over_x0 = (p_m != 0) & (not saves_copies)
    factor = np.where(over_x0, p_m, 1.0)
    a_0, k_0 = (np.where(over_x0, values / factor, 0.0) for values in (rows.a_m, rows.k_m))
    found = {"p_x": p_x, "p_m": p_m, "s": rows.s, "slot": rows.slot}
    found |= {"a_0": a_0, "a_x": _difference(rows.a_x, a_0 * p_x), "a_m": np.where(over_x0, 0.0, rows.a_m)}
    found |= {"k_0": k_0, "k_x": _difference(rows.k_x, k_0 * p_x), "k_m": np.where(over_x0, 0.0, rows.k_m)}
    return found | {f"a_h{j}": rows.a_h[:, j] for j in range(rows.a_h.shape[1])}


def _difference(a: Array, b: Array) -> Array:
    """a - b, set to 0 where only rounding is left."""
    difference = a - b
    return np.where(np.abs(difference) < 1e-9 * np.abs(b), 0.0, difference)


def verify(
    table: StepTable, draws: Sequence[Sequence[float]], trial: Recording, clip: Clip, rounding: float, what: str
) -> None:
    """Raise `UnprovedError` unless a table, with coefficients of every row's draws, reproduces an original's run on
    random inputs in float64. `clip` is as `scheduler_clip` returns it.

    A row is measured by its own terms: large ones that cancel leave their rounding.
    """
    states, drawn = trial.states, trial.drawn[-len(trial.outputs) :]
    plain = PlainTable(table, states[0])
    bound = states[0].new_full((len(states[0]),), clip) if isinstance(clip, float) else clip
    spec = StepSpec.of(table, clip=clip is not None, rescale=isinstance(clip, DynamicThreshold))
    quiet = replace(spec, noise_source="none")
    noisy = replace(spec, noise_source="tensor") if table.learned_variance else quiet
    saved = [0.0] * table.num_history
    for row, (x, output, noise, state) in enumerate(zip(states, trial.outputs, drawn, states[1:], strict=False)):
        c = dict(zip(COLUMNS, table.rows[row].tolist(), strict=True))
        made = plain(row, x, output, noisy if noise else quiet, bound=bound, noise=noise[0] if noise else None)
        y = made["x"]
        if not table.learned_variance:
            y += sum(coefficient * z for coefficient, z in zip(draws[row], noise, strict=True))
        of_x, of_m = float(x.abs().max()), float(output[:, : x.shape[1]].abs().max())
        through_x0 = abs(c["a_0"]) * (abs(c["p_x"]) * of_x + abs(c["p_m"]) * of_m)
        past = (abs(c[f"a_h{j}"]) * size for j, size in enumerate(saved))
        size = max(abs(c["a_x"]) * of_x, abs(c["a_m"]) * of_m, through_x0, *past, float(state.abs().max()))
        if not (error := float((y - state).abs().max()) / (size or 1.0)) <= _MAX_ROUNDINGS * rounding:
            raise UnprovedError(
                f"{what}, from which its table differs by {error:.1e} in row {row}, expected at most "
                f"{_MAX_ROUNDINGS * rounding:.0e}"
            )
        if c["slot"] >= 0:
            saved[int(c["slot"])] = float(made["saved"].abs().max())


def distance(got: Tensor, want: Tensor, size: float = 1.0) -> float:
    """The largest difference relative to the largest value, to `size` or to 1, whichever is largest."""
    return float((got - want).abs().max()) / max(1.0, size, float(want.abs().max()))
