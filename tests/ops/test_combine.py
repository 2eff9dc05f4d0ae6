"""Combinations as an operation: what it checks, reads and returns, on both backends."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.combinations import assert_close, in_float64, random_combination
from torch import Tensor

from fastcfg.clip import DynamicThreshold
from fastcfg.combination import Combination
from fastcfg.ops import Combine, is_channels_last, triton_problem
from fastcfg.ops import combine as module
from fastcfg.ops.extension import native_problem
from fastcfg.reference import _fma

pytestmark = pytest.mark.quick

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32 = torch.float32
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs Triton"))
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native_problem(DEVICE)), reason=native_problem(DEVICE)))
backends = pytest.mark.parametrize("backend", ["reference", TRITON, NATIVE])

# Of DDIM, clipped: the next sample and x0, which is handed out and kept.
DDIM = Combination([[0, 0.4], [0, 0], [0, 0]], [1.2, -0.8], [0.9, 1, 1], 1.0)  # type: ignore[arg-type]
SUM = Combination([[0.5, -0.25, 2.0]])  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@backends
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...], backend: str) -> None:
    rng = np.random.default_rng(len(shape))
    for clip in (None, 0.7, DynamicThreshold(0.5)):
        combination = random_combination(rng, 4, 3, clip)
        tensors = [normal(*shape, seed=k) for k in range(4)]
        copies = [tensor.clone() for tensor in tensors]
        results = Combine(combination, DEVICE, backend=backend)(tensors, [F32] * 3)
        assert [result.shape for result in results] == [shape] * 3
        assert_close(results, in_float64(combination, tensors), 20)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    if (dtype, backend, DEVICE.type) == (torch.bfloat16, "triton", "cpu"):
        pytest.skip("Triton's interpreter cuts bfloat16 off; tests/kernels mends it")
    tensors = [normal(2, 3, 8, 8, seed=k).to(dtype) for k in range(2)]
    combine = Combine(DDIM, DEVICE, backend=backend)
    wide = combine([tensor.float() for tensor in tensors], [F32] * 3)
    results = combine(tensors, [dtype, F32, dtype])
    assert [result.dtype for result in results] == [dtype, F32, dtype]
    assert all(torch.equal(got, want.to(got.dtype)) for got, want in zip(results, wide, strict=True))


@backends
def test_x0_is_handed_out_as_it_is_and_in_memory_of_its_own(backend: str) -> None:
    tensors = [normal(2, 3, 8, 8, seed=k) for k in range(2)]
    _, x0, kept = Combine(DDIM, DEVICE, backend=backend)(tensors, [F32] * 3)
    expected = torch.add(tensors[1] * -0.8, tensors[0], alpha=1.2)
    torch.testing.assert_close(x0, expected.clamp(-1, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(x0, kept)
    assert x0.data_ptr() != kept.data_ptr()


@backends
@pytest.mark.parametrize("clip", [None, 1e6], ids=str)
def test_results_are_new_tensors_even_where_they_are_inputs(clip: float | None, backend: str) -> None:
    """A copy of an input, and an x0 that is the model's output."""
    copies = Combination([[1, 0], [0, 1], [0, 0], [0, 0]], [0, 1], [0, 0, 1, 1], clip)  # type: ignore[arg-type]
    tensors = [normal(2, 3, seed=k) for k in range(2)]
    results = Combine(copies, DEVICE, backend=backend)(tensors, [F32] * 4)
    for result, index in zip(results, (0, 1, 1, 1), strict=True):
        assert torch.equal(result, tensors[index])
    assert len({tensor.data_ptr() for tensor in (*tensors, *results)}) == 6


@backends
def test_what_has_a_zero_coefficient_is_not_read(backend: str) -> None:
    """0 times infinity is NaN."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=DEVICE)
    good = normal(4)
    rows = Combination([[1, 0, 0.5], [0, 0, 0], [0, 0, 0]], [0.5, 0, 1], [0.0, 1, 0], 1.0)  # type: ignore[arg-type]
    results = Combine(rows, DEVICE, backend=backend)([good, bad, good], [F32] * 3)
    assert all(result.isfinite().all() for result in results)
    assert not results[2].any()
    # An x0 that no output uses is not computed; one that a single output uses does not come into the others.
    rows = Combination([[1, 0], [0.5, 0]], [0, 1], [0, 1])  # type: ignore[arg-type]
    results = Combine(rows, DEVICE, backend=backend)([good, bad], [F32] * 2)
    assert torch.equal(results[0], good)
    assert not results[1][:3].isfinite().any()


@backends
def test_a_clip_keeps_nan(backend: str) -> None:
    sample = torch.tensor([math.nan, math.inf, -math.inf, 0.25], device=DEVICE)
    combination = Combination([[0.0]], [1], [1], 0.5)  # type: ignore[arg-type]
    (result,) = Combine(combination, DEVICE, backend=backend)([sample], [F32])
    assert result.isnan().tolist() == [True, False, False, False]
    assert result[1:].tolist() == [0.5, -0.5, 0.25]


@backends
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("batch", [1, 3])
def test_learned_variance(batch: int, layout: str, backend: str) -> None:
    combination = Combination([[0.9, -0.1, 0], [0, 1, 0]], noise=2, l_0=-3, l_v=1.5)  # type: ignore[arg-type]
    sample, noise = normal(batch, 3, 8, 8), normal(batch, 3, 8, 8, seed=1)
    output = normal(batch, 6, 8, 8, seed=2)
    if layout == "channels-last":
        sample, output = (t.contiguous(memory_format=torch.channels_last) for t in (sample, output))
    following, mean = Combine(combination, DEVICE, backend=backend)([sample, output, noise], [F32, F32])
    first, variance = output.chunk(2, dim=1)
    expected, sizes = in_float64(combination, [sample, first, noise], variance)
    # exp2 to 2 ulp, and its exponent's rounding.
    std = np.exp2(-3 + 1.5 * variance.double().cpu().numpy()) * np.abs(noise.double().cpu().numpy())
    assert_close([following], ([expected[0]], [sizes[0] + 2 * std]), 6)
    assert torch.equal(mean, first)
    assert following.stride() == mean.stride() == sample.stride()


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def permuted(tensor: Tensor) -> Tensor:
    return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": channels_last,
    "permuted": permuted,
    "with gaps": with_gaps,
    "flipped dimensions": lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
}


@backends
@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_sample_s_layout(layout: str, others: str, backend: str) -> None:
    plain = [normal(2, 3, 4, 5, seed=k) for k in range(3)]
    wide = torch.cat([plain[1], normal(2, 3, 4, 5, seed=9)], dim=1)
    sample = LAYOUTS[layout](plain[0])
    combine = Combine(SUM, DEVICE, backend=backend)
    (expected,) = combine(plain, [F32])
    for output in (plain[1], wide):
        tensors = [sample, LAYOUTS[others](output), LAYOUTS[others](plain[2])]
        (result,) = combine(tensors, [F32])
        assert torch.equal(result, expected)
        assert result.stride() == (expected.stride() if layout == "with gaps" else sample.stride())
        assert is_channels_last(result) == (layout == "channels-last")


@backends
def test_an_expanded_sample_and_an_expanded_output(backend: str) -> None:
    plain = [normal(2, 3, 4, seed=k) for k in range(3)]
    combine = Combine(SUM, DEVICE, backend=backend)
    tensors = [plain[0][:1].expand(2, 3, 4), plain[1][:, :1].expand(2, 3, 4), plain[2]]
    (result,) = combine(tensors, [F32])
    assert torch.equal(
        result, combine([tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors], [F32])[0]
    )
    assert result.is_contiguous()


@backends
def test_a_threshold_keeps_the_layout(backend: str) -> None:
    combination = Combination([[0, 0.5], [0, 0]], [2.0, -1.0], [0.25, 1.0], DynamicThreshold(0.9))  # type: ignore[arg-type]
    tensors = [normal(2, 3, 8, 8, seed=k) for k in range(2)]
    combine = Combine(combination, DEVICE, backend=backend)
    expected = combine(tensors, [F32, F32])
    results = combine([channels_last(tensor) for tensor in tensors], [F32, F32])
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)
        assert is_channels_last(got)
    assert_close(expected, in_float64(combination, tensors), 12)


@backends
def test_what_the_kernel_cannot_take_runs_all_the_same(backend: str) -> None:
    """Float64 inputs or results, nine inputs, five outputs, nothing at all."""
    tensors = [normal(2, 3, 4, seed=k) for k in range(12)]
    rng = np.random.default_rng(0)
    for inputs, outputs in ((9, 1), (2, 5), (12, 6)):
        combination = random_combination(rng, inputs, outputs)
        results = Combine(combination, DEVICE, backend=backend)(tensors[:inputs], [F32] * outputs)
        assert_close(results, in_float64(combination, tensors[:inputs]), 30)
    combine = Combine(SUM, DEVICE, backend=backend)
    (expected,) = combine(tensors[:3], [F32])
    assert torch.equal(combine([tensors[0].double(), *tensors[1:3]], [F32])[0], expected)
    assert torch.equal(combine(tensors[:3], [torch.float64])[0], expected.double())
    assert combine([torch.empty(0, 3, device=DEVICE)] * 3, [F32])[0].shape == (0, 3)


@pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs Triton")
def test_the_kernel_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once: with a threshold, once for x0 and once for the results."""
    from fastcfg.kernels import combine as kernels

    launch, launched = kernels.launch_combine, []
    monkeypatch.setattr(kernels, "launch_combine", lambda *args: (launched.append(1), launch(*args)))
    threshold = Combination([[0, 0.5]], [2.0, -1.0], [0.25], DynamicThreshold())  # type: ignore[arg-type]
    tensors = [normal(1, 2, 4, seed=k) for k in range(9)]
    nine = Combination(np.ones((1, 9)))
    for combination, dtype, count in (
        (SUM, F32, 1),
        (DDIM, torch.bfloat16, 1),
        (threshold, F32, 2),
        (SUM, torch.float64, 0),
        (nine, F32, 0),
    ):
        launched.clear()
        combine = Combine(combination, DEVICE, backend="triton")
        combine(tensors[: combination.coefficients.shape[1]], [dtype] * len(combination.coefficients))
        assert len(launched) == count


@pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs Triton")
def test_tensors_that_int32_cannot_number_are_left_to_the_reference() -> None:
    kernel = Combine(SUM, DEVICE, backend="triton")._kernel
    assert kernel is not None
    for size, taken in ((2**30, True), (2**30 + 1, False), (2**31 - 1, False), (0, False)):
        assert kernel.takes([torch.empty(size, device="meta")] * 3, [F32]) == taken


def test_float64_is_computed_in_float64() -> None:
    tensors = [normal(2, 3, 4, seed=k).double() for k in range(3)]
    combine = Combine(SUM, DEVICE, torch.float64)
    assert combine.backend == "reference"
    assert_close(combine(tensors, [torch.float64]), in_float64(SUM, tensors), 4 * 2.0**-29)
    with pytest.raises(ValueError, match="backend: 'triton' cannot run"):
        Combine(SUM, DEVICE, torch.float64, "triton")


@backends
def test_no_gradient_is_recorded(backend: str) -> None:
    tensors = [normal(2, 3).requires_grad_() for _ in range(3)]
    (result,) = Combine(SUM, DEVICE, backend=backend)(tensors, [F32])
    assert not result.requires_grad
    assert torch.is_grad_enabled()


@backends
def test_the_default_device_does_not_matter(backend: str) -> None:
    tensors = [normal(2, 3, seed=k) for k in range(2)]
    expected = Combine(DDIM, DEVICE, backend=backend)(tensors, [F32] * 3)
    _fma.add_rounds_once.cache_clear()
    _fma.addcmul_rounds_once.cache_clear()
    with torch.device("meta"):
        _fma.addcmul_rounds_once(DEVICE)
        results = Combine(DDIM, DEVICE, backend=backend)(tensors, [F32] * 3)
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


@backends
def test_copies_and_pickles(backend: str) -> None:
    tensors = [normal(2, 3, seed=k) for k in range(2)]
    combine = Combine(DDIM, DEVICE, backend=backend)
    expected = combine(tensors, [F32] * 3)
    for other in (copy.deepcopy(combine), pickle.loads(pickle.dumps(combine))):
        assert all(torch.equal(got, want) for got, want in zip(other(tensors, [F32] * 3), expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((1, 2)), DEVICE), TypeError, "combination: got ndarray"),
        ((SUM, DEVICE, torch.float16), ValueError, r"dtype: got torch\.float16"),
        ((SUM, DEVICE, F32, "inductor"), ValueError, "backend: got 'inductor'"),
    ],
)
def test_constructor_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Combine(*arguments)


@backends
def test_calls_refuse_what_does_not_fit(backend: str) -> None:
    combine = Combine(SUM, DEVICE, backend=backend)
    good = [normal(2, 3, 4, seed=k) for k in range(3)]
    for tensors, dtypes, message in (
        (good[:2], [F32], "inputs, dtypes: got 2 and 1, expected 3 and 1"),
        (good, [F32, F32], "inputs, dtypes: got 3 and 2"),
        ([good[0], normal(2, 4, 4), good[2]], [F32], r"output: got shape \(2, 4, 4\)"),
        ([good[0], good[1][:1], good[2]], [F32], "output: got shape"),
        ([good[0], good[1], normal(2, 6, 4)], [F32], "input 2: got shape"),
        ([good[0], good[1], good[2][:1]], [F32], "input 2: got shape"),
        ([normal(6), normal(12), normal(6)], [F32], "input 1: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            combine(tensors, dtypes)
    learned = Combine(Combination([[1.0, 0, 0]], noise=2), DEVICE, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 2C channels"):
        learned(good, [F32])


def test_dense_tensors_are_read_where_they_are() -> None:
    tensors = [normal(2, 3, 4, 5, seed=k) for k in range(2)]
    wide = torch.cat([tensors[1], tensors[1]], dim=1)
    for sample, output in ((tensors[0], wide), (channels_last(tensors[0]), channels_last(tensors[1]))):
        found, _ = module.arranged([sample, output], False)
        assert [t.data_ptr() for t in found] == [sample.data_ptr(), output.data_ptr()]
    found, variance = module.arranged([tensors[0], wide], True)
    assert variance is not None
    assert variance.data_ptr() == wide.data_ptr() + tensors[0][0].numel() * 4
