"""What is run of a project: its sampling calls, as its own scripts make them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkout import Checkout

LOOPS = ("p_sample_loop", "ddim_sample_loop")


@dataclass(frozen=True)
class Call:
    """A sampling call.

    Attributes:
        name: what it is called with.
        obj: what is accelerated.
        run: the call, with the object or what it became.
        steps: of a run.
        progressive: whether it is the generator of the call before it, of the same name.
    """

    name: str
    obj: Any
    run: Callable[[Any], Any]
    steps: int
    progressive: bool = False


@dataclass(frozen=True)
class Project:
    """A project and how it is recognised.

    Attributes:
        name: owner and name.
        marks: files that it has, relative to its root; "FILE: TEXT" also holds the text.
        calls: its calls, from an open checkout.
    """

    name: str
    marks: Sequence[str]
    calls: Callable[[Checkout], Iterable[Call]] = field(repr=False)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is a checkout of it."""
        for mark in self.marks:
            path, _, text = mark.partition(": ")
            file = folder / path
            if not file.exists() or (text and text not in file.read_text(encoding="utf-8", errors="replace")):
                return False
        return True


def loops(
    obj: Any,
    model: Any,
    shape: Sequence[int],
    what: str = "",
    *,
    names: Sequence[str] = LOOPS,
    steps: int | None = None,
    **options: Any,
) -> Iterator[Call]:
    """The calls of an object's loops with (model, shape), and of their generators where it has them."""
    count = steps or int(obj.num_timesteps)
    for name in names:
        if hasattr(obj, name) and _taken(getattr(obj, name), options) == options:
            label = f"{name}{', ' * bool(what)}{what}"
            yield Call(label, obj, _loop(name, (model, tuple(shape)), options), count)
            if generator := getattr(obj, f"{name}_progressive", None):
                given = _taken(generator, options)
                yield Call(label, obj, _loop(f"{name}_progressive", (model, tuple(shape)), given), count, True)


def _taken(method: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a method takes."""
    known = inspect.signature(method).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {name: value for name, value in options.items() if takes_any or name in known}


def _loop(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda obj: kept(getattr(obj, name)(*args, **options))


def kept(result: Any) -> Any:
    """A result; a generator's as a list, copied as they came."""
    return [copied(item) for item in result] if inspect.isgenerator(result) else result


def copied(value: Any) -> Any:
    """Copies of tensors, in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list | tuple) else value


def drawn(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same every time."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
