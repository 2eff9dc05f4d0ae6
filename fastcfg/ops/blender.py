"""Run guidance one row at a time from your own loop, which calls the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guidance import Guidance, GuidancePlan
from ..table import StepTable
from .checks import LOADED_DTYPES
from .gram import gram, mixed_weights
from .pieces import guidance_blend

__all__ = ["Blender"]


@dataclass(frozen=True, eq=False)
class _Row:
    """A row's part of the plan."""

    branches: tuple[str, ...]  # those evaluated
    base: int | None = None  # index among them of the one that differences are measured from; None for the sum form
    share: float | None = None  # of two branches, the weight of the other one, if it is one number for all samples
    weights: Tensor | None = None  # float32 [B, K], or the row of `GuidancePlan.planned` that they are computed from
    uses_outputs: bool = False  # whether the weights are computed from the outputs


class RowBlends:
    """What blends the branches' outputs row by row. It keeps no state: the momentum is the caller's.

    Args:
        guidance, num_steps, backend: as for `Blender`.
        batch, device: B, and the device of the outputs.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, guidance: Guidance, num_steps: int, batch: int, device: torch.device, backend: str = "auto"
    ) -> None:
        plan = guidance.plan(StepTable.from_columns(t=range(num_steps), a_m=1.0), batch)
        if plan.agreement is not None:
            raise ValueError(f"guidance: got {type(guidance).__name__}, expected guidance that does not end by itself")
        self.guidance = guidance
        self.has_momentum = plan.momentum is not None
        self._mix, self._rescale, self._decay = plan.mix, plan.rescale, plan.momentum or 0.0
        self._backend = backend
        self._rows = [self._row(plan, row, device) for row in range(num_steps)]

    def _row(self, plan: GuidancePlan, row: int, device: torch.device) -> _Row:
        active, branches = plan.active[row], self.guidance.branches
        names = tuple(branches[k] for k in active)
        if len(active) == 1:
            return _Row(names)
        base = None if self.guidance.base is None else active.index(self.guidance.base)
        if plan.planned is not None:
            columns = [*active, *range(len(branches), plan.planned.shape[2])]
            planned = torch.from_numpy(plan.planned[row][:, columns].copy())
            return _Row(names, base, weights=planned.to(device), uses_outputs=True)
        weights = plan.weights[row][:, list(active)]
        if base is not None and len(active) == 2 and (weights == weights[0]).all():
            return _Row(names, base, share=float(weights[0, 1 - base]))
        return _Row(names, base, weights=torch.from_numpy(weights.copy()).to(device, torch.float32))

    def branches(self, row: int) -> tuple[str, ...]:
        """The branches a row evaluates, by name: the keys of `__call__`'s outputs."""
        return self._rows[row].branches

    def uses_outputs(self, row: int) -> bool:
        """Whether a row's weights depend on the outputs."""
        return self._rows[row].uses_outputs

    @torch.no_grad()
    def __call__(self, row: int, outputs: Mapping[str, Tensor], momentum: Tensor | None = None) -> Tensor:
        """As `Blender.__call__`. The momentum, float32 [B, C, ...] and contiguous, is rewritten by rows that have one;
        it is needed then."""
        plan = self._rows[row]
        if set(outputs) != set(plan.branches):
            raise ValueError(f"outputs: got {sorted(outputs)}, expected those of row {row}: {sorted(plan.branches)}")
        parts = [outputs[name] for name in plan.branches]
        if len(parts) == 1:
            return parts[0]
        if plan.share is not None:
            return torch.lerp(parts[plan.base], parts[1 - plan.base], plan.share)  # type: ignore[index, operator]
        output = torch.cat(parts)
        options: dict[str, Any] = {"base": plan.base, "backend": self._backend}
        weights: Any = plan.weights
        if plan.uses_outputs:
            conditional = plan.branches.index(self.guidance.branches[self.guidance.conditional])
            roles: dict[str, Any] = {"momentum": momentum, "decay": self._decay, "conditional": conditional}
            found = gram(output, len(parts), **options, **roles)
            count, pair = output[0].numel(), (options["base"], conditional)
            weights = mixed_weights(*found, count, weights, *pair, self._mix, self._rescale).float()
            options |= {"scaled": True, "momentum": momentum}
        return guidance_blend(output, weights, **options).to(output.dtype)


class Blender:
    """Blends the branches' outputs row by row, as a `Sampler` with the same guidance does. Two branches with one weight
    for all samples take one kernel; otherwise the outputs are concatenated first, and weights that depend on the
    outputs take one more pass over them. Nothing is read back to the host.

    Args:
        guidance: any spec but `AdaptiveCFG`, which ends by itself (ValueError).
        num_steps: N, the length of the run.
        like: one branch's output [B, C, ...], in float32, float16 or bfloat16; the run's outputs have its shape, dtype
            and device; ValueError for another dtype.
        backend: "auto", "triton", "native" or "reference".

    Attributes:
        momentum: float32 [B, C, ...], for guidance that has one; `begin` clears it.

    Example:
        >>> from fastcfg import APG
        >>> cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> blender = Blender(APG(7.5, momentum=-0.5), num_steps=20, like=cond)
        >>> blender(0, {"cond": cond, "uncond": uncond}).shape
        torch.Size([2, 4, 8, 8])
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, guidance: Guidance, num_steps: int, like: Tensor, backend: str = "auto") -> None:
        if like.dtype not in LOADED_DTYPES:
            raise ValueError(f"like: got {like.dtype}, expected float32, float16 or bfloat16")
        self.guidance = guidance
        self._blends = RowBlends(guidance, num_steps, len(like), like.device, backend)
        self.momentum = like.new_zeros(like.shape, dtype=torch.float32) if self._blends.has_momentum else None

    def branches(self, row: int) -> tuple[str, ...]:
        """The branches a row evaluates, by name: the keys of `__call__`'s outputs."""
        return self._blends.branches(row)

    def begin(self) -> None:
        """Forget the momentum of an earlier run."""
        if self.momentum is not None:
            self.momentum.zero_()

    def __call__(self, row: int, outputs: Mapping[str, Tensor]) -> Tensor:
        """Blend the outputs [B, C, ...] of a row's branches, given by name, to [B, C, ...] in their dtype, computed in
        float32 and rounded once. Rows are numbered 0 to N - 1; ValueError for other branches than the row's."""
        return self._blends(row, outputs, self.momentum)
