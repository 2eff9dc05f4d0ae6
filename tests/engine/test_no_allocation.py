"""What a run does between two calls of the model: allocates nothing, creates and reads nothing on the host, and passes
over the state as rarely as it can."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcfg import CFG, Compose, DynamicThreshold, Guidance, Sampler, Schedule, StepTable, inpaint
from fastcfg.ops import triton_problem
from fastcfg.solvers import ddim, ddpm

SHAPE = (2, 3, 8, 8)
SIZE = 2 * 3 * 8 * 8
SCHEDULE = Schedule.named("linear", 1000).respace(3)

# By the start of the operation's name: memory, numbers from the host, joins, conversions, and reading back.
FORBIDDEN = (
    *("empty", "new_", "zeros", "ones", "full", "arange", "eye", "linspace", "rand", "scalar_tensor", "lift", "clone"),
    *("cat", "stack", "repeat", "_to_copy", "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"),
)

interpreted = pytest.mark.skipif(bool(triton_problem(torch.device("cpu"))), reason="needs the Triton interpreter")


def live_tensors() -> list[Tensor]:
    gc.collect()
    # Exactly this type: what torch.compile keeps from earlier tests are subclasses without memory.
    return [item for item in gc.get_objects() if type(item) is Tensor]


class Call:
    """One operation as dispatched, without its tensors: holding them would keep their memory from being used again."""

    def __init__(self, function: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        aliases = [returned.alias_info for returned in function._schema.returns]
        self.name = str(function).removeprefix("aten.")
        self.is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        self.size = max((tensor.numel() for tensor in tensors), default=0)
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Recorder(TorchDispatchMode):
    """The operations of a run, cut where the model is called, and the storages that existed at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Call]] = [[]]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls[-1].append(Call(function, result))
        return result

    def cut(self) -> None:
        if not self.storages:
            self.storages = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
        self.calls.append([])


class Stub:
    """A model that returns memory of its own and tells a recorder when it is called."""

    def __init__(self, branches: int, channels: int, dtype: torch.dtype = torch.float32) -> None:
        shape = (branches * SHAPE[0], channels, *SHAPE[2:])
        self.output = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.recorder: Recorder | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.recorder is not None:
            self.recorder.cut()
        return self.output


def record_rows(
    table: StepTable, guidance: Guidance | None = None, **options: Any
) -> tuple[list[list[Call]], set[int]]:
    """What is dispatched from each model call but the last to the next, in a run that another one has warmed up: a
    row's step and the drawing of the next row's noise. And the storages that existed at the first."""
    guidance = guidance or CFG(3.0)
    branches = len(guidance.branches)
    model = Stub(branches, 2 * SHAPE[1] if table.learned_variance else SHAPE[1], options.get("dtype", torch.float32))
    sampler = Sampler(model, table, guidance=guidance, **{"clip": 1.0, **options})
    conditioning = {name: {"y": torch.zeros(SHAPE[0])} for name in guidance.branches}
    sampler.sample(SHAPE, branches=conditioning, seed=0)
    model.recorder = Recorder()
    with model.recorder:
        sampler.sample(SHAPE, branches=conditioning, seed=0)
    rows = model.recorder.calls[1:-1]
    assert len(rows) == table.num_rows - 1
    return rows, model.recorder.storages


def passes(row: list[Call]) -> list[str]:
    """The operations that pass over a whole state."""
    return [call.name for call in row if call.size >= SIZE and not call.is_view]


def history_table() -> StepTable:
    ramp = np.linspace(0.1, 0.9, 5)
    columns = {"p_x": ramp, "p_m": -ramp, "a_x": ramp, "a_0": ramp, "k_0": ramp, "k_m": ramp, "a_m": ramp, "a_u": ramp}
    return StepTable.from_columns(t=range(5), slot=[0, 1, 0, 1, -1], a_h1=[0, 0, 1, 1, 1], c_in=ramp, **columns)


TABLES = {
    "ddim": ddim(SCHEDULE),
    "ddim with noise": ddim(SCHEDULE, eta=1.0),
    "fixed variance": ddpm(SCHEDULE, variance="fixed_small"),
    "learned range": ddpm(SCHEDULE, variance="learned_range"),
    "history": history_table(),
}


THREE = Compose({"cond": 2.0, "style": 1.0})


def assert_nothing_new(rows: list[list[Call]], storages: set[int]) -> None:
    for call in (call for row in rows for call in row):
        assert not call.name.startswith(FORBIDDEN), call.name
        assert call.storages <= storages, f"{call.name} allocated its result"


@pytest.mark.parametrize("guidance", [CFG(3.0), CFG(3.0, formulation="sum"), THREE], ids=["cfg", "sum", "three"])
@pytest.mark.parametrize("name", TABLES)
def test_the_reference_loop_allocates_nothing(name: str, guidance: Guidance) -> None:
    assert_nothing_new(*record_rows(TABLES[name], guidance, noise_source="torch"))


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"state_dtype": torch.float64}], ids=str)
def test_the_reference_loop_allocates_nothing_in_other_dtypes(options: dict[str, Any]) -> None:
    assert_nothing_new(*record_rows(TABLES["learned range"], noise_source="torch", **options))


# Blend: difference, multiply-add. x0: product, three multiply-adds, clamp. Update: product, two multiply-adds. Next
# model input: product. Noise adds a multiply-add, and the learned range another and exp2 for its standard deviation.
DDIM = ["sub", "addcmul", "mul", *["addcmul"] * 3, "clamp", "mul", *["addcmul"] * 2, "mul"]
NOISE = [*DDIM[:-1], "addcmul", "mul"]
LEARNED = [*DDIM[:-1], "addcmul", "exp2", "addcmul", "mul"]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("ddim", 11, DDIM),
        ("fixed variance", 12 + 1, [*NOISE, "normal_"]),
        ("learned range", 14 + 1, [*LEARNED, "normal_"]),
    ],
)
def test_the_reference_loop_passes_over_the_state_so_often(name: str, count: int, expected: list[str]) -> None:
    rows, _ = record_rows(TABLES[name], noise_source="torch", backend="reference")
    for row in rows:
        assert [operation.split(".")[0] for operation in passes(row)] == expected
        assert len(passes(row)) == count


@interpreted
@pytest.mark.parametrize(
    ("name", "noise"), [(n, noise) for n in TABLES for noise in ("philox", "torch")[: 1 + TABLES[n].uses_noise]]
)
def test_the_fused_loop_is_one_operation(name: str, noise: str) -> None:
    rows, storages = record_rows(TABLES[name], noise_source=noise, backend="triton")
    assert_nothing_new(rows, storages)
    drawn = ["normal_.default"] if noise == "torch" and TABLES[name].uses_noise else []
    for row in rows:
        assert [call.name for call in row if not call.is_view] == ["fastcfg.guided_step.default", *drawn]


@interpreted
def test_the_fused_loop_with_dynamic_thresholding_is_two_operations() -> None:
    rows, storages = record_rows(TABLES["learned range"], clip=DynamicThreshold(0.9), backend="triton")
    assert_nothing_new(rows, storages)
    for row in rows:
        names = [call.name for call in row if not call.is_view]
        assert names == ["fastcfg.step_bound.default", "fastcfg.guided_step.default"]


@interpreted
@pytest.mark.parametrize("noise", ["fixed", "row"])
def test_the_fused_loop_with_known_pixels_is_two_operations(noise: str) -> None:
    pixels = inpaint(torch.ones(1, 1, 1, 8), torch.ones(1, 3, 8, 8), SCHEDULE, noise=noise)
    rows, storages = record_rows(TABLES["learned range"], state_fn=pixels, backend="triton")
    assert_nothing_new(rows, storages)
    for row in rows:
        names = [call.name for call in row if not call.is_view]
        assert names == ["fastcfg.guided_step.default", "fastcfg.state_change.default"]


def test_a_run_sees_the_allocations_it_is_asked_about() -> None:
    class Wasteful(Stub):
        def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().__call__(x, t, y) * 1.0

    model = Wasteful(1, 3)
    sampler = Sampler(model, TABLES["ddim"])
    model.recorder = Recorder()
    with model.recorder:
        sampler.sample(SHAPE, cond={"y": torch.zeros(2)}, seed=0)
    with pytest.raises(AssertionError, match=r"mul\.Tensor allocated its result"):
        assert_nothing_new(model.recorder.calls[1:-1], model.recorder.storages)


@pytest.mark.parametrize("noise", ["philox", "torch"])
def test_thirty_calls_leave_no_tensors_behind(noise: str) -> None:
    sampler = Sampler(Stub(2, 6), ddpm(SCHEDULE.respace(2)), guidance=CFG(3.0), clip=1.0, noise_source=noise)
    conditioning = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}}

    before = 0
    for call in range(32):
        if call == 2:
            before = len(live_tensors())
        sampler.sample(SHAPE, branches=conditioning, seed=call)
    assert len(live_tensors()) == before
