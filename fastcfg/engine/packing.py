"""Static tensors for the conditioning of some branches: neighbours with equal layouts lie together in one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conditioning import Arguments, Conditioning, Leaf, Place


class Packed:
    """What the model is given for some branches, in memory that stays.

    Args:
        conditioning: of a call, which is loaded.
        branches: the branches, ascending.

    Attributes:
        ends: where each forward ends, as a number of branches.
        note: why there are several forwards, or what is padded; empty for one forward of equal branches.
    """

    def __init__(self, conditioning: Conditioning, branches: tuple[int, ...]) -> None:
        self._branches = branches
        self._groups = _groups(conditioning, branches)
        self.ends = [group.start + len(group.branches) for group in self._groups] or [len(branches)]
        arguments = [conditioning.branches[k] for k in branches] if conditioning.branches else []
        self.note = _note(arguments, len(self.ends))
        self._loaded: Conditioning | None = None
        self.load(conditioning)

    def load(self, conditioning: Conditioning) -> None:
        """Copy a conditioning with the same signature."""
        for group in self._groups:
            group.load([conditioning.branches[k] for k in group.branches])
        self._loaded = conditioning

    def enter(self, conditioning: Conditioning) -> bool:
        """Copy a conditioning unless it is what was copied last; whether it was copied."""
        if conditioning is self._loaded:
            return False
        self.load(conditioning)
        return True

    def structure(self) -> Any:
        """Equal as long as the values that are passed as they are stay what they are: a caller may change a list."""
        return tuple(group.tree.key() for group in self._groups)

    def keywords(self, start: int, end: int) -> dict[str, Any]:
        """The model's keyword arguments for the branches from `start` on and before `end`, of one forward."""
        group = next(
            (group for group in self._groups if group.start <= start < group.start + len(group.branches)), None
        )
        return {} if group is None else group.keywords(start, end)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for group in self._groups for tensor in group.tensors()]


class _Group:
    """The branches of one forward; `start` is the place of the first among all."""

    def __init__(self, start: int, branches: list[int], arguments: list[Arguments]) -> None:
        self.start, self.branches = start, branches
        self.tree, self._leaves = arguments[0].tree, arguments[0].leaves
        self._packed: dict[Place, Tensor] = {}
        for index, leaf in enumerate(self._leaves):
            self._packed[Place(index)] = _empty([branch.leaves[index] for branch in arguments])
            if leaf.padded:
                size = self._packed[Place(index)].shape[:2]
                mask = torch.empty(size, dtype=torch.bool, device=leaf.tensor.device)
                self._packed[Place(index, is_mask=True)] = mask

    def load(self, arguments: list[Arguments]) -> None:
        for index, first in enumerate(self._leaves):
            leaves, packed = [branch.leaves[index] for branch in arguments], self._packed[Place(index)]
            if first.number is not None:
                packed.copy_(leaves[0].tensor)
                continue
            for part, leaf in zip(packed.chunk(len(leaves)), leaves, strict=True):
                if leaf.padded:
                    part[:, leaf.tensor.shape[1] :].zero_()
                    part = part[:, : leaf.tensor.shape[1]]
                part.copy_(leaf.tensor)
            if first.padded:
                for part, leaf in zip(self._packed[Place(index, True)].chunk(len(leaves)), leaves, strict=True):
                    part.zero_()
                    part[:, : leaf.tensor.shape[1]] = True

    def keywords(self, start: int, end: int) -> dict[str, Any]:
        built = {}
        for place, tensor in self._packed.items():
            if (leaf := self._leaves[place.leaf]).number is None:
                batch = len(leaf.tensor)
                tensor = tensor[(start - self.start) * batch : (end - self.start) * batch]
            built[place] = tensor
        result: dict[str, Any] = self.tree.build(built)
        return result

    def tensors(self) -> list[Tensor]:
        return list(self._packed.values())


def _groups(conditioning: Conditioning, branches: tuple[int, ...]) -> list[_Group]:
    """Neighbours with equal layouts."""
    if not conditioning.branches:
        return []
    layouts = [conditioning.branches[k].layout(lengths=False) for k in branches]
    starts = [i for i in range(len(branches)) if i == 0 or layouts[i] != layouts[i - 1]]
    groups = []
    for start, end in zip(starts, [*starts[1:], len(branches)], strict=True):
        members = list(branches[start:end])
        groups.append(_Group(start, members, [conditioning.branches[k] for k in members]))
    return groups


def _empty(leaves: list[Leaf]) -> Tensor:
    """Memory for a leaf of every branch: [n*B, ...], or for a value without batch one like it."""
    first = leaves[0].tensor
    if leaves[0].number is not None:
        return torch.empty_like(first)
    shape = [len(leaves) * len(first), *first.shape[1:]]
    if leaves[0].padded:
        shape[1] = max(leaf.tensor.shape[1] for leaf in leaves)
    return first.new_empty(shape)


def _note(arguments: list[Arguments], forwards: int) -> str:
    """What keeps the branches from one plain forward, in a line."""
    differing = {}
    for alike in zip(*(branch.leaves for branch in arguments), strict=True):
        if len({leaf.layout(lengths=True) for leaf in alike}) > 1:
            sizes = [str(list(leaf.tensor.shape)) for leaf in alike]
            what = "objects without batch that differ" if alike[0].number is not None else " and ".join(sizes)
            differing[alike[0].name.partition("[")[2].replace("'", "").replace("][", ".").rstrip("]")] = what
    if not differing and forwards == 1:
        return ""
    said = "; ".join(f"{name} has {what}" for name, what in differing.items()) or "values differ between branches"
    return f"{said}: padded" if forwards == 1 else f"{said}: {forwards} forwards"
