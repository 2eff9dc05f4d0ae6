"""The coefficient table: a solver written as one row of numbers per model evaluation.

Every row does the same four things, for model outputs m_1 ... m_K of the K guidance branches, state x, noise z and
saved tensors h_j:

    m    = blend(m_1 ... m_K)                                    guidance
    x0   = clip(p_x*x + p_m*m) + p_g*g                           predict x0
    x'   = a_x*x + a_0*x0 + a_m*m + a_u*u + sum_j a_hj*h_j + a_g*g + std*z
    h_d <- k_x*x + k_0*x0 + k_m*m                                save at most one tensor (d = slot, none if -1)

where u is the output of the unconditional branch (CFG++), g the gradient of a classifier (without one its terms are
absent) and std = s, or 2**(l_0 + l_v*v) where the variance is learned, v being the variance channels of the conditional
branch; a_g then counts a_g*2**(2*l_v*v). The model sees c_in*x at time t. The kernels know the order of the columns
(`kernels/_columns.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .utils.checks import check_finite
from .utils.files import replacing, write_text

__all__ = ["COLUMNS", "DEVICE_COLUMNS", "MAX_HISTORY", "NO_NOISE", "StepTable"]

COLUMNS = (
    *("c_in", "t"),
    *("p_x", "p_m"),
    *("a_x", "a_0", "a_m", "a_u", "a_h0", "a_h1", "a_h2"),
    *("s", "l_0", "l_v"),
    *("k_x", "k_0", "k_m", "slot"),
    *("p_g", "a_g"),
)
# On the device they are followed by what rounding to float32 takes from these: x0 is a small difference of large terms,
# and where a_x is close to 1, as with many steps, its rounding error is as large as the sum's.
_IN_TWO_PARTS = ("p_x", "p_m", "a_x")
DEVICE_COLUMNS = (*COLUMNS, *(f"{name}_rest" for name in _IN_TWO_PARTS))
MAX_HISTORY = 3
# l_0 of a row of a learned-variance table that adds no noise: 2**-1000 is 0 in float32.
NO_NOISE = -1000.0

_FORMAT = "fastcfg.StepTable/1"
_FURTHER = ("levels", "rebuild")
_ATTRIBUTES = ("learned_variance", "initial_scale", "integer_time", "name")

_INDEX = {name: i for i, name in enumerate(COLUMNS)}
_DEFAULTS = {"c_in": 1.0, "slot": -1.0}


@dataclass(frozen=True, eq=False)
class StepTable:
    """One float64 row of coefficients per model evaluation, first executed first. Built by the functions of
    `fastcfg.solvers`, or from columns with `StepTable.from_columns`.

    Attributes:
        rows: float64 [R, len(COLUMNS)].
        learned_variance: whether std depends on the model's variance channels (then the model must return 2C channels).
        initial_scale: the standard deviation of the starting noise, x_T = initial_scale * z (sigma_max for solvers in
            sigma space).
        integer_time: whether the model takes t as int64 (else float32).
        steps: int64 [R], the step of the run each row belongs to, for progress and guidance intervals.
        name: what built the table, for messages.
        levels: float64 [R + 1, 2], α and σ of the state x = α x0 + σ z before each row, and after the last one; None if
            they are not known. Runs that begin from an image need them.
        rebuild: (row) -> the table of a run that begins at that row, by what built this one; None if nothing can.

    Raises:
        ValueError: wrong shape, non-finite values, a slot that is not -1, 0, 1 or 2, a saved tensor read before a row
            wrote it, negative s, or decreasing steps.
    """

    rows: NDArray[np.float64]
    learned_variance: bool = False
    initial_scale: float = 1.0
    integer_time: bool = True
    steps: NDArray[np.int64] = None  # type: ignore[assignment]  # until __post_init__
    name: str = "table"
    levels: NDArray[np.float64] | None = None
    rebuild: Callable[[int], StepTable] | None = None

    def __post_init__(self) -> None:
        rows = np.array(self.rows, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS) or not len(rows):
            raise ValueError(f"rows: got shape {rows.shape}, expected [R >= 1, {len(COLUMNS)}]")
        steps = np.arange(len(rows)) if self.steps is None else np.array(self.steps, dtype=np.int64)
        if steps.shape != (len(rows),) or (np.diff(steps, prepend=0) < 0).any():
            raise ValueError(f"steps: got {steps.tolist()}, expected {len(rows)} non-decreasing integers from 0")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "steps", steps)
        if self.levels is not None:
            object.__setattr__(self, "levels", np.array(self.levels, dtype=np.float64))
        self._check()

    @classmethod
    def from_columns(cls, *, steps: ArrayLike | None = None, **columns: Any) -> StepTable:
        """Build a table from named columns; any left out are 0 (c_in 1, slot -1).

        Args:
            steps: as the attribute.
            **columns: one value or R values for columns named in `COLUMNS`, at least one of length R; and the
                attributes learned_variance, initial_scale, integer_time, name, levels, rebuild.

        Example:
            >>> table = StepTable.from_columns(t=[999, 499], p_m=1.0, a_0=1.0)     # the model predicts x0, and x' = x0
            >>> table.num_rows
            2
        """
        options: dict[str, Any] = {name: columns.pop(name) for name in (*_ATTRIBUTES, *_FURTHER) if name in columns}
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise ValueError(f"columns: unknown {', '.join(unknown)}; expected some of {', '.join(COLUMNS)}")
        values: dict[str, NDArray[np.float64]] = {}
        for name, value in columns.items():
            try:
                values[name] = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: got {value!r}, expected a number or one per row") from error
        lengths = {value.shape for value in values.values()} - {()}
        if len(lengths) != 1 or any(len(shape) != 1 for shape in lengths):
            expected = "scalars and at least one vector, all of one length"
            raise ValueError(f"columns: got shapes {sorted(lengths)}, expected {expected}")
        rows = np.zeros((*lengths.pop(), len(COLUMNS)))
        for name, index in _INDEX.items():
            rows[:, index] = values.get(name, _DEFAULTS.get(name, 0.0))
        if steps is not None:
            options["steps"] = np.asarray(steps)
        return cls(rows, **options)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        """float64 [R]: one column by name."""
        if column not in _INDEX:
            raise ValueError(f"column: unknown {column!r}, expected one of {', '.join(COLUMNS)}")
        return self.rows[:, _INDEX[column]]

    def __repr__(self) -> str:
        return f"StepTable({self.name!r}, {self.num_rows} rows, {self.num_steps} steps)"

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """R, the number of model evaluations."""
        return len(self.rows)

    @property
    def num_steps(self) -> int:
        """The number of steps of the run (a step of a two-stage method has two rows)."""
        return int(self.steps[-1]) + 1

    @property
    def num_history(self) -> int:
        """The number of saved tensors, 0 to 3."""
        return int(self["slot"].max()) + 1

    @property
    def saves_states(self) -> bool:
        """Whether all saved tensors are copies of states."""
        saved = self.rows[self["slot"] >= 0][:, [_INDEX[name] for name in ("k_x", "k_0", "k_m")]]
        return bool(len(saved)) and bool((saved == [1, 0, 0]).all())

    @property
    def uses_noise(self) -> bool:
        """Whether any row adds noise."""
        return self.learned_variance or bool(self["s"].any())

    @property
    def uses_x0(self) -> bool:
        """Whether any row adds or saves x0. If none does, a clip changes previews of x0 but no sample."""
        return bool(self["a_0"].any() or self["k_0"].any())

    @property
    def uses_raw_output(self) -> bool:
        """Whether any row adds the blended model output itself (a_m)."""
        return bool(self["a_m"].any())

    @property
    def uses_gradient(self) -> bool:
        """Whether any row adds the gradient of a classifier (p_g, a_g)."""
        return bool(self["p_g"].any() or self["a_g"].any())

    @property
    def uses_unconditional(self) -> bool:
        """Whether any row adds the unconditional output (a_u, CFG++)."""
        return bool(self["a_u"].any())

    def restarted(self, row: int) -> StepTable:
        """The table for a run that begins at a row without a past: this one where no row from there on reads what an
        earlier one saved, else with the rows from there on as `rebuild` has them, those of a multistep method that
        begins with lower orders.

        Raises:
            ValueError: a row within a step, or of a table that nothing can rebuild.
        """
        if row == 0 or not self._unwritten(row):
            return self
        if self.rebuild is None or self.steps[row] == self.steps[row - 1]:
            got = f"row {row} of the table {self.name}, from which on rows read what earlier ones saved"
            raise ValueError(f"start: got {got}, expected a table that is built for a run from there, or a RunState")
        known: dict[int, StepTable] = vars(self).setdefault("_restarted", {})
        if row not in known:
            rows = np.concatenate([self.rows[:row], self.rebuild(row).rows])
            known[row] = replace(self, rows=rows, rebuild=None)
        return known[row]

    def _unwritten(self, start: int = 0) -> dict[int, int]:
        """The rows that read a saved tensor which no row from `start` on wrote before, by tensor: the first of each."""
        slots, found = self["slot"][start:], {}
        for j in range(MAX_HISTORY):
            reads, writes = np.flatnonzero(self[f"a_h{j}"][start:]), np.flatnonzero(slots == j)
            if reads.size and (not writes.size or reads[0] <= writes[0]):
                found[j] = start + int(reads[0])
        return found

    def on(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[R + 1, len(DEVICE_COLUMNS)] on `device`: the rows rounded once, with the rests of p_x, p_m and a_x, and a
        last row of defaults that the final step looks ahead to."""
        end = np.array([[_DEFAULTS.get(name, 0.0) for name in COLUMNS]])
        exact = torch.from_numpy(np.concatenate([self.rows, end]))
        rest = (exact - exact.to(dtype).double())[:, [_INDEX[name] for name in _IN_TWO_PARTS]]
        return torch.cat([exact, rest], dim=1).to(dtype).to(device)

    def explain(self) -> str:
        """The table as text: its size, saved tensors and noise, and a line for every row, without terms that are 0."""
        kept = f"{self.num_history} saved tensor{'s' * (self.num_history != 1)}"
        noise = "learned variance" if self.learned_variance else "noise" if self.uses_noise else "no noise"
        lines = [f"{self.name}: {self.num_rows} rows in {self.num_steps} steps, {kept}, {noise}"]
        lines += [f"the state starts at {self.initial_scale:g} times the starting noise"]
        for step, row in zip(self.steps.tolist(), self.rows.tolist(), strict=True):
            c = dict(zip(COLUMNS, row, strict=True))
            x0 = _sum({"x": c["p_x"], "m": c["p_m"]})
            update = {"x": c["a_x"], "x0": c["a_0"], "m": c["a_m"], "u": c["a_u"]}
            update |= {f"h{j}": c[f"a_h{j}"] for j in range(MAX_HISTORY)} | {"z": c["s"]}
            line = f"step {step}: t = {c['t']:g}, model input {_sum({'x': c['c_in']})}; x0 = {x0}; x' = {_sum(update)}"
            if self.learned_variance and c["l_0"] != NO_NOISE:
                line += f" + 2^({_sum({'v': c['l_v']})} {c['l_0']:+.4g}) z"
            if c["slot"] >= 0:
                line += f"; h{c['slot']:.0f} <- {_sum({'x': c['k_x'], 'x0': c['k_0'], 'm': c['k_m']})}"
            lines.append(line)
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the coefficients of x', of the saved tensors and of x0 over the rows, without columns that are 0, as a
        PNG, whole or not at all. ImportError without matplotlib (the extra "bench" has it)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("StepTable.plot needs matplotlib: pip install 'fastcfg[bench]'") from error
        panels = {"x' =": "a_x a_0 a_m a_u a_h0 a_h1 a_h2 s", "h <-": "k_x k_0 k_m", "x0 =": "p_x p_m"}
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axes, (title, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for column in columns.split():
                if self[column].any():
                    axes.plot(self[column], marker="o", markersize=3, linewidth=1, label=column)
            axes.set(title=title, xlabel="row", yscale="symlog" if np.abs(self.rows[:, 2:]).max() > 100 else "linear")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small")
        figure.suptitle(f"{self.name}: {self.num_rows} rows, {self.num_history} saved tensors")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=80, format="png")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all: the attributes but for `rebuild`, the columns' names and the
        rows. OSError if the file cannot be written."""
        attributes = {name: getattr(self, name) for name in _ATTRIBUTES}
        rows: dict[str, Any] = {"steps": self.steps.tolist(), "columns": list(COLUMNS), "rows": self.rows.tolist()}
        rows["levels"] = None if self.levels is None else self.levels.tolist()
        write_text(path, json.dumps({"format": _FORMAT, **attributes, **rows}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTable:
        """A table that `save` wrote, to the last bit; OSError or ValueError for another file.

        Example:
            >>> import os, tempfile
            >>> table = StepTable.from_columns(t=[999, 499], p_m=1.0, a_0=1.0)
            >>> path = os.path.join(tempfile.mkdtemp(), "table.json")
            >>> table.save(path)
            >>> bool((StepTable.load(path).rows == table.rows).all())
            True
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != _FORMAT or found["columns"] != list(COLUMNS):
                raise ValueError(f"got format {found['format']!r} and columns {found['columns']}")
            rows, steps = np.array(found["rows"], dtype=np.float64), np.array(found["steps"], dtype=np.int64)
            options = {name: found[name] for name in _ATTRIBUTES}
            return cls(rows, steps=steps, levels=found.get("levels"), **options)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a table of this version of fastcfg ({error})") from error

    def _check(self) -> None:
        if bad := [name for name in COLUMNS if not np.isfinite(self[name]).all()]:
            hint = "; alphas_cumprod reaches 0, which ε-prediction cannot invert: use v-prediction"
            raise ValueError(f"rows of {self.name}: non-finite values in {', '.join(bad)}{hint * ('p_m' in bad)}")
        check_finite("initial_scale", self.initial_scale, least=0)
        if (self["s"] < 0).any():
            raise ValueError(f"s of {self.name}: got {self['s'].min():g}, expected at least 0")
        slots = self["slot"]
        if not np.isin(slots, range(-1, MAX_HISTORY)).all():
            raise ValueError(f"slot of {self.name}: got {np.unique(slots).tolist()}, expected -1 ... {MAX_HISTORY - 1}")
        for j, row in self._unwritten().items():
            raise ValueError(f"a_h{j} of {self.name}: row {row} reads a saved tensor that no earlier row wrote")
        levels = self.levels
        if levels is not None and (levels.shape != (self.num_rows + 1, 2) or not np.isfinite(levels).all()):
            expected = f"finite values of shape {(self.num_rows + 1, 2)}"
            raise ValueError(f"levels of {self.name}: got shape {levels.shape}, expected {expected}")


def _sum(terms: dict[str, float]) -> str:
    """The terms that are not 0, with four digits."""
    parts = [f"{value:+.4g} {name}" for name, value in terms.items() if value]
    return " ".join(parts).removeprefix("+") or "0"
