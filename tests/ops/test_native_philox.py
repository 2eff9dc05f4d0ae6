"""Noise drawn in C has the bits of `reference.philox` on every instruction set of this CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcfg.ops.extension import instruction_sets, native_module, native_problem
from fastcfg.ops.native import native_normal
from fastcfg.reference.philox import BROWNIAN_STREAM, INITIAL_STREAM, STEP_STREAM, philox_normal, sample_seeds

CPU = torch.device("cpu")
built = pytest.mark.skipif(bool(native_problem(CPU)), reason=native_problem(CPU))
pytestmark = [built, pytest.mark.parametrize("instructions", instruction_sets())]
MARGIN = 256  # more than is drawn at a time


def drawn(seeds: Tensor, size: int, row: int, stream: int, instructions: str) -> Tensor:
    """[B, size], in memory with a margin, which must stay."""
    batch = len(seeds)
    memory = torch.full((batch * size + 2 * MARGIN,), math.nan)
    out = memory[MARGIN:-MARGIN].view(batch, size)
    assert native_normal(out, seeds, row=row, stream=stream, instructions=instructions) is out
    assert memory[:MARGIN].isnan().all()
    assert memory[-MARGIN:].isnan().all()
    return out


def assert_same(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("size", [*range(1, 10), 31, 32, 33, 63, 64, 127, 128, 129, 12289])
def test_every_size_has_the_bits_of_the_reference(size: int, instructions: str) -> None:
    seeds = sample_seeds(2**63 - 2, 3)  # the last two are beyond the largest int64
    want = philox_normal(seeds, (size,), row=7)
    assert_same(drawn(seeds, size, 7, STEP_STREAM, instructions), want)


@pytest.mark.parametrize(
    ("row", "stream"), [(0, INITIAL_STREAM), (2**31 - 1, BROWNIAN_STREAM), (2**32 - 1, STEP_STREAM)]
)
def test_rows_and_streams_are_words_of_the_counter(row: int, stream: int, instructions: str) -> None:
    seeds = sample_seeds([-1, 0, 2**32], 3)
    want = philox_normal(seeds, (40,), row=row, stream=stream)
    assert_same(drawn(seeds, 40, row, stream, instructions), want)


def test_a_long_sample_has_the_bits_of_the_reference(instructions: str) -> None:
    # 2^21 radii and angles: the smallest u and the largest are among 2^-21 of their ends. Long enough to release the
    # interpreter's lock.
    seeds = sample_seeds(5, 1)
    assert_same(drawn(seeds, 2**21, 1, STEP_STREAM, instructions), philox_normal(seeds, (2**21,), row=1))


def test_arguments_that_cannot_be_are_refused(instructions: str) -> None:
    normal = native_module().normal
    with pytest.raises(TypeError, match="got 1 arguments, expected 8"):
        normal(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        normal(9, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises((TypeError, OverflowError)):
        normal(instruction_sets().index(instructions), 0, "1", 0, 0, 0, 0, 0)
