"""Replacements for the functions an original draws and converts with, while it is run to be compiled.

They act in the current thread: names are replaced for all threads, under one lock, by functions that pass every other
thread on to the original. (torch's function modes, which belong to a thread, make compiling three times as slow.)
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor

# Held while names are replaced: two threads at once could restore them in the wrong order.
_lock = RLock()
# k-diffusion's class of trees, in the module of a sampling function.
BROWNIAN_TREE = "BrownianTreeNoiseSampler"


@contextmanager
def drawing(sampler: Any, draw: Callable[[Tensor | None], Tensor]) -> Iterator[None]:
    """Context in which a scheduler or sampling function draws from `draw`, called with an uninitialised tensor of the
    shape and dtype."""

    def randn_tensor(shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(torch.empty(tuple(shape), dtype=dtype))

    def randn(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(torch.empty(*(size or (options["size"],)), dtype=dtype))

    def randn_like(input: Tensor, **_: Any) -> Tensor:
        return draw(input)

    functions: list[tuple[Any, str, Callable[..., Any]]]
    functions = [(module, "randn_tensor", randn_tensor) for module in modules_of(type(sampler))]
    functions += [(torch, "randn", randn), (torch, "randn_like", randn_like)]
    with replaced(functions):
        yield


@contextmanager
def in_float64(applies: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Context in which float64 samples keep their dtype, while that applies. Schedulers that compute half-precision
    samples in float32 do so by converting every sample, which would round the coefficients read off a float64 run."""

    def widest(convert: Callable[..., Any]) -> Callable[..., Any]:
        def converted(values: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = convert(values, *args, **kwargs)
            narrowed = isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64
            return values if narrowed and values.dtype == torch.float64 and values.ndim == 4 and applies() else result

        return converted

    with replaced([(Tensor, name, widest(getattr(Tensor, name))) for name in ("to", "float", "type")]):
        yield


def draw_function(scheduler_class: type) -> Callable[..., Tensor]:
    """The function a scheduler class draws with: diffusers' `randn_tensor` where its module has it."""
    with _lock:  # no other thread's replacement is in place
        for module in modules_of(scheduler_class):
            draw: Callable[..., Tensor] | None = getattr(module, "randn_tensor", None)
            if draw is not None:
                return draw
    return torch.randn


@dataclass
class Talk:
    """What a function tells the user while it runs.

    Attributes:
        lines: the arguments of its calls of `print`.
        bar: `disable` of its tqdm, True if it has none.
    """

    lines: list[tuple[Any, ...]] = field(default_factory=list)
    bar: bool | None = True

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Context in which it is heard and not shown."""
        tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
        shown: Any = getattr(tqdm, "__init__", None)

        def write(*values: Any, **_: Any) -> None:
            self.lines.append(values)

        def begin(bar: Any, *args: Any, disable: bool | None = False, **options: Any) -> None:
            self.bar = disable
            shown(bar, *args, disable=True, **options)

        with replaced([(builtins, "print", write), *([(tqdm, "__init__", begin)] if tqdm else [])]):
            yield


@contextmanager
def replaced(functions: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Context in which attributes (owner, name), where they exist, are other functions to this thread."""
    thread, active, originals = get_ident(), True, []

    def for_this_thread(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            # Another thread may keep this function for longer than it is in place.
            return (function if active and get_ident() == thread else original)(*args, **kwargs)

        return chosen

    with _lock:
        try:
            for owner, name, function in functions:
                if hasattr(owner, name):
                    originals.append((owner, name, vars(owner).get(name)))
                    setattr(owner, name, for_this_thread(function, getattr(owner, name)))
            yield
        finally:
            active = False
            for owner, name, own in reversed(originals):
                delattr(owner, name) if own is None else setattr(owner, name, own)


def modules_of(kind: type) -> Iterator[Any]:
    """The modules of a class and its bases."""
    return filter(None, (inspect.getmodule(base) for base in kind.__mro__ if base is not object))
