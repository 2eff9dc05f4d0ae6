"""Several sums of the same tensors in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..combination import OUTPUT, Combination
from ..reference import ReferenceCombine
from ..reference._fma import add_rounds_once, addcmul_rounds_once
from ..utils._torch_private import in_function_transform, same_tensor
from .backend import PIECE_BACKENDS, resolve_backend
from .checks import LOADED_DTYPES
from .native_combine import NativeCombine, run_native
from .threshold import dynamic_threshold

__all__ = ["Combine"]

MOST_ELEMENTS = 2**30  # the kernel numbers those of a tensor in int32, also those of its last program that do not exist


class Combine:
    """A combination ready to run: a call reads the tensors and returns its sums, on a GPU by one kernel (with a
    `DynamicThreshold` by one for x0, those of the threshold, and one for the sums). The coefficients go to the device
    here; a call copies nothing between host and device, and waits for nothing.

    Every multiply-add rounds once, in the order of `Sum`; results in other dtypes are rounded once more.

    Args:
        combination: the sums.
        device: the tensors'.
        dtype: in which it is computed: float32, or float64 on the reference path.
        backend: "auto", "triton", "native" (C, for CPUs, with the reference's bits) or "reference". "auto" takes the
            native kernel on a CPU where it is built. Empty tensors, inputs or results in other dtypes than float32,
            float16 and bfloat16, and more than 8 inputs, 4 outputs or 2**30 elements with Triton, or 12 inputs or 6
            outputs natively, run on the reference path, on any device.

    Raises:
        TypeError, ValueError: an argument of another kind, or a backend that cannot run.

    Example:
        >>> import numpy as np
        >>> from fastcfg.combination import Combination
        >>> combine = Combine(Combination(np.array([[1.0, -0.5], [0.0, 1.0]])), "cpu")
        >>> following, kept = combine([torch.ones(2, 3), torch.ones(2, 3)], [torch.float32, torch.float16])
        >>> following[0], kept.dtype
        (tensor([0.5000, 0.5000, 0.5000]), torch.float16)
    """

    __slots__ = (
        *("_kernel", "_learned", "_num_inputs", "_num_outputs", "_reference"),
        *("again", "backend", "combination", "device", "dtype"),
    )

    def __init__(
        self,
        combination: Combination,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        if not isinstance(combination, Combination):
            raise TypeError(f"combination: got {type(combination).__name__}, expected a Combination")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: got {dtype}, expected torch.float32 or torch.float64")
        self.combination, self.device, self.dtype = combination, torch.device(device), dtype
        self.backend = resolve_backend(backend, device, dtype, PIECE_BACKENDS)
        self._num_outputs, self._num_inputs = combination.coefficients.shape
        self._learned = combination.noise is not None
        self._reference: ReferenceCombine | None = None  # made when it is needed, but for what is tried on the device:
        for try_on in (add_rounds_once, addcmul_rounds_once):
            try_on(self.device)
        self._kernel = self._fused(torch.device(device))
        # Of the last native call: whether each tensor is like its own, a function of the addresses of inputs and
        # results that computes these, and their dtypes.
        self.again: tuple[list[Callable[[Tensor], bool]], Callable[..., None], Sequence[torch.dtype]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Combine, (self.combination, self.device, self.dtype, self.backend)

    def _fused(self, device: torch.device) -> _Kernel | NativeCombine | None:
        if self.backend == "native":
            try:
                return NativeCombine(self.combination)
            except ValueError:
                return None
        if self.backend != "triton":
            return None
        from ..kernels.combine import MAX_INPUTS, MAX_OUTPUTS

        fits = self._num_inputs <= MAX_INPUTS and self._num_outputs <= MAX_OUTPUTS
        return _Kernel(self.combination, device) if fits else None

    def __call__(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The M sums.

        Args:
            inputs: the N tensors [B, C, ...], on one device, in any floating dtypes and layouts. The second, the
                model's output, may be [B, 2C, ...], and must be with learned variances. None is changed.
            dtypes: the M results'.

        Returns:
            New tensors in the sample's layout: its strides where it is dense, else contiguous.

        Raises:
            ValueError: another number of inputs or dtypes, or an input of another shape.
        """
        if (again := self.again) is not None:
            checks, launch, known = again
            fits = known == dtypes and len(inputs) == self._num_inputs and not in_function_transform()
            if fits and _are_alike(checks, inputs):
                return run_native(launch, inputs, dtypes)
        if len(inputs) != self._num_inputs or len(dtypes) != self._num_outputs:
            got, expected = (len(inputs), len(dtypes)), (self._num_inputs, self._num_outputs)
            raise ValueError(f"inputs, dtypes: got {got[0]} and {got[1]}, expected {expected[0]} and {expected[1]}")
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run(inputs, dtypes)
        return self._run(inputs, dtypes)

    def _run(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        given, variance = inputs, None
        shape = inputs[0].shape
        for tensor in inputs:
            if tensor.shape != shape or not tensor.is_contiguous():
                inputs, variance = arranged(inputs, self._learned)
                break
        if self._learned and variance is None:
            raise ValueError(f"output: got shape {tuple(shape)}, expected 2C channels for the learned variance")
        if self._kernel is not None and self._kernel.takes(inputs, dtypes):
            if isinstance(self._kernel, _Kernel):
                return self._kernel(inputs, dtypes, variance)
            launch = self._kernel.launch(inputs, dtypes, variance)
            if _are_in_place(given, inputs):
                self.again = [same_tensor(tensor) for tensor in given], launch, copy.copy(dtypes)
            return run_native(launch, inputs, dtypes)
        if self._reference is None:
            self._reference = ReferenceCombine(self.combination, self.dtype, self.device)
        return self._reference(inputs, dtypes, variance)


class _Kernel:
    """The launch of a combination."""

    def __init__(self, combination: Combination, device: torch.device) -> None:
        from ..kernels.combine import combine_options, combine_table, launch_combine

        outputs, inputs = combination.coefficients.shape
        clip, uses_x0 = combination.clip, combination.uses_x0
        self._threshold = clip if uses_x0 and isinstance(clip, DynamicThreshold) else None
        self._bare_x0: _Kernel | None = None
        x0, bound = combination.sum_of_x0() if uses_x0 else None, None
        if self._threshold is not None:
            # Computed on its own: its bound is known when all of it is.
            self._bare_x0, x0 = _Kernel(Combination(combination.x0[None]), device), None  # type: ignore[index]
        elif uses_x0:
            bound = clip
        sums = [combination.sum_of(j) for j in range(outputs)]
        self._launch = launch_combine
        self._options = combine_options(
            inputs, sums, x0, bound is not None, self._threshold is not None, combination.noise
        )
        numbers = combine_table(sums, x0, bound, combination.l_0, combination.l_v)
        self._table = torch.tensor(numbers, dtype=torch.float32, device=device)

    def takes(self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
        """Whether the kernel can run on these."""
        for tensor in inputs:
            if tensor.dtype not in LOADED_DTYPES:
                return False
        for dtype in dtypes:
            if dtype not in LOADED_DTYPES:
                return False
        return 0 < inputs[0].numel() <= MOST_ELEMENTS

    def __call__(
        self, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], variance: Tensor | None
    ) -> list[Tensor]:
        sample, x0 = inputs[0], None
        if self._bare_x0 is not None and self._threshold is not None:
            x0 = limited(self._bare_x0(inputs, [torch.float32], None)[0], self._threshold)
        results = [torch.empty_like(sample, dtype=dtype) for dtype in dtypes]
        with torch.cuda.device_of(sample):
            self._launch(inputs, x0, variance, results, self._table, self._options)
        return results


def limited(x0: Tensor, by: DynamicThreshold) -> Tensor:
    """`dynamic_threshold` by the kernels, for x0 of any number of dimensions and in its layout."""
    flat = x0.reshape(len(x0), 1, -1)
    flat = dynamic_threshold(flat, by.quantile, by.floor, by.ceiling, backend="triton")
    return like(flat.view(x0.shape), x0)


def _are_alike(checks: Sequence[Callable[[Tensor], bool]], tensors: Sequence[Tensor]) -> bool:
    for check, tensor in zip(checks, tensors, strict=True):  # noqa: SIM110 (a generator costs a microsecond)
        if not check(tensor):
            return False
    return True


def _are_in_place(given: Sequence[Tensor], arranged: Sequence[Tensor]) -> bool:
    """Whether tensors were arranged without a copy."""
    return all(tensor.data_ptr() == found.data_ptr() for tensor, found in zip(given, arranged, strict=True))


def arranged(inputs: Sequence[Tensor], learned: bool) -> tuple[list[Tensor], Tensor | None]:
    """The tensors in the sample's layout, dense, but that the first C of a model's 2C channels stay where they are if
    the sample is contiguous; and the last C of them if they are asked for. ValueError for a tensor of another shape."""
    sample, *others = inputs
    if not sample.is_contiguous() and torch.empty_like(sample).stride() != sample.stride():
        sample = sample.contiguous()
    shape, variance = sample.shape, None
    tensors = [sample]
    for index, tensor in enumerate(others, 1):
        if index == OUTPUT and tensor.shape != shape and tensor.ndim > 1:
            if tensor.shape != (shape[0], 2 * shape[1], *shape[2:]):
                raise ValueError(
                    f"output: got shape {tuple(tensor.shape)}, expected {tuple(shape)} or twice the channels"
                )
            in_place = sample.is_contiguous() and tensor.is_contiguous()
            halves = [tensor.narrow(1, first, shape[1]) for first in ((0, shape[1]) if learned else (0,))]
            tensor, *rest = halves if in_place else [like(half, sample) for half in halves]
            variance = rest[0] if rest else None
        elif tensor.shape != shape:
            raise ValueError(f"input {index}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        else:
            tensor = like(tensor, sample)
        tensors.append(tensor)
    return tensors, variance


def like(tensor: Tensor, sample: Tensor) -> Tensor:
    """The tensor in the sample's layout, which is dense."""
    if tensor.stride() == sample.stride() or (tensor.is_contiguous() and sample.is_contiguous()):
        return tensor
    return torch.empty_like(sample, dtype=tensor.dtype).copy_(tensor)
