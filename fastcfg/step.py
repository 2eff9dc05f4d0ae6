"""What one guided step does, and the tensors it works on: the vocabulary of the reference, kernels and engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .table import StepTable

__all__ = ["StepBuffers", "StepSpec"]

NOISE_SOURCES = ("none", "tensor", "philox")
WEIGHTS_BY = ("sample", "channel", "element")


class BranchRoles(Protocol):
    """The branches of a guidance that a step treats apart, by index; `Guidance` is one."""

    @property
    def base(self) -> int | None: ...
    @property
    def conditional(self) -> int: ...
    @property
    def unconditional(self) -> int | None: ...


@dataclass(frozen=True)
class StepSpec:
    """Everything that changes the code of a step; equal specs run the same kernel.

    Attributes:
        branches: K, the number of branches evaluated.
        base: the branch that differences are measured from; None for the weighted sum (see `fastcfg.guidance`).
        conditional, unconditional: the branches of which variance channels are used, and which a_u multiplies.
        scaled: whether the base is weighted too: w_b m_b + sum of w_k (m_k - m_b).
        momentum: whether a tensor is added to the blend, with a weight after the branches'.
        weights_by: what has a weight of its own: a "sample", a "channel" of a sample, or every "element" of it.
        learned_variance: whether std comes from the variance channels.
        predict_x0: whether x0 is predicted. A step without clip, gradient and keep_x0 need not predict it if its rows
            use raw_output and not x0 (`StepTable.uses_x0`); its bits are the same.
        raw_output, gradient: whether a_m is used; whether p_g and a_g are.
        history, saves_states: the number of saved tensors, 0 to 3, and whether they are copies of states, which are as
            large as x and so added after it.
        clip, rescale: whether x0 is clipped to a bound per sample, and then divided by it (dynamic thresholding).
        noise_source: "none", "tensor" (read from a buffer) or "philox" (drawn by the step).
        keep_x0: whether x0 is written out.
    """

    branches: int = 1
    base: int | None = None
    conditional: int = 0
    unconditional: int | None = None
    scaled: bool = False
    momentum: bool = False
    weights_by: str = "sample"
    learned_variance: bool = False
    predict_x0: bool = True
    raw_output: bool = False
    gradient: bool = False
    history: int = 0
    saves_states: bool = False
    clip: bool = False
    rescale: bool = False
    noise_source: str = "none"
    keep_x0: bool = False

    @classmethod
    def of(
        cls, table: StepTable, roles: BranchRoles | None = None, active: Sequence[int] = (0,), **others: Any
    ) -> StepSpec:
        """The spec of a table's rows that evaluate the branches `active`, ascending, of a guidance; None for one
        branch. The table's columns decide what the update needs; `others` are further attributes."""
        if roles is not None:

            def position(branch: int | None) -> int | None:
                return active.index(branch) if branch in active else None

            others["branches"] = len(active)
            others["base"] = position(roles.base) if len(active) > 1 else None
            others["conditional"] = position(roles.conditional) or 0
            others["unconditional"] = position(roles.unconditional) if table.uses_unconditional else None
        spec = cls(
            learned_variance=table.learned_variance,
            raw_output=table.uses_raw_output,
            history=table.num_history,
            saves_states=table.saves_states,
            **others,
        )
        return replace(spec, predict_x0=table.uses_x0 or spec.takes_x0)

    @property
    def takes_x0(self) -> bool:
        """Whether x0 has to be predicted, whatever the rows use."""
        return self.clip or self.gradient or self.keep_x0 or not self.raw_output


@dataclass(eq=False)
class StepBuffers:
    """The tensors of a run, all on one device and all written in place.

    The state's dtype is that of the table: float32, or float64 on the reference path. Tensors without a dtype here are
    contiguous and have the state's.

    Attributes:
        x: [B, C, ...]: the state.
        table: [R + 1, columns], from `StepTable.on`.
        counter: int32 [2]: the row to execute next, and the ticket by which the last program of a launch is known.
        weights: [R, B, K], or [R, B, K + 1] with momentum; by channel [R, B, K, C], by element [R, B, K, C, ...], where
            all rows may be the same memory (expanded).
        bound: [B]: the clip bound of each sample.
        noise, gradient, momentum: [B, C, ...]: standard normals, the classifier's gradient, what is added to the blend.
        seeds: int64 [B].
        history: [H + 1, B, C, ...]: the saved tensors, and one that rows without a slot may write to.
        x0: [B, C, ...]; with dynamic thresholding also where x0 waits for its bound.
        model_input: [S*B, C, ...] in the model's dtype: c_in*x, once for every branch slot.
        time: [S*B], int64 or floating: the model's time.
        source: [B, C, ...]: where the state is read from, if not from x. Source, x, x0 and noise may then be float16 or
            bfloat16; the step computes in the state's dtype.
    """

    x: torch.Tensor
    table: torch.Tensor
    counter: torch.Tensor
    weights: torch.Tensor | None = None
    bound: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    seeds: torch.Tensor | None = None
    history: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    momentum: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    model_input: torch.Tensor | None = None
    time: torch.Tensor | None = None
    source: torch.Tensor | None = None
