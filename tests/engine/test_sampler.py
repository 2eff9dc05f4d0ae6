"""The sampler's loop: right results over every kind of table and guidance, no stale buffers, errors before any work.

The models are made of operations whose result at an element does not depend on where it lies in memory, so that runs of
different batches can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.native import CPU_BACKEND
from torch import Tensor, nn

from fastcfg import CFG, Compose, Guidance, NoGuidance, Sampler, Schedule, StepTable, solvers
from fastcfg.engine.program_cache import MAX_ENTRIES
from fastcfg.reference.philox import INITIAL_STREAM, STEP_STREAM, philox_normal, sample_seeds
from fastcfg.reference.plain import PlainTable
from fastcfg.step import StepSpec

B, SHAPE = 3, (3, 2, 8, 8)


def rational(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A model of one condition y [B]: bounded, and sensitive to all of its inputs."""
    ones = [1] * (x.ndim - 1)
    z = 0.9 * x + 0.5 * y.to(x.dtype).view(-1, *ones) - 0.001 * t.to(x.dtype).view(-1, *ones)
    return z / (1 + z * z)


def with_variance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The same with variance channels."""
    m = rational(x, t, y)
    return torch.cat([m, m * m - 0.5], dim=1)


class Affine(nn.Module):
    """The same with a parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.25, dtype=dtype))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(x)
        return rational(x, t, y) * self.gain


def schedule(steps: int) -> Schedule:
    return Schedule.named("squaredcos_cap_v2", 100).respace(steps)


def multistep(order: int, rows: int = 6) -> StepTable:
    """A table of arbitrary small numbers that saves and reads `order` tensors and scales the model's input."""
    rng = np.random.default_rng(order)
    columns = {name: rng.uniform(-0.6, 0.6, rows) for name in ("p_x", "p_m", "a_x", "a_0", "a_m", "k_x", "k_0", "k_m")}
    for j in range(order):
        columns[f"a_h{j}"] = np.where(np.arange(rows) > j, rng.uniform(-0.5, 0.5, rows), 0)
    return StepTable.from_columns(
        **columns,
        c_in=rng.uniform(0.5, 1.5, rows),
        t=np.linspace(90.5, 3.0, rows),
        s=rng.uniform(0, 0.3, rows),
        slot=np.arange(rows) % (order + 1) - (np.arange(rows) % (order + 1) == order) * (order + 1),
        steps=np.arange(rows) // 2,
        initial_scale=2.5,
        integer_time=False,
        name=f"multistep{order}",
    )


TABLES = {
    "ddpm fixed": solvers.ddpm(schedule(6), variance="fixed_small"),
    "ddpm learned": solvers.ddpm(schedule(6), variance="learned_range"),
    "ddpm previous_x": solvers.ddpm(schedule(6), variance="fixed_large", prediction="previous_x"),
    "ddim": solvers.ddim(schedule(6)),
    "ddim eta": solvers.ddim(schedule(6), eta=0.7, prediction="v", rescale_timesteps=True),
    "ddim reverse": solvers.ddim_reverse(schedule(6), prediction="x0"),
    "plms": solvers.plms(schedule(6), prediction="x0"),
    "corrected": solvers.predictor_corrector(solvers.ddpm(schedule(3)), schedule(3), step_size=0.5),
    "history 1": multistep(1),
    "history 2": multistep(2),
    "history 3": multistep(3),
}

GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "cfg": CFG(3.0),
    "uncond first": CFG(3.0, order=("uncond", "cond")),
    "original": CFG(2.0, formulation="original"),
    "sum": CFG(3.0, formulation="sum"),
    "scale 0": CFG(0.0),
    "scale 1": CFG(1.0),
    "per sample": CFG([0.5, 3.0, 7.5]),
    "per row": CFG(np.linspace(0.0, 5.0, 6)[:, None]),
    "by progress": CFG(lambda progress: 4 * (1 - progress)),
    "interval": CFG(3.0, interval=(0.2, 0.7)),
    "compose": Compose({"cond": 2.0, "image": [1.5, 0.0, -1.0]}, interval=(0.0, 0.5)),
}

CONDITIONS = {
    "cond": torch.tensor([1.0, -0.5, 0.25]),
    "uncond": torch.zeros(B),
    "image": torch.tensor([0.3, 0.2, 0.1]),
}


def conditioning(guidance: Guidance | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of `sample` that give every branch its condition."""
    names = (guidance or NoGuidance()).branches
    given: dict[str, Any] = {name: {"y": CONDITIONS[name].to(dtype)} for name in names}
    branches = {name: given.pop(name) for name in names if name not in ("cond", "uncond")}
    return {**given, **({"branches": branches} if branches else {})}


CFG_CONDITIONS = conditioning(CFG())


def model_for(table: StepTable) -> Callable[..., Tensor]:
    return with_variance if table.learned_variance else rational


def by_hand(table: StepTable, guidance: Guidance | None, x: Tensor, noise: Tensor, clip: float | None) -> Tensor:
    """The run in float64 by the plain equations, every branch evaluated in every row."""
    guidance = guidance or NoGuidance()
    model, weights = model_for(table), guidance.plan(table, len(x)).weights
    branches = range(len(guidance.branches))
    spec = StepSpec.of(table, guidance, branches, clip=clip is not None, noise_source="tensor")
    bound = None if clip is None else x.new_full((len(x),), clip)
    plain = PlainTable(table, x)
    for row in range(table.num_rows):
        t = torch.full((len(x),), table["t"][row], dtype=torch.float64)
        entered = float(table["c_in"][row]) * x
        output = torch.cat([model(entered, t, CONDITIONS[name].double()) for name in guidance.branches])
        w = torch.from_numpy(weights[row])
        x = plain(row, x, output, spec, weights=w, bound=bound, noise=noise[row])["x"]
    return x


def recording(table: StepTable, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn((table.num_rows, *shape), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", TABLES)
def test_a_run_in_float64_is_the_equations_done_by_hand(name: str, guidance: str) -> None:
    table, spec = TABLES[name], GUIDANCES[guidance]
    noise = recording(table)
    x_T = noise[0].flip(0) * 1.5
    expected = by_hand(table, spec, x_T, noise, 1.0)
    sampler = Sampler(model_for(table), table, guidance=spec, clip=1.0, dtype=torch.float64, state_dtype=torch.float64)
    got = sampler.sample(SHAPE, x_T=x_T, noise=noise, **conditioning(spec))
    # Measured: 6e-14 for ddim reverse, 4e-14 for ddim, 2e-15 for the others.
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-13)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("name", TABLES)
def test_a_replayed_program_equals_an_eager_one(name: str, guidance: str) -> None:
    table, spec = TABLES[name], GUIDANCES[guidance]
    results = []
    for graph in (False, True):
        sampler = Sampler(model_for(table), table, guidance=spec, clip=[0.9, 1.0, 1.1], graph=graph)
        results.append(sampler.sample(SHAPE, seed=5, **conditioning(spec)))
        assert sampler.report()["graph"] == ("stand-in" if graph else "none")
    assert torch.equal(*results)
    assert results[0].std() > 0.05


@pytest.mark.parametrize("noise", ["philox", "torch", "recorded"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("watched", [False, True])
def test_a_replayed_program_equals_an_eager_one_with_every_noise_and_clip(
    noise: str, clip: float | None, watched: bool
) -> None:
    table = TABLES["ddpm learned"]
    options = {"noise": recording(table)} if noise == "recorded" else {}
    kind = "philox" if noise == "recorded" else noise
    runs = []
    for graph in (False, True):
        steps: list[Tensor] = []
        sampler = Sampler(with_variance, table, guidance=CFG(2.0), clip=clip, noise_source=kind, graph=graph)
        callback = (lambda step, steps=steps: steps.extend([step.x, step.x0])) if watched else None
        steps.append(sampler.sample(SHAPE, seed=3, callback=callback, **CFG_CONDITIONS, **options))
        runs.append(torch.stack(steps))
    assert torch.equal(*runs)


def test_the_kernels_run_the_same_loop_as_the_reference() -> None:
    table = solvers.ddim(schedule(3), eta=0.5)
    results = [
        Sampler(rational, table, guidance=CFG(3.0), clip=1.0, backend=backend, graph=graph).sample(
            (2, 1, 4, 5), seed=8, cond={"y": torch.tensor([1.0, -1.0])}, uncond={"y": torch.zeros(1)}
        )
        for backend, graph in (("reference", False), ("triton", False), ("triton", True))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# What one call leaves behind must not reach the next


def change_nothing(sampler: Sampler, model: Affine) -> dict[str, Any]:
    return {}


def change_condition(sampler: Sampler, model: Affine) -> dict[str, Any]:
    return {"cond": {"y": torch.tensor([0.9, 0.8, 0.7])}}


def change_negative(sampler: Sampler, model: Affine) -> dict[str, Any]:
    return {"uncond": {"y": torch.tensor([0.9, 0.8, 0.7])}}


def change_seed(sampler: Sampler, model: Affine) -> dict[str, Any]:
    return {"seed": 77}


def change_start(sampler: Sampler, model: Affine) -> dict[str, Any]:
    return {"x_T": torch.full(SHAPE, 0.5)}


def change_scale(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.guidance = CFG([4.0, 5.0, 6.0])
    return {}


def change_clip(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.clip = 0.4
    return {}


def change_weight_in_place(sampler: Sampler, model: Affine) -> dict[str, Any]:
    with torch.no_grad():
        model.gain.fill_(0.5)
    return {}


REUSING = [
    change_condition,
    change_negative,
    change_seed,
    change_start,
    change_scale,
    change_clip,
    change_weight_in_place,
]


def change_formulation(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.guidance = CFG(3.0, formulation="sum")
    return {}


def change_order(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.guidance = CFG(3.0, order=("uncond", "cond"))
    return {}


def change_to_no_clip(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.clip = None
    return {}


def change_table(sampler: Sampler, model: Affine) -> dict[str, Any]:
    sampler.table = solvers.ddim(Schedule.named("linear", 100).respace(6), eta=0.5)
    return {}


REBUILDING = [change_formulation, change_order, change_to_no_clip, change_table]


def affine_sampler(graph: bool) -> tuple[Sampler, Affine]:
    model = Affine()
    table = solvers.ddim(schedule(6), eta=0.5)
    return Sampler(model, table, guidance=CFG(3.0), clip=1.0, graph=graph), model


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("change", [*REUSING, *REBUILDING], ids=lambda change: change.__name__)
def test_a_change_between_calls_acts_as_on_a_fresh_sampler(
    change: Callable[[Sampler, Affine], dict[str, Any]], graph: bool
) -> None:
    used, used_model = affine_sampler(graph)
    first = used.sample(SHAPE, **{"seed": 1, **CFG_CONDITIONS})
    buffers = used.memory()
    second = used.sample(SHAPE, **{"seed": 1, **CFG_CONDITIONS, **change(used, used_model)})
    if change in REUSING:
        assert used.memory() == buffers
    fresh, fresh_model = affine_sampler(graph)
    overrides = change(fresh, fresh_model)
    expected = fresh.sample(SHAPE, **{"seed": 1, **CFG_CONDITIONS, **overrides})
    assert torch.equal(second, expected)
    if change not in (change_formulation, change_order):
        assert not torch.equal(second, first)


@pytest.mark.parametrize("graph", [False, True])
def test_recorded_noise_changed_in_place_is_read_anew(graph: bool) -> None:
    sampler, _ = affine_sampler(graph)
    noise = recording(sampler.table).float()
    first = sampler.sample(SHAPE, seed=1, noise=noise, **CFG_CONDITIONS)
    noise.neg_()
    second = sampler.sample(SHAPE, seed=1, noise=noise, **CFG_CONDITIONS)
    fresh, _ = affine_sampler(graph)
    assert torch.equal(second, fresh.sample(SHAPE, seed=1, noise=noise, **CFG_CONDITIONS))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("graph", [False, True])
def test_shared_values_are_the_calls_own(graph: bool) -> None:
    table = solvers.ddim(schedule(4))

    def model(x: Tensor, t: Tensor, y: Tensor, gains: np.ndarray, flags: list[int]) -> Tensor:
        return rational(x, t, y) * float(gains[1000]) * flags[0]

    sampler = Sampler(model, table, guidance=CFG(2.0), graph=graph)

    def run(gain: float, flag: int) -> Tensor:
        gains = np.zeros(2001)  # its repr leaves the middle out
        gains[1000] = gain
        shared = {"gains": gains, "flags": [flag]}
        return sampler.sample(
            SHAPE, seed=1, cond={"y": torch.ones(1), **shared}, uncond={"y": torch.zeros(1), **shared}
        )

    assert not torch.equal(run(1.0, 1), run(0.5, 1))
    assert not torch.equal(run(1.0, 1), run(1.0, 2))
    assert torch.equal(run(1.0, 2), run(2.0, 1))


@pytest.mark.parametrize("graph", [False, True])
def test_a_run_that_diverged_leaves_nothing_behind(graph: bool) -> None:
    table = multistep(2)
    sampler = Sampler(rational, table, guidance=CFG(3.0), graph=graph)
    expected = sampler.sample(SHAPE, seed=2, **CFG_CONDITIONS)
    diverged = sampler.sample(SHAPE, x_T=torch.full(SHAPE, float("nan")), seed=2, **CFG_CONDITIONS)
    assert diverged.isnan().all()
    assert torch.equal(sampler.sample(SHAPE, seed=2, **CFG_CONDITIONS), expected)


def test_the_result_is_the_callers_own() -> None:
    sampler, _ = affine_sampler(True)
    first = sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    kept = first.clone()
    sampler.sample(SHAPE, seed=2, **CFG_CONDITIONS)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS), kept)


def test_the_arguments_are_left_as_they_were() -> None:
    sampler, _ = affine_sampler(False)
    noise, x_T = recording(sampler.table), torch.ones(SHAPE)
    given = [tensor.clone() for tensor in (noise, x_T, CONDITIONS["cond"])]
    sampler.sample(SHAPE, seed=1, noise=noise, x_T=x_T, **CFG_CONDITIONS)
    assert all(map(torch.equal, given, (noise, x_T, CONDITIONS["cond"])))


# Generators


def last_x(sampler: Sampler, seed: int) -> Tensor:
    *_, last = sampler.iterate(SHAPE, seed=seed, **CFG_CONDITIONS)
    return last.x


@pytest.mark.parametrize("graph", [False, True])
def test_an_abandoned_generator_does_not_disturb_later_runs(graph: bool) -> None:
    sampler, _ = affine_sampler(graph)
    expected = [last_x(sampler, seed) for seed in (1, 2)]
    never_started = sampler.iterate(SHAPE, seed=9, **CFG_CONDITIONS)
    half_way = sampler.iterate(SHAPE, seed=1, **CFG_CONDITIONS)
    next(half_way), next(half_way)
    assert torch.equal(last_x(sampler, 2), expected[1])
    del never_started, half_way
    assert torch.equal(last_x(sampler, 1), expected[0])


@pytest.mark.parametrize("graph", [False, True])
def test_interleaved_generators_do_not_share_memory(graph: bool) -> None:
    sampler, _ = affine_sampler(graph)
    expected = [last_x(sampler, seed) for seed in (1, 2, 3)]
    runs = [sampler.iterate(SHAPE, seed=seed, **CFG_CONDITIONS) for seed in (1, 2, 3)]
    last = [steps[-1].x for steps in zip(*[list(group) for group in zip(*runs, strict=True)], strict=True)]
    assert all(map(torch.equal, last, expected))


def test_steps_tell_where_the_run_is() -> None:
    table = multistep(1)
    sampler = Sampler(rational, table, guidance=CFG(3.0), clip=1.0)
    steps = list(sampler.iterate(SHAPE, seed=1, **CFG_CONDITIONS))
    assert [step.row for step in steps] == list(range(6))
    assert [step.step for step in steps] == [0, 0, 1, 1, 2, 2]
    assert [step.t for step in steps] == table["t"].tolist()
    assert {step.rows for step in steps} == {6}
    assert all(not torch.equal(a.x, b.x) and not torch.equal(a.x0, b.x0) for a, b in pairwise(steps))
    assert all(step.x0.abs().max() <= 1 for step in steps)
    called: list[Tensor] = []
    result = sampler.sample(SHAPE, seed=1, callback=lambda step: called.append(step.x), **CFG_CONDITIONS)
    assert torch.equal(result, steps[-1].x)
    assert torch.equal(torch.stack(called), torch.stack([step.x for step in steps]))


def test_the_last_ddim_step_returns_its_x0() -> None:
    *_, last = Sampler(rational, TABLES["ddim"], clip=1.0).iterate(SHAPE, seed=1, cond={"y": CONDITIONS["cond"]})
    torch.testing.assert_close(last.x, last.x0, rtol=1e-6, atol=0)


# Failures in the middle


class Failing(Affine):
    """Fails at its n-th call from now."""

    countdown = -1

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.countdown > 0:  # else it is one that can be captured
            self.countdown -= 1
            if self.countdown == 0:
                raise RuntimeError("the model failed")
        return super().forward(x, t, y)


def test_an_exception_in_the_model_leaves_the_sampler_usable() -> None:
    model = Failing()
    sampler = Sampler(model, solvers.ddim(schedule(6), eta=0.5), guidance=CFG(3.0), clip=1.0)
    expected = sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    model.countdown = 4
    with pytest.raises(RuntimeError, match="the model failed"):
        sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    assert torch.equal(sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS), expected)


def test_an_exception_while_recording_leaves_the_sampler_usable() -> None:
    model = Failing()
    sampler = Sampler(model, solvers.ddim(schedule(6), eta=0.5), guidance=CFG(3.0), clip=1.0, graph=True)
    model.countdown = 1
    with pytest.raises(RuntimeError, match="the model failed"):
        sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    assert model.countdown == 1  # it is left as it was found
    model.countdown = -1
    fresh, _ = affine_sampler(True)
    expected = fresh.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    assert torch.equal(sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS), expected)


@pytest.mark.parametrize("graph", [False, True])
def test_an_exception_in_the_callback_leaves_the_sampler_usable(graph: bool) -> None:
    sampler, _ = affine_sampler(graph)
    expected = sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)

    def stop(step: Any) -> None:
        if step.row == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(SHAPE, seed=1, callback=stop, **CFG_CONDITIONS)
    assert torch.equal(sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS), expected)


# What the model is given


def batch_sizes(guidance: Guidance | None, table: StepTable) -> list[int]:
    model = Affine()

    def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(t) == len(y)
        output = model(x, t, y)
        return torch.cat([output, output], dim=1) if table.learned_variance else output

    Sampler(counted, table, guidance=guidance).sample(SHAPE, seed=0, **conditioning(guidance))
    return [len(x) // B for x in model.seen]


@pytest.mark.parametrize(
    ("guidance", "table", "expected"),
    [
        (None, "ddim", [1] * 6),
        (CFG(3.0), "ddim", [2] * 6),
        (CFG(3.0, interval=(0.2, 0.7)), "ddim", [1, 2, 2, 2, 1, 1]),
        (CFG(3.0, interval=(0.2, 0.7)), "ddpm learned", [1, 2, 2, 2, 1, 1]),
        (CFG(3.0, interval=(0.34, 1.0)), "history 1", [1, 1, 2, 2, 2, 2]),
        (CFG(1.0), "ddim", [1] * 6),
        (CFG(0.0), "ddim", [1] * 6),
        (CFG(0.0), "ddpm learned", [2] * 6),
        (CFG([1.0, 1.0, 2.0]), "ddim", [2] * 6),
        (CFG(lambda progress: 1.0 if progress < 0.5 else 2.0), "ddim", [1, 1, 1, 2, 2, 2]),
        (Compose({"cond": 2.0, "image": 1.5}), "ddim", [3] * 6),
        (Compose({"cond": 2.0, "image": 0.0}), "ddim", [2] * 6),
    ],
)
def test_only_branches_with_weight_are_evaluated(guidance: Guidance | None, table: str, expected: list[int]) -> None:
    assert batch_sizes(guidance, TABLES[table]) == expected


def test_the_model_gets_its_own_dtype_and_the_state_stays_float32() -> None:
    model = Affine(torch.bfloat16)
    table = solvers.ddim(schedule(1))
    sampler = Sampler(model, table, guidance=CFG(3.0))
    x_T = recording(table)[0].float()
    given = conditioning(CFG(), torch.bfloat16)
    got = sampler.sample(SHAPE, x_T=x_T, **given)
    assert {x.dtype for x in model.seen} == {torch.bfloat16}
    assert got.dtype == torch.float32
    # One step by hand: the model rounds in and out, the state is what it was.
    x, t = x_T.bfloat16(), torch.full((B,), int(table["t"][0]))
    with torch.no_grad():
        cond, uncond = [model(x, t, given[name]["y"]).double() for name in ("cond", "uncond")]
    x0 = table["p_x"][0] * x_T.double() + table["p_m"][0] * (uncond + 3.0 * (cond - uncond))
    expected = table["a_x"][0] * x_T.double() + table["a_0"][0] * x0
    # Measured: 1.3e-7, on values up to 3. Rounding the state to bfloat16 would cost 1e-2.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_channels_last_reaches_the_model_and_changes_nothing() -> None:
    shape = (B, 4, 6, 5)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = Affine()
        sampler = Sampler(
            model,
            solvers.ddim(schedule(6), eta=0.5),
            guidance=CFG(3.0, interval=(0.0, 0.5)),
            memory_format=memory_format,
        )
        results.append(sampler.sample(shape, seed=1, **CFG_CONDITIONS))
        assert all(x.is_contiguous(memory_format=memory_format) for x in model.seen)
    assert torch.equal(*results)
    assert results[1].is_contiguous()


@pytest.mark.parametrize("shape", [(B, 4, 9), (B, 1, 1), (B, 2, 3, 4, 5), (B, 2, 1, 1, 1, 7)])
@pytest.mark.parametrize("graph", [False, True])
def test_samples_of_any_rank(shape: tuple[int, ...], graph: bool) -> None:
    """Their elements are those of the same samples flattened."""
    table = solvers.ddim(schedule(6), eta=0.5)
    got = Sampler(rational, table, guidance=CFG(3.0), clip=1.0, graph=graph).sample(shape, seed=1, **CFG_CONDITIONS)
    flat = Sampler(rational, table, guidance=CFG(3.0), clip=1.0).sample(
        (B, 1, got[0].numel()), seed=1, **CFG_CONDITIONS
    )
    assert got.shape == shape
    assert torch.equal(got.reshape(flat.shape), flat)


def test_a_model_may_return_a_tuple_and_take_shared_values() -> None:
    table = solvers.ddim(schedule(4))
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor, mode: str, extra: None) -> tuple[Tensor, str]:
        seen.append((mode, extra))
        return rational(x, t, y), "more"

    shared = {"mode": "fast", "extra": None}
    got = Sampler(model, table, guidance=CFG(2.0)).sample(
        SHAPE, seed=1, cond={"y": CONDITIONS["cond"], **shared}, uncond={"y": torch.zeros(1), **shared}
    )
    assert seen == [("fast", None)] * 4
    expected = Sampler(rational, table, guidance=CFG(2.0)).sample(SHAPE, seed=1, **CFG_CONDITIONS)
    assert torch.equal(got, expected)


def test_without_guidance_a_model_may_need_no_conditioning() -> None:
    got = Sampler(lambda x, t: x * 0.5, solvers.ddim(schedule(4))).sample(SHAPE, seed=1)
    assert got.shape == SHAPE
    assert got.isfinite().all()


# Noise and seeds


@pytest.mark.parametrize("size", [(2, 8, 8), (3, 5, 7)])
@pytest.mark.parametrize("name", ["ddpm fixed", "ddim eta", "history 2"])
def test_image_i_depends_on_its_seed_alone(name: str, size: tuple[int, ...]) -> None:
    sampler = Sampler(rational, TABLES[name], guidance=CFG(3.0), clip=1.0)
    y = torch.tensor([1.0, -0.5, 0.25, 0.8, -0.9])

    def run(seed: Any, rows: list[int]) -> Tensor:
        return sampler.sample((len(rows), *size), seed=seed, cond={"y": y[rows]}, uncond={"y": torch.zeros(1)})

    five = run(40, [0, 1, 2, 3, 4])
    assert torch.equal(run(40, [0, 1]), five[:2])
    assert torch.equal(run(43, [3]), five[3:4])
    assert torch.equal(run([44, 40, 42], [4, 0, 2]), five[[4, 0, 2]])
    assert not torch.equal(run(41, [0]), five[:1])


def test_image_i_depends_on_its_seed_alone_with_learned_variances() -> None:
    """Samples of a multiple of 64 elements: torch's exp2 rounds otherwise in the last, partly filled vector."""
    sampler = Sampler(with_variance, TABLES["ddpm learned"], guidance=CFG(3.0), clip=1.0)
    runs = [
        sampler.sample((n, 2, 8, 8), seed=4, cond={"y": torch.ones(1)}, uncond={"y": torch.zeros(1)}) for n in (1, 2, 5)
    ]
    assert torch.equal(runs[0], runs[2][:1])
    assert torch.equal(runs[1], runs[2][:2])


def test_per_sample_scales_equal_runs_of_their_own() -> None:
    table = solvers.ddim(schedule(6), eta=0.5)
    scales = [1.5, 3.0, -7.0]
    together = Sampler(rational, table, guidance=CFG(scales), clip=1.0).sample(SHAPE, seed=1, **CFG_CONDITIONS)
    for i, scale in enumerate(scales):
        alone = Sampler(rational, table, guidance=CFG(scale), clip=1.0).sample(
            (1, *SHAPE[1:]), seed=1 + i, cond={"y": CONDITIONS["cond"][i : i + 1]}, uncond={"y": torch.zeros(1)}
        )
        assert torch.equal(together[i : i + 1], alone)


def test_per_sample_clips_equal_runs_of_their_own() -> None:
    table = solvers.ddim(schedule(6))
    together = Sampler(rational, table, guidance=CFG(9.0), clip=[0.2, 0.5, 3.0]).sample(SHAPE, seed=1, **CFG_CONDITIONS)
    for i, clip in enumerate([0.2, 0.5, 3.0]):
        alone = Sampler(rational, table, guidance=CFG(9.0), clip=clip).sample(SHAPE, seed=1, **CFG_CONDITIONS)
        assert torch.equal(together[i], alone[i])
    assert together[0].abs().max() < together[1].abs().max()


@pytest.mark.parametrize("name", ["ddpm fixed", "history 1"])
def test_philox_noise_is_what_the_generator_draws(name: str) -> None:
    table = TABLES[name]
    sampler = Sampler(rational, table, guidance=CFG(3.0), clip=1.0)
    drawn = sampler.sample(SHAPE, seed=[5, 900, -3], **CFG_CONDITIONS)
    seeds = sample_seeds([5, 900, -3], B)
    noise = torch.stack([philox_normal(seeds, SHAPE[1:], row=row, stream=STEP_STREAM) for row in range(len(table))])
    x_T = philox_normal(seeds, SHAPE[1:], stream=INITIAL_STREAM) * table.initial_scale
    assert torch.equal(sampler.sample(SHAPE, noise=noise, x_T=x_T, **CFG_CONDITIONS), drawn)
    assert torch.equal(sampler.sample(SHAPE, noise=lambda row, shape: noise[row], x_T=x_T, **CFG_CONDITIONS), drawn)


def test_torch_noise_is_drawn_in_the_originals_order() -> None:
    """The start, then one draw a row, the last one included."""
    table = TABLES["ddpm fixed"]
    sampler = Sampler(rational, table, guidance=CFG(3.0), clip=1.0, noise_source="torch")
    torch.manual_seed(6)
    x_T, noise = torch.randn(SHAPE), torch.stack([torch.randn(SHAPE) for _ in range(len(table))])
    after = torch.randn(2)
    expected = sampler.sample(SHAPE, noise=noise, x_T=x_T, **CFG_CONDITIONS)
    assert torch.equal(sampler.sample(SHAPE, seed=6, **CFG_CONDITIONS), expected)
    torch.manual_seed(6)
    assert torch.equal(sampler.sample(SHAPE, **CFG_CONDITIONS), expected)
    assert torch.equal(torch.randn(2), after)


def test_without_a_seed_torchs_global_generator_decides() -> None:
    sampler, _ = affine_sampler(False)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(sampler.sample(SHAPE, **CFG_CONDITIONS))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("noise", ["philox", "torch"])
def test_a_run_without_chance_leaves_torchs_generator_alone(noise: str) -> None:
    schedule = Schedule.named("linear").respace(3)
    start = torch.randn(2, 3, 4, 4)
    for table in (solvers.ddim(schedule), solvers.ddpm(schedule, variance="fixed_small")):
        sampler = Sampler(lambda x, t: 0.1 * x, table, noise_source=noise)
        torch.manual_seed(0)
        sampler.sample((2, 3, 4, 4), x_T=start, noise=torch.zeros(3, 2, 3, 4, 4))
        after = torch.rand(4)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), [3, 4, 5], np.arange(3, 6), range(3, 6)])
def test_seeds_may_come_from_numpy_torch_or_a_range(seed: Any) -> None:
    sampler, _ = affine_sampler(False)
    expected = sampler.sample(SHAPE, seed=3, **CFG_CONDITIONS)
    assert torch.equal(sampler.sample(SHAPE, seed=seed, **CFG_CONDITIONS), expected)


# Modes of the caller


def test_the_callers_grad_mode_stays_between_steps() -> None:
    sampler, model = affine_sampler(False)
    for _ in sampler.iterate(SHAPE, seed=1, **CFG_CONDITIONS):
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in sampler.iterate(SHAPE, seed=1, **CFG_CONDITIONS):
            assert not torch.is_grad_enabled()
    with torch.inference_mode():
        for _ in sampler.iterate(SHAPE, seed=1, **CFG_CONDITIONS):
            assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    # The model saw no gradients: it checks that itself.
    assert len(model.seen) == 3 * len(sampler.table)


@pytest.mark.parametrize("graph", [False, True])
def test_no_gradient_enters_through_the_arguments(graph: bool) -> None:
    sampler, _ = affine_sampler(graph)
    table = sampler.table
    plain = {"x_T": torch.ones(SHAPE), "noise": recording(table).float(), "cond": {"y": CONDITIONS["cond"]}}
    expected = sampler.sample(SHAPE, **{**CFG_CONDITIONS, **plain})
    with_grad = {
        "x_T": plain["x_T"].requires_grad_(),
        "noise": plain["noise"].requires_grad_(),
        "cond": {"y": CONDITIONS["cond"].clone().requires_grad_()},
    }
    got = sampler.sample(SHAPE, **{**CFG_CONDITIONS, **with_grad})
    assert not got.requires_grad
    assert torch.equal(got, expected)


@pytest.mark.parametrize("graph", [False, True])
def test_buffers_made_in_inference_mode_serve_outside_it(graph: bool) -> None:
    model = Affine(torch.bfloat16)
    sampler = Sampler(model, solvers.ddim(schedule(4), eta=0.5), guidance=CFG(3.0), graph=graph)
    given = conditioning(CFG(), torch.bfloat16)
    with torch.inference_mode():
        first = sampler.sample(SHAPE, seed=1, **given).clone()
    second = sampler.sample(SHAPE, seed=1, **given)
    assert not second.is_inference()
    with torch.inference_mode():
        third = sampler.sample(SHAPE, seed=1, **given)
    assert torch.equal(first, second)
    assert torch.equal(second, third)


# Bookkeeping


def test_report_tells_how_the_run_went() -> None:
    sampler = Sampler(rational, TABLES["ddim"], guidance=CFG(3.0, interval=(0.0, 0.5)))
    assert sampler.report() == {}
    sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    decision = {
        "graph": "none",
        "batching": "batched",
        "reason": "the device is a CPU",
        "milliseconds": {},
        "constants": 0,
        "passes": 1,
        "conditioning": "",
        "model": 0,
    }
    assert sampler.report() == {
        "backend": CPU_BACKEND,
        "graph": "none",
        "graph_reason": "the device is a CPU",
        "rows": 6,
        "branches": [2, 2, 2, 1, 1, 1],
        "conditioning_copies": [],
        "programs": [
            {**decision, "branches": ("cond", "uncond")},
            {**decision, "branches": ("cond",)},
        ],
        "copies": 0,
        "captures": 1,
        "recaptured": "",
    }
    eager = Sampler(rational, TABLES["ddim"], graph=False)
    eager.sample(SHAPE, seed=1, cond={"y": CONDITIONS["cond"]})
    assert eager.report()["graph_reason"] == "graph=False"
    recorded = Sampler(rational, TABLES["ddim"], graph=True)
    recorded.sample(SHAPE, seed=1, cond={"y": CONDITIONS["cond"]})
    assert (recorded.report()["graph"], recorded.report()["graph_reason"]) == ("stand-in", "")


def test_memory_is_counted_capped_and_given_back() -> None:
    sampler = Sampler(rational, TABLES["ddim"], guidance=CFG(3.0))

    def run(size: int) -> Tensor:
        return sampler.sample((B, 1, size, size), seed=1, **CFG_CONDITIONS)

    assert sampler.memory() == 0
    first = run(4)
    one = sampler.memory()
    # x, and the model's input for two branches.
    assert one >= 3 * first.nbytes
    run(4)
    assert sampler.memory() == one
    sizes = {4: one}
    for size in range(5, 5 + MAX_ENTRIES):
        before = sampler.memory()
        run(size)
        sizes[size] = sampler.memory() - before + (sizes[4] if size == 4 + MAX_ENTRIES else 0)
    assert sampler.memory() == sum(sizes.values()) - sizes[4]
    sampler.release()
    assert sampler.memory() == 0
    assert torch.equal(run(4), first)


def test_the_shape_used_last_is_kept_longest() -> None:
    sampler = Sampler(rational, TABLES["ddim"], guidance=CFG(3.0), graph=True)

    def recordings(size: int) -> int:
        before = sampler.report().get("captures", 0)
        sampler.sample((B, 1, size, size), seed=1, **CFG_CONDITIONS)
        return sampler.report()["captures"] - before

    assert [recordings(size) for size in (4, 5, 6, 7)] == [1] * MAX_ENTRIES
    assert recordings(4) == 0
    assert recordings(8) == 1
    assert recordings(4) == 0
    assert recordings(5) == 1


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    sampler, _ = affine_sampler(False)
    quiet = sampler.sample(SHAPE, seed=1, **CFG_CONDITIONS)
    assert capsys.readouterr() == ("", "")
    shown = sampler.sample(SHAPE, seed=1, progress=True, **CFG_CONDITIONS)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6/6" in captured.err
    assert torch.equal(quiet, shown)


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, TypeError, "model: got NoneType, expected a callable"),
        ({"table": "ddim"}, TypeError, "table: got str, expected a StepTable"),
        ({"guidance": 3.0}, TypeError, "guidance: got float, expected a Guidance"),
        ({"clip": True}, TypeError, "clip: got True, expected None, numbers or a DynamicThreshold"),
        ({"clip": 0.0}, ValueError, "clip: got 0.0, expected None or positive finite bounds"),
        ({"clip": float("inf")}, ValueError, "clip: got inf"),
        ({"clip": []}, ValueError, r"clip: got \[\]"),
        ({"clip": "1"}, TypeError, "clip: got '1'"),
        ({"noise_source": "gaussian"}, ValueError, "noise_source: got 'gaussian', expected one of 'philox', 'torch'"),
        ({"batching": "both"}, ValueError, "batching: got 'both', expected one of 'auto', 'batched', 'serial'"),
        ({"rows_per_graph": 0}, ValueError, "rows_per_graph: got 0, expected an integer of at least 1"),
        ({"compile": "fast"}, ValueError, "compile: got 'fast', expected one of None, 'default', 'max-autotune'"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend: got 'cuda', expected one of auto, triton, inductor, native, reference",
        ),
        ({"backend": "triton", "state_dtype": torch.float64}, ValueError, "backend: 'triton' cannot run here"),
        ({"graph": "yes"}, ValueError, "graph: got 'yes', expected one of 'auto', True, False"),
        ({"dtype": torch.int64}, ValueError, "dtype: got torch.int64, expected a floating dtype"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype: got torch.float16, expected one of torch.float32"),
        ({"device": "abacus"}, ValueError, "device: got 'abacus'"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: got torch.preserve_format"),
    ],
)
def test_constructor_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": rational, "table": TABLES["ddim"], **changes}
    with pytest.raises(error, match=message):
        Sampler(**arguments)


def never(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    raise AssertionError("the model was called")


YS = {"y": torch.zeros(B)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (B,)}, ValueError, r"shape: got \(3,\), expected \(B, C, ...\)"),
        ({"shape": (0, 2, 8)}, ValueError, r"shape: got \(0, 2, 8\)"),
        ({"shape": (B, 2, 8.0)}, ValueError, r"shape: got \(3, 2, 8.0\)"),
        ({"shape": 3}, ValueError, "shape: got 3"),
        ({"uncond": None}, ValueError, r"conditioning: got cond, expected cond, uncond \(the branches"),
        ({"cond": None, "uncond": None}, ValueError, "conditioning: got nothing, expected cond, uncond"),
        ({"branches": {"image": YS}}, ValueError, "conditioning: got cond, image, uncond, expected cond, uncond"),
        ({"cond": torch.zeros(B)}, TypeError, "cond: got Tensor, expected a mapping"),
        ({"uncond": {"z": torch.zeros(B)}}, ValueError, "uncond: got keys z, expected those of cond: y"),
        ({"uncond": {}}, ValueError, "uncond: got keys nothing, expected those of cond: y"),
        (
            {"cond": {"y": torch.zeros(2)}},
            ValueError,
            r"cond\['y'\]: got shape \(2,\), expected a first dimension of 3",
        ),
        ({"cond": {"y": torch.tensor(0.0)}}, ValueError, r"cond\['y'\]: got shape \(\)"),
        ({"uncond": {"y": torch.zeros(B, 4)}}, ValueError, r"uncond\['y'\]: got torch.float32 \(3, 4\), expected"),
        ({"uncond": {"y": torch.zeros(B).long()}}, ValueError, r"uncond\['y'\]: got torch.int64 \(3,\), expected"),
        ({"uncond": {"y": [0.0] * B}}, ValueError, r"uncond\['y'\]: got list, expected a tensor"),
        ({"cond": {"y": 1}, "uncond": {"y": 2}}, ValueError, r"uncond\['y'\]: got 2, expected 1 as in cond"),
        ({"cond": {"y": np.ones(3)}, "uncond": {"y": np.ones(3)}}, ValueError, r"uncond\['y'\]: got array"),
        ({"cond": {"y": torch.zeros(B, device="meta")}}, ValueError, r"cond\['y'\]: got device meta, expected"),
        ({"seed": 0.5}, TypeError, "seed: got 0.5, expected an integer or a sequence of integers"),
        ({"seed": "7"}, TypeError, "seed: got '7', expected an integer"),
        ({"seed": [1, 2]}, ValueError, r"seed: got 2 seeds, expected one per sample \(3\)"),
        (
            {"noise": torch.zeros(2, *SHAPE)},
            ValueError,
            r"noise: got shape \(2, 3, 2, 8, 8\), expected \(6, 3, 2, 8, 8\)",
        ),
        ({"noise": "philox"}, TypeError, "noise: got str, expected a tensor or a function"),
        ({"x_T": torch.zeros(1)}, ValueError, r"x_T: got shape \(1,\), expected \(3, 2, 8, 8\)"),
        ({"x_T": [0.0]}, TypeError, "x_T: got list, expected a tensor"),
    ],
)
@pytest.mark.parametrize("generator", [False, True])
def test_sample_refuses_before_any_work(
    changes: dict[str, Any], error: type[Exception], message: str, generator: bool
) -> None:
    sampler = Sampler(never, solvers.ddim(schedule(6), eta=0.5), guidance=CFG(3.0))
    arguments: dict[str, Any] = {"shape": SHAPE, "cond": YS, "uncond": YS, "seed": 0, **changes}
    with pytest.raises(error, match=message):
        (sampler.iterate if generator else sampler.sample)(**arguments)
    assert sampler.memory() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": CFG([1.0, 2.0])}, r"scale: got 2 values, expected 1 or one per sample \(3\)"),
        ({"guidance": CFG(np.ones((4, 1)))}, r"scale: got shape \(4, 1\), expected \(6, 1\) or \(6, 3\)"),
        ({"guidance": CFG(lambda progress: float("nan"))}, "scale: got nan, expected finite"),
        ({"guidance": CFG(3.0), "clip": [1.0, 2.0]}, r"clip: got 2 bounds, expected 1 or one per sample \(3\)"),
        (
            {"guidance": CFG(3.0), "noise_source": "torch", "seed": [1, 2]},
            r"seed: got 2 seeds, expected one per sample",
        ),
    ],
)
def test_sample_refuses_options_that_do_not_fit_the_batch(options: dict[str, Any], message: str) -> None:
    seed = options.pop("seed", 0) if "seed" in options else 0
    sampler = Sampler(never, solvers.ddim(schedule(6), eta=0.5), **options)
    with pytest.raises(ValueError, match=message):
        sampler.sample(SHAPE, cond=YS, uncond=YS, seed=seed)


def test_channels_last_needs_images() -> None:
    sampler = Sampler(never, TABLES["ddim"], guidance=CFG(3.0), memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"memory_format: got torch.channels_last with shape \(3, 2, 8\), expected"):
        sampler.sample((B, 2, 8), cond=YS, uncond=YS, seed=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda x, t, y: x[:, :1],
            r"model output: got shape \(6, 1, 8, 8\), expected \(6, 2, 8, 8\) or \(6, 4, 8, 8\)",
        ),
        (lambda x, t, y: x[:B], r"model output: got shape \(3, 2, 8, 8\)"),
        (lambda x, t, y: x.double(), "model output: got torch.float64, expected a floating dtype no wider"),
        (lambda x, t, y: x.long(), "model output: got torch.int64"),
    ],
)
def test_a_model_whose_output_does_not_fit_is_refused(model: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(model, TABLES["ddim"], guidance=CFG(3.0)).sample(SHAPE, seed=0, **CFG_CONDITIONS)


def test_recorded_noise_of_the_wrong_shape_is_refused_when_drawn() -> None:
    sampler, _ = affine_sampler(False)

    def draws() -> Iterator[Tensor]:
        yield torch.zeros(SHAPE)
        yield torch.zeros(1)

    source = draws()
    with pytest.raises(ValueError, match=r"noise\(1\): got shape \(1,\), expected \(3, 2, 8, 8\)"):
        sampler.sample(SHAPE, seed=0, noise=lambda row, shape: next(source), **CFG_CONDITIONS)
