"""The registry of checks, and how they fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Details = dict[str, Any]
Function = Callable[[torch.device], Details]

CHECKS: dict[str, Check] = {}


class NotHereError(Exception):
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """A claim about the captured loop.

    Attributes:
        name: as `--only` takes it.
        claim: what it shows, in a line.
        function: takes the device and returns plain JSON; raises AssertionError where the claim does not hold.
        needs_cuda: whether a CPU's stand-in for graphs cannot show it.
    """

    name: str
    claim: str
    function: Function
    needs_cuda: bool

    def __call__(self, device: torch.device) -> Details:
        """Make the check.

        Args:
            device: where to.

        Returns:
            What was seen, as plain JSON.

        Raises:
            AssertionError: the claim does not hold, with the numbers.
            NotHereError: it cannot be made here.
        """
        if self.needs_cuda and device.type != "cuda":
            raise NotHereError("needs a CUDA device")
        return self.function(device)


def check(*, needs_cuda: bool = False) -> Callable[[Function], Function]:
    """Register a function as a check, by its name and the first line of its docstring."""

    def register(function: Function) -> Function:
        name = function.__name__.replace("_", "-")
        claim = " ".join((function.__doc__ or "").split()).partition(". ")[0].rstrip(".")
        CHECKS[name] = Check(name, claim, function, needs_cuda)
        return function

    return register


def require(holds: bool, message: str) -> None:
    """Raise AssertionError with a message unless something holds, under `python -O` as well."""
    if not holds:
        raise AssertionError(message)


def require_same(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError, with the numbers, unless two tensors are equal bit for bit and finite."""
    require(got.shape == want.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}")
    bad = int((~torch.isfinite(want)).sum())
    require(bad == 0, f"{what}: {bad} of {want.numel()} values are not finite")
    if not torch.equal(got, want):
        differing = got != want
        distance = (got - want).abs().nan_to_num(nan=float("inf")).max().item()
        raise AssertionError(f"{what}: {int(differing.sum())} of {want.numel()} differ, by up to {distance:.3g}")
