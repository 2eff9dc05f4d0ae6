"""What one guided step does, and the tensors it works on: the vocabulary of the reference, kernels and engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .table import StepTable

__all__ = ["StepBuffers", "StepSpec"]

NOISE_SOURCES = ("none", "tensor", "philox")


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

    A step without clip, gradient and keep_x0 need not predict x0 if its rows use raw_output and not x0
    (`StepTable.uses_x0`); its bits are the same.
    """

    branches: int = 1  # K, the number evaluated
    base: int | None = None  # the branch that differences are measured from; None for the weighted sum
    conditional: int = 0  # the branch whose variance channels are used
    unconditional: int | None = None  # the branch that a_u multiplies; None if no row uses it
    scaled: bool = False  # the base is weighted too: w_b m_b + sum of w_k (m_k - m_b)
    momentum: bool = False  # a tensor is added to the blend, with a weight after the branches'
    learned_variance: bool = False  # std comes from the variance channels
    predict_x0: bool = True
    raw_output: bool = False  # a_m is used
    gradient: bool = False  # p_g and a_g are used
    history: int = 0  # the number of saved tensors, 0 to 3
    saves_states: bool = False  # these are copies of states, which are as large as x and so added after it
    clip: bool = False  # x0 is clipped to a bound per sample
    rescale: bool = False  # the clipped x0 is then divided by the bound (dynamic thresholding); needs clip
    noise_source: str = "none"  # "none", "tensor" (read from a buffer) or "philox" (drawn by the step)
    keep_x0: bool = False  # x0 is written out

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
    """The tensors of a run, all on one device, contiguous (model_input also channels-last), and written in place.

    They are in the state's dtype, which is that of the table (float32, or float64 on the reference path), where none is
    given. With a source, x, x0, noise and source may be float16 or bfloat16; the step computes in the state's.
    """

    x: torch.Tensor  # the state, [B, C, ...]
    table: torch.Tensor  # [R + 1, columns], from `StepTable.on`
    counter: torch.Tensor  # int32 [2]: the row to execute next, and the ticket by which a launch knows its last program
    weights: torch.Tensor | None = None  # [R, B, K], or [R, B, K + 1] with momentum
    bound: torch.Tensor | None = None  # [B], the clip bound of each sample
    noise: torch.Tensor | None = None  # standard normals like x
    seeds: torch.Tensor | None = None  # int64 [B]
    history: torch.Tensor | None = None  # [H + 1, B, C, ...]: those saved, and one that rows without a slot may write
    gradient: torch.Tensor | None = None  # the classifier's, like x
    momentum: torch.Tensor | None = None  # what is added to the blend, like x
    x0: torch.Tensor | None = None  # like x; with dynamic thresholding also where x0 waits for its bound
    model_input: torch.Tensor | None = None  # [S*B, C, ...] in the model's dtype: c_in*x, once for every branch slot
    time: torch.Tensor | None = None  # int64 or floating [S*B], the model's time
    source: torch.Tensor | None = None  # where the state is read from, if not from x, like x
