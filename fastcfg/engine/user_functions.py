"""The user's functions (denoised_fn, cond_fn) inside a program, between the model and the fused step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_output
from ..reference import pieces
from ..step import StepBuffers, StepSpec
from ..table import DEVICE_COLUMNS

_P = [DEVICE_COLUMNS.index(name) for name in ("p_x", "p_m", "p_x_rest", "p_m_rest")]


class DenoisedOutput:
    """Turns a model's output into x0, applies denoised_fn to it, and passes the result to the step as its output.

    Blend and x0 are rounded as in the step, which then has a table with p_x = 0 and p_m = 1: a function that returns x0
    unchanged changes no bit. `spec` is of the step without the function, and the buffers' table predicts x0.
    """

    def __init__(self, function: Callable[..., Tensor], spec: StepSpec, buffers: StepBuffers, backend: str) -> None:
        self._function, self._spec, self._buffers = function, spec, buffers
        self._pieces: Any = ops if backend == "triton" else pieces

    def __call__(self, output: Tensor) -> Tensor:
        """[K*B, C or 2C, ...] to [B, C, ...], or [B, 2C, ...] where the variance is learned; ValueError for an output
        that does not fit, or another shape returned by the function."""
        check_output(output, self._spec, self._buffers)
        spec, buffers, x = self._spec, self._buffers, self._buffers.x
        channels, row = x.shape[1], buffers.counter[:1]
        m = output[:, :channels]
        if spec.branches > 1:
            weights = buffers.weights.index_select(0, row)[0]  # type: ignore[union-attr]
            momentum = buffers.momentum if spec.momentum else None
            # The kernel of this piece has one weight for a sample.
            by_sample = self._pieces if spec.weights_by == "sample" else pieces
            m = by_sample.guidance_blend(m, weights, base=spec.base, scaled=spec.scaled, momentum=momentum)
        coefficients = buffers.table.index_select(0, row).expand(len(x), -1).t().contiguous()
        p_x, p_m, p_x_rest, p_m_rest = (coefficients[column] for column in _P)
        x0 = self._function(self._pieces.predict_x0(x, m, p_x, p_m, rest=(p_x_rest, p_m_rest)))
        _check("denoised_fn", x0, x)
        if not spec.learned_variance:
            return x0
        return torch.cat([x0, output.chunk(spec.branches)[spec.conditional][:, channels:].to(x0.dtype)], dim=1)


class ClassifierGradient:
    """Writes ∇ log p(y | x_t), which cond_fn returns for the state, to the run's gradient buffer."""

    def __init__(self, function: Callable[..., Tensor], buffers: StepBuffers, conditioning: Mapping[str, Any]) -> None:
        self._function, self._buffers, self._conditioning = function, buffers, conditioning
        self._time = buffers.time[: len(buffers.x)]  # type: ignore[index]

    def __call__(self) -> None:
        """Evaluate the function at the state; ValueError if it returned another shape."""
        buffers = self._buffers
        gradient = self._function(buffers.x, self._time, **self._conditioning)
        _check("cond_fn", gradient, buffers.x)
        buffers.gradient.copy_(gradient)  # type: ignore[union-attr]


def _check(name: str, result: Any, x: Tensor) -> None:
    if not isinstance(result, Tensor) or result.shape != x.shape:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{name}: got {got} from it, expected a tensor of shape {tuple(x.shape)}")
