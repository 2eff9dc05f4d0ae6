"""The sums that the log-probability of a step's draw is made of, bound to the buffers of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.log_prob import ReferenceNoiseSums
from ..step import StepBuffers, StepSpec
from .backend import interpreting, resolve_backend
from .checks import readable


class NoiseSums:
    """Writes a row's sums to `sums` before its step: calling it with the model's output leaves the run at its row.

    Args:
        spec, buffers: the guided step's, with noise.
        sums: of `sums_memory`.
        backend: as for `GuidedStep`; "inductor" runs the reference here.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers, sums: Tensor, backend: str = "auto") -> None:
        self.backend = resolve_backend(backend, buffers.x.device, buffers.x.dtype)
        drawn = spec.noise_source == "philox"
        noise, seeds = None if drawn else buffers.noise, buffers.seeds if drawn else None
        channels = buffers.x.shape[1]
        self._arguments = noise, seeds, buffers.counter, sums, channels, spec.conditional, spec.learned_variance
        self._run: Any = ReferenceNoiseSums(spec, buffers, sums) if self.backend != "triton" else self._kernel

    def __call__(self, output: Tensor) -> None:
        """Write the row's sums."""
        self._run(readable(output))

    def _kernel(self, output: Tensor) -> None:
        (_noise_sums_op if interpreting() else _launch)(output, *self._arguments)


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


_noise_sums_op = torch.library.custom_op(
    "fastcfg::noise_sums",
    _launch,
    mutates_args=("sums",),
    schema="(Tensor output, Tensor? noise, Tensor? seeds, Tensor counter, Tensor(a!) sums, int channels,"
    " int conditional, bool learned) -> ()",
)
