"""The equations of `fastcfg.table` as eager torch code has them, in any dtype: each operation rounded on its own, the
blend in the model's dtype. In float64 it is the truth that steps, compiled tables and tests are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..schedule import Schedule
from ..step import StepSpec
from ..table import DEVICE_COLUMNS, StepTable
from . import originals
from .table_step import per_sample


def blended(output: Tensor, channels: int, spec: StepSpec, weights: Tensor | None) -> Tensor:
    """The guided output [B, C, ...] of K branches' [K*B, C or 2C, ...], every result rounded to its dtype."""
    parts = output[:, :channels].chunk(spec.branches)
    if spec.branches == 1:
        return parts[0]
    w = weights.view(*weights.shape, *[1] * (output.ndim - 1)).unbind(1)  # type: ignore[union-attr]
    rest = [k for k in range(spec.branches) if k != spec.base]
    if spec.base is None:
        terms = [(w[k] * parts[k]).to(output.dtype) for k in rest]
        m = terms.pop(0)
    else:
        m = base = parts[spec.base]
        terms = [(w[k] * (parts[k] - base)).to(output.dtype) for k in rest]
    for term in terms:
        m = m + term
    return m


def plain_row(
    row: Sequence[float],
    x: Tensor,
    output: Tensor,
    spec: StepSpec,
    *,
    weights: Tensor | None = None,
    bound: Tensor | DynamicThreshold | None = None,
    noise: Tensor | None = None,
    gradient: Tensor | None = None,
    history: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """One row of a table.

    Args:
        row: the row's coefficients, in the order of `DEVICE_COLUMNS`.
        x, noise, gradient, history: [B, C, ...].
        output: the model's [K*B, C or 2C, ...] in its dtype.
        spec: which terms exist; without `scaled` and `momentum`.
        weights: [B, K].
        bound: [B], or the `DynamicThreshold` that it follows from.

    Returns:
        "x", the next state; "x0"; "saved", the tensor to save; and with a clip its "bound" [B, 1, ...].
    """
    c = dict(zip(DEVICE_COLUMNS, row, strict=True))
    channels, made = x.shape[1], {}
    m = blended(output, channels, spec, weights).to(x.dtype)
    x0 = c["p_x"] * x + c["p_m"] * m + (c["p_x_rest"] * x + c["p_m_rest"] * m)
    if spec.clip:
        if isinstance(bound, DynamicThreshold):
            bound = x0.abs().flatten(1).quantile(bound.quantile, dim=1).clamp(bound.floor, bound.ceiling)
        made["bound"] = limit = per_sample(bound, x)  # type: ignore[arg-type]
        x0 = torch.minimum(torch.maximum(x0, -limit), limit)
        x0 = x0 / limit if spec.rescale else x0
    if spec.gradient:
        x0 = x0 + c["p_g"] * gradient  # type: ignore[operator]
    y = c["a_x"] * x + (c["a_x_rest"] * x + c["a_0"] * x0)
    if spec.raw_output:
        y = y + c["a_m"] * m
    if spec.unconditional is not None:
        y = y + c["a_u"] * output[:, :channels].chunk(spec.branches)[spec.unconditional].to(x.dtype)
    for j, saved in enumerate(history):
        y = y + c[f"a_h{j}"] * saved
    std: Tensor | float = c["s"]
    if spec.learned_variance:
        v = output[:, channels:].chunk(spec.branches)[spec.conditional].to(x.dtype)
        std = torch.exp2(c["l_0"] + c["l_v"] * v)
    if spec.gradient:
        scale = c["a_g"] * torch.exp2(2 * c["l_v"] * v) if spec.learned_variance else c["a_g"]
        y = y + scale * gradient  # type: ignore[operator]
    if spec.noise_source != "none":
        y = y + std * noise  # type: ignore[operator]
    return {"x": y, "x0": x0, "saved": c["k_x"] * x + c["k_0"] * x0 + c["k_m"] * m, **made}


class PlainTable:
    """A table run row by row by `plain_row` on states like a given one, with its saved tensors (`history`)."""

    def __init__(self, table: StepTable, like: Tensor) -> None:
        self._rows = table.on("cpu", like.dtype).tolist()
        self.history = [torch.zeros_like(like) for _ in range(table.num_history)]

    def __call__(self, row: int, x: Tensor, output: Tensor, spec: StepSpec, **terms: Any) -> dict[str, Tensor]:
        """Run a row; the arguments and the result are `plain_row`'s."""
        coefficients = self._rows[row]
        made = plain_row(coefficients, x, output, spec, history=tuple(self.history), **terms)
        slot = int(coefficients[DEVICE_COLUMNS.index("slot")])
        if slot >= 0:
            self.history[slot] = made["saved"]
        return made


def original_row(
    schedule: Schedule, solver: str, x: Tensor, output: Tensor, row: int, scale: float, noise: Tensor
) -> Tensor:
    """The next x of guided-diffusion's and GLIDE's step with guidance, by their own formulas in their order.

    Args:
        solver: "ddpm" (learned range) or "ddim" (eta = 0).
        x, noise: float32 [B, C, ...].
        output: the model's [2B, 2C, ...], the conditional half first.
        row: 0 for the noisiest timestep.
    """
    batch, channels = x.shape[:2]
    weights = torch.tensor([scale, 0.0], device=x.device).expand(batch, 2)
    # Variance channels have no guidance: the conditional half's are used.
    m = blended(output, channels, StepSpec(branches=2, base=1), weights)
    guided = torch.cat([m, output[:batch, channels:]], dim=1)
    t = torch.full((batch,), schedule.num_timesteps - 1 - row, device=x.device)
    p = originals.p_mean_variance(schedule, guided, x, t)
    return originals.p_sample(p, t, noise) if solver == "ddpm" else originals.ddim_sample(schedule, p, x, t, noise)
