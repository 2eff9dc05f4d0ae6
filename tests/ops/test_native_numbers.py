"""The native kernels' numbers on every instruction set of this CPU: multiply-add, exp2 and conversions."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from support.native_numbers import native_conversion, native_exp2, native_fma
from torch import Tensor

from fastcfg.ops.extension import instruction_sets, native_problem

CPU = torch.device("cpu")
built = pytest.mark.skipif(bool(native_problem(CPU)), reason=native_problem(CPU))
pytestmark = [built, pytest.mark.parametrize("instructions", instruction_sets())]


def floats(words: Tensor) -> Tensor:
    """The float32 of which these are the bits."""
    return (words - (words >= 2**31).long() * 2**32).int().view(torch.float32)


def rounded(exact: Fraction) -> float:
    """To float32, to the nearest, ties to even: the bits of the nearest integer multiple of the last place."""
    if not exact:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    place = Fraction(2) ** max(exponent - 23, -149)
    # `round` takes ties to even.
    result = round(magnitude / place) * place
    value = math.inf if result >= 2**128 else float(result)
    return math.copysign(value, exact)


def test_a_multiply_add_rounds_the_exact_sum_once(instructions: str) -> None:
    generator = random.Random(1)

    def number(exponent: int) -> float:
        # Few bits make ties and exact sums, many make the rest.
        bits = generator.choice([1, 2, 12, 24])
        return math.ldexp(generator.choice([-1, 1]) * (generator.getrandbits(bits) | 1), exponent - bits)

    for a_exponent in (-100, -60, 0, 1, 60):
        a = number(a_exponent)
        b = [number(generator.randint(-48, 66)) for _ in range(400)]
        # From far below the product to far above it, and what cancels all but the product's last places.
        shifts = [generator.choice([-60, -49, -25, -24, -23, -1, 0, 1, 24, 25, 48]) for _ in b]
        c = [number(min(max(math.frexp(a * one)[1] + shift, -120), 127)) for one, shift in zip(b, shifts, strict=True)]
        c[300:] = torch.tensor([-a * one for one in b[300:]]).tolist()
        assert_exact(a, b, c, instructions)


def test_a_multiply_add_next_to_a_tie_knows_on_which_side_it_is(instructions: str) -> None:
    generator = random.Random(2)
    for _ in range(20):
        # Odd numbers of 13 bits: the product has 25 or 26, of which a float keeps 24.
        a, *b = (float(2**12 + 2 * generator.randrange(2**11) + 1) for _ in range(50))
        c = [generator.choice([-1, 0, 1]) * math.ldexp(1, -generator.randint(2, 60)) for _ in b]
        assert_exact(a, b, c, instructions)


def assert_exact(a: float, b: list[float], c: list[float], instructions: str) -> None:
    got = native_fma(a, torch.tensor(b), torch.tensor(c), instructions).tolist()
    exact = [Fraction(a) * Fraction(one) + Fraction(other) for one, other in zip(b, c, strict=True)]
    assert got == list(map(rounded, exact))


def test_a_multiply_add_of_zeros_infinities_and_nan(instructions: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-45, -1e-45])
    b, c = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    for a in values.tolist():
        got, want = native_fma(a, b, c, instructions), (a * b.double() + c.double()).float()
        assert_same(got, want)


def test_exp2_is_within_two_ulp_of_torch_over_its_whole_range(instructions: str) -> None:
    x = torch.cat([floats(torch.arange(0, 2**32, 4999)), torch.linspace(-160, 140, 2**19), torch.arange(-155.0, 135.0)])
    got, want = native_exp2(x, instructions), torch.exp2(x)
    assert torch.equal(got.isnan(), x.isnan())
    assert (want[~x.isnan()] >= 0).all()
    # The bits of positive floats count their places.
    places = (got.view(torch.int32).long() - want.view(torch.int32)).abs()[~x.isnan()]
    assert int(places.max()) <= 2
    assert ((want > 0) & (want < 2.0**-126)).any()
    assert torch.equal(native_exp2(torch.arange(-149.0, 128.0), instructions), torch.arange(-149.0, 128.0).exp2())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_numbers_of_sixteen_bits_are_read_as_torch_reads_them(dtype: torch.dtype, instructions: str) -> None:
    values = torch.arange(-(2**15), 2**15).short().view(dtype)
    got, again = native_conversion(values, dtype, instructions)
    assert_same(got, values.float())
    assert_same(again, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_rounded_to_sixteen_bits_as_torch_rounds_them(dtype: torch.dtype, instructions: str) -> None:
    # Each number of sixteen bits, the ties after it, and the neighbours of both.
    places = {torch.float16: 2**13, torch.bfloat16: 2**16}[dtype]
    words = torch.cat([torch.arange(0, 2**32, places // 2 if dtype == torch.bfloat16 else 2**15 // 8)])
    # Below float16's normal numbers its last place is 2^-24.
    small = (torch.arange(4096) * 2.0**-26).view(torch.int32).long()
    words = torch.cat([words, small, small + 2**31])
    words = torch.cat([words, words + 1, words - 1]).remainder(2**32)
    values = floats(words)
    assert_same(native_conversion(values, dtype, instructions)[1], values.to(dtype))


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for what is no number."""
    integers = torch.int32 if want.dtype == torch.float32 else torch.int16
    assert torch.equal(got.isnan(), want.isnan())
    different = (got.view(integers) != want.view(integers)) & ~want.isnan()
    assert not different.any(), (got[different][:5], want[different][:5])
