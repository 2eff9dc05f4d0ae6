"""StepTable: columns by name, what it derives from them, and what it refuses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcfg import Schedule, StepTable, solvers
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

pytestmark = pytest.mark.quick


def test_columns_left_out_are_neutral() -> None:
    table = StepTable.from_columns(t=[9, 4, 0], p_m=[1.0, 2.0, 3.0], a_0=0.5)
    assert table.rows.dtype == np.float64
    assert table["t"].tolist() == [9, 4, 0]
    assert table["p_m"].tolist() == [1, 2, 3]
    assert table["a_0"].tolist() == [0.5] * 3
    assert table["c_in"].tolist() == [1] * 3
    assert table["slot"].tolist() == [-1] * 3
    others = set(COLUMNS) - {"t", "p_m", "a_0", "c_in", "slot"}
    assert not any(table[name].any() for name in others)
    assert table.steps.tolist() == [0, 1, 2]
    assert (len(table), table.num_rows, table.num_steps, table.num_history) == (3, 3, 3, 0)
    assert (table.learned_variance, table.initial_scale, table.integer_time, table.name) == (False, 1.0, True, "table")


def test_attributes_are_given_beside_columns() -> None:
    options: dict[str, Any] = {"learned_variance": True, "initial_scale": 80.0, "integer_time": False, "name": "edm"}
    table = StepTable.from_columns(t=[1, 0], steps=[0, 0], **options)
    assert {name: getattr(table, name) for name in options} == options
    assert table.steps.tolist() == [0, 0]
    assert (table.num_rows, table.num_steps) == (2, 1)


def test_a_table_owns_its_rows() -> None:
    rows = StepTable.from_columns(t=[1, 0]).rows
    table = StepTable(rows)
    rows[:] = 7
    assert table["t"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "name", "want"),
    [
        ({}, "uses_noise", False),
        ({"s": [0.0, 0.1]}, "uses_noise", True),
        ({"learned_variance": True}, "uses_noise", True),
        ({}, "uses_raw_output", False),
        ({"a_m": [0.0, -1.0]}, "uses_raw_output", True),
        ({}, "uses_unconditional", False),
        ({"a_u": [-1.0, 0.0]}, "uses_unconditional", True),
        ({"k_x": 1.0}, "saves_states", False),
        ({"k_x": [1.0, 0.0], "slot": [0, -1]}, "saves_states", True),
        ({"k_x": [1.0, 0.5], "slot": [0, 0]}, "saves_states", False),
        ({"k_x": 1.0, "k_m": 0.1, "slot": [0, -1]}, "saves_states", False),
        ({"slot": [0, -1]}, "num_history", 1),
        ({"slot": [0, 1]}, "num_history", 2),
        ({"slot": [2, 0]}, "num_history", 3),
    ],
)
def test_what_a_table_uses(columns: dict[str, Any], name: str, want: object) -> None:
    got = getattr(StepTable.from_columns(t=[1, 0], **columns), name)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_rounds_once_and_looks_ahead_to_a_neutral_row(dtype: torch.dtype) -> None:
    table = StepTable.from_columns(t=[999, 0], a_x=[1 / 3, 2 / 3], c_in=0.1, p_x=[157.3, 1.1], p_m=-0.3, slot=[0, -1])
    tensor = table.on("cpu", dtype)
    assert tensor.dtype == dtype
    assert tensor.shape == (3, len(DEVICE_COLUMNS))
    assert torch.equal(tensor[:2, : len(COLUMNS)], torch.tensor(table.rows.tolist(), dtype=dtype))
    parts = tensor[:2].double()
    for column in ("p_x", "p_m", "a_x"):
        both = parts[:, COLUMNS.index(column)] + parts[:, DEVICE_COLUMNS.index(f"{column}_rest")]
        np.testing.assert_allclose(both, table[column], rtol=2e-15)  # measured: 8.9e-16
    neutral = dict(zip(DEVICE_COLUMNS, tensor[2].tolist(), strict=True))
    assert neutral.pop("c_in") == 1
    assert neutral.pop("slot") == -1
    assert not any(neutral.values())
    assert table.on("cpu").dtype == torch.float32


def test_a_saved_tensor_may_be_read_after_it_was_written() -> None:
    table = StepTable.from_columns(t=[3, 2, 1], slot=[0, 1, 0], a_h0=[0, 1, 1], a_h1=[0, 0, 1])
    assert table.num_history == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a_h0": [0, 1]}, r"a_h0 of table: row 1 reads a saved tensor that no earlier row wrote"),
        ({"a_h0": [1, 0], "slot": [0, -1]}, r"a_h0 of table: row 0 reads"),
        ({"a_h1": [0, 1], "slot": [-1, 1]}, r"a_h1 of table: row 1 reads"),
        ({"a_h1": [0, 1], "slot": [0, -1]}, r"a_h1 of table: row 1 reads"),
        ({"slot": [3, -1]}, r"slot of table: got \[-1.0, 3.0\], expected -1 \.\.\. 2"),
        ({"slot": [-2, -1]}, r"slot of table: got \[-2.0, -1.0\]"),
        ({"slot": [0.5, -1]}, r"slot of table: got \[-1.0, 0.5\]"),
        ({"s": [-0.1, 0.0]}, r"s of table: got -0.1, expected at least 0"),
        ({"a_x": [np.nan, 0.0]}, r"rows of table: non-finite values in a_x$"),
        ({"p_x": [np.inf, 0.0], "p_m": -np.inf}, r"non-finite values in p_x, p_m; alphas_cumprod reaches 0, .*v-pred"),
        ({"name": "mine", "s": np.inf}, r"rows of mine: non-finite values in s"),
        ({"initial_scale": -1.0}, r"initial_scale: got -1.0, expected a finite value of at least 0"),
        ({"initial_scale": np.nan}, r"initial_scale: got nan"),
        ({"steps": [1, 0]}, r"steps: got \[1, 0\], expected 2 non-decreasing integers"),
        ({"steps": [0]}, r"steps: got \[0\], expected 2 non-decreasing integers"),
        ({"steps": [-1, 0]}, r"steps: got \[-1, 0\], expected 2 non-decreasing integers from 0"),
        ({"a_x0": 1.0, "q": 2.0}, r"columns: unknown a_x0, q; expected some of c_in, t, "),
        ({"a_x": "x"}, r"a_x: got 'x', expected a number or one per row"),
        ({"a_x": [1.0, 2.0, 3.0]}, r"columns: got shapes \[\(2,\), \(3,\)\]"),
        ({"a_x": [[1.0, 2.0]]}, r"columns: got shapes \[\(1, 2\), \(2,\)\]"),
    ],
)
def test_bad_columns_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepTable.from_columns(t=[1, 0], **columns)


def test_columns_need_a_length() -> None:
    with pytest.raises(ValueError, match=r"columns: got shapes \[\], expected scalars and at least one vector"):
        StepTable.from_columns(t=0, a_x=1.0)


@pytest.mark.parametrize("shape", [(0, len(COLUMNS)), (2, len(COLUMNS) - 1), (len(COLUMNS),)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows: got shape .*, expected \[R >= 1, 20\]"):
        StepTable(np.zeros(shape))


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"column: unknown 'sigma', expected one of c_in, t, "):
        StepTable.from_columns(t=[0])["sigma"]


def test_a_table_is_saved_and_loaded_to_the_last_bit(tmp_path: Path) -> None:
    schedule = Schedule.named("squaredcos_cap_v2").respace(7)
    for table in (solvers.ddpm(schedule), solvers.plms(schedule), solvers.prk(schedule), solvers.heun([5.0, 1.3, 0.0])):
        table.save(tmp_path / "table.json")
        loaded = StepTable.load(tmp_path / "table.json")
        assert np.array_equal(loaded.rows, table.rows)
        assert np.array_equal(loaded.steps, table.steps)
        for name in ("learned_variance", "initial_scale", "integer_time", "name"):
            assert getattr(loaded, name) == getattr(table, name)


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"columns": ["t"]}, {"rows": [[1.0]]}, {"steps": [3, 1]}, {"name": None}], ids=str
)
def test_what_is_no_table_is_not_loaded(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    StepTable.from_columns(t=[999, 499], p_m=1.0, a_0=1.0).save(path)
    found = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    with pytest.raises(ValueError, match=r"table.json: not a table of this version"):
        StepTable.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a table"):
        StepTable.load(path)


def test_a_table_explains_itself() -> None:
    columns = {
        "t": [9, 5, 1],
        "c_in": [0.5, 1, 1],
        "p_x": 2.0,
        "p_m": [-1.0, -1.0, 0.0],
        "a_x": [0.25, 0.0, 1.0],
        "a_0": 1.0,
    }
    saved = {"a_h1": [0, 0, -0.125], "slot": [0, 1, -1], "k_0": [1, 1, 0], "s": [0.75, 0, 0]}
    table = StepTable.from_columns(**columns, **saved, steps=[0, 0, 1], initial_scale=14.5, name="mine")
    assert table.explain().splitlines() == [
        "mine: 3 rows in 2 steps, 2 saved tensors, noise",
        "the state starts at 14.5 times the starting noise",
        "step 0: t = 9, model input 0.5 x; x0 = 2 x -1 m; x' = 0.25 x +1 x0 +0.75 z; h0 <- 1 x0",
        "step 0: t = 5, model input 1 x; x0 = 2 x -1 m; x' = 1 x0; h1 <- 1 x0",
        "step 1: t = 1, model input 1 x; x0 = 2 x; x' = 1 x +1 x0 -0.125 h1",
    ]
    learned = solvers.ddpm(Schedule.named("linear").respace(3)).explain().splitlines()
    assert learned[0].endswith("0 saved tensors, learned variance")
    assert "+ 2^(" in learned[2]
    assert "2^(" not in learned[-1]


def test_a_plot_shows_every_column_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from PIL import Image

    shown: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: (shown.append(k["label"]), plot(self, *a, **k))[1])
    table = StepTable.from_columns(t=[2, 1, 0], p_m=1.0, a_0=[0.1, 0.2, 0.3], slot=[0, -1, -1], k_0=1.0, a_h0=[0, 1, 0])
    table.plot(tmp_path / "table.png")
    assert shown == ["a_0", "a_h0", "k_0", "p_m"]
    assert Image.open(tmp_path / "table.png").size[0] > 500
    with pytest.raises(OSError, match="absent"):
        table.plot(tmp_path / "absent" / "table.png")


def test_a_table_is_short_in_print_and_whole_in_a_pickle() -> None:
    table = StepTable.from_columns(t=[2, 1, 0], p_m=1.0, a_0=1.0, steps=[0, 0, 1], name="heun", initial_scale=2.0)
    assert repr(table) == "StepTable('heun', 3 rows, 2 steps)"
    copy = pickle.loads(pickle.dumps(table))
    assert (copy.name, copy.initial_scale, copy.steps.tolist()) == ("heun", 2.0, [0, 0, 1])
    assert (copy.rows == table.rows).all()
