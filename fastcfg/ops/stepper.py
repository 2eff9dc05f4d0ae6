"""Run a table one row at a time from your own loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..step import StepBuffers, StepSpec
from ..table import StepTable
from .backend import resolve_backend
from .step import GuidedStep
from .threshold import QuantileBound

__all__ = ["Stepper"]


class Stepper:
    """Runs a table row by row. Every call reads the caller's sample and returns a new one: one fused step, which on a
    GPU is one kernel, without copies from the host or to it.

    Args:
        table: for one branch (guidance is the caller's).
        like: a sample [B, C, ...] in float32, float16 or bfloat16 (float64 on the reference path); the run's samples
            have its shape, dtype and device.
        clip: of x0: None, a bound, or a `DynamicThreshold`.
        backend: "auto", "triton", "native" (on CPUs) or "reference"; ValueError if it cannot run, or for a sample of
            another dtype.
        keep_x0: whether to return x0 too.

    Example:
        >>> from fastcfg import Schedule, solvers
        >>> x = torch.randn(2, 3, 8, 8)
        >>> stepper = Stepper(solvers.ddim(Schedule.named("linear").respace(10)), like=x)
        >>> x, x0 = stepper(0, output=torch.randn(2, 3, 8, 8), sample=x)
        >>> x.shape
        torch.Size([2, 3, 8, 8])
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        table: StepTable,
        like: Tensor,
        clip: float | DynamicThreshold | None = None,
        backend: str = "auto",
        keep_x0: bool = True,
    ) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"table: got {type(table).__name__}, expected a StepTable")
        if not isinstance(like, Tensor):
            raise TypeError(f"like: got {type(like).__name__}, expected a tensor")
        self.table = table
        state = torch.float64 if like.dtype == torch.float64 else torch.float32
        backend = resolve_backend(backend, like.device, state)
        threshold = clip if isinstance(clip, DynamicThreshold) else None
        # Stands for the tensors that every call replaces (`GuidedStep.move`).
        example = torch.empty_like(like, memory_format=torch.contiguous_format)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=state, device=like.device)

        buffers = StepBuffers(
            x=example,
            table=table.on(like.device, state),
            counter=torch.zeros(2, dtype=torch.int32, device=like.device),
            history=zeros(table.num_history + 1, *like.shape) if table.num_history else None,
            bound=None if clip is None else zeros(len(like)) + (0.0 if threshold else clip),  # type: ignore[operator]
            noise=example,
            x0=example,
            source=example,
        )
        has_clip, rescale = clip is not None, threshold is not None
        noisy = StepSpec.of(table, noise_source="tensor", keep_x0=keep_x0, clip=has_clip, rescale=rescale)
        quiet = replace(noisy, noise_source="none", learned_variance=False)
        self._quiet = GuidedStep(quiet, replace(buffers), backend)
        self._noisy = GuidedStep(noisy, replace(buffers), backend) if table.uses_noise else self._quiet
        self._predicting: QuantileBound | None = None
        if threshold is not None:
            apart = replace(buffers, x=zeros(*like.shape), x0=zeros(*like.shape), source=None)
            self._predicting = QuantileBound(threshold, quiet, apart, backend)
        self._counter, self.history = buffers.counter, buffers.history
        # Every row's counter is on the device beforehand: a number from the host would be a copy.
        rows = torch.arange(len(table), dtype=torch.int32)
        self._starts = torch.stack([rows, torch.zeros_like(rows)], dim=1).to(like.device).unbind()
        self._next = 0

    @torch.no_grad()
    def __call__(
        self, row: int, output: Tensor, sample: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run one row.

        Args:
            row: of the table. A row that does not follow the last one costs a copy on the device.
            output: the model's, [B, C, ...], or [B, 2C, ...] with variance channels, no wider than the state.
            sample: [B, C, ...], not changed.
            noise: standard normals [B, C, ...], in the sample's dtype or float32; None for rows without noise.

        Returns:
            The next sample, and x0 (limited by the clip) or None: new tensors, in the sample's dtype.
        """
        if row != self._next:
            self._counter.copy_(self._starts[row])
        if row == 0 and self.history is not None:
            # Rows multiply saved tensors they do not use by 0, and 0 times an earlier run's infinity is NaN.
            self.history.zero_()
        sample = sample.contiguous()
        if self._predicting is not None:
            self._predicting.buffers.x.copy_(sample)
            self._predicting(output)
        step = self._quiet if noise is None else self._noisy
        following = torch.empty_like(sample)
        x0 = torch.empty_like(sample) if step.spec.keep_x0 else None
        step.move(sample, following, x0, noise)
        self._next = -1  # until this row is known to be enqueued
        step(output)
        self._next = row + 1
        return following, x0
