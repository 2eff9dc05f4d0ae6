"""What a check found, and when that is within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What fastcfg may lose, in what plain torch loses; at least one ulp.
FACTOR, FLOOR = 2.0, 1.0


@dataclass(frozen=True)
class Error:
    """A distance from the float64 result.

    Attributes:
        max: the largest, relative to the largest value of the float64 result.
        rms: the root of the mean square, likewise.
        ulp: the largest in ulps of the tensor's dtype: its spacing at that value.
        rms_ulp: the root of the mean square, likewise.
    """

    max: float
    rms: float
    ulp: float
    rms_ulp: float


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        check: "step", "noise", "loop" or "model".
        backend: of fastcfg.
        dtype: the model's.
        options: what was run.
        way: "eager" or "captured".
        shape: [B, C, ...].
        tensor: what was compared: "x", "model_input", "x0" or "history".
        bitwise: whether it is the float32 reference's bit for bit; None where nothing has its bits to show.
        reference_ulp: the distance from that reference in ulps; None likewise.
        allowed_ulp: the distance that is allowed; 0 asks for equal bits, None for nothing.
        error: from float64; None where only bits are compared.
        torch: the same of plain torch.
        trajectory: of loops, the largest relative error after every row.
        torch_trajectory: the same of plain torch.
        note: what else is to be said.
        factor: what may be lost, in what plain torch loses.
    """

    check: str
    backend: str
    dtype: str
    options: str
    way: str
    shape: tuple[int, ...]
    tensor: str
    bitwise: bool | None = None
    reference_ulp: float | None = None
    allowed_ulp: float | None = None
    error: Error | None = None
    torch: Error | None = None
    trajectory: tuple[float, ...] = ()
    torch_trajectory: tuple[float, ...] = ()
    note: str = ""
    factor: float = FACTOR

    @property
    def bound_ulp(self) -> float | None:
        """The largest error allowed, in ulps; None without plain torch's to compare."""
        return None if self.torch is None else max(self.factor * self.torch.ulp, FLOOR)

    @property
    def problem(self) -> str:
        """What is out of bounds; empty if nothing is."""
        problems = []
        if self.allowed_ulp == 0 and not self.bitwise:
            problems.append(f"not bit for bit the reference: {self.reference_ulp:.3g} ulp from it")
        elif self.allowed_ulp and not (self.reference_ulp or 0.0) <= self.allowed_ulp:
            problems.append(f"{self.reference_ulp:.3g} ulp from the reference, more than {self.allowed_ulp:g}")
        if self.error is not None and self.bound_ulp is not None and not self.error.ulp <= self.bound_ulp:
            problems.append(f"{self.error.ulp:.3g} ulp from float64, more than {self.bound_ulp:.3g}")
        return "; ".join(problems)

    @property
    def load(self) -> float:
        """The share of what is allowed that is used up; above 1 where something is out of bounds."""
        used = 0.0 if self.error is None or self.bound_ulp is None else self.error.ulp / self.bound_ulp
        return math.inf if self.problem else used

    @property
    def name(self) -> str:
        """The case in words."""
        size = "x".join(map(str, self.shape))
        return f"{self.check} {self.backend} {self.dtype} {self.options} {self.way}, {self.tensor} at {size}"


def spacing(largest: float, dtype: torch.dtype) -> float:
    """An ulp of a dtype at a value."""
    finfo = torch.finfo(dtype)
    return finfo.eps * 2.0 ** math.floor(math.log2(max(largest, finfo.tiny)))


def measure(got: Tensor, truth: Tensor) -> Error:
    """The distance of a tensor from the float64 one of its shape; infinite where it holds no numbers."""
    truth = truth.to("cpu", torch.float64)
    largest = float(truth.abs().max())
    distance = got.to("cpu", torch.float64) - truth
    most, mean = float(distance.abs().max()), float(distance.square().mean().sqrt())
    if not math.isfinite(most):
        most = mean = math.inf
    unit, ulp = largest or 1.0, spacing(largest, got.dtype)
    return Error(most / unit, mean / unit, most / ulp, mean / ulp)


def distance_in_ulps(got: Tensor, expected: Tensor) -> tuple[bool, float]:
    """Whether two tensors have the same values, and how far they are apart in ulps at the largest."""
    expected = expected.to(got.device)
    return torch.equal(got, expected), measure(got, expected).ulp
