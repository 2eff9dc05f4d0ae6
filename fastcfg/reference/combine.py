"""Several sums of the same tensors in torch, with the kernel's order of terms and roundings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..combination import Combination, Sum
from ._fma import add_scaled, fma
from .pieces import quantile_bound, threshold


class ReferenceCombine:
    """A combination bound to the dtype it is computed in, float32 or float64."""

    def __init__(self, combination: Combination, dtype: torch.dtype = torch.float32) -> None:
        self.combination, self.dtype = combination, dtype
        count, inputs = combination.coefficients.shape
        self._sums = [_Prepared(combination.sum_of(j, dtype), dtype) for j in range(count)]
        self._x0 = _Prepared(combination.sum_of_x0(dtype), dtype) if combination.uses_x0 else None
        used = {k for prepared in (*self._sums, self._x0) if prepared for k in prepared.inputs}
        used |= {0} if combination.noise is None else {0, combination.noise}
        self._used = [k in used for k in range(inputs)]

    def __call__(
        self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], variance: Tensor | None = None
    ) -> list[Tensor]:
        """The outputs, new tensors in these dtypes.

        Args:
            inputs: N of one shape, [B, ...], in any floating dtypes.
            dtypes: M.
            variance: with learned variances, the variance channels, of the inputs' shape.
        """
        dtype = self.dtype
        values = [
            v if v.dtype == dtype or not used else v.to(dtype) for v, used in zip(inputs, self._used, strict=True)
        ]
        x0 = None
        if self._x0 is not None:
            x0 = self._clipped(*self._x0(values))
            values.append(x0)
        results = []
        for j, prepared in enumerate(self._sums):
            total, is_new = prepared(values)
            if j == 0 and variance is not None:
                total, is_new = self._with_noise(total, is_new, values, variance), True
            if total is x0:
                # x0 itself is handed out once.
                x0, is_new = None, True
            results.append(total.to(dtypes[j]) if is_new or total.dtype != dtypes[j] else total.clone())
        return results

    def _clipped(self, x0: Tensor, is_new: bool) -> Tensor:
        clip = self.combination.clip
        if isinstance(clip, DynamicThreshold):
            flat = x0.reshape(len(x0), 1, -1)
            limited = threshold(flat, quantile_bound(flat, clip.rank(flat[0].numel(), x0.dtype))).view(x0.shape)
            return limited if x0.is_contiguous() else torch.empty_like(x0).copy_(limited)
        if clip is not None:
            return x0.clamp_(-clip, clip) if is_new else x0.clamp(-clip, clip)
        return x0 if is_new else x0.clone()

    def _with_noise(self, total: Tensor, is_new: bool, values: Sequence[Tensor], variance: Tensor) -> Tensor:
        combination = self.combination
        variance = variance.to(self.dtype)
        exponent = add_scaled(torch.full_like(variance, combination.l_0), variance, combination.l_v, in_place=True)
        return fma(torch.exp2(exponent), values[combination.noise], total)  # type: ignore[index]


class _Prepared:
    """A `Sum` with what can be made ready once. A call returns the sum, and whether it is new memory."""

    def __init__(self, total: Sum, dtype: torch.dtype) -> None:
        self.inputs = [index for index, _ in total.terms]
        self._first, coefficient = total.terms[0] if total.terms else (0, 0.0)
        # Scalar tensors cost less than numbers here, and stay on the CPU: operations on any device take them as they
        # are.
        self._scale = torch.tensor(coefficient, dtype=dtype)
        self._is_one = bool(self._scale == 1)
        self._is_zero = not total.terms
        self._rest = total.terms[1:]
        self._factor = None if total.factor == 1 else torch.tensor(total.factor, dtype=dtype)

    def __call__(self, values: Sequence[Tensor]) -> tuple[Tensor, bool]:
        total = values[self._first]
        if self._is_zero:
            return torch.zeros_like(total, dtype=self._scale.dtype), True
        is_new = not self._is_one
        if is_new:
            total = torch.mul(total, self._scale)
        for index, coefficient in self._rest:
            total = add_scaled(total, values[index], coefficient, in_place=is_new)
            is_new = True
        if self._factor is not None:
            total = total.mul_(self._factor)
        return total, is_new
