"""The log-probability of a step's draw, from its noise as it is drawn, and again from states and outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..clip import DynamicThreshold
from ..step import StepBuffers, StepSpec
from ..table import DEVICE_COLUMNS, NO_NOISE, StepTable
from ..utils.checks import as_integer
from .philox import STEP_STREAM, philox_normal
from .plain import plain_row
from .table_step import per_sample

_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


class ReferenceNoiseSums:
    """Writes the sums that the log-probability of a run's next row is made of, before its step: of the squares of its
    normals, and with learned variance of the variance channels.

    Args:
        spec, buffers: the guided step's, with noise.
        sums: float64 [R, 2, B, 1]; the row is written.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers, sums: Tensor) -> None:
        self._spec, self._buffers, self._sums = spec, buffers, sums

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's, [K*B, C or 2C, ...]."""
        spec, buffers, x = self._spec, self._buffers, self._buffers.x
        row, z = buffers.counter[:1].long(), buffers.noise
        if spec.noise_source == "philox":
            z = philox_normal(buffers.seeds, x.shape[1:], row=row[0], stream=STEP_STREAM)  # type: ignore[arg-type]
        squares = z.double().square().flatten(1).sum(1)  # type: ignore[union-attr]
        variance = torch.zeros_like(squares)
        if spec.learned_variance:
            channels = output.chunk(spec.branches)[spec.conditional][:, x.shape[1] :]
            variance = channels.double().flatten(1).sum(1)
        self._sums.index_copy_(0, row, torch.stack([squares, variance])[None, ..., None])


def stochastic_rows(table: StepTable) -> NDArray[np.int64]:
    """The rows that add noise."""
    return np.flatnonzero(table["l_0"] != NO_NOISE if table.learned_variance else table["s"])


def log_prob_of_sums(table: StepTable, rows: Sequence[int], sums: Tensor, count: int) -> Tensor:
    """float64 [n, B]: the log-probabilities of n rows, from their sums [R, 2, B, P] over P parts of samples of `count`
    elements."""
    chosen = torch.as_tensor(list(rows), dtype=torch.int64, device=sums.device)
    squares, variance = sums.index_select(0, chosen).double().sum(-1).unbind(1)

    def column(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values[list(rows)]).to(sums.device)[:, None]

    if table.learned_variance:
        log_std = math.log(2) * (count * column(table["l_0"]) + column(table["l_v"]) * variance)
    else:
        with np.errstate(divide="ignore"):
            log_std = count * column(np.log(table["s"]))
    return -0.5 * squares - log_std - count * _HALF_LOG_2_PI


def log_prob(
    table: StepTable,
    row: int | Sequence[int] | Tensor,
    x: Tensor,
    output: Tensor,
    x_next: Tensor,
    *,
    clip: float | Tensor | DynamicThreshold | None = None,
    history: Sequence[Tensor] = (),
) -> Tensor:
    """log p(x_next | x) of a row that adds noise: of a normal distribution with the row's mean and standard deviation,
    summed over each sample. Differentiable in all tensors, as fine-tuning by policy gradients needs it (DDPO: Black et
    al. 2023, https://arxiv.org/abs/2305.13301, which divides by the number of elements; DPOK: Fan et al. 2023,
    https://arxiv.org/abs/2305.16381; Flow-GRPO: Liu et al. 2025, https://arxiv.org/abs/2505.05470).
    `Sampler.sample(log_prob=True)` gives the same numbers for a run, without a gradient.

    Args:
        table: the run's.
        row: the row's index in it, or one for each sample.
        x, x_next: the states before and after it, [B, C, ...].
        output: the guided model output, [B, C, ...], or [B, 2C, ...] with variance channels, which only tables with
            learned variances read.
        clip: bound of x0, as of `Sampler`.
        history: the tensors that the table saves, as they were before the row: for rows that use them.

    Returns:
        float64 [B]: it is computed in float64, as ratios are exponentials of differences.

    Raises:
        ValueError: a row that adds no noise or does not exist, a table with CFG++'s unconditional output, shapes that
            do not fit, saved tensors that are missing.

    Example:
        >>> from fastcfg import Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(10), eta=1.0)
        >>> x, output = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> log_prob(table, 0, x, output, x).shape
        torch.Size([2])
    """
    rows = _checked_rows(table, row, len(x))
    channels, shapes = x.shape[1], [(len(x), factor * x.shape[1], *x.shape[2:]) for factor in (1, 2)]
    if x_next.shape != x.shape or output.shape not in (shapes[1:] if table.learned_variance else shapes):
        got = f"x {tuple(x.shape)}, output {tuple(output.shape)}, x_next {tuple(x_next.shape)}"
        wanted = 2 * channels if table.learned_variance else f"{channels} or {2 * channels}"
        raise ValueError(f"log_prob: got {got}, expected the output with {wanted} channels, the others alike")
    uses_history = any(table[f"a_h{j}"][rows].any() for j in range(table.num_history))
    if len(history) != table.num_history and (history or uses_history):
        raise ValueError(f"history: got {len(history)} tensors, expected the {table.num_history} of {table.name}")
    if bad := [tuple(tensor.shape) for tensor in history if tensor.shape != x.shape]:
        raise ValueError(f"history: got shape {bad[0]}, expected {tuple(x.shape)}")
    columns = table.on(x.device, torch.float64)[torch.as_tensor(rows, device=x.device)]
    c: list[Any] = [per_sample(column, x) for column in columns.unbind(1)]
    spec = StepSpec(raw_output=table.uses_raw_output, clip=clip is not None, rescale=isinstance(clip, DynamicThreshold))
    bound: Any = clip
    if clip is not None and not isinstance(clip, DynamicThreshold):
        bound = torch.as_tensor(clip, dtype=torch.float64, device=x.device)
        if bound.shape not in ((), (1,), (len(x),)) or not ((bound > 0) & bound.isfinite()).all():
            raise ValueError(f"clip: got {clip!r}, expected positive finite bounds, 1 or one per sample ({len(x)})")
        bound = bound.expand(len(x))
    x, output, x_next = x.double(), output.double(), x_next.double()
    saved = [tensor.double() for tensor in history]
    mean = plain_row(c, x, output[:, :channels], spec, bound=bound, history=saved)["x"]
    log_std = _log_std(table, c, output[:, channels:])
    z = (x_next - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - _HALF_LOG_2_PI).flatten(1).sum(1)


def _log_std(table: StepTable, c: Sequence[Tensor], variance: Tensor) -> Tensor:
    s, l_0, l_v = (c[DEVICE_COLUMNS.index(name)] for name in ("s", "l_0", "l_v"))
    return math.log(2) * (l_0 + l_v * variance) if table.learned_variance else s.log()


def _checked_rows(table: StepTable, row: Any, batch: int) -> list[int]:
    """A row for every sample."""
    one = as_integer(row)
    several = [as_integer(value) for value in row] if isinstance(row, Tensor | Sequence) else []
    given = [one] * batch if one is not None else several
    stochastic = set(stochastic_rows(table).tolist())
    if len(given) != batch or not all(value in stochastic for value in given):
        raise ValueError(
            f"row: got {row!r}, expected a row of {table.name} that adds noise, or one per sample ({batch})"
        )
    if table.uses_unconditional:
        raise ValueError(f"table: got {table.name}, which adds the unconditional output, expected one that does not")
    return given  # type: ignore[return-value]
