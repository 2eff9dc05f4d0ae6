"""Which model and which conditioning every row of a run takes, and what a caller changes of them in mid-run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..table import StepTable
from ..utils.identity import identity_key
from .by_row import ByRow
from .conditioning import Conditioning, Padded, Shared, contained

# (index of a model, the given conditionings of a row) -> the classifier's and the model's conditioning.
Reader = Callable[[int, dict[str, Any]], tuple[Conditioning, Conditioning]]


class RowKind(NamedTuple):
    """What a program is made for: the branches that it evaluates, the model, and the layout of its conditioning."""

    active: tuple[int, ...]
    model: int = 0
    layout: int = 0


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The models and conditionings of a run.

    Attributes:
        conditionings: those that occur, cond_fn's before each of the model's.
        of_row: which of them each row has.
        layouts: of each conditioning, the index of its signature among those that occur.
        models: the index of each row's model.
        classified: the branch that cond_fn takes, None without one.
    """

    conditionings: tuple[tuple[Conditioning, Conditioning], ...]
    of_row: tuple[int, ...]
    layouts: tuple[int, ...]
    models: tuple[int, ...]
    classified: int | None

    def signature(self) -> Any:
        """What captured programs depend on."""
        first = {layout: model.signature() for layout, (_, model) in zip(self.layouts, self.conditionings, strict=True)}
        return tuple(first.values()), self.classifier_layouts()

    def layout_of_rows(self) -> list[int]:
        """The layout of each row's conditioning."""
        return [self.layouts[place] for place in self.of_row]

    def classifier_layouts(self) -> Any:
        """The layouts of what cond_fn takes."""
        if self.classified is None:
            return ()
        taken = [classifier.branches[self.classified :][:1] for classifier, _ in self.conditionings]
        return frozenset(tuple(branch.layout(lengths=True) for branch in branches) for branches in taken)

    def kind(self, row: int, active: tuple[int, ...]) -> RowKind:
        """A row's kind, with some branches."""
        return RowKind(active, self.models[row], self.layouts[self.of_row[row]])

    def of_layout(self, layout: int) -> Conditioning:
        """The first conditioning with a layout."""
        return self.conditionings[self.layouts.index(layout)][1]

    def values(self) -> dict[str, Any]:
        """The values that are passed as they are, by name."""
        return {name: value for pair in self.conditionings for one in pair for name, value in one.values().items()}


def plan_rows(
    model: Any, given: Mapping[str, Any], table: StepTable, read: Reader, by_model: bool, classified: int | None
) -> RowPlan:
    """The plan for a model, or a `ByRow` of models, and conditionings by branch with `ByRow`s anywhere in them.

    Args:
        read: reads the conditionings of a row.
        by_model: whether conditionings depend on the model, which computes a part of them beforehand.
        classified: as the attribute.

    Raises:
        ValueError: as `ByRow.indices` and `read`, or conditionings of cond_fn that differ in layout.
    """
    models = model.indices(table) if isinstance(model, ByRow) else (0,) * table.num_rows
    turns = {id(part): part.indices(table) for part in _parts(given)}
    places: dict[Any, int] = {}
    found: list[tuple[Conditioning, Conditioning]] = []
    of_row: list[int] = []
    for row, number in enumerate(models):
        chosen = {name: indices[row] for name, indices in turns.items()}
        key = (number if by_model else 0, *chosen.values())
        if key not in places:
            places[key] = len(found)
            found.append(read(number, {name: _chosen(value, chosen) for name, value in given.items()}))
        of_row.append(places[key])
    signatures: dict[Any, int] = {}
    layouts = tuple(signatures.setdefault(conditioning.signature(), len(signatures)) for _, conditioning in found)
    plan = RowPlan(tuple(found), tuple(of_row), layouts, models, classified)
    if len(plan.classifier_layouts()) > 1:
        expected = "the same in all: cond_fn takes them too"
        raise ValueError(f"cond: got other shapes or values in some rows, expected {expected}")
    return plan


def _parts(given: Any) -> Iterator[ByRow]:
    """The `ByRow`s in some conditionings, at any depth."""
    if isinstance(given, ByRow):
        yield given
        for value in given.values:
            yield from _parts(value)
    elif isinstance(given, Mapping | list | tuple):
        for value in given.values() if isinstance(given, Mapping) else given:
            yield from _parts(value)


def _chosen(given: Any, chosen: Mapping[int, int]) -> Any:
    """The same with every `ByRow` replaced by a row's value."""
    if isinstance(given, ByRow):
        return _chosen(given.values[chosen[id(given)]], chosen)
    if not any(True for _ in _parts(given)):
        return given
    named = isinstance(given, Mapping)
    items = {name: _chosen(value, chosen) for name, value in (given.items() if named else enumerate(given))}
    kind = dict if named and not isinstance(given, OrderedDict) else type(given)
    return contained(kind, items)


class Watch:
    """Notices that conditionings which a caller gave have changed: tensors in place, or items that were replaced. What
    is written to a tensor's memory past torch is not noticed. Tensors of inference mode do not count what is written to
    them, and always count as changed."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self._kept, self._marks = self._look()

    def changed(self) -> bool:
        """Whether anything has changed since the last time."""
        kept, marks = self._look()
        if marks == self._marks:
            return False
        self._kept, self._marks = kept, marks
        return True

    def _look(self) -> tuple[list[Any], list[Any]]:
        kept: list[Any] = []  # alive, so that no other object gets its id
        marks: list[Any] = []
        waiting: list[Any] = [self._given]
        while waiting:
            value = waiting.pop()
            if isinstance(value, Tensor):
                kept.append(value)
                marks.append(object() if value.is_inference() else (id(value), value._version))
            elif isinstance(value, Mapping):
                marks.append(tuple(value))
                waiting += value.values()
            elif isinstance(value, list | tuple):
                marks.append(len(value))
                waiting += value
            elif isinstance(value, ByRow):
                kept.append(value)
                marks.append(id(value))
                waiting += value.values
            elif isinstance(value, Padded | Shared):
                waiting.append(value.tensor if isinstance(value, Padded) else value.value)
            else:
                marks.append(identity_key(value))
        return kept, marks


class Turns:
    """Puts each row's conditioning into the static memory before the row, where it is not there yet.

    Args:
        plan: the run's.
        packed: the static memory of every set of branches and layout.
        classifier: that of cond_fn.
        again: reads what the caller gave again; None where the caller sees no row before the end.
        watch: what the caller gave.

    Attributes:
        copies: the rows before which a conditioning was copied.
    """

    def __init__(
        self,
        plan: RowPlan,
        packed: Mapping[tuple[tuple[int, ...], int], Any],
        classifier: Any | None,
        again: Callable[[], RowPlan] | None,
        watch: Watch | None,
    ) -> None:
        self._plan, self._packed, self._classifier = plan, packed, classifier
        self._again, self._watch = again, watch
        self._began = False
        self.copies: list[int] = []

    @torch.no_grad()
    def enter(self, row: int) -> None:
        """Make a row, and those that its program runs with it, ready."""
        if self._began and self._watch is not None and self._again is not None and self._watch.changed():
            plan = self._again()
            if plan.signature() != self._plan.signature() or plan.layout_of_rows() != self._plan.layout_of_rows():
                expected = "other contents of tensors alone"
                raise ValueError(f"cond: got other shapes, dtypes or values before row {row}, expected {expected}")
            self._plan = plan
        place = self._plan.of_row[row]
        layout = self._plan.layouts[place]
        classifier, conditioning = self._plan.conditionings[place]
        loaded = [packed.enter(conditioning) for (_, found), packed in self._packed.items() if found == layout]
        if self._classifier is not None:
            loaded.append(self._classifier.enter(classifier))
        if any(loaded) and self._began:
            self.copies.append(row)
        self._began = True
