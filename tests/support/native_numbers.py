"""Numbers that go through single operations of the native step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcfg.ops.native import NativeStep
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS


def table_of(**row: float) -> Tensor:
    """A row with these coefficients, the others 0, and the one after it, which leaves x as the model's input."""
    table = torch.zeros(2, len(DEVICE_COLUMNS))
    table[:, COLUMNS.index("slot")] = -1
    table[1, COLUMNS.index("c_in")] = 1
    for name, value in row.items():
        table[0, DEVICE_COLUMNS.index(name)] = value
    return table


def native_exp2(x: Tensor, instructions: str) -> Tensor:
    """2**x as the step computes it: as the standard deviation of noise that is 1, around 0."""
    size = x.numel()
    spec = StepSpec(predict_x0=False, raw_output=True, learned_variance=True, noise_source="tensor")
    buffers = _buffers(torch.zeros(1, 1, size), table_of(l_v=1))
    buffers.noise = torch.ones(1, 1, size)
    NativeStep(spec, buffers, instructions)(torch.stack([torch.zeros(size), x.flatten()])[None])
    return buffers.x.view(x.shape)


def native_fma(a: float, b: Tensor, c: Tensor, instructions: str) -> Tensor:
    """a*b + c as the step adds noise b to an output c."""
    spec = StepSpec(predict_x0=False, raw_output=True, noise_source="tensor")
    buffers = _buffers(_minus_zero(len(c)), table_of(a_m=1, s=a))
    buffers.noise = b.view(1, 1, -1)
    NativeStep(spec, buffers, instructions)(c.view(1, 1, -1))
    return buffers.x.view(-1)


def native_conversion(values: Tensor, dtype: torch.dtype, instructions: str) -> tuple[Tensor, Tensor]:
    """Values [n] in float32, float16 or bfloat16 as the step reads them from an output, in float32, and as it writes
    that to a model input of a dtype."""
    buffers = _buffers(_minus_zero(len(values)), table_of(a_m=1))
    buffers.model_input = torch.empty(1, 1, len(values), dtype=dtype)
    buffers.time = torch.empty(1)
    NativeStep(StepSpec(predict_x0=False, raw_output=True), buffers, instructions)(values.view(1, 1, -1))
    return buffers.x.view(-1), buffers.model_input.view(-1)


def _minus_zero(size: int) -> Tensor:
    """A state to which any number can be added, zeros of either sign too, without changing it."""
    return torch.full((1, 1, size), -0.0)


def _buffers(x: Tensor, table: Tensor) -> StepBuffers:
    return StepBuffers(x, table, torch.zeros(2, dtype=torch.int32))
