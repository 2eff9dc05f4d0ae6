"""A table run from the caller's own loop: each row reads the caller's tensor and returns a new one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcfg import DynamicThreshold, Sampler, Schedule, StepTable, solvers
from fastcfg.ops import triton_problem
from fastcfg.ops.backend import interpreting
from fastcfg.ops.stepper import Stepper

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 3, 4, 5)
SCHEDULE = Schedule.named("linear").respace(4)
TABLES = {
    "saved tensors": solvers.plms(SCHEDULE),
    "noise": solvers.ddpm(SCHEDULE, variance="fixed_small"),
    "learned variance": solvers.ddpm(SCHEDULE),
    "raw output": StepTable.from_columns(t=[9, 3, 1, 0], p_x=1.0, p_m=-0.5, a_x=0.9, a_0=0.2, a_m=[0.1, 0.2, 0.0, 0.3]),
}
CLIPS = {"no clip": None, "a bound": 1.0, "a quantile": DynamicThreshold(0.9, 0.5, 2.0)}
kernels = pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs a GPU or the Triton interpreter")
BACKENDS = ["reference", pytest.param("triton", marks=kernels)]
CLIPPED = [*(("reference", clip) for clip in CLIPS), pytest.param("triton", "a quantile", marks=kernels)]


def inputs(table: StepTable, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The output and the noise of a row."""
    generator = torch.Generator().manual_seed(row)
    shape = (SHAPE[0], SHAPE[1] * (1 + table.learned_variance), *SHAPE[2:])
    output = torch.randn(shape, generator=generator).clamp(-1.5, 1.5)
    noise = torch.randn(SHAPE, generator=generator)
    noisy = table["s"][row] > 0 or table.learned_variance
    return output.to(DEVICE, dtype), noise.to(DEVICE, dtype) if noisy else None


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("backend", "clip"), CLIPPED)
def test_a_run_is_the_sampler_s_bit_for_bit(backend: str, name: str, clip: str) -> None:
    table, x = TABLES[name], start()
    rows = [inputs(table, row, x.dtype) for row in range(len(table))]
    outputs = iter([output for output, _ in rows])
    sampler = Sampler(lambda *_: next(outputs), table, clip=CLIPS[clip], backend=backend, graph=False, device=DEVICE)
    noise = torch.stack([x if noise is None else noise for _, noise in rows]) if table.uses_noise else None
    stepper = Stepper(table, x, CLIPS[clip], backend)
    for step, (output, drawn) in zip(sampler.iterate(SHAPE, x_T=x, noise=noise), rows, strict=True):
        x, x0 = stepper(step.row, output, x, drawn)
        assert torch.equal(x, step.x)
        assert torch.equal(x0, step.x0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("backend", "clip"), CLIPPED)
def test_a_row_in_half_precision_is_the_float32_one_rounded_once(
    backend: str, name: str, clip: str, dtype: torch.dtype
) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter drops the low half instead of rounding")
    table, x = TABLES[name], start(dtype)
    half, full = Stepper(table, x, CLIPS[clip], backend), Stepper(table, x.float(), CLIPS[clip], backend)
    for row in range(len(table)):
        output, noise = inputs(table, row, dtype)
        before, wide = x.clone(), x.float()
        got, want = half(row, output, x, noise), full(row, output, wide, None if noise is None else noise.float())
        assert torch.equal(x, before)
        for ours, theirs in zip(got, want, strict=True):
            assert ours is not None
            assert torch.equal(ours, theirs.to(dtype))  # type: ignore[union-attr]
        x = got[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_run_in_any_order_and_again(backend: str) -> None:
    table, x = TABLES["noise"], start()
    stepper = Stepper(table, x, None, backend)
    inorder = [stepper(row, inputs(table, row, x.dtype)[0], x, inputs(table, row, x.dtype)[1])[0] for row in range(4)]
    for row in (2, 0, 3, 3, 1):
        output, noise = inputs(table, row, x.dtype)
        assert torch.equal(stepper(row, output, x, noise)[0], inorder[row]), row


def test_a_run_after_one_that_went_to_infinity_is_a_fresh_one() -> None:
    table, x = TABLES["saved tensors"], start()
    stepper = Stepper(table, x)
    want = stepper(0, x, x)[0]
    stepper(1, torch.full_like(x, torch.inf), x)
    assert torch.equal(stepper(0, x, x)[0], want)


def test_a_row_that_failed_is_not_counted() -> None:
    table, x = TABLES["noise"], start()
    stepper, (output, noise) = Stepper(table, x), inputs(TABLES["noise"], 1, torch.float32)
    want = Stepper(table, x)(1, output, x, noise)[0]
    stepper(0, output, x, noise)
    with pytest.raises(ValueError, match="model output: got shape"):
        stepper(3, x[:, :1], x, noise)
    assert torch.equal(stepper(1, output, x, noise)[0], want)


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a number is read back from the device, or made from one of the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(("_local_scalar_dense", "nonzero", "is_nonzero", "item", "tensor", "scalar_tensor"))
        assert not name.startswith(("_to_copy", "lift_fresh", "arange")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["saved tensors", "raw output", "noise"])
def test_nothing_is_read_back_or_copied_from_the_host(name: str) -> None:
    table, x = TABLES[name], start()
    stepper = Stepper(table, x, 1.0)
    rows = [inputs(table, row, x.dtype) for row in range(len(table))]
    with NothingFromTheHost():
        for row, (output, noise) in enumerate(rows):
            x, _ = stepper(row, output, x, noise)
        stepper(1, rows[1][0], x, rows[1][1])


def test_x0_may_be_left_out_and_a_float64_state_stays_one() -> None:
    table, x = TABLES["raw output"], start(torch.float64)
    following, x0 = Stepper(table, x, keep_x0=False)(0, x, x)
    assert x0 is None
    assert following.dtype == torch.float64
    row = table.rows[0]
    torch.testing.assert_close(following, (0.9 + 0.2 * 0.5 + 0.1) * x, rtol=1e-14, atol=1e-14)
    assert row[3] == -0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": torch.zeros(2)}, "x: got shape"),
        ({"like": torch.zeros(2, 3, 4, dtype=torch.int64)}, "x: got torch.int64"),
        ({"backend": "inductor"}, "backend: got 'inductor' with a source"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stepper(**{"table": TABLES["noise"], "like": start(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": SCHEDULE}, "table: got Schedule, expected a StepTable"),
        ({"like": SHAPE}, "like: got tuple, expected a tensor"),
    ],
)
def test_arguments_of_wrong_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Stepper(**{"table": TABLES["noise"], "like": start(), **changes})
