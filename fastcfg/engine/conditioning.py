"""Conditioning of the branches: checked once, and packed along the batch before the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import listed
from ..utils.identity import Alike, Same, identity_key

__all__ = ["Alike", "Conditioning", "Same", "Shared", "check_conditioning"]


@dataclass(frozen=True, eq=False)
class Shared:
    """Marks a value, tensor or not, that is passed to the model unchanged for every branch and batch."""

    value: Any


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The keyword arguments of the model, branch by branch."""

    tensors: Mapping[str, tuple[Tensor, ...]]  # one tensor [B, ...] per branch, of equal shape and dtype
    shared: Mapping[str, Any]  # values that are not tensors, the same for all branches

    def signature(self) -> tuple[Any, ...]:
        """What a captured program depends on: names, shapes, dtypes and shared values, but not tensor contents."""
        shapes = tuple((name, values[0].shape, values[0].dtype) for name, values in sorted(self.tensors.items()))
        return shapes, tuple((name, identity_key(value)) for name, value in sorted(self.shared.items()))

    def allocate(self, branches: int) -> dict[str, Tensor]:
        """Uninitialised [n*B, ...] tensors for n branches."""
        return {
            name: values[0].new_empty((branches * len(values[0]), *values[0].shape[1:]))
            for name, values in self.tensors.items()
        }

    def copy_to(self, packed: Mapping[str, Tensor], active: tuple[int, ...]) -> None:
        """Fill tensors from `allocate` with the conditionings of the given branches."""
        for name, values in self.tensors.items():
            for part, branch in zip(packed[name].chunk(len(active)), active, strict=True):
                part.copy_(values[branch])


def check_conditioning(
    names: tuple[str, ...], given: Mapping[str, Mapping[str, Any] | None], batch: int, device: torch.device
) -> Conditioning:
    """The conditioning of the named branches in order, with [1, ...] tensors repeated to the batch, from what was given
    by branch (None counts as not given).

    Raises:
        TypeError: a conditioning that is not a mapping.
        ValueError: a branch missing or unknown, keys that differ, or shapes, dtypes or devices that do not fit.
    """
    present = {name: value for name, value in given.items() if value is not None}
    for name, value in present.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a mapping of keyword arguments of the model")
    if not present and len(names) == 1:
        return Conditioning({}, {})
    if set(present) != set(names):
        expected = f"{listed(sorted(names))} (the branches of the guidance)"
        raise ValueError(f"conditioning: got {listed(sorted(present))}, expected {expected}")

    first, *others = names
    keys = set(present[first])
    for name in others:
        if set(present[name]) != keys:
            got, expected = listed(sorted(present[name])), listed(sorted(keys))
            raise ValueError(f"{name}: got keys {got}, expected those of {first}: {expected}")
    tensors: dict[str, tuple[Tensor, ...]] = {}
    shared: dict[str, Any] = {}
    for key in present[first]:
        values = [present[name][key] for name in names]
        if isinstance(values[0], Tensor):
            tensors[key] = tuple(
                _checked(key, name, value, values[0], batch, device) for name, value in zip(names, values, strict=True)
            )
        elif isinstance(values[0], Shared):
            shared[key] = values[0].value
        else:
            for name, value in zip(names, values, strict=True):
                if identity_key(value) != identity_key(values[0]):
                    expected = f"{values[0]!r} as in {first} (values that are not tensors are shared)"
                    raise ValueError(f"{name}[{key!r}]: got {value!r}, expected {expected}")
            shared[key] = values[0]
    return Conditioning(tensors, shared)


def _checked(key: str, branch: str, value: Any, like: Tensor, batch: int, device: torch.device) -> Tensor:
    label = f"{branch}[{key!r}]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{label}: got {type(value).__name__}, expected a tensor as in the other branches")
    if value.ndim == 0 or len(value) not in (1, batch):
        raise ValueError(f"{label}: got shape {tuple(value.shape)}, expected a first dimension of {batch} (or 1)")
    if value.shape[1:] != like.shape[1:] or value.dtype != like.dtype:
        expected = f"{like.dtype} {(batch, *like.shape[1:])} as in the other branches"
        raise ValueError(f"{label}: got {value.dtype} {tuple(value.shape)}, expected {expected}")
    if value.device != device:
        raise ValueError(f"{label}: got device {value.device}, expected the model's, {device}")
    return value.detach().expand(batch, *value.shape[1:])
