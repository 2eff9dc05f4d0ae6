"""What a check found, and whether it is within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# fastcfg's error may be twice plain torch's, and an ulp in any case.
FACTOR, FLOOR = 2.0, 1.0


@dataclass(frozen=True)
class Error:
    """A distance from the float64 result: the largest difference and the root mean square, relative to the largest
    value of that result, and in ulps of the tensor's dtype (its spacing at that value)."""

    max: float
    rms: float
    ulp: float
    rms_ulp: float


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        check: "step" (one fused step), "noise" (what is drawn), "loop" (50 rows) or "model" (the user's own).
        backend, dtype: of fastcfg, and the model's; the state is float32.
        options: what was run.
        way: "eager" or "captured".
        shape: [B, C, ...].
        tensor: what was compared: "x", "model_input", "x0" or "history".
        bitwise, reference_ulp: whether it equals the float32 reference on the CPU bit for bit, and the distance from
            it in ulps, of a pipeline from its own scheduler's samples; None where that was not compared.
        allowed_ulp: the largest such distance allowed: 0 asks for equal bits, None for nothing.
        error, torch: from float64, and plain torch's; None where only bits are compared.
        trajectory, torch_trajectory: of loops, the largest relative error after every row, and plain torch's.
        note: a remark.
        factor: the error allowed, in errors of plain torch (2; of a pipeline 4).
        same_code: whether the reference is compared with itself: equal bits show nothing.
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
    same_code: bool = False

    @property
    def bound_ulp(self) -> float | None:
        """The largest error allowed, in ulps, at least 1; None without plain torch's to compare."""
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
        """The share of the allowed error that is used up; infinite where something is out of bounds."""
        used = 0.0 if self.error is None or self.bound_ulp is None else self.error.ulp / self.bound_ulp
        return math.inf if self.problem else used

    @property
    def name(self) -> str:
        """The case in words."""
        size = "x".join(map(str, self.shape))
        return f"{self.check} {self.backend} {self.dtype} {self.options} {self.way}, {self.tensor} at {size}"

    def against(self, got: Tensor, expected: Tensor, allowed_ulp: float | None) -> Finding:
        """This finding with the tensor's bits and distance from the reference's."""
        same, ulps = distance_in_ulps(got.cpu(), expected)
        same_code = self.backend == "reference" and got.device.type == "cpu"
        return replace(self, bitwise=same, reference_ulp=ulps, allowed_ulp=allowed_ulp, same_code=same_code)

    def along(self, states: Sequence[Tensor], truth: Sequence[Tensor], plain: Sequence[Tensor] | None) -> Finding:
        """This finding with the largest errors along a trajectory, and along plain torch's if there is one."""
        ours = [measure(got, want) for got, want in zip(states, truth, strict=True)]
        others = [measure(got, want) for got, want in zip(plain, truth, strict=True)] if plain else []
        own, plains = (tuple(error.max for error in errors) for errors in (ours, others))
        found = replace(self, error=_worst(ours), trajectory=own, torch_trajectory=plains)
        return replace(found, torch=_worst(others)) if others else found


def _worst(errors: Sequence[Error]) -> Error:
    return Error(*(max(getattr(error, field.name) for error in errors) for field in fields(Error)))


def spacing(largest: float, dtype: torch.dtype) -> float:
    """An ulp of a dtype at a value."""
    finfo = torch.finfo(dtype)
    return finfo.eps * 2.0 ** math.floor(math.log2(max(largest, finfo.tiny)))


def measure(got: Tensor, truth: Tensor) -> Error:
    """The distance of a tensor from the float64 one of its shape; infinite where it has values that are not finite."""
    truth = truth.to("cpu", torch.float64)
    largest = float(truth.abs().max())
    distance = got.to("cpu", torch.float64) - truth
    most, mean = float(distance.abs().max()), float(distance.square().mean().sqrt())
    if not math.isfinite(most):
        most = mean = math.inf
    unit, ulp = largest or 1.0, spacing(largest, got.dtype)
    return Error(most / unit, mean / unit, most / ulp, mean / ulp)


def distance_in_ulps(got: Tensor, expected: Tensor) -> tuple[bool, float]:
    """Whether two tensors have the same values, and their distance in ulps at the largest."""
    expected = expected.to(got.device)
    return torch.equal(got, expected), measure(got, expected).ulp


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
