"""A combination in C, for CPUs: one pass over its tensors, with the reference's bits."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..combination import OUTPUT, Combination, Sum
from ..utils._torch_private import current_dispatch_mode, in_function_transform
from .extension import instruction_sets, native_module

# As in kernels/cpu/combine.h.
MAX_INPUTS, MAX_OUTPUTS = 12, 6
_TERMS = MAX_INPUTS + 1
_LARGEST = torch.finfo(torch.float32).max
_NO_CLIP, _CLIP, _THRESHOLD = range(3)
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeCombine:
    """The launch of a combination that can be packed (`pack`).

    Args:
        combination: the sums.
        instructions: one of `instruction_sets`, by default the widest.

    Raises:
        ValueError: the kernel has no room for the sums, or numbers are not finite in float32.
    """

    __slots__ = ("_combination", "_packed", "_set")

    def __init__(self, combination: Combination, instructions: str | None = None) -> None:
        packed = pack(combination)
        if packed is None:
            raise ValueError("combination: got one without a native kernel")
        self._combination, self._packed = combination, packed
        names = instruction_sets()
        self._set = names.index(instructions or names[-1])

    def takes(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
        """Whether the kernel can run on these tensors of one shape, dense in one layout."""
        for tensor in inputs:
            dense = type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided
            if not dense or tensor.dtype not in _NUMBERS or tensor.is_neg():
                return False
        sample = inputs[0]
        if not sample.ndim or not sample.numel() or not _NUMBERS.keys() >= set(dtypes):
            return False
        if torch.compiler.is_compiling() or in_function_transform() or current_dispatch_mode() is not None:
            return False
        # A threshold's samples lie one after the other.
        return not self._has_threshold() or len(sample) == 1 or sample.stride(0) == sample[0].numel()

    def launch(
        self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], variance: Tensor | None
    ) -> Callable[..., None]:
        """A function of the addresses of tensors like these, which `takes`, and of new ones for the results. With a
        learned variance it is where it is now beside the model's output."""
        offset = 0 if variance is None else variance.data_ptr() - inputs[OUTPUT].data_ptr()
        return partial(native_module().combine, self._set, self._packed, self._layout(inputs, dtypes, offset))

    def _has_threshold(self) -> bool:
        return self._combination.uses_x0 and isinstance(self._combination.clip, DynamicThreshold)

    def _layout(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], variance: int) -> bytes:
        """`Layout` of kernels/cpu/combine.h."""
        sample = inputs[0]
        batch, size, stride = 1, sample.numel(), 0
        gaps = len(inputs) > 1 and len(sample) > 1 and inputs[OUTPUT].stride(0) != sample.stride(0)
        if gaps or self._has_threshold():
            batch, size = len(sample), size // len(sample)
            stride = inputs[OUTPUT].stride(0) if len(inputs) > 1 and batch > 1 else size
        rank, share, from_high, is_exact = 0, 0.0, False, True
        if self._has_threshold():
            rank, weight, *_ = self._combination.clip.rank(size)  # type: ignore[union-attr]
            from_high, is_exact = weight >= 0.5, not weight > 0
            share = weight - 1 if from_high else weight
        kinds = [_NUMBERS[tensor.dtype] for tensor in inputs], [_NUMBERS[dtype] for dtype in dtypes]
        fields = (batch, size, stride, variance, rank, share, from_high, is_exact)
        padded = (*_padded(kinds[0], MAX_INPUTS), *_padded(kinds[1], MAX_OUTPUTS))
        return struct.pack(f"=5qf2i{len(padded)}i4x", *fields, *padded)


def run_native(launch: Callable[..., None], inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The results of a launch."""
    sample = inputs[0]
    results = [torch.empty_like(sample, dtype=dtype) for dtype in dtypes]
    launch(*[tensor.data_ptr() for tensor in inputs], *[tensor.data_ptr() for tensor in results])
    return results


def pack(combination: Combination) -> bytes | None:
    """`Combination` of kernels/cpu/combine.h; None for sums that it has no room for, or numbers that are not finite in
    float32."""
    outputs, inputs = combination.coefficients.shape
    if outputs > MAX_OUTPUTS or inputs > MAX_INPUTS:
        return None
    uses_x0, noise = combination.uses_x0, -1 if combination.noise is None else combination.noise
    sums = [combination.sum_of_x0() if uses_x0 else Sum(()), *map(combination.sum_of, range(outputs))]
    clip = combination.clip if uses_x0 else None
    kind, bound, floor, ceiling = _NO_CLIP, 0.0, 0.0, math.inf
    if isinstance(clip, DynamicThreshold):
        # A ceiling beyond float32 is none.
        kind, floor = _THRESHOLD, clip.floor
        ceiling = clip.ceiling if clip.ceiling is not None and clip.ceiling <= _LARGEST else math.inf
    elif clip is not None:
        kind, bound = _CLIP, clip
    used = {index for total in sums for index, _ in total.terms if index < inputs} | ({noise} - {-1})
    bits = sum(1 << index for index in used)
    head = struct.pack("=6i", inputs, outputs, bits, uses_x0, kind, noise)
    numbers = [bound, combination.l_0, combination.l_v, floor]
    numbers += [number for total in sums for number in (total.factor, *(value for _, value in total.terms))]
    if not all(map(math.isfinite, numbers)):
        return None
    try:
        parts = [_pack_sum(total, inputs) for total in sums]
        parts += [_NO_SUM] * (1 + MAX_OUTPUTS - len(sums))
        return head + struct.pack("=5f", *numbers[:4], ceiling) + b"".join(parts)
    except OverflowError:  # beyond float32
        return None


def _pack_sum(total: Sum, inputs: int) -> bytes:
    places, values = zip(*total.terms, strict=True) if total.terms else ((), ())
    places = tuple(MAX_INPUTS if index == inputs else index for index in places)
    rest = (0,) * (_TERMS - len(places))
    return _SUM.pack(len(places), *places, *rest, *values, *rest, total.factor)


_SUM = struct.Struct(f"={1 + _TERMS}i{_TERMS + 1}f")
_NO_SUM = _pack_sum(Sum(()), 0)


def _padded(values: Sequence[float], size: int) -> list[float]:
    return [*values, *[0] * (size - len(values))]
