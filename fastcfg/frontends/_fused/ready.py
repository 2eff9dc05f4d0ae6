"""A traced step made ready to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...compiler.step import MISSING, Constant, Container, Part, Small, TracedStep, Write
from ...ops.combine import Combine
from ...utils.lru import LRU
from .program import program_of

_FORMS = 256  # kept for a class


class ReadyStep:
    """A traced step, made ready for tensors like a sample: what it has in common with others, and its numbers."""

    __slots__ = ("combine", "constants", "following", "form", "run")

    def __init__(self, form: StepForm, constants: tuple[Any, ...], combine: Combine | None) -> None:
        self.form, self.constants, self.combine = form, constants, combine
        self.run = form.program  # called with this, and as the step
        self.following: Any = None  # of `steps`: what came after it

    def is_current(self) -> bool:
        """Whether the class and the modules still have what the step read of them."""
        return all(getattr(owner, name, MISSING) is value for owner, name, value in self.form.others)


class StepForm:
    """What steps that differ in nothing but numbers have in common."""

    def __init__(self, traced: TracedStep, result: Part, writes: tuple[Write, ...], kind: Any) -> None:
        # A class or a module may be given other functions.
        modules = {(draw.module, draw.name): draw.function for draw in traced.draws}
        self.others = [(kind, name, value) for name, value in traced.of_class.items()]
        self.others += [(module, name, function) for (module, name), function in modules.items()]
        self.draws, self.sources, self.dtypes = traced.draws, traced.sources, traced.dtypes
        self.program = program_of(self.draws, self.sources, self.dtypes, traced.orders, result, writes)


class StepForms:
    """The forms of a class's steps."""

    def __init__(self) -> None:
        self._known: LRU[StepForm] = LRU(_FORMS)

    def ready(self, traced: TracedStep, kind: Any, output: Tensor, sample: Tensor) -> ReadyStep:
        """A traced step made ready for tensors like these."""
        constants: list[Any] = []
        result = _bare(traced.result, constants)
        writes = tuple(write._replace(part=_bare(write.part, constants)) for write in traced.writes)
        # A form keeps these values, whose ids are theirs as long as it is known.
        of_class = frozenset((name, id(value)) for name, value in traced.of_class.items())
        kinds = _kinds(result), tuple(_kinds(write.part) for write in writes)
        key = (kinds, result, writes, traced.sources, traced.dtypes, traced.orders, traced.draws, of_class)
        form = self._known.get_or_make(key, lambda: StepForm(traced, result, writes, kind))
        combine = None
        if traced.combination is not None:
            wide = torch.float64 in (output.dtype, sample.dtype, *traced.dtypes)
            combine = Combine(traced.combination, sample.device, torch.float64 if wide else torch.float32)
        return ReadyStep(form, tuple(constants), combine)


def _bare(part: Part, constants: list[Any]) -> Part:
    """A part with the numbers of its constants in place of these."""
    if isinstance(part, Small):
        constants.append((part.value, {}))  # and what it is on other devices
        return part._replace(value=len(constants) - 1)  # type: ignore[arg-type]
    if isinstance(part, Constant):
        constants.append(part.value)
        return part._replace(value=len(constants) - 1)
    if isinstance(part, Container):
        return part._replace(parts=tuple(_bare(item, constants) for item in part.parts))
    return part


def _kinds(part: Part) -> Any:
    """The classes of a part and of those in it: parts of two classes are equal if their numbers are."""
    return (Container, *map(_kinds, part.parts)) if isinstance(part, Container) else type(part)
