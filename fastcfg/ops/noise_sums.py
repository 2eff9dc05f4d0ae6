"""The sums that the log-probability of a step's draw is made of, bound to the buffers of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.log_prob import ReferenceNoiseSums
from ..step import StepBuffers, StepSpec
from ..utils._torch_private import current_dispatch_mode
from .backend import interpreting, resolve_piece
from .checks import readable
from .native_rows import native_noise_sums


class NoiseSums:
    """Writes a row's sums to `sums` before its step: calling it with the model's output leaves the run at its row.

    Args:
        spec, buffers: the guided step's, with noise.
        sums: of `sums_memory`.
        backend: as for `GuidedStep`; "inductor" runs the reference here, and "auto" is "native" on a CPU where that can
            run.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers, sums: Tensor, backend: str = "auto") -> None:
        self.backend = resolve_piece(backend, buffers.x.device, buffers.x.dtype, registered=True)
        drawn = spec.noise_source == "philox"
        noise, seeds = None if drawn else buffers.noise, buffers.seeds if drawn else None
        channels = buffers.x.shape[1]
        self._arguments = noise, seeds, buffers.counter, sums, channels, spec.conditional, spec.learned_variance
        kernels = {"triton": self._kernel, "native": self._native}
        self._run: Any = kernels.get(self.backend) or ReferenceNoiseSums(spec, buffers, sums)

    def __call__(self, output: Tensor) -> None:
        """Write the row's sums."""
        self._run(readable(output))

    def _kernel(self, output: Tensor) -> None:
        (_noise_sums_op if interpreting() else _launch)(output, *self._arguments)

    def _native(self, output: Tensor) -> None:
        watched = torch.compiler.is_compiling() or current_dispatch_mode() is not None
        (_native_op if watched else native_noise_sums)(output, *self._arguments)


def sums_memory(rows: int, x: Tensor, backend: str) -> Tensor:
    """Zeros for the sums of a run's rows: [R, 2, B, P], P parts of a sample being added apart."""
    if backend != "triton":
        return torch.zeros((rows, 2, len(x), 1), dtype=torch.float64, device=x.device)
    from ..kernels.noise_sums import parts_of

    return torch.zeros((rows, 2, len(x), parts_of(x[0].numel(), len(x))), dtype=torch.float32, device=x.device)


def _launch(output: Tensor, *arguments: Any) -> None:
    from ..kernels.noise_sums import launch_noise_sums

    with torch.cuda.device_of(output):
        launch_noise_sums(output, *arguments)


_SCHEMA = (
    "(Tensor output, Tensor? noise, Tensor? seeds, Tensor counter, Tensor(a!) sums, int channels, int conditional,"
    " bool learned) -> ()"
)
_noise_sums_op = torch.library.custom_op("fastcfg::noise_sums", _launch, mutates_args=("sums",), schema=_SCHEMA)


def _run_native(output: Tensor, *arguments: Any) -> None:
    native_noise_sums(output, *arguments)


_native_op = torch.library.custom_op("fastcfg::native_noise_sums", _run_native, mutates_args=("sums",), schema=_SCHEMA)
