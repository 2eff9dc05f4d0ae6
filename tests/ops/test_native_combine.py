"""`Combine(backend="native")`: the bits of the reference on every instruction set of this CPU."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from support.combinations import random_combination
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastcfg.clip import DynamicThreshold
from fastcfg.combination import Combination
from fastcfg.ops import Combine, extension, native_combine
from fastcfg.ops import combine as module
from fastcfg.ops.extension import instruction_sets, native_problem
from fastcfg.ops.native_combine import MAX_INPUTS, MAX_OUTPUTS, NativeCombine, pack
from fastcfg.utils._torch_private import fake_tensors

CPU = torch.device("cpu")
built = pytest.mark.skipif(bool(native_problem(CPU)), reason=native_problem(CPU))
each_set = pytest.mark.parametrize("instructions", instruction_sets())
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SUM = Combination([[0.5, -0.25]])  # type: ignore[arg-type]


def _kernel_cases() -> Any:
    """The cases that the Triton kernel is tested with."""
    path = ROOT / "tests" / "kernels" / "test_combine.py"
    spec = importlib.util.spec_from_file_location("combine_cases", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


cases = _kernel_cases()


def on(combination: Combination, instructions: str) -> Combine:
    """A combination on an instruction set."""
    combine = Combine(combination, CPU, backend="native")
    combine._kernel = NativeCombine(combination, instructions)
    return combine


def assert_same(got: list[Tensor], want: list[Tensor], ulps: int = 0) -> None:
    """Bit for bit, but for the first within some ulps of float32."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        if ulps and number == 0:
            torch.testing.assert_close(a, b, rtol=ulps * max(2.0**-23, torch.finfo(a.dtype).eps / 2), atol=1e-6)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


@built
@each_set
def test_random_combinations_are_the_reference_bit_for_bit(instructions: str) -> None:
    """Any layout and dtypes, bounds and quantiles. A second call takes the way of calls like the last."""
    for seed in range(120):
        combination, tensors, dtypes = cases.build(seed)
        expected = Combine(combination, CPU, backend="reference")(tensors, dtypes)
        combine = on(combination, instructions)
        kernel: Any = combine._kernel
        assert kernel.takes(module.arranged(tensors, combination.noise is not None)[0], dtypes)
        for _ in range(2):
            assert_same(combine(tensors, dtypes), expected, ulps=4 if combination.noise is not None else 0)


@built
@each_set
@pytest.mark.parametrize("size", [511, 512, 513, 70001])
def test_samples_longer_than_a_block_have_the_same_bits(size: int, instructions: str) -> None:
    rng = np.random.default_rng(size)
    for clip in (None, 0.7, DynamicThreshold(0.99, 0.5)):
        combination = random_combination(rng, 5, 3, clip)
        tensors, dtypes = [torch.randn(2, size) for _ in range(5)], [F32, BF16, F16]
        tensors[1] = torch.randn(2, 2 * size)
        expected = Combine(combination, CPU, backend="reference")(tensors, dtypes)
        assert_same(on(combination, instructions)(tensors, dtypes), expected)


@built
@each_set
def test_every_half_is_read_and_every_rounding_is_torch_s(instructions: str) -> None:
    copies = Combination([[1.0]])  # type: ignore[arg-type]
    combine = on(copies, instructions)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (F16, BF16):
        values = every.view(dtype)
        assert_same(combine([values], [F32]), [values.float()])
        assert_same(combine([values], [dtype]), [values])
        # The numbers halfway to the next one, those beside them, and any others.
        bits = values.float().view(torch.int32)
        spread = 2**13 if dtype == F16 else 2**16
        near = torch.stack([bits + offset for offset in (spread // 2 - 1, spread // 2, spread // 2 + 1)])
        for numbers in (near.view(F32), torch.randint(-(2**31), 2**31 - 1, (2**17,), dtype=torch.int32).view(F32)):
            assert_same(combine([numbers], [dtype]), [numbers.to(dtype)])


@built
@each_set
def test_powers_of_two_are_within_two_ulps(instructions: str) -> None:
    """As the coefficient of noise, of which 0 is added."""
    combine = on(Combination([[0, 0, 0]], noise=2, l_0=0, l_v=1), instructions)  # type: ignore[arg-type]
    powers = torch.cat([torch.linspace(-160, 140, 300_001), torch.linspace(-1, 1, 100_001)])
    powers = torch.cat([powers, torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30])]).view(1, 1, -1)
    (got,) = combine([torch.ones_like(powers), torch.cat([powers, powers], 1), torch.ones_like(powers)], [F32])
    want = torch.exp2(powers.double())
    finite = want.isfinite() & (want < 2.0**128)
    error = (got.double() - want).abs()[finite] / (want[finite] * 2.0**-23).clamp(min=2.0**-149)
    assert error.max() <= 2
    assert torch.equal(got[~finite].isnan(), want[~finite].isnan())
    assert got[~finite & ~want.isnan()].isinf().all()


@built
@each_set
@pytest.mark.parametrize("clip", [None, 0.7, DynamicThreshold(0.9), DynamicThreshold(1.0, 0.1, 0.4)], ids=str)
def test_nan_and_infinity_come_through(clip: float | DynamicThreshold | None, instructions: str) -> None:
    combination = Combination([[0.5, 0, 0], [0, 0, 0.5], [0, 0, 1]], [1, 0.5, 0], [1, 0, 0], clip)  # type: ignore[arg-type]
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0, 0.0, 3.0])
    for index in range(3):
        for first in range(7):
            tensors = [torch.ones(1, 1, 7) for _ in range(3)]
            tensors[index] = special[first:].repeat(7)[:7].view(1, 1, 7)
            expected = Combine(combination, CPU, backend="reference")(tensors, [F32] * 3)
            assert_same(on(combination, instructions)(tensors, [F32] * 3), expected)


@built
@each_set
def test_quantiles_of_equal_and_of_few_magnitudes(instructions: str) -> None:
    rng = np.random.default_rng(5)
    for number in range(60):
        size = int(rng.integers(1, 40))
        threshold = DynamicThreshold(float(rng.choice([0, 0.25, 0.5, 0.9, 0.995, 1])), 1e-3, None)
        combination = Combination([[0.0]], [1.0], [1.0], threshold)  # type: ignore[arg-type]
        values = rng.choice([0.0, 1e-40, 0.5, 0.5000001, 2.0, -2.0, 1e30, np.inf], (3, 2, size)[: 2 + number % 2])
        tensors = [torch.tensor(values, dtype=F32)]
        expected = Combine(combination, CPU, backend="reference")(tensors, [F32])
        assert_same(on(combination, instructions)(tensors, [F32]), expected)


@built
def test_nothing_is_written_outside_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[Tensor] = []

    def guarded(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        memory.append(torch.full((like.numel() + 128,), math.nan, dtype=dtype or like.dtype))
        return memory[-1][64:-64].view(like.shape)

    combination = random_combination(np.random.default_rng(0), 3, 3)
    for shape in ((2, 3, 7), (1, 700), (5,)):
        tensors = [torch.randn(shape) for _ in range(3)]
        monkeypatch.setattr(native_combine.torch, "empty_like", guarded)
        Combine(combination, CPU, backend="native")(tensors, [F32, F16, BF16])
        monkeypatch.undo()
    assert len(memory) == 9
    assert all(bool(m[:64].isnan().all() and m[-64:].isnan().all() and not m[64:-64].isnan().any()) for m in memory)


@built
def test_a_call_unlike_the_last_is_heard() -> None:
    """In dtypes, layouts and shapes, in any order."""
    rng = np.random.default_rng(1)
    combination = random_combination(rng, 3, 2, 0.5)
    combine, reference = (Combine(combination, CPU, backend=backend) for backend in ("native", "reference"))
    plain = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    kinds: list[Callable[[list[Tensor]], list[Tensor]]] = [
        lambda tensors: tensors,
        lambda tensors: [tensor.half() for tensor in tensors],
        lambda tensors: [tensors[0], torch.cat([tensors[1]] * 2, 1), tensors[2]],
        lambda tensors: [tensor[:1] for tensor in tensors],
        lambda tensors: [tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:]],
        lambda tensors: [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors],
        lambda tensors: [torch.nn.Parameter(tensors[0]), *tensors[1:]],
        lambda tensors: [tensors[0], torch._neg_view(tensors[1]), tensors[2]],
        lambda tensors: [tensor.double() for tensor in tensors],
    ]
    for _ in range(60):
        tensors = kinds[int(rng.integers(len(kinds)))](plain)
        dtypes = [[F32, F32], [F16, F32]][int(rng.integers(2))]
        assert_same(combine(tensors, dtypes), reference(tensors, dtypes))


def _mapped(combine: Combine, tensors: list[Tensor]) -> Any:
    return torch.func.vmap(lambda a, b: combine([a, b], [F32])[0])(*tensors)


def _faked(combine: Combine, tensors: list[Tensor]) -> Any:
    mode: Any = fake_tensors()
    return combine([mode.from_tensor(tensor) for tensor in tensors], [F32])[0]


def _in_fake_mode(combine: Combine, tensors: list[Tensor]) -> Any:
    with fake_tensors():
        return combine(tensors, [F32])[0]


def _counted(combine: Combine, tensors: list[Tensor]) -> Any:
    with FlopCounterMode(display=False):
        return combine(tensors, [F32])[0]


def _forward_mode(combine: Combine, tensors: list[Tensor]) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        return tuple(torch.autograd.forward_ad.unpack_dual(combine([dual, tensors[1]], [F32])[0]))


@built
@pytest.mark.parametrize("run", [_mapped, _faked, _in_fake_mode, _counted, _forward_mode])
@pytest.mark.parametrize("again", [False, True])
def test_what_is_no_memory_is_left_to_the_reference(run: Callable[..., Any], again: bool) -> None:
    tensors = [torch.randn(2, 3) for _ in range(2)]
    found = []
    for backend in ("reference", "native"):
        combine = Combine(SUM, CPU, backend=backend)
        if again:
            combine(tensors, [F32])
        try:
            found.append(run(combine, tensors))
        except Exception as error:
            found.append(type(error))
    want, got = found
    assert type(got) is type(want)
    if type(want) is Tensor or isinstance(want, tuple):
        torch.testing.assert_close(got, want)
    else:
        assert got is want or type(want) is not type


@built
def test_auto_takes_the_kernel_on_a_cpu_and_copies_keep_it() -> None:
    combine, tensors = Combine(SUM, CPU), [torch.randn(2, 3) for _ in range(2)]
    expected = combine(tensors, [F32])
    for other in (combine, copy.deepcopy(combine), pickle.loads(pickle.dumps(combine))):
        assert other.backend == "native"
        assert isinstance(other._kernel, NativeCombine)
        assert_same(other(tensors, [F32]), expected)
    assert Combine(SUM, CPU, torch.float64).backend == "reference"


@built
def test_what_does_not_fit_is_the_reference_s() -> None:
    assert pack(Combination(np.ones((MAX_OUTPUTS, MAX_INPUTS))))
    for combination in (
        Combination(np.ones((MAX_OUTPUTS + 1, 1))),
        Combination(np.ones((1, MAX_INPUTS + 1))),
    ):
        assert not pack(combination)
        assert Combine(combination, CPU, backend="native")._kernel is None
    assert not pack(Combination(np.array([[1e39]])))
    assert not pack(Combination([[0.0]], [1.0], [1.0], 1e39))  # type: ignore[arg-type]
    kernel = NativeCombine(SUM)
    good = torch.randn(2, 3)
    assert kernel.takes([good, good], [F32])
    for bad in (good.double(), torch.randn(0, 3), torch.tensor(1.0), good.to("meta"), good.to_sparse()):
        assert not kernel.takes([bad, bad], [F32])
    assert not kernel.takes([good, good], [torch.float64])
    threshold = NativeCombine(Combination([[0.0]], [1.0], [1.0], DynamicThreshold()))  # type: ignore[arg-type]
    assert threshold.takes([good], [F32])
    assert not threshold.takes([good.T.contiguous().T], [F32])


@built
def test_addresses_and_structs_that_cannot_be_are_refused() -> None:
    combine = extension.native_module().combine
    packed, tensor = pack(SUM), torch.randn(2)
    layout = NativeCombine(SUM)._layout([tensor, tensor], [F32], 0)
    address = tensor.data_ptr()
    with pytest.raises(TypeError, match="got 1 arguments"):
        combine(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        combine(9, packed, layout, address, address, address)
    with pytest.raises(ValueError, match="combination: got 3 bytes"):
        combine(0, b"abc", layout, address, address, address)
    with pytest.raises(ValueError, match="layout: got 3 bytes"):
        combine(0, packed, b"abc", address, address, address)
    with pytest.raises(ValueError, match="got 0 inputs and 0 outputs"):
        combine(0, bytes(len(packed)), layout, address, address, address)
    with pytest.raises(TypeError, match="got 5 arguments, expected 6"):
        combine(0, packed, layout, address, address)
    for place in range(3):
        with pytest.raises(ValueError, match="address: got 0"):
            combine(0, packed, layout, *[0 if place == number else address for number in range(3)])
