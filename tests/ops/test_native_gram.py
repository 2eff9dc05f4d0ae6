"""The Gram matrix in C: one result on every instruction set of this CPU, as close to the exact one as the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.native import Watching, built, chosen, every_set
from torch import Tensor

from fastcfg.ops import extension, gram
from fastcfg.ops.gram import _gram_result
from fastcfg.ops.native_pieces import MAX_VECTORS, native_gram
from fastcfg.reference import gram as reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(instructions: str, output: Tensor, momentum: Tensor | None, *arguments: Any) -> Tensor:
    out = _gram_result(output, momentum, *arguments).fill_(math.nan)
    native_gram(output, momentum, *arguments, out, instructions)
    return out


@built
@every_set
@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 8, 255, 256, 257, 1543])
def test_the_matrix_is_exact_but_for_the_sums_rounding(
    size: int, branches: int, has_momentum: bool, instructions: str
) -> None:
    if branches + has_momentum > MAX_VECTORS:
        branches = MAX_VECTORS - 1
    output, h = normal(2 * branches, 1, size), normal(2, 1, size, seed=1)
    arguments = branches, branches - 1, 1, 0, 0.75
    momenta = [h.clone() if has_momentum else None for _ in range(3)]
    got = matrix(instructions, output, momenta[0], *arguments)
    want = reference(output, branches, branches - 1, 1, 0, momenta[1], 0.75)
    size_of_sums = reference(output.abs(), 1, 0, 1, 0, None, 0.0).view(branches, 2, 1, 2).sum((0, 2, 3)) + 1
    assert ((got - want).abs() <= 64 * 2.0**-53 * size * size_of_sums[:, None, None]).all()
    if has_momentum:
        assert torch.equal(momenta[0], momenta[1])
        assert not torch.equal(momenta[0], h)
    # The same bits as on the plainest set.
    assert torch.equal(got, matrix("baseline", output, momenta[2], *arguments))


@built
@every_set
def test_close_branches_keep_the_norm_of_their_difference(instructions: str) -> None:
    a = normal(1, 3, 1000)
    b = a + normal(1, 3, 1000, seed=1) * 1e-5
    got = matrix(instructions, torch.cat([a, b]), None, 2, 1, 3, 0, 0.0)
    exact = (a - b).double().square().sum()
    assert abs(got[0, 0, 0] - exact) <= 1e-14 * exact


@built
@every_set
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("at", [0, 300, 307])
def test_nan_infinity_and_overflow_come_through(at: int, value: float, instructions: str) -> None:
    output = normal(4, 1, 308)
    output[0, 0, at], output[2, 0, at] = value, -value
    got = matrix(instructions, output, None, 2, 1, 1, 0, 0.0)
    want = reference(output, 2, 1, 1, 0, None, 0.0)
    assert not want[0].isfinite().all()
    assert torch.equal(got[0].isnan(), want[0].isnan())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@chosen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_operation_takes_every_output(layout: str, dtype: torch.dtype, backend: str) -> None:
    output = normal(4, 6, 5, 7).to(dtype)
    if layout == "channels-last":
        output = output.contiguous(memory_format=torch.channels_last)
    momenta = [normal(2, 3, 5, 7, seed=1) for _ in range(2)]
    options: dict[str, Any] = {"channels": 3, "conditional": 0, "decay": -0.5}
    got = gram(output, 2, 1, momentum=momenta[0], backend=backend, **options)
    want = gram(output, 2, 1, momentum=momenta[1], backend="reference", **options)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-11)
    assert torch.equal(*momenta)


@built
def test_a_sample_does_not_depend_on_its_batch() -> None:
    output = normal(6, 3, 5, 7)
    whole, _ = gram(output, 2, 1, backend="native")
    for b in range(3):
        assert torch.equal(gram(output[b::3], 2, 1, backend="native")[0][0], whole[b])


@chosen
def test_more_vectors_than_there_is_room_for_and_float64_run_on_the_reference(backend: str) -> None:
    many = normal(2 * (MAX_VECTORS + 1), 3, 4)
    got = gram(many, MAX_VECTORS + 1, 0, backend=backend)
    assert all(map(torch.equal, got, gram(many, MAX_VECTORS + 1, 0, backend="reference")))
    wide = normal(4, 3, 4).double()
    assert torch.equal(gram(wide, 2, 1)[0], gram(wide, 2, 1, backend="reference")[0])
    with pytest.raises(ValueError, match="float64"):
        gram(wide, 2, 1, backend="native")


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    output = normal(4, 3, 5)
    monkeypatch.setattr(extension, "instruction_sets", tuple)
    assert torch.equal(gram(output, 2, 1)[0], gram(output, 2, 1, backend="reference")[0])
    with pytest.raises(ValueError, match="'native' cannot run here"):
        gram(output, 2, 1, backend="native")


@built
def test_who_watches_torchs_operations_sees_the_kernel() -> None:
    output = normal(4, 3, 5)
    with Watching() as watching:
        got = gram(output, 2, 1, backend="native")
    assert "fastcfg.native_gram.default" in watching.seen
    assert all(map(torch.equal, got, gram(output, 2, 1, backend="native")))
    torch.library.opcheck(torch.ops.fastcfg.native_gram.default, (output, normal(2, 3, 5), 2, 1, 3, 0, 0.5))


@built
def test_arguments_that_cannot_be_are_refused() -> None:
    run = extension.native_module().gram
    with pytest.raises(TypeError, match="got 1 arguments, expected 3"):
        run(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        run(9, 0, b"")
    with pytest.raises(ValueError, match="gram: got 3 bytes, expected 80"):
        run(0, 0, b"abc")
