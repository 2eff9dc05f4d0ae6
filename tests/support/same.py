"""Whether two structures of tensors and other values are the same: everything exactly, floating-point numbers to
rounding."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

Leaf = Any
Leaves = dict[str, Leaf]

# Of the largest value.
FLOAT32 = 2e-6
TINY = 1e-37  # below float32's normal numbers: as good as 0


def leaves_of(value: Any, path: str) -> Leaves:
    """The tensors and other values of a structure by their place in it."""
    found: Leaves = {}
    _walk(value, path, found, set())
    return found


def _walk(value: Any, path: str, found: Leaves, within: set[int]) -> None:
    if isinstance(value, Tensor):
        found[path] = value
    elif isinstance(value, np.ndarray):
        found[path] = (str(value.dtype), value.shape, repr(value.tolist()))
    elif value is None or isinstance(
        value, bool | int | float | str | complex | np.generic | torch.dtype | torch.device
    ):
        found[path] = (type(value).__name__, repr(value))
    elif id(value) in within:
        found[path] = "again"
    elif isinstance(value, dict):
        found[path] = (type(value).__name__, list(value))
        for name, one in value.items():
            _walk(one, f"{path}.{name}", found, within | {id(value)})
        # diffusers' configs have their items as attributes too, and those are what a scheduler reads.
        if type(value).__name__ == "FrozenDict":
            _walk(dict(vars(value)), f"{path}'s attributes", found, within | {id(value)})
    elif isinstance(value, list | tuple):
        found[path] = (type(value).__name__, len(value))
        for i, one in enumerate(value):
            _walk(one, f"{path}[{i}]", found, within | {id(value)})
    elif isinstance(value, type | types.FunctionType | types.MethodType):
        found[path] = getattr(value, "__qualname__", repr(value))
    else:
        found[path] = type(value).__name__
        if hasattr(value, "config") and hasattr(value, "__dict__"):
            state = {name: one for name, one in vars(value).items() if not name.startswith("_fastcfg")}
            _walk(state, path, found, within | {id(value)})


def differences(want: Leaves, got: Leaves, truth: Leaves | None = None, floor: float = 0.0) -> list[str]:
    """What differs, in words; `truth` has the tensors of the same computation in float64.

    Without it, tensors may differ by 2e-6 of the largest value, or of `floor` if that is larger; half precisions' by
    their spacing. With it they may besides be as far from it as twice the distance of those wanted.
    """
    found = []
    for path in want.keys() | got.keys():
        if path not in got:
            found.append(f"{path}: missing, expected {_short(want[path])}")
        elif path not in want:
            found.append(f"{path}: got {_short(got[path])}, expected none such")
        elif said := _difference(want[path], got[path], None if truth is None else truth.get(path), floor):
            found.append(f"{path}: {said}")
    return sorted(found)


def make_equal(want: Leaves, got: Leaves) -> None:
    """Write the wanted tensors' bits into the others, in a way that their versions do not count."""
    with torch.inference_mode():
        for path, theirs in want.items():
            ours = got[path]
            if isinstance(theirs, Tensor) and theirs.is_floating_point() and not _expanded(ours):
                ours.data.copy_(theirs)


def _expanded(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def _short(value: Leaf) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {tuple(value.shape)}"
    return str(value)[:100]


def _layout(tensor: Tensor) -> dict[str, Any]:
    return {
        "type": type(tensor).__name__,
        "dtype": tensor.dtype,
        "device": str(tensor.device),
        "shape": tuple(tensor.shape),
        "requires_grad": tensor.requires_grad,
        "is_inference": tensor.is_inference(),
        "strides": [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1],
    }


def _difference(want: Leaf, got: Leaf, truth: Leaf | None, floor: float) -> str:
    if not (isinstance(want, Tensor) and isinstance(got, Tensor)):
        same = not isinstance(want, Tensor) and not isinstance(got, Tensor) and want == got
        return "" if same else f"got {_short(got)}, expected {_short(want)}"
    theirs, ours = _layout(want), _layout(got)
    for name, a in theirs.items():
        if ours[name] != a:
            return f"got {name} {ours[name]}, expected {a}"
    with torch.no_grad():
        return _numbers(want.detach(), got.detach(), truth, floor)


def _numbers(want: Tensor, got: Tensor, truth: Leaf | None, floor: float) -> str:
    if torch.equal(want, got):
        return ""
    if not want.is_floating_point():
        return "got other integers"
    a, b = want.double(), got.double()
    if isinstance(truth, Tensor) and truth.shape == want.shape:
        # Where the original overflows in half precision inside its step, the true number will do as well, and so will
        # another value that is not finite.
        exact = truth.detach().double()
        a = torch.where(~a.isfinite() & exact.isfinite(), torch.where(b.isfinite(), exact, b), a)
        # One sum of infinite inputs may be infinite where the original subtracts two infinities.
        a = torch.where(a.isnan() & b.isinf(), b, a)
        if want.dtype == torch.float16:  # the last numbers before infinity
            a = torch.where(exact.abs() > 0.9 * torch.finfo(torch.float16).max, b, a)
    finite = a.isfinite()
    if not torch.equal(_kinds(a), _kinds(b)):
        return "got other values that are not finite"
    if not finite.any():
        return ""
    size, apart = max(floor, _largest(a, finite)), _largest(a - b, finite)
    spacing = torch.finfo(want.dtype).eps if want.dtype in (torch.float16, torch.bfloat16) else FLOAT32
    if apart <= spacing * size + TINY:
        return ""
    said = f"off by {apart:.3g} of {size:.3g}"
    if isinstance(truth, Tensor) and truth.shape == want.shape:
        exact = truth.detach().double()
        theirs, ours = _largest(a - exact, finite), _largest(b - exact, finite)
        if ours <= 2 * theirs + spacing / 2 * size or apart <= spacing * size + 2 * theirs:
            return ""
        said += f" (from float64: {ours:.3g}, the original {theirs:.3g})"
    return said


def _kinds(value: Tensor) -> Tensor:
    """0 for numbers, 1 and 2 for the infinities, 3 for NaN."""
    return torch.where(value.isfinite(), 0.0, value).nan_to_num(3.0, 1.0, 2.0)


def largest(tensor: Tensor) -> float:
    """The largest of a tensor's finite values, 0 if it has none."""
    wide = tensor.detach().double()
    return _largest(wide, wide.isfinite()) if wide.numel() else 0.0


def _largest(value: Tensor, where: Tensor) -> float:
    return float(torch.where(where, value, 0.0).abs().nan_to_num(torch.inf).max())
