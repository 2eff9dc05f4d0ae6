"""Counter-based Gaussian noise: what the kernels draw, in torch.

Philox4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) with key = the sample's 64-bit seed and
counter = (element // 4, row, stream, 0); its four outputs give the normals of four neighbouring elements by the
Box-Muller transform. Sample i therefore depends on its seed alone, not on the batch, the block size or the device.
Every floating-point operation is specified down to the rounding: this file and the kernels agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ..utils.checks import as_integer, check_seed

__all__ = ["BROWNIAN_STREAM", "INITIAL_STREAM", "STEP_STREAM", "philox4x32", "philox_normal", "sample_seeds"]

# 2 and 3 are `fastcfg.state_change`'s.
INITIAL_STREAM, STEP_STREAM, BROWNIAN_STREAM = 0, 1, 4

# Minimax fits, largest relative error of each: -2 log1p(t)/t on [√½ - 1, √2 - 1] 1.7e-7; sin(a)/a and cos(a) in a² on
# |a| <= π/4 3e-9 and 3e-8.
LOG_COEFFICIENTS = (
    *(-1.9999998807907104, 1.0000072717666626, -0.6667011976242065, 0.4993981420993805),
    *(-0.39800339937210083, 0.34501707553863525, -0.3244510889053345, 0.20213566720485687),
)
SIN_COEFFICIENTS = (1.0, -0.16666650772094727, 0.008332016877830029, -0.00019501821952871978)
COS_COEFFICIENTS = (0.9999999403953552, -0.49999842047691345, 0.04165441915392876, -0.0013579403748735785)

_WORD = 0xFFFFFFFF


def sample_seeds(seed: int | Sequence[int], batch: int) -> torch.Tensor:
    """int64 [batch]: `seed + i` (modulo 2**64) for sample i, or the given sequence. TypeError for a seed that is not an
    integer, ValueError for one beyond 64 bits, or a sequence of another length than the batch."""
    if isinstance(seed, torch.Tensor):
        seed = seed.tolist()
    first = as_integer(seed)
    if first is not None:
        seed = range(check_seed(first), first + batch)
    seeds = [as_integer(one) for one in seed] if isinstance(seed, Iterable) else [None]
    known = [one for one in seeds if one is not None]
    if len(known) != len(seeds):
        raise TypeError(f"seed: got {seed!r}, expected an integer or a sequence of integers")
    if len(known) != batch:
        raise ValueError(f"seed: got {len(known)} seeds, expected one per sample ({batch})")
    if first is None:
        known = [check_seed(one) for one in known]
    return torch.tensor([(one + 2**63) % 2**64 - 2**63 for one in known], dtype=torch.int64)


def philox4x32(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Four int64 tensors of 32-bit words: ten rounds of Philox4x32 on four such tensors, with a key of two more, which
    all broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps modulo 2**64, which keeps both words.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def philox_normal(
    seeds: torch.Tensor,
    shape: Sequence[int],
    *,
    row: int | torch.Tensor = 0,
    stream: int = STEP_STREAM,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard normals for a batch of samples of a shape: float32 [B, *shape], written to `out` if it is given.

    Args:
        seeds: int64 [B], one per sample, on the device to draw on.
        row: the row of the run (an int64 scalar tensor works without a sync).
        stream: `INITIAL_STREAM` for the starting noise, `STEP_STREAM` for the steps', `BROWNIAN_STREAM` for the path's.

    Example:
        >>> philox_normal(sample_seeds(0, 2), (3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    size = math.prod(shape)
    group = torch.arange((size + 3) // 4, device=seeds.device)
    key = (seeds[:, None] & _WORD, seeds[:, None] >> 32 & _WORD)
    zero = torch.zeros_like(group)
    words = philox4x32((group & _WORD, zero + row, zero + stream, zero), key)
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    normals = normals.reshape(len(seeds), -1)[:, :size].reshape(len(seeds), *shape)
    return normals if out is None else out.copy_(normals)


def _box_muller(radius_word: torch.Tensor, angle_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 normals from two 32-bit words."""
    # u in [2**-33, 1] is 2**e * (1 + t) with 1 + t around 1: -2 log u keeps its relative accuracy near u = 1.
    u = _fma(radius_word.float(), 2.0**-32, 2.0**-33)
    bits = u.view(torch.int32)
    exponent = bits - 0x3F3504F3 >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = _fma(exponent.float(), _F32_MINUS_2_LN_2, t * _horner(t, LOG_COEFFICIENTS))
    # In float64: torch's float32 sqrt on a CPU is not always the nearest.
    radius = torch.sqrt(square.double()).float()
    # The angle is uniform on the circle: a in [-π/4, π/4); the word's lowest bit mirrors it at the diagonal, the next
    # bit at the origin.
    signed = torch.where(angle_word >= 2**31, angle_word - 2**32, angle_word)
    a = signed.float() * _F32_QUARTER_PI_OVER_2_31
    a2 = a * a
    sin, cos = a * _horner(a2, SIN_COEFFICIENTS), _horner(a2, COS_COEFFICIENTS)
    mirrored = (angle_word & 1).bool()
    radius = torch.where((angle_word & 2).bool(), -radius, radius)
    return torch.where(mirrored, sin, cos) * radius, torch.where(mirrored, cos, sin) * radius


def _horner(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = _fma(value, x, coefficient)
    return value


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """a*b + c rounded to float32: the product is exact in float64, and rounding the sum there first does not matter."""
    return (a.double() * b + c).float()


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


_F32_MINUS_2_LN_2 = _float32(-2 * math.log(2))
_F32_QUARTER_PI_OVER_2_31 = _float32(math.pi / 4 * 2**-31)
