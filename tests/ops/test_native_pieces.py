"""The pieces of the step in C: the reference's bits on every instruction set of this CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.native import Watching, built, chosen, every_set
from torch import Tensor

from fastcfg import DynamicThreshold, ops
from fastcfg.ops import QuantileBound, extension
from fastcfg.ops.native_pieces import NativeBound, native_blend, native_threshold, native_x0
from fastcfg.reference import ReferenceBound
from fastcfg.reference import pieces as reference
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS

SIZES = (1, 5, 16, 17, 511, 513, 1100)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def special(*shape: int, seed: int = 0) -> Tensor:
    """With NaN, infinities and zeros of both signs, where there is room."""
    x = normal(*shape, seed=seed)
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    flat = x.view(-1)[5::7]
    flat.copy_(values.repeat(len(flat) // 5 + 1)[: len(flat)])
    return x


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    different = got.contiguous().view(torch.int32) != want.contiguous().view(torch.int32)
    assert not bool((different & ~(got.isnan() & want.isnan())).any())


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory like a tensor, and what follows it, which must stay NaN."""
    memory = torch.full((like.numel() + 64,), math.nan)
    return memory[: like.numel()].view(like.shape), memory[like.numel() :]


@built
@every_set
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_momentum", [False, True])
@pytest.mark.parametrize(("base", "scaled"), [(None, False), (0, False), (2, True), (1, False)])
@pytest.mark.parametrize("branches", [2, 3])
def test_blends(
    branches: int, base: int | None, scaled: bool, has_momentum: bool, size: int, instructions: str
) -> None:
    base = None if base is None else min(base, branches - 1)
    output, momentum = special(branches * 2, 1, size), normal(2, 1, size, seed=1) if has_momentum else None
    weights = normal(2, branches + has_momentum, seed=2)
    out, after = guarded(output[:2])
    native_blend(output, weights, base, scaled, momentum, out, instructions)
    assert_same(out, reference.guidance_blend(output, weights, base=base, scaled=scaled, momentum=momentum))
    assert after.isnan().all()


@built
@every_set
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("has_rest", [False, True])
def test_predicted_x0(has_rest: bool, limited: bool, size: int, instructions: str) -> None:
    x, m = special(3, 1, size), special(3, 1, size, seed=1)
    p_x, p_m, *rest = normal(4, 3, seed=2) * torch.tensor([1.0, 1.0, 1e-8, 1e-8])[:, None]
    bound = torch.tensor([0.5, math.nan, math.inf]) if limited else None
    out, after = guarded(x)
    arguments: Any = (x, m, p_x, p_m, bound, tuple(rest) if has_rest else None)
    native_x0(*arguments, out, instructions)
    assert_same(out, reference.predict_x0(*arguments))
    assert after.isnan().all()


@built
@every_set
@pytest.mark.parametrize("size", SIZES)
def test_thresholds(size: int, instructions: str) -> None:
    x, bound = special(4, 1, size), torch.tensor([0.7, math.nan, math.inf, 3.0])
    out, after = guarded(x)
    native_threshold(x, bound, out, instructions)
    assert_same(out, reference.threshold(x, bound))
    assert after.isnan().all()


def run_buffers(spec: StepSpec, size: int) -> StepBuffers:
    x, vectors = normal(2, 3, size), spec.branches + spec.momentum
    return StepBuffers(
        x,
        normal(6, len(DEVICE_COLUMNS), seed=1),
        torch.tensor([3, 0], dtype=torch.int32),
        weights=normal(5, 2, vectors, seed=2),
        momentum=normal(2, 3, size, seed=3),
        bound=torch.full((2,), -1.0),
        x0=torch.full_like(x, math.nan),
    )


BOUNDS = {
    "one branch": StepSpec(clip=True),
    "guided": StepSpec(branches=2, base=1, clip=True),
    "summed": StepSpec(branches=3, clip=True),
    "momentum": StepSpec(branches=2, base=0, scaled=True, momentum=True, clip=True),
}


@built
@every_set
@pytest.mark.parametrize("size", [1, 171, 400])
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_a_row(name: str, size: int, instructions: str) -> None:
    spec, threshold = BOUNDS[name], DynamicThreshold(0.9, 0.1)
    expected, buffers = run_buffers(spec, size), run_buffers(spec, size)
    outputs = [normal(2 * spec.branches, 3, size, seed=seed) for seed in (4, 5)]
    outputs += [normal(2 * spec.branches, 6, size, seed=6), outputs[0].half()]
    outputs += [outputs[0].movedim(1, -1).contiguous().movedim(-1, 1)]
    want, got = ReferenceBound(threshold, spec, expected), NativeBound(threshold, spec, buffers, instructions)
    for output in outputs:
        want(output)
        got(output)
        assert_same(buffers.x0, expected.x0)  # type: ignore[arg-type]
        assert_same(buffers.bound, expected.bound)  # type: ignore[arg-type]
        assert torch.equal(buffers.counter, expected.counter)


def calls(backend: str, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """The operations' results."""
    x, output = normal(2, 3, 5, 7).to(dtype), normal(4, 3, 5, 7, seed=1).to(dtype)
    if layout == "channels-last":
        x, output = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, output))
    weights, one = normal(2, 2, seed=2), torch.ones(2)
    buffers = run_buffers(BOUNDS["guided"], 35)
    buffers.x, buffers.x0 = (tensor.view(2, 3, 5, 7) for tensor in (buffers.x, buffers.x0))  # type: ignore[union-attr]
    QuantileBound(DynamicThreshold(), BOUNDS["guided"], buffers, backend)(output)
    return [
        ops.guidance_blend(output, weights, base=1, backend=backend),
        ops.predict_x0(x, output[:2], 0.7 * one, 0.1 * one, 0.5 * one, rest=(1e-8 * one, one), backend=backend),
        ops.dynamic_threshold(x, 0.9, 0.1, backend=backend),
        buffers.bound,  # type: ignore[list-item]
        buffers.x0,  # type: ignore[list-item]
    ]


@chosen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_operations_take_every_tensor(layout: str, dtype: torch.dtype, backend: str) -> None:
    for got, want in zip(calls(backend, dtype, layout), calls("reference", dtype, layout), strict=True):
        assert_same(got, want)
        assert got.stride() == want.stride()


@built
def test_who_watches_torchs_operations_sees_those_of_the_reference() -> None:
    want = calls("native", torch.float32, "contiguous")
    with Watching() as watching:
        got = calls("native", torch.float32, "contiguous")
    assert watching.seen.count("aten.topk.default") == 2
    assert all(map(torch.equal, got, want))


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    want = calls("reference", torch.float32, "contiguous")
    monkeypatch.setattr(extension, "instruction_sets", tuple)
    assert all(map(torch.equal, calls("auto", torch.float32, "contiguous"), want))
    with pytest.raises(ValueError, match="'native' cannot run here"):
        calls("native", torch.float32, "contiguous")


@built
@pytest.mark.parametrize(
    ("name", "size"), [("blend_outputs", 80), ("predict", 80), ("threshold", 40), ("step_bound", 160)]
)
def test_arguments_that_cannot_be_are_refused(name: str, size: int) -> None:
    run = getattr(extension.native_module(), name)
    with pytest.raises(TypeError, match="got 1 arguments, expected 3"):
        run(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        run(9, 0, b"")
    with pytest.raises(ValueError, match=f"{name}: got 3 bytes, expected {size}"):
        run(0, 0, b"abc")


@built
@pytest.mark.parametrize("threads", [2, 3])
def test_large_states_have_the_same_bits_in_any_number_of_threads(threads: int) -> None:
    output, weights, seeds = normal(10, 3, 4500), normal(5, 2, seed=1), torch.arange(5)
    nodes, one, momentum = torch.arange(3), torch.ones(5), normal(5, 3, 4500, seed=2)

    def results() -> list[Tensor]:
        h = momentum.clone()
        products, sums = ops.gram(output, 2, 1, momentum=h, conditional=0, decay=0.5, backend="native")
        return [
            *(products, sums, h),
            ops.guidance_blend(output, weights, base=1, backend="native"),
            ops.predict_x0(momentum, output[:5], one, weights[:, 1].contiguous(), one, backend="native"),
            ops.dynamic_threshold(momentum, 0.9, 0.1, backend="native"),
            ops.brownian_noise(torch.empty(5, 13500), seeds, nodes, torch.randn(3).sign(), 3, "native").abs(),
        ]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    want = results()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        assert all(map(torch.equal, results(), want))
    finally:
        torch.set_num_threads(before)
