"""Runs that start and stop at a row: image to image, and runs in two parts, which have the bits of the run in one."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.captured_cases import GUIDANCES, SCHEDULE, SHAPE, Model, conditioning, gradient, halve
from support.captured_cases import TABLES as CAPTURED_TABLES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcfg import CFG, DynamicThreshold, RunState, Sampler, Schedule, StepTable, inpaint, sigmas, solvers
from fastcfg.reference.philox import INITIAL_STREAM, philox_normal, sample_seeds
from fastcfg.solvers import Denoiser
from fastcfg.table import COLUMNS

LEVELS = sigmas.karras(6, 0.1, 8.0)
DENOISER = Denoiser("epsilon", schedule=Schedule.named("scaled_linear", 100))
IMAGE = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(SHAPE)

ON_LEVELS = ["euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "lms", "dpmpp_2m"]
ON_LEVELS += ["dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis", "sa_solver", "euler_cfg_pp", "euler_ancestral_cfg_pp"]
TABLES: dict[str, StepTable] = {
    **CAPTURED_TABLES,
    **{name: getattr(solvers, name)(LEVELS, denoiser=DENOISER) for name in ON_LEVELS},
    "unipc 3": solvers.unipc(LEVELS, order=3, denoiser=DENOISER),
    "churned heun": solvers.heun(LEVELS, s_churn=3.0, denoiser=DENOISER),
    "lcm": solvers.lcm(SCHEDULE),
    "tcd": solvers.tcd(Schedule.named("linear", 100), [99, 70, 40, 10]),
    "ddim_cfg_pp": solvers.ddim_cfg_pp(SCHEDULE),
}
# One option each, over the tables in turn.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"graph": True, "noise_source": "torch"},
    {"backend": "triton"},
    {"dtype": torch.float16, "graph": True},
    {"dtype": torch.bfloat16},
    {"state_dtype": torch.float64, "backend": "reference"},
    {"graph": True, "rows_per_graph": 2},
    {"clip": DynamicThreshold()},
    {"noise_source": "torch", "batching": "serial"},
]


def sampler(table: StepTable, guidance: Any = "cfg", **options: Any) -> Sampler:
    spec = GUIDANCES[guidance] if isinstance(guidance, str) else guidance
    dtype = options.get("dtype", options.get("state_dtype", torch.float32))
    model = Model(table.learned_variance, dtype)
    return Sampler(model, table, guidance=spec, **{"clip": 1.0, "graph": False, **options})


def given(sampler: Sampler, **options: Any) -> dict[str, Any]:
    return {"branches": conditioning(sampler.guidance, sampler.config.dtype), "seed": 3, **options}


def in_two_parts(sampler: Sampler, stop: int, other: Sampler | None = None, **options: Any) -> Tensor:
    arguments = given(sampler, **options)
    state = sampler.export(SHAPE, stop=stop, **arguments)
    arguments = {name: value for name, value in arguments.items() if name not in ("seed", "generator", "init", "start")}
    return (other or sampler).resume(state, **arguments)


@pytest.mark.parametrize("number", range(len(TABLES)), ids=list(TABLES))
def test_a_run_in_two_parts_is_the_run_in_one_piece(number: int) -> None:
    """For every solver, stopped at every row, each part by a sampler of its own."""
    table, options = list(TABLES.values())[number], OPTIONS[number % len(OPTIONS)]
    first, second = sampler(table, **options), sampler(table, **options)
    whole = first.sample(SHAPE, **given(first))
    for stop in range(1, table.num_rows):
        assert torch.equal(in_two_parts(first, stop, second), whole), stop
    assert torch.equal(first.sample(SHAPE, **given(first)), whole)


@pytest.mark.parametrize("guidance", ["none", "sum per sample", "interval", "by progress", "compose", "apg"])
@pytest.mark.parametrize("graph", [False, True])
def test_guidance_goes_on_where_it_was(guidance: str, graph: bool) -> None:
    options = {"graph": True, "rows_per_graph": 2, "noise_source": "torch"} if graph else {}
    one = sampler(TABLES["ddpm learned"], guidance, **options)
    whole = one.sample(SHAPE, **given(one))
    for stop in (1, 3, 4):
        assert torch.equal(in_two_parts(one, stop), whole), stop


@pytest.mark.parametrize("functions", [{"denoised_fn": halve}, {"cond_fn": gradient}], ids=["denoised_fn", "cond_fn"])
def test_functions_go_on(functions: dict[str, Any]) -> None:
    one = sampler(TABLES["ddpm fixed_small"], graph=True, **functions)
    whole = one.sample(SHAPE, **given(one))
    assert torch.equal(in_two_parts(one, 2), whole)
    assert not torch.equal(sampler(TABLES["ddpm fixed_small"]).sample(SHAPE, **given(one)), whole)


@pytest.mark.parametrize("table", ["unipc 3", "ddim eta x0", "sa_solver"])
def test_three_parts_each_another_samplers(table: str) -> None:
    whole = sampler(TABLES[table]).sample(SHAPE, **given(sampler(TABLES[table])))
    one, two, three = (sampler(TABLES[table]) for _ in range(3))
    arguments = given(one)
    state = one.export(SHAPE, stop=2, **arguments)
    del arguments["seed"]
    state = two.export(state.shape, state=state, stop=4, **arguments)
    assert torch.equal(three.resume(state, **arguments), whole)


@pytest.mark.parametrize("source", ["philox", "torch"])
def test_a_saved_state_goes_on_in_another_process(source: str, tmp_path: Path) -> None:
    table = solvers.dpmpp_2m_sde(LEVELS)
    table.save(tmp_path / "table.json")
    one = Sampler(lambda x, t: x / (1 + x * x), table, noise_source=source)
    one.export(SHAPE, stop=3, seed=[5, 2**63]).save(tmp_path / "state.safetensors")
    script = f"""
import torch
from fastcfg import RunState, Sampler, StepTable
table, state = StepTable.load("table.json"), RunState.load("state.safetensors")
one = Sampler(lambda x, t: x / (1 + x * x), table, noise_source={source!r})
torch.save(one.resume(state), "samples.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "samples.pt"), one.sample(SHAPE, seed=[5, 2**63]))


def test_a_file_has_all_of_a_state_and_others_are_refused(tmp_path: Path) -> None:
    one = sampler(TABLES["unipc 3"], "apg", noise_source="torch")
    state = one.export(SHAPE, stop=3, **given(one))
    state.save(tmp_path / "state")
    loaded = RunState.load(tmp_path / "state")
    assert (loaded.row, loaded.began, loaded.table, loaded.noise) == (3, 0, state.table, "none")
    assert loaded.tensors().keys() == {"x", "history", "momentum", "generators"}
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in state.tensors().items())
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ValueError, match="not a RunState of this version"):
        RunState.load(tmp_path / "other")
    with pytest.raises(OSError):
        RunState.load(tmp_path / "none")


def test_noise_without_a_seed_goes_on_where_torchs_generator_was() -> None:
    one = sampler(TABLES["ddim eta x0"], noise_source="torch")
    arguments = {**given(one), "seed": None}
    torch.manual_seed(5)
    whole = one.sample(SHAPE, **arguments)
    torch.manual_seed(5)
    state = one.export(SHAPE, stop=2, **arguments)
    torch.randn(7)
    del arguments["seed"]
    assert torch.equal(one.resume(state, **arguments), whole)


@pytest.mark.parametrize("source", ["philox", "brownian"])
@pytest.mark.parametrize("stop", [1, 4])
def test_known_pixels_go_on_with_the_seeds_where_no_row_adds_noise(source: str, stop: int) -> None:
    run = sampler(TABLES["ddim"], state_fn=inpaint(torch.zeros(1, 1, 4, 4), IMAGE), noise_source=source)
    whole = run.sample(SHAPE, **given(run))
    assert torch.equal(in_two_parts(run, stop), whole)
    # The last state is that of its row, whatever came before.
    plain = sampler(TABLES["ddim"], noise_source=source)
    assert torch.equal(in_two_parts(plain, stop, run), whole)
    state = plain.export(SHAPE, stop=stop, x_T=IMAGE, branches=given(run)["branches"])
    with pytest.raises(ValueError, match="state: got one of a run without seeds"):
        run.resume(state, branches=given(run)["branches"])


def test_recorded_noise_is_given_again() -> None:
    one = sampler(TABLES["ddim eta x0"])
    noise = torch.randn(one.table.num_rows, *SHAPE, generator=torch.Generator().manual_seed(1))
    whole = one.sample(SHAPE, **given(one, noise=noise))
    assert torch.equal(in_two_parts(one, 3, noise=noise), whole)
    state = one.export(SHAPE, stop=3, **given(one, noise=noise))
    with pytest.raises(ValueError, match="state: got noise_source 'philox', expected noise=, as recorded"):
        one.resume(state, branches=given(one)["branches"])


@pytest.mark.parametrize("name", ["ddim", "ddpm fixed_large v", "heun", "langevin", "dpm2_ancestral"])
@pytest.mark.parametrize("graph", [False, True])
def test_rows_without_history_go_on_from_the_state_alone(name: str, graph: bool) -> None:
    one = sampler(TABLES[name], graph=graph)
    arguments = given(one)
    half = one.sample(SHAPE, stop=2, **arguments)
    assert torch.equal(one.sample(SHAPE, start=2, x_T=half, **arguments), one.sample(SHAPE, **arguments))


class Operations(TorchDispatchMode):
    """The names of the operations of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = [[]]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.rows[-1].append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m_sde", "ddpm learned"])
@pytest.mark.parametrize("source", ["philox", "torch"])
def test_a_row_costs_what_it_costs_in_a_whole_run(name: str, source: str) -> None:
    one = sampler(TABLES[name], noise_source=source)

    def operations(**options: Any) -> list[list[str]]:
        run = one.start(SHAPE, **given(one, **options))
        with Operations() as seen:
            for _ in run.rows():
                seen.rows.append([])
        if source == "torch" and seen.rows[0][0] == "aten.unbind.int":  # of the noise's buffers, once
            del seen.rows[0][0]
        return seen.rows[:-1]

    whole = operations()
    assert operations(init=IMAGE, start=2, stop=4) == whole[2:4]
    assert len(whole[2]) > 8
    state = one.export(SHAPE, stop=2, **given(one))
    rest = {"seed": None, "state": state}
    assert operations(**rest) == whole[2:]
    passes = [decision["passes"] for decision in one.report()["programs"]]
    one.sample(SHAPE, **given(one))
    assert passes == [decision["passes"] for decision in one.report()["programs"]]


def test_a_start_shares_the_programs_of_a_whole_run() -> None:
    one = sampler(TABLES["heun"], graph=True)
    one.sample(SHAPE, **given(one))
    one.sample(SHAPE, init=IMAGE, strength=0.5, **given(one))
    one.sample(SHAPE, init=IMAGE, start=4, stop=6, **given(one))
    assert one.report()["captures"] == 1
    assert one.report()["rows"] == 2


# Their rows do not keep the process's variance.
OTHERS = ("ddpm fixed_large v", "langevin", "sgld", "lcm")
KEEPING = [name for name, table in TABLES.items() if table.levels is not None and not table.learned_variance]


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in KEEPING if name not in OTHERS])
def test_levels_are_those_of_a_perfect_models_states(name: str) -> None:
    """A model that knows image and noise leads from each step's state to one with the next level's signal and noise."""
    table, levels = TABLES[name], TABLES[name].levels
    basis = np.eye(2 + table.num_rows)  # x0, the start's noise, and each row's
    ends = {*np.flatnonzero(np.diff(table.steps, prepend=-1)), table.num_rows}
    x, history = levels[0] @ basis[:2], np.zeros((4, len(basis)))
    for row in range(table.num_rows):
        c = {column: table[column][row] for column in COLUMNS}
        m = (basis[0] - c["p_x"] * x) / c["p_m"]
        saved = sum(c[f"a_h{j}"] * history[j] for j in range(3)) + c["s"] * basis[2 + row]
        moved = c["a_x"] * x + c["a_0"] * basis[0] + (c["a_m"] + c["a_u"]) * m + saved
        history[int(c["slot"])] = c["k_x"] * x + c["k_0"] * basis[0] + c["k_m"] * m
        x = moved
        if row + 1 in ends:
            assert np.allclose([x[0], np.linalg.norm(x[1:])], levels[row + 1], rtol=0, atol=1e-12), row


def noised(table: StepTable, row: int) -> Tensor:
    """The image with the starting noise of seed 3 at a row's level, which p_x and p_m of ε-prediction tell."""
    noise = philox_normal(sample_seeds(3, 2), SHAPE[1:], stream=INITIAL_STREAM)
    return (IMAGE - table["p_m"][row] * noise) / table["p_x"][row]


@pytest.mark.parametrize("name", ["ddim", "ddim_extrapolated", "plms", "heun", "dpmpp_2m", "unipc 3", "deis", "lms"])
def test_image_to_image_is_a_run_of_the_steps_left(name: str) -> None:
    """Their own table, with a start by hand, gives the same samples: a multistep solver begins with lower orders."""
    build, levels, options = {
        "ddim": (solvers.ddim, SCHEDULE, {}),
        "ddim_extrapolated": (solvers.ddim_extrapolated, SCHEDULE, {}),
        "plms": (solvers.plms, SCHEDULE, {}),
        "heun": (solvers.heun, LEVELS, {"denoiser": DENOISER}),
        "dpmpp_2m": (solvers.dpmpp_2m, LEVELS, {"denoiser": DENOISER}),
        "unipc 3": (solvers.unipc, LEVELS, {"denoiser": DENOISER, "order": 3}),
        "deis": (solvers.deis, LEVELS, {"denoiser": DENOISER}),
        "lms": (solvers.lms, LEVELS, {"denoiser": DENOISER}),
    }[name]
    one = sampler(TABLES[name])
    row = int(np.searchsorted(one.table.steps, 2))
    left = build(SCHEDULE.respace(range(3)) if levels is SCHEDULE else levels[2:], **options)
    arguments = given(one)
    want = sampler(left).sample(SHAPE, x_T=noised(one.table, row), **arguments)
    got = one.sample(SHAPE, init=IMAGE, start=row, **arguments)
    assert torch.allclose(got, want, atol=2e-6, rtol=0)
    assert not torch.allclose(got, one.sample(SHAPE, init=-IMAGE, start=row, **arguments), atol=1e-3)


@pytest.mark.parametrize("graph", [False, True])
def test_a_later_start_of_a_multistep_solver_is_exported_too(graph: bool) -> None:
    one = sampler(TABLES["unipc 3"], graph=graph)
    whole = one.sample(SHAPE, **given(one, init=IMAGE, start=1))
    for stop in (2, 3, 5):
        assert torch.equal(in_two_parts(one, stop, init=IMAGE, start=1), whole), stop


def test_guidance_and_noise_of_a_later_start_are_those_of_its_rows() -> None:
    for name in ("ddim eta x0", "dpmpp_2m_sde"):
        table = TABLES[name]
        seen: list[float] = []
        one = sampler(table, CFG(partial(recorded, seen)))
        rows = [(step.row, step.step, step.t) for step in one.iterate(SHAPE, **given(one, init=IMAGE, start=3))]
        assert rows == [(row, row, pytest.approx(table["t"][row])) for row in range(3, table.num_rows)]
        assert seen == [row / table.num_rows for row in range(table.num_rows)]
        noise = torch.zeros(table.num_rows, *SHAPE)
        still = one.sample(SHAPE, **given(one, init=IMAGE, start=3, noise=noise))
        noise[:3] = 1e6
        assert torch.equal(one.sample(SHAPE, **given(one, init=IMAGE, start=3, noise=noise)), still)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("strength", "row"), [(1, 0), (1.0, 0), (0.99, 2), (0.5, 6), (np.float32(0.5), 6), (torch.tensor(0.17), 10)]
)
def test_strength_is_diffusers_share_of_the_steps(strength: Any, row: int) -> None:
    table = TABLES["heun"]  # 6 steps, 11 rows
    one = Sampler(lambda x, t: x, table, graph=False)
    run = one.start(SHAPE, init=IMAGE, strength=strength, seed=0)
    assert run.span.rows == range(row, 11)


def test_observers_see_the_rows_that_are_run() -> None:
    one, seen, previews = sampler(TABLES["ddim"]), [], []
    arguments = given(one, init=IMAGE, start=1, stop=4)
    result = one.sample(SHAPE, callback=seen.append, preview=previews.append, preview_every=2, **arguments)
    assert [step.row for step in seen] == [1, 2, 3]
    assert [preview.row for preview in previews] == [2, 3]
    assert torch.equal(seen[-1].x, result)
    bar = Bar()
    one.sample(SHAPE, progress=bar, **arguments)
    assert bar.count == 3


def recorded(seen: list[float], progress: float) -> float:
    seen.append(progress)
    return 1.5


class Bar:
    count = 0

    def update(self, count: int) -> None:
        self.count += count


def test_adaptive_guidance_starts_and_stops_but_is_not_exported() -> None:
    one = sampler(TABLES["ddim"], "adaptive")
    arguments = given(one)
    assert torch.equal(one.sample(SHAPE, stop=5, **arguments), one.sample(SHAPE, **arguments))
    one.sample(SHAPE, init=IMAGE, start=2, **arguments)
    with pytest.raises(ValueError, match="export: got adaptive guidance"):
        one.export(SHAPE, stop=2, **arguments)


def test_tables_with_a_rebuilder_are_copied_and_pickled() -> None:
    table = TABLES["dpmpp_2m"]
    for other in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert (other.restarted(2).rows == table.restarted(2).rows).all()
    assert table.restarted(2) is table.restarted(2)
    tau = solvers.sa_solver(LEVELS, tau=np.linspace(0, 1, 6))
    assert (tau.restarted(2).rows[2:] == solvers.sa_solver(LEVELS[2:], tau=np.linspace(0, 1, 6)[2:]).rows).all()


@pytest.mark.quick
def test_what_does_not_fit_is_refused_before_any_work() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    ddim, heun = solvers.ddim(SCHEDULE), TABLES["heun"]
    state = Sampler(lambda x, t: x, ddim, graph=False).export(SHAPE, stop=2, seed=0)
    ended = Sampler(lambda x, t: x, ddim, graph=False).export(SHAPE, stop=5, seed=0)
    noisy = Sampler(lambda x, t: x, TABLES["lcm"], graph=False).export(SHAPE, stop=2, seed=0)
    unknown = StepTable.from_columns(t=[1, 0], a_0=1.0)
    history = TABLES["history"]
    cases: list[tuple[StepTable, dict[str, Any], str]] = [
        (ddim, {"start": 2}, "start: got 2 alone, expected it with init"),
        (ddim, {"start": 5, "init": IMAGE}, "start: got 5, expected a row from 0 to 4"),
        (ddim, {"start": -1, "init": IMAGE}, "start: got -1"),
        (ddim, {"start": 1.0, "init": IMAGE}, "start: got 1.0"),
        (ddim, {"start": 2, "stop": 2, "init": IMAGE}, "stop: got 2, expected a row from 3 to 5"),
        (ddim, {"stop": 6}, "stop: got 6"),
        (ddim, {"strength": 0.5}, "strength: got 0.5 with no init"),
        (ddim, {"strength": 0.5, "start": 1, "init": IMAGE}, "strength: got 0.5 with start"),
        (ddim, {"strength": 0.1, "init": IMAGE}, "strength: got 0.1, expected 1 / 5 to 1"),
        (ddim, {"strength": 1.1, "init": IMAGE}, "strength: got 1.1"),
        (ddim, {"strength": float("nan"), "init": IMAGE}, "strength: got nan"),
        (ddim, {"init": IMAGE, "x_T": IMAGE}, "init: got an image beside x_T"),
        (ddim, {"init": IMAGE[:1]}, r"init: got shape \(1, 3, 4, 4\)"),
        (ddim, {"init": 3}, "init: got int"),
        (unknown, {"init": IMAGE}, "init: got an image with the table table, expected x_T"),
        (heun, {"init": IMAGE, "start": 3}, "start: got row 3 of the table heun, from which on"),
        (history, {"x_T": IMAGE, "start": 2}, "start: got row 2 of the table"),
        (ddim, {"state": 3}, "state: got int, expected a RunState"),
        (heun, {"state": state}, "state: got one of another table, expected one of heun with 11 rows"),
        (ddim, {"state": state, "start": 2, "init": IMAGE}, "state: got one beside start, init"),
        (ddim, {"state": ended}, "state: got one after the last row, 4"),
        (ddim, {"state": state, "stop": 2}, "stop: got 2, expected a row from 3 to 5"),
        (TABLES["lcm"], {"state": noisy, "seed": 1}, "state: got one beside a seed"),
        (
            TABLES["lcm"],
            {"state": noisy, "noise": lambda row, shape: IMAGE},
            "noise: got some beside a state",
        ),
        (ddim, {"state": replace(state, x=state.x.double())}, "state: got torch.float64, expected torch.float32"),
    ]
    for table, arguments, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            Sampler(never, table, graph=False).sample(SHAPE, **arguments)
    with pytest.raises(ValueError, match="shape: got"):
        Sampler(never, ddim, graph=False).sample((1, 3, 4, 4), state=state)
    with pytest.raises(ValueError, match="state: got noise_source 'torch', expected 'philox'"):
        Sampler(never, TABLES["lcm"], graph=False, noise_source="torch").resume(noisy)
    with pytest.raises(TypeError, match="export: got callback"):
        Sampler(never, ddim).export(SHAPE, stop=2, callback=print)
