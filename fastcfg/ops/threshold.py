"""Dynamic thresholding: the bound of a run's next row, and its two pieces as operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clip import DynamicThreshold, QuantileRank
from ..reference import ReferenceBound
from ..reference import pieces as reference
from ..step import StepBuffers, StepSpec
from ..utils._torch_private import current_dispatch_mode
from .backend import PIECE_BACKENDS, interpreting, is_transformed, resolve_piece
from .checks import check_buffers, check_image, check_spec
from .native_pieces import NativeBound, native_quantile, native_threshold
from .registered import Operation
from .step import RowOperation


class QuantileBound(RowOperation):
    """The bound of x0 in a run's next row: calling it with the model's output writes `buffers.bound` for the guided
    step that follows; the run stays at its row.

    Args:
        threshold: the quantile and its limits, for samples of at most 2**24 elements.
        spec, buffers: the guided step's; bound and x0 are written.
        backend: as for `GuidedStep`; "inductor" runs the reference here, and "auto" is "native" on a CPU where that can
            run.

    Example:
        >>> from fastcfg import Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(10))
        >>> x, bound = torch.randn(2, 3, 8, 8), torch.ones(2)
        >>> counter = torch.zeros(2, dtype=torch.int32)
        >>> buffers = StepBuffers(x, table.on("cpu"), counter, bound=bound, x0=torch.empty_like(x))
        >>> QuantileBound(DynamicThreshold(), StepSpec(), buffers)(torch.randn(2, 3, 8, 8))
        >>> bool((bound > 1).all())
        True
    """

    def __init__(
        self, threshold: DynamicThreshold, spec: StepSpec, buffers: StepBuffers, backend: str = "auto"
    ) -> None:
        check_spec(spec)
        needed = StepSpec(spec.branches, spec.base, scaled=spec.scaled, momentum=spec.momentum, clip=True, keep_x0=True)
        check_buffers(needed, buffers)
        x = buffers.x
        super().__init__(spec, buffers)
        self.backend = resolve_piece(backend, x.device, x.dtype, registered=True)
        self._rank = threshold.rank(x[0].numel(), x.dtype)
        if self.backend != "triton":
            self._run = self._reference = ReferenceBound(threshold, spec, buffers)
            if self.backend == "native":
                self._run, self._native = self._natively, NativeBound(threshold, spec, buffers)
        else:
            self._selection = _empty_selection(x)
            self._run = self._dispatched if interpreting() else self._launched

    def _natively(self, output: Tensor) -> None:
        watched = is_transformed() or current_dispatch_mode() is not None
        (self._reference if watched else self._native)(output)

    def _launched(self, output: Tensor) -> None:
        _launch_step_bound(output, self.spec, self.buffers, self._selection, self._rank)

    def _dispatched(self, output: Tensor) -> None:
        spec, buffers = self.spec, self.buffers
        momentum = buffers.momentum if spec.momentum else None
        tensors = buffers.x, buffers.table, buffers.counter, buffers.weights, momentum, buffers.bound, buffers.x0
        _step_bound_op(output, *tensors, self._selection, spec.branches, spec.base, spec.scaled, *self._rank)


@torch.no_grad()
def quantile_bound(
    x0: Tensor, quantile: float = 0.995, floor: float = 1.0, ceiling: float | None = None, *, backend: str = "auto"
) -> Tensor:
    """The bound of dynamic thresholding: `torch.quantile` of |x0| over each sample, bit for bit, limited to
    [floor, ceiling]. TypeError or ValueError for arguments that do not fit, or a backend that cannot run.

    Args:
        x0: [B, C, ...], at most 2**24 elements in a sample.
        quantile, floor, ceiling: as `DynamicThreshold`.
        backend: "auto" (on a CPU "native" where that can run), "triton", "native" or "reference".

    Returns:
        float32 [B]; NaN for a sample with NaN.

    Example:
        >>> quantile_bound(torch.linspace(-3, 3, 7).view(1, 1, 7), 0.5)
        tensor([2.])
    """
    rank, x0 = _checked(x0, quantile, floor, ceiling)
    backend = resolve_piece(backend, x0.device, backends=PIECE_BACKENDS)
    if backend == "native":
        return _native_bound(x0.float(), rank)
    if backend == "reference":
        return reference.quantile_bound(x0, rank)
    return _quantile(x0, *rank)


@torch.no_grad()
def dynamic_threshold(
    x0: Tensor, quantile: float = 0.995, floor: float = 1.0, ceiling: float | None = None, *, backend: str = "auto"
) -> Tensor:
    """clip(x0, -s, s) / s with s = `quantile_bound` of the same arguments (Saharia et al. 2022, section 2.3,
    https://arxiv.org/abs/2205.11487; diffusers' `_threshold_sample`): [B, C, ...], in [-1, 1]; NaN for a sample with
    NaN.

    Example:
        >>> dynamic_threshold(torch.linspace(-3, 3, 7).view(1, 1, 7), 0.5)
        tensor([[[-1.0000, -1.0000, -0.5000,  0.0000,  0.5000,  1.0000,  1.0000]]])
    """
    rank, x0 = _checked(x0, quantile, floor, ceiling)
    backend = resolve_piece(backend, x0.device, backends=PIECE_BACKENDS)
    if backend == "native":
        x0 = x0.float()
        return native_threshold(x0, _native_bound(x0, rank), torch.empty_like(x0))
    if backend == "reference":
        return reference.threshold(x0, reference.quantile_bound(x0, rank))
    return _threshold(x0, _quantile(x0, *rank))


def _native_bound(x0: Tensor, rank: QuantileRank) -> Tensor:
    return native_quantile(x0, rank, torch.empty(x0[0].numel(), dtype=torch.int32), torch.empty(len(x0)))


def _checked(x0: Tensor, quantile: float, floor: float, ceiling: float | None) -> tuple[QuantileRank, Tensor]:
    check_image("x0", x0)
    return DynamicThreshold(quantile, floor, ceiling).rank(x0[0].numel()), x0.contiguous()


def _empty_selection(x: Tensor) -> Tensor:
    from ..kernels.quantile import SELECTION

    return torch.zeros((len(x), SELECTION), dtype=torch.int32, device=x.device)


def _launch_quantile(x0: Tensor, rank: int, weight: float, floor: float, ceiling: float, bound: Tensor) -> None:
    from ..kernels.quantile import launch_quantile

    launch_quantile(x0, _empty_selection(x0), bound, (rank, weight, floor, ceiling))


_quantile = Operation(
    "quantile_bound(Tensor x0, int rank, float weight, float floor, float ceiling) -> Tensor",
    lambda x0, *_: torch.empty(len(x0), dtype=torch.float32, device=x0.device),
    _launch_quantile,
)
_threshold = Operation(
    "threshold(Tensor x0, Tensor bound) -> Tensor",
    lambda x0, _: torch.empty(x0.shape, dtype=torch.float32, device=x0.device),
    "threshold",
)


def _run_registered(output: Tensor, *arguments: Any) -> None:
    x, table, counter, weights, momentum, bound, x0, selection, branches, base, scaled, *rank = arguments
    spec = StepSpec(branches, base, scaled=scaled, momentum=momentum is not None)
    buffers = StepBuffers(x, table, counter, weights=weights, momentum=momentum, bound=bound, x0=x0)
    _launch_step_bound(output, spec, buffers, selection, QuantileRank(*rank))


_step_bound_op = torch.library.custom_op(
    "fastcfg::step_bound",
    _run_registered,
    mutates_args=("bound", "x0", "selection"),
    schema="(Tensor output, Tensor x, Tensor table, Tensor counter, Tensor? weights, Tensor? momentum,"
    " Tensor(a!) bound, Tensor(b!) x0, Tensor(c!) selection, int branches, int? base, bool scaled,"
    " int rank, float weight, float floor, float ceiling) -> ()",
)


def _launch_step_bound(
    output: Tensor, spec: StepSpec, buffers: StepBuffers, selection: Tensor, rank: QuantileRank
) -> None:
    from ..kernels.step_bound import launch_step_bound

    with torch.cuda.device_of(output):
        launch_step_bound(output, spec, buffers, selection, rank)
