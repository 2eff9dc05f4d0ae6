"""Several sums of the same tensors in torch, with the kernel's order of terms and roundings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..combination import Combination, Sum, is_one
from ._fma import adder, fma
from .pieces import quantile_bound, threshold


class ReferenceCombine:
    """A combination ready for tensors of a device, computed in float32 or float64."""

    __slots__ = ("_add", "_sums", "_used", "_x0", "combination", "dtype")

    def __init__(
        self, combination: Combination, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.combination, self.dtype = combination, dtype
        count, inputs = combination.coefficients.shape
        self._add = adder(dtype, torch.device(device))
        self._sums = tuple(_Prepared(combination.sum_of(j, dtype), dtype, self._add) for j in range(count))
        self._x0 = _Prepared(combination.sum_of_x0(dtype), dtype, self._add) if combination.uses_x0 else None
        used = {index for prepared in (*self._sums, self._x0) if prepared for index in prepared.inputs()}
        self._used = tuple(index for index in range(inputs) if index in used or index == combination.noise)

    def __call__(
        self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], variance: Tensor | None = None
    ) -> list[Tensor]:
        """The outputs, new tensors in these dtypes and the first input's layout.

        Args:
            inputs: N of one shape, [B, ...], in any floating dtypes, as `ops.combine.arranged` leaves them.
            dtypes: M.
            variance: with learned variances, the variance channels, of the inputs' shape.
        """
        dtype, values = self.dtype, list(inputs)
        for index in self._used:
            if values[index].dtype != dtype:
                values[index] = values[index].to(dtype)
        x0 = None
        if self._x0 is not None:
            x0 = self._limited(*self._x0(values))
            values.append(x0)
        results = []
        for j, prepared in enumerate(self._sums):
            total, is_new = prepared(values)
            if j == 0 and variance is not None:
                total, is_new = self._with_noise(total, values, variance), True
            elif total is x0:
                # x0 itself is handed out once.
                x0, is_new = None, True
            if not is_new:
                total = torch.empty_like(inputs[0], dtype=dtypes[j]).copy_(total)
            results.append(total if total.dtype == dtypes[j] else total.to(dtypes[j]))
        return results

    def _limited(self, x0: Tensor, is_new: bool) -> Tensor:
        """x0 with its clip, in new memory."""
        clip = self.combination.clip
        if clip is None:
            return x0 if is_new else x0.clone()
        if not isinstance(clip, DynamicThreshold):
            return x0.clamp_(-clip, clip) if is_new else x0.clamp(-clip, clip)
        flat = x0.reshape(len(x0), 1, -1)
        limited = threshold(flat, quantile_bound(flat, clip.rank(flat[0].numel(), x0.dtype))).view(x0.shape)
        return limited if x0.is_contiguous() else torch.empty_like(x0).copy_(limited)

    def _with_noise(self, total: Tensor, values: Sequence[Tensor], variance: Tensor) -> Tensor:
        combination = self.combination
        variance = variance.to(self.dtype)
        exponent = self._add(torch.full_like(variance, combination.l_0), variance, alpha=combination.l_v)
        return fma(torch.exp2(exponent), values[combination.noise], total)  # type: ignore[index]


class _Prepared:
    """A `Sum` with what can be made ready once. A call returns the sum, and whether it is in new memory."""

    __slots__ = ("_add", "_factor", "_first", "_is_scaled", "_is_zero", "_rest", "_scale")

    def __init__(self, total: Sum, dtype: torch.dtype, add: Callable[..., Tensor]) -> None:
        self._first, coefficient = total.terms[0] if total.terms else (0, 0.0)
        self._rest = total.terms[1:]
        # Scalar tensors cost less than numbers here, and stay on the CPU: operations on any device take them as they
        # are.
        self._scale = torch.scalar_tensor(coefficient, dtype=dtype, device="cpu")
        self._is_scaled = not is_one(coefficient, dtype)
        self._is_zero = not total.terms
        self._factor = None if total.factor == 1 else torch.scalar_tensor(total.factor, dtype=dtype, device="cpu")
        self._add = add

    def inputs(self) -> list[int]:
        """The inputs that it reads."""
        return [] if self._is_zero else [self._first, *(index for index, _ in self._rest)]

    def __call__(self, values: Sequence[Tensor]) -> tuple[Tensor, bool]:
        total = values[self._first]
        if self._is_zero:
            return torch.zeros_like(total, dtype=self._scale.dtype), True
        is_new = self._is_scaled
        if is_new:
            total = torch.mul(total, self._scale)
        for index, coefficient in self._rest:
            if is_new:
                self._add(total, values[index], alpha=coefficient, out=total)
            else:
                total, is_new = self._add(total, values[index], alpha=coefficient), True
        if self._factor is not None:
            total.mul_(self._factor)
        return total, is_new
