"""Conditioning of the branches: keyword arguments of the model, nested as it takes them, read and compared once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import listed
from ..utils.identity import Alike, Same, identity_key

__all__ = ["Alike", "Conditioning", "Padded", "Same", "Shared", "check_conditioning"]


@dataclass(frozen=True, eq=False)
class Shared:
    """Marks a value, tensor or not, that is passed to the model unchanged, whatever the batch. Branches whose values
    differ (tensors: that are not the same object) are run one after the other.

    Attributes:
        value: anything.
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Padded:
    """Marks a sequence whose length may differ from branch to branch, for a model that takes a mask: the branches run
    in one forward, the shorter ones padded with zeros at the end.

    Attributes:
        tensor: [B, L, ...] or [1, L, ...].
        mask: the keyword under which the model gets a bool [K*B, L], False at padding, beside the sequence; None where
            the conditioning has a mask of its own, itself marked as padded.

    Example:
        >>> text = {"text": Padded(torch.ones(2, 7, 16), mask="text_mask")}
    """

    tensor: Tensor
    mask: str | None = None


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of a branch's arguments: [B, ...], or without batch where `number` is not None. Branches share a forward
    only where tensors without batch are the same objects, which the number says."""

    name: str
    tensor: Tensor
    padded: bool = False
    number: int | None = None

    def layout(self, lengths: bool) -> Any:
        """Shape and dtype, hashable; without the length of a padded sequence unless that is wanted."""
        shape = list(self.tensor.shape)
        if self.padded and not lengths:
            shape[1] = -1
        return self.padded, self.number, tuple(shape), self.tensor.dtype


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: that of a leaf, or the mask of a padded one."""

    leaf: int
    is_mask: bool = False


@dataclass(frozen=True, eq=False)
class Value:
    """A value without tensors, which is passed as it is; `is_shared` where it was marked."""

    value: Any
    is_shared: bool


@dataclass(frozen=True, eq=False)
class Node:
    """A dict, list or tuple with tensors below it: its items in an order that all branches share, and the names in the
    order in which they were given."""

    kind: type
    items: dict[Any, Any]
    given: tuple[Any, ...]

    def key(self) -> Any:
        """Equal for nodes with the same structure and values."""
        return self.kind, self.given, tuple((name, _key(item)) for name, item in self.items.items())

    def build(self, tensors: Mapping[Place, Tensor]) -> Any:
        """The container with tensors in their places."""
        built = {name: _built(item, tensors) for name, item in self.items.items()}
        return contained(self.kind, {name: built[name] for name in self.given})

    def values(self) -> Iterator[tuple[str, Value]]:
        """The values without tensors, by name."""
        for name, item in self.items.items():
            if isinstance(item, Node):
                yield from ((f"{name}.{below}", value) for below, value in item.values())
            elif isinstance(item, Value):
                yield str(name), item


@dataclass(frozen=True, eq=False)
class Arguments:
    """The model's keyword arguments for one branch."""

    tree: Node
    leaves: tuple[Leaf, ...]

    def layout(self, lengths: bool) -> Any:
        """Equal for branches that can share a forward (without lengths), or a captured program (with them)."""
        return self.tree.key(), tuple(leaf.layout(lengths) for leaf in self.leaves)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The arguments of every branch, of equal structure; none where the model takes no conditioning."""

    branches: tuple[Arguments, ...] = ()

    def signature(self) -> Any:
        """What a captured program depends on: structure, shapes, dtypes and values, but not tensor contents."""
        return tuple(branch.layout(lengths=True) for branch in self.branches)

    def values(self) -> dict[str, Any]:
        """The values that are passed as they are, by name."""
        return {name: found.value for branch in self.branches for name, found in branch.tree.values()}


def check_conditioning(
    names: tuple[str, ...], given: Mapping[str, Mapping[str, Any] | None], batch: int, device: torch.device
) -> Conditioning:
    """The conditioning of the named branches in order, with [1, ...] tensors repeated to the batch, from what was given
    by branch (None counts as not given).

    Raises:
        TypeError: a conditioning that is not a mapping.
        ValueError: a branch missing or unknown, keys or values that differ, or tensors that do not fit.
    """
    present = {name: value for name, value in given.items() if value is not None}
    for name, value in present.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a mapping of keyword arguments of the model")
    if not present and len(names) == 1:
        return Conditioning()
    if set(present) != set(names):
        expected = f"{listed(sorted(names))} (the branches of the guidance)"
        raise ValueError(f"conditioning: got {listed(sorted(present))}, expected {expected}")
    first, *others = (_Reader(name, batch, device).arguments(present[name]) for name in names)
    for name, arguments in zip(names[1:], others, strict=True):
        _check_alike(arguments.tree, first.tree, name, names[0], (arguments.leaves, first.leaves))
    numbers: dict[int, int] = {}
    branches = []
    for arguments in (first, *others):
        leaves = [
            leaf if leaf.number is None else replace(leaf, number=numbers.setdefault(leaf.number, len(numbers)))
            for leaf in arguments.leaves
        ]
        branches.append(replace(arguments, leaves=tuple(leaves)))
    return Conditioning(tuple(branches))


class _Reader:
    """Reads one branch's arguments."""

    def __init__(self, branch: str, batch: int, device: torch.device) -> None:
        self._branch, self._batch, self._device = branch, batch, device
        self._leaves: list[Leaf] = []

    def arguments(self, given: Mapping[str, Any]) -> Arguments:
        tree = self._node(dict, given, self._branch)
        # Keyword arguments have no order.
        return Arguments(replace(tree, given=tuple(tree.items)), tuple(self._leaves))

    def _node(self, kind: type, given: Any, name: str) -> Node:
        # Branches may name their keys in any order.
        named = isinstance(given, Mapping)
        items = dict(sorted(given.items(), key=lambda item: str(item[0])) if named else enumerate(given))
        order = list(given) if named else list(items)
        read = {key: self._read(item, f"{name}[{key!r}]") for key, item in items.items()}
        for key, item in items.items():
            if isinstance(item, Padded) and item.mask is not None:
                if kind is not dict or item.mask in items:
                    expected = "a name that nothing beside it has, in a dict"
                    raise ValueError(f"{name}[{key!r}]: got mask={item.mask!r}, expected {expected}")
                read[item.mask] = replace(read[key], is_mask=True)
                order.append(item.mask)
        return Node(kind, read, tuple(order))

    def _read(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor | Padded):
            self._leaves.append(self._leaf(value, name))
            return Place(len(self._leaves) - 1)
        if isinstance(value, Shared):
            return Value(value.value, is_shared=True)
        if _has_tensors(value):
            return self._node(type(value), value, name)
        return Value(value, is_shared=False)

    def _leaf(self, given: Tensor | Padded, name: str) -> Leaf:
        padded = isinstance(given, Padded)
        tensor = given.tensor if isinstance(given, Padded) else given
        if not isinstance(tensor, Tensor) or (padded and tensor.ndim < 2):
            got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: got {got} as padded, expected a tensor [B, L, ...]")
        if tensor.device != self._device:
            raise ValueError(f"{name}: got device {tensor.device}, expected the model's, {self._device}")
        if tensor.ndim == 0:
            return Leaf(name, tensor.detach(), number=id(tensor))
        if len(tensor) not in (1, self._batch):
            expected = f"a first dimension of {self._batch} (or 1), or Shared(...) for a value without batch"
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
        return Leaf(name, tensor.detach().expand(self._batch, *tensor.shape[1:]), padded)


def _check_alike(
    item: Any, like: Any, name: str, first: str, leaves: tuple[tuple[Leaf, ...], tuple[Leaf, ...]]
) -> None:
    """Raise ValueError unless a branch's item, called `name`, has the structure of the first branch's."""
    if isinstance(item, Node) and isinstance(like, Node):
        if item.kind is not like.kind:
            raise ValueError(f"{name}: got a {item.kind.__name__}, expected a {like.kind.__name__} as in {first}")
        if set(item.items) != set(like.items):
            got, expected = (listed(sorted(map(str, node.items))) for node in (item, like))
            raise ValueError(f"{name}: got keys {got}, expected those of {first}: {expected}")
        for key, below in item.items.items():
            _check_alike(below, like.items[key], f"{name}[{key!r}]", first, leaves)
    elif isinstance(item, Value) and isinstance(like, Value):
        if not item.is_shared and not like.is_shared and identity_key(item.value) != identity_key(like.value):
            expected = f"{like.value!r} as in {first} (or Shared(...), for a value of its own)"
            raise ValueError(f"{name}: got {item.value!r}, expected {expected}")
    elif isinstance(item, Place) and isinstance(like, Place):
        a, b = leaves[0][item.leaf], leaves[1][like.leaf]
        if a.tensor.ndim != b.tensor.ndim or a.tensor.dtype != b.tensor.dtype or a.padded is not b.padded:
            odd, even = (b, a) if b.number is not None else (a, b)
            what = f"{even.tensor.dtype} {tuple(even.tensor.shape)} or other sizes, as in another branch"
            got = f"{odd.tensor.dtype} {tuple(odd.tensor.shape)}" if odd.tensor.ndim else "shape ()"
            raise ValueError(f"{odd.name}: got {got}{' as padded' * odd.padded}, expected {what}")
    else:
        got = "a tensor" if isinstance(item, Place) else item.kind.__name__ if isinstance(item, Node) else ""
        got = got or type(item.value).__name__
        kind = "a tensor" if isinstance(like, Place) else "no tensor" if isinstance(like, Value) else "a container"
        raise ValueError(f"{name}: got {got}, expected {kind} as in the other branches")


def _has_tensors(value: Any) -> bool:
    """Whether a container has tensors, or what is marked, somewhere below it."""
    return any(isinstance(item, Tensor | Padded | Shared) or _has_tensors(item) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    """What is in a container that can be built again (`contained`)."""
    kind = type(value)
    if kind in (dict, OrderedDict) or (isinstance(value, OrderedDict) and is_dataclass(value)):
        found: Iterable[Any] = value.values()
        return found
    return value if kind in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")) else ()


def contained(kind: Any, items: dict[Any, Any]) -> Any:
    """A container of a kind with other items, by name or index: dicts and ordered ones, the outputs of networks that
    transformers and diffusers define, lists, tuples and named tuples."""
    if kind is dict:
        return items
    if issubclass(kind, OrderedDict):
        return kind(items) if kind is OrderedDict else kind(**items)
    return kind(*items.values()) if hasattr(kind, "_fields") else kind(items.values())


def _key(item: Any) -> Any:
    if isinstance(item, Node):
        return item.key()
    return ("value", identity_key(item.value)) if isinstance(item, Value) else item


def _built(item: Any, tensors: Mapping[Place, Tensor]) -> Any:
    if isinstance(item, Node):
        return item.build(tensors)
    return item.value if isinstance(item, Value) else tensors[item]
