"""Scales that vary within a sample, by channel, frame or place: each combination of scales is planned as a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..table import StepTable
from .base import Guidance, GuidancePlan
from .scales import dimensions, finite_scale, scale_by_row


@dataclass(frozen=True, eq=False)
class PlaceWeights:
    """Blend weights by place.

    Attributes:
        values: float64 [R, N, K], of the N combinations of scales that occur.
        index: int64 [1 or B, 1 or C, ...]: which of them each place has.
    """

    values: NDArray[np.float64]
    index: NDArray[np.int64]

    @property
    def by(self) -> str:
        """What has a weight of its own: a "channel", or every "element"."""
        return "channel" if all(size == 1 for size in self.index.shape[2:]) else "element"

    def of_rows(self, rows: Sequence[int], branches: Sequence[int]) -> NDArray[np.float64]:
        """float64 [1 or len(rows), N, K']: weights of some branches at some rows; one row where all are the same."""
        found = self.values[list(rows)][:, :, list(branches)]
        return found[:1] if (found == found[:1]).all() else found


def plan_for(guidance: Guidance, table: StepTable, shape: Sequence[int]) -> GuidancePlan:
    """`guidance.plan` for samples [B, C, ...], with scales by place: arrays that broadcast to the samples' shape, and
    `CFG.channels`. Scales that turn out to be the same all over a sample are planned as such.

    Raises:
        ValueError: as `Guidance.plan`; a scale that does not broadcast; more guided channels than there are; scales by
            place for guidance whose weights depend on the outputs.
    """
    scales, channels = _scales(guidance), getattr(guidance, "channels", None)
    if channels is not None and channels > shape[1]:
        raise ValueError(f"channels: got {channels}, expected at most the state's {shape[1]}")
    if channels is not None:
        guidance = replace(guidance, channels=None)  # type: ignore[call-arg]
    if channels in (None, shape[1]) and not any(_is_map(scale) for scale in scales.values()):
        return guidance.plan(table, shape[0])
    if guidance.uses_outputs:
        got = "scales by place" if channels is None else f"channels={channels}"
        got += f" with {type(guidance).__name__}{' and rescale' * (guidance.rescale > 0)}"
        raise ValueError(f"guidance: got {got}, expected one scale per sample: its weights depend on the outputs")
    names, arrays = list(scales), [_expanded(name, scale, table, shape) for name, scale in scales.items()]
    combined, index = _combinations(arrays)
    if not any(size > 1 for size in index.shape[1:]) and channels in (None, shape[1]):
        # One number for each sample after all.
        order = np.broadcast_to(index.reshape(-1), shape[0])
        return _with_scales(guidance, names, [rows[:, order] for rows in combined]).plan(table, shape[0])
    inner = _with_scales(guidance, names, combined)
    plan = inner.plan(table, combined[0].shape[1])
    if plan.agreement is not None:
        got = f"scales by place with {type(guidance).__name__}"
        raise ValueError(f"guidance: got {got}, expected one scale per sample: it ends sample by sample")
    values, active = plan.weights, plan.active
    if channels is not None and channels < shape[1]:
        # The other channels are the conditional branch's own.
        unguided = np.broadcast_to(guidance.fallback_weights, (table.num_rows, 1, values.shape[2]))
        values = np.concatenate([values, unguided], axis=1)
        index = np.broadcast_to(index, (index.shape[0], shape[1], *index.shape[2:])).copy()
        index[:, channels:] = values.shape[1] - 1
        active = tuple(inner.evaluated(values[row], table, row) for row in range(table.num_rows))
    weights = np.zeros((table.num_rows, shape[0], values.shape[2]))
    return replace(plan, weights=weights, active=active, places=PlaceWeights(values, index))


def _scales(guidance: Guidance) -> dict[Any, Any]:
    """The scales of a spec by field, or by (field, key) of mappings."""
    found: dict[Any, Any] = {}
    for field in fields(guidance):
        kind, value = str(field.type), getattr(guidance, field.name)
        if kind == "Scale":
            found[field.name] = value
        elif kind == "Scales":
            found |= {(field.name, key): scale for key, scale in value.items()}
    return found


def _with_scales(guidance: Guidance, names: list[Any], scales: list[NDArray[np.float64]]) -> Guidance:
    """The spec with scales [1 or R, N]."""
    given: dict[str, Any] = {}
    for name, by_row in zip(names, scales, strict=True):
        scale = by_row[0] if len(by_row) == 1 else by_row
        if isinstance(name, str):
            given[name] = scale
        else:
            given.setdefault(name[0], {})[name[1]] = scale
    return replace(guidance, **given)


def _is_map(scale: Any) -> bool:
    """Whether a scale has a dimension for each of a sample's, with or without one for rows. [R, B] has two."""
    return not callable(scale) and dimensions(scale) > 2


def _expanded(name: Any, scale: Any, table: StepTable, shape: Sequence[int]) -> NDArray[np.float64]:
    """float64 [1 or R, 1 or B, 1 or C, ...] of a scale in any form."""
    label = name if isinstance(name, str) else f"{name[0]}[{name[1]!r}]"
    if not _is_map(scale):
        by_row = scale_by_row(label, scale, table, shape[0])
        if (by_row == by_row[:, :1]).all():
            by_row = by_row[:, :1]
        by_row = by_row[:1] if (by_row == by_row[:1]).all() else by_row
        return by_row.reshape(*by_row.shape, *[1] * (len(shape) - 1))
    values = finite_scale(label, scale)
    values = values[None] if values.ndim == len(shape) else values
    full = (table.num_rows, *shape)
    if values.ndim != len(full) or any(size not in (1, most) for size, most in zip(values.shape, full, strict=True)):
        expected = f"one that broadcasts to the samples' {tuple(shape)}, or to {full} by row"
        raise ValueError(
            f"{label}: got shape {tuple(values.shape[values.ndim - dimensions(scale) :])}, expected {expected}"
        )
    return values


def _combinations(arrays: list[NDArray[np.float64]]) -> tuple[list[NDArray[np.float64]], NDArray[np.int64]]:
    """The distinct combinations of scales as [R, N] for each scale, and which of them each place has."""
    places = np.broadcast_shapes(*(array.shape[1:] for array in arrays))
    flat = [np.broadcast_to(array, (array.shape[0], *places)).reshape(array.shape[0], -1) for array in arrays]
    stacked = np.concatenate(flat)
    if len(stacked) == 1:
        unique, index = np.unique(stacked[0], return_inverse=True)
        unique = unique[None]
    else:
        unique, index = np.unique(stacked, axis=1, return_inverse=True)
    index = index.reshape(places)
    for axis in range(index.ndim):
        first = index.take([0], axis=axis)
        index = first if (index == first).all() else index
    return np.split(unique, np.cumsum([len(part) for part in flat])[:-1]), index
