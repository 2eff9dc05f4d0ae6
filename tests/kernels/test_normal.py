"""The generator: published vectors, kernel = torch, and the statistics of its normals."""

from __future__ import annotations

import ast
import math
import os

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor

from fastcfg.kernels import normal
from fastcfg.reference import philox
from fastcfg.reference.philox import INITIAL_STREAM, STEP_STREAM, philox4x32, philox_normal, sample_seeds

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

# Salmon et al.'s known answers (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
KERNELS = ROOT / "kernels"


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_torch_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(word) for word in words) == expected


@interpreted
def test_kernel_philox_gives_the_published_words() -> None:
    from support.philox_kernel import philox_kernel

    # Four lanes, as a block is a power of two.
    columns = zip(*KNOWN_ANSWERS, KNOWN_ANSWERS[0], strict=True)
    counters, keys, expected = (torch.tensor(column).T.contiguous() for column in columns)
    out = torch.full_like(expected, -1)
    philox_kernel[(1,)](counters, keys, out, BLOCK=4)
    assert torch.equal(out, expected)


def kernel_normal(seeds: Tensor, shape: tuple[int, ...], row: int = 0, stream: int = STEP_STREAM) -> Tensor:
    """What the kernel writes to poisoned memory; nothing past its end is touched."""
    size = len(seeds) * math.prod(shape)
    memory = torch.full((size + 4096,), math.nan)
    normal.launch_normal(memory[:size].view(len(seeds), *shape), seeds, row, stream)
    assert memory[size:].isnan().all()
    return memory[:size].view(len(seeds), *shape)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    different = int((got.view(torch.int32) != want.view(torch.int32)).sum())
    assert different == 0, f"{different} of {want.numel()} differ"


@interpreted
@pytest.mark.parametrize("stream", [INITIAL_STREAM, STEP_STREAM])
@pytest.mark.parametrize("row", [0, 1, 999])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (3, 5, 7), (4, 1023), (3, 32, 32)])
def test_kernel_draws_the_normals_of_torch_bit_for_bit(shape: tuple[int, ...], row: int, stream: int) -> None:
    seeds = torch.tensor([0, -1, 2**62 + 12345])
    want = philox_normal(seeds, shape, row=row, stream=stream)
    assert_same_bits(kernel_normal(seeds, shape, row, stream), want)


@interpreted
@pytest.mark.parametrize("block", [16, 128, 4096])
def test_the_block_size_changes_nothing(block: int) -> None:
    seeds, size = sample_seeds(5, 2), 203
    out = torch.full((2, size), math.nan)
    blocks = -(-size // block)
    normal._normal_kernel[(2 * blocks,)](out, seeds, 3, size, blocks, STREAM=STEP_STREAM, BLOCK=block)
    assert_same_bits(out, philox_normal(seeds, (size,), row=3))


@interpreted
def test_a_sample_is_the_same_in_any_place_of_any_batch() -> None:
    shape = (3, 5, 7)
    alone = kernel_normal(torch.tensor([41]), shape)[0]
    for seeds, place in (([41, 7, 8], 0), ([7, 41], 1), ([1, 2, 3, 4, 41], 4)):
        assert_same_bits(kernel_normal(torch.tensor(seeds), shape)[place], alone)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one() -> None:
    seeds = sample_seeds(3, 2)
    assert_same_bits(philox_normal(seeds, (1021,)), philox_normal(seeds, (4096,))[:, :1021].contiguous())


def test_constants_of_the_kernels_are_those_of_torch() -> None:
    tree = ast.parse((KERNELS / "_math.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def literals(name: str, kind: type) -> list[float]:
        """Numbers of a function as they stand, signs included."""
        body = functions[name].body[1:]
        negated = {id(node.operand): -1 for part in body for node in ast.walk(part) if isinstance(node, ast.UnaryOp)}
        constants = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Constant)]
        constants.sort(key=lambda node: (node.lineno, node.col_offset))
        return [node.value * negated.get(id(node), 1) for node in constants if type(node.value) is kind]

    assert literals("box_muller", float) == [
        *(2.0**-32, 2.0**-33, 1.0),
        *reversed(philox.LOG_COEFFICIENTS),
        philox._F32_MINUS_2_LN_2,
        philox._F32_QUARTER_PI_OVER_2_31,
        *reversed(philox.SIN_COEFFICIENTS),
        *reversed(philox.COS_COEFFICIENTS),
    ]
    # All of them are float32 numbers, so that no compiler rounds them.
    assert all(value == float(np.float32(value)) for value in literals("box_muller", float))
    assert set(literals("philox4x32", int)) >= {0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85}
    launcher = (KERNELS / "guided_step.py").read_text(encoding="utf-8")
    assert f"\nSTEP_STREAM = {STEP_STREAM}\n" in launcher


# Statistics. The draws are fixed, so each test either passes always or never; its bound is what a perfect generator
# exceeds with a probability below 1e-6 (5 standard errors).
N = 2**20


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """float64 [4, N]: four samples."""
    return philox_normal(sample_seeds(2024, 4), (N,)).double()


def test_the_first_four_moments(draws: Tensor) -> None:
    n = draws.numel()
    # The variance of z**k is E z**2k - (E z**k)**2.
    for k, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = float((draws**k).mean())
        assert abs(moment - expected) < 5 * math.sqrt(variance / n), k


def test_the_distribution_is_normal_at_every_point(draws: Tensor) -> None:
    z = draws.flatten().sort().values
    cdf = 0.5 * torch.erfc(-z / math.sqrt(2))
    steps = torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    # Kolmogorov: P(distance > c / sqrt(n)) is 2 exp(-2 c**2), 1e-6 at c = 2.7.
    assert distance < 2.7 / math.sqrt(len(z))


def test_the_counts_of_4096_equal_bins_fit(draws: Tensor) -> None:
    bins = 4096
    cdf = 0.5 * torch.erfc(-draws.flatten() / math.sqrt(2))
    counts = torch.bincount((cdf * bins).long().clamp(max=bins - 1), minlength=bins).double()
    expected = draws.numel() / bins
    chi_square = float(((counts - expected) ** 2).sum()) / expected
    freedom = bins - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_tails(draws: Tensor) -> None:
    """As heavy as they should be, and no further than the 33 bits of the radius reach."""
    z = draws.flatten().abs()
    for bound in (3.0, 4.0, 4.5):
        expected = len(z) * math.erfc(bound / math.sqrt(2))
        assert abs(int((z > bound).sum()) - expected) < 5 * math.sqrt(expected), bound
    # That the largest of 4 million stays below 4.6 has probability 2e-8; sqrt(2 ln 2**33) is 6.764.
    assert 4.6 < float(z.max()) < 6.765


def test_the_smallest_and_largest_words_give_finite_normals() -> None:
    words = torch.tensor([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1])
    radius, angle = torch.meshgrid(words, words, indexing="ij")
    a, b = philox._box_muller(radius.flatten(), angle.flatten())
    squares = (a.double() ** 2 + b.double() ** 2).view(6, 6)
    # -2 ln of u, which lies in [2**-33, 1]; the radius does not depend on the angle. Measured: 2.3e-7.
    u = (words.double() + 0.5) / 2**32
    torch.testing.assert_close(squares[:4], (-2 * u.log())[:4, None].expand(4, 6), rtol=1e-6, atol=0)
    # Words near 2**32 round to u = 1 in float32.
    assert float(squares[5].max()) == 0


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of the correlation of independent draws."""
    return float((a * b).mean()) * math.sqrt(a.numel())


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8, 64, 4096])
def test_elements_are_independent(draws: Tensor, distance: int) -> None:
    a, b = draws[:, :-distance], draws[:, distance:]
    assert abs(correlation(a, b)) < 5
    # Of squares, which the two normals of one radius would show first.
    assert abs(correlation((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2))) < 5


@pytest.mark.parametrize("distance", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_the_four_normals_of_one_counter_are_independent(draws: Tensor, first: int, distance: int) -> None:
    a, b = draws[:, first::4], draws[:, (first + distance) % 4 :: 4]
    assert abs(correlation(a, b)) < 5
    assert abs(correlation((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2))) < 5
    assert abs(correlation(a.sign(), b.sign())) < 5


def test_samples_rows_and_streams_are_independent(draws: Tensor) -> None:
    seeds = sample_seeds(2024, 4)
    others = {
        "row 1": philox_normal(seeds, (N,), row=1),
        "row 2": philox_normal(seeds, (N,), row=2),
        "the other stream": philox_normal(seeds, (N,), stream=INITIAL_STREAM),
        "high word of the seed": philox_normal(seeds + 2**32, (N,)),
        "sign of the seed": philox_normal(seeds - 2**63, (N,)),
    }
    for name, other in others.items():
        assert abs(correlation(draws, other.double())) < 5, name
    for i in range(4):
        for j in range(i):
            assert abs(correlation(draws[i], draws[j])) < 5, (i, j)
            assert abs(correlation(draws[i] ** 2 - 1, draws[j] ** 2 - 1)) < 5 * 2, (i, j)


def test_seeds_count_by_protocol() -> None:
    expected = torch.tensor([7, 8, 9])
    for seed in (7, np.int64(7), torch.tensor(7), [7, 8, 9], np.array([7, 8, 9]), torch.tensor([7, 8, 9])):
        assert torch.equal(sample_seeds(seed, 3), expected)
    for seed in (True, 1.5, "7", [1.0, 2.0, 3.0], None):
        with pytest.raises(TypeError, match=r"seed: got .* expected an integer or a sequence of integers"):
            sample_seeds(seed, 3)
