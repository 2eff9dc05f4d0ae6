"""What works on a run's buffers between rows, in C: the reference's bits on every instruction set of this CPU."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import ROOT
from support.native import Watching, built, chosen, every_set
from torch import Tensor

from fastcfg.ops import FiniteCheck, NoiseSums, StateChange, extension, sums_memory
from fastcfg.ops.native_rows import has_native_state_change, native_finite_check, native_noise_sums, native_state_change
from fastcfg.reference import ReferenceStateChange
from fastcfg.reference.finite import FINITE, ReferenceFiniteCheck
from fastcfg.reference.log_prob import ReferenceNoiseSums
from fastcfg.reference.philox import INITIAL_STREAM, STEP_STREAM
from fastcfg.state_change import (
    FRESH_STREAM,
    KNOWN_COLUMNS,
    NO_NORMALS,
    RENOISE_STREAM,
    TENSOR,
    KnownBuffers,
    StateSpec,
)
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import StepTable

TABLE = StepTable.from_columns(t=[9, 5, 2, 1], c_in=[1.0, 0.7, 0.4, 0.2], p_m=1.0, a_0=1.0, s=0.5)
MARGIN = 600  # more than a block
SIZES = (1, 7, 33, 511, 512, 513, 1100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy in memory with margins, and the memory of the margins."""
    memory = torch.full((tensor.numel() + 2 * MARGIN,), math.nan)
    copy = memory[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor)
    return copy, torch.as_strided(memory, (2, MARGIN), (MARGIN + tensor.numel(), 1))


def assert_same(got: Tensor, want: Tensor) -> None:
    integers = {4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    different = got.view(integers) != want.view(integers)
    assert not bool((different & ~(got.isnan() & want.isnan())).any())


# Changes of the state.

SPECS = {
    "given": StateSpec(),
    "given before": StateSpec(before=True),
    "known": StateSpec(known=True, noise=FRESH_STREAM),
    "known, of the start": StateSpec(True, True, noise=INITIAL_STREAM),
    "known, of the step": StateSpec(known=True, noise=STEP_STREAM, renoise=RENOISE_STREAM),
    "hard": StateSpec(True, True, True, TENSOR, RENOISE_STREAM),
    "no noise": StateSpec(known=True, noise=NO_NORMALS, renoise=TENSOR),
}


def state_buffers(size: int, time: torch.dtype, known: bool) -> tuple[StepBuffers, KnownBuffers | None]:
    x, counter = normal(3, 1, size), torch.tensor([2, 0], dtype=torch.int32)
    model_input = torch.full((6, 1, size), math.nan)
    seeds, times = torch.arange(3) + 2**40, torch.full((6,), -1, dtype=time)
    buffers = StepBuffers(x, TABLE.on("cpu"), counter, seeds=seeds, model_input=model_input, time=times)
    if not known:
        return buffers, None
    hold = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    hold.view(-1)[::3], hold.view(-1)[1::3] = 0, 1
    image, again = normal(3, 1, size, seed=4), normal(3, 1, size, seed=6)
    image[1, 0, 0], again[2, 0, -1] = math.nan, math.inf
    rows = torch.rand(4, 5, generator=torch.Generator().manual_seed(3))
    hold.view(-1)[2::5] = rows[2, KNOWN_COLUMNS.index("gate")]
    return buffers, KnownBuffers(image, hold, rows, normal(3, 1, size, seed=5), again)


@built
@every_set
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPECS)
def test_changes_of_the_state_have_the_bits_of_the_reference(name: str, size: int, instructions: str) -> None:
    spec, time = SPECS[name], (torch.int64, torch.float32)[size % 2]
    expected, known = state_buffers(size, time, spec.known)
    x, x_margin = guarded(expected.x)
    model_input, input_margin = guarded(expected.model_input)  # type: ignore[arg-type]
    buffers = replace(expected, x=x, model_input=model_input, time=expected.time.clone())  # type: ignore[union-attr]
    given = normal(3, 1, size, seed=8) if name.startswith("given") else None
    ReferenceStateChange(spec, expected, known)(expected.x if given is None else given)
    assert has_native_state_change(buffers)
    native_state_change(x if given is None else given, spec, buffers, known, instructions)
    assert_same(x, expected.x)
    assert_same(model_input, expected.model_input)  # type: ignore[arg-type]
    assert torch.equal(buffers.time, expected.time)  # type: ignore[arg-type]
    assert x_margin.isnan().all()
    assert input_margin.isnan().all()


@chosen
def test_inputs_that_the_kernel_does_not_write_are_the_references(backend: str) -> None:
    buffers, known = state_buffers(8, torch.int64, True)
    assert StateChange(SPECS["known"], buffers, known, backend).backend in ("native", "reference")
    buffers.model_input = torch.zeros(6, 1, 8, dtype=torch.float16)
    change = StateChange(SPECS["known"], buffers, known, backend)
    assert change.backend == "reference"
    change(buffers.x)
    want = buffers.x * torch.tensor(0.4)
    torch.testing.assert_close(buffers.model_input[:3], want.half(), rtol=0, atol=0, equal_nan=True)


def test_numbers_of_the_kernel_are_those_of_the_vocabulary() -> None:
    header = (ROOT / "kernels" / "cpu" / "row_work.h").read_text()
    (columns,) = re.findall(r"enum \{ ([A-Z, _]+), KNOWN_WIDTH \};", header)
    assert tuple(columns.lower().split(", ")) == KNOWN_COLUMNS
    assert f"enum {{ NO_NORMALS = {NO_NORMALS}, FROM_TENSOR = {TENSOR} }};" in header


# Sums of log-probabilities.


@built
@every_set
@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1100])
@pytest.mark.parametrize("source", ["philox", "tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_sums_are_those_of_float64(size: int, source: str, learned: bool, instructions: str) -> None:
    spec = StepSpec(branches=2, base=0, conditional=1, learned_variance=learned, noise_source=source)
    buffers = StepBuffers(
        normal(2, 3, size),
        TABLE.on("cpu"),
        torch.tensor([1, 0], dtype=torch.int32),
        noise=normal(2, 3, size, seed=1),
        seeds=torch.arange(2) + 5,
    )
    output = normal(4, 6, size, seed=2)
    noise, seeds = (None, buffers.seeds) if source == "philox" else (buffers.noise, None)
    for given in (output, output.half(), output.movedim(1, -1).contiguous().movedim(-1, 1)):
        want, got, plain = (sums_memory(4, buffers.x, "native") for _ in range(3))
        ReferenceNoiseSums(spec, buffers, want)(given)
        for sums, name in ((got, instructions), (plain, "baseline")):
            native_noise_sums(given, noise, seeds, buffers.counter, sums, 3, 1, learned, name)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
        assert torch.equal(got, plain)
        assert (got[1, 0] > 0).all()
        assert bool((got[1, 1] != 0).all()) is learned


# The check for NaN and infinity.


@built
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_the_first_number_that_is_not_finite_is_noted(state: torch.dtype, dtype: torch.dtype, value: float) -> None:
    sources = torch.tensor([0, 2, 3], dtype=torch.int32)
    places: list[Any] = [[], [(0, 5, 18)], [(0, 1, 0), (1, 0, 7)], [(1, 2, 18)], [(0, 0, 0)], [(0, 3, 9), (0, 2, 1)]]
    for row in (1, 2, 5):
        counter, seen = torch.tensor([row, 0], dtype=torch.int32), set()
        for place in places:
            tensors = [normal(6, 19).to(dtype), normal(3, 19).to(state)]
            tensors[0][4, 4], tensors[1][1, 1] = torch.finfo(dtype).max, torch.finfo(state).tiny
            for which, *index in place:
                tensors[which][tuple(index)] = value
            for before in (FINITE, 3):
                want, got = (torch.full((1,), before) for _ in range(2))
                ReferenceFiniteCheck(tensors[1], counter, sources, want, 2)(tensors[0])
                native_finite_check(*tensors, counter, sources, got, 2)
                assert torch.equal(got, want)
                seen.add(int(got))
        assert len(seen) > 4 or row % 2


# Which runs.


def three(backend: str) -> tuple[list[Any], list[Tensor], Tensor]:
    """The three operations, what they write, and the model's output."""
    buffers, known = state_buffers(8, torch.int64, True)
    buffers.noise, record = normal(3, 1, 8, seed=1), torch.full((1,), FINITE)
    known.image.nan_to_num_(), known.renoise.nan_to_num_(posinf=0)  # type: ignore[union-attr]
    sums = sums_memory(4, buffers.x, backend)
    sources = torch.tensor([0, 1], dtype=torch.int32)
    output = normal(3, 1, 8, seed=2)
    output[1, 0, 3] = math.nan
    operations = [
        StateChange(SPECS["hard"], buffers, known, backend),
        NoiseSums(StepSpec(noise_source="tensor"), buffers, sums, backend),
        FiniteCheck(buffers.x, buffers.counter, sources, record, 1, backend),
    ]
    written = [buffers.x, buffers.model_input, buffers.time, sums, record]
    return [(operations[0], buffers.x), *((run, output) for run in operations[1:])], written, output  # type: ignore


@chosen
def test_the_operations_are_those_of_the_reference(backend: str) -> None:
    found = {}
    for name in (backend, "reference"):
        operations, written, _ = three(name)
        for run, argument in operations:
            run(argument)
        found[name] = written
    torch.testing.assert_close(found[backend], found["reference"], rtol=1e-14, atol=0)
    assert int(found[backend][-1]) < FINITE


@built
def test_who_watches_torchs_operations_sees_them() -> None:
    (operations, written, _), (again, expected, _) = three("native"), three("native")
    assert {run.backend for run, _ in operations} == {"native"}
    for (run, argument), (other, given) in zip(operations, again, strict=True):
        with Watching() as watching:
            run(argument)
        assert watching.seen, run
        other(given)
    assert all(map(torch.equal, written, expected))


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "instruction_sets", tuple)
    operations, _, _ = three("auto")
    assert {run.backend for run, _ in operations} == {"reference"}
    with pytest.raises(ValueError, match="'native' cannot run here"):
        three("native")


@built
def test_arguments_that_cannot_be_are_refused() -> None:
    module = extension.native_module()
    for name, size in (("noise_sums", 72), ("state_change", 168)):
        with pytest.raises(TypeError, match="got 1 arguments, expected 3"):
            getattr(module, name)(0)
        with pytest.raises(ValueError, match=f"{name}: got 3 bytes, expected {size}"):
            getattr(module, name)(0, 0, b"abc")
    with pytest.raises(TypeError, match="got 0 arguments, expected 1"):
        module.finite_check()
    with pytest.raises(ValueError, match="finite_check: got 3 bytes, expected 88"):
        module.finite_check(b"abc")
