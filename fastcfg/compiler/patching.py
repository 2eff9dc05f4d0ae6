"""Replacements for the functions an original draws and converts with, while it is run to be compiled.

They act in the current thread only. torch's own functions are intercepted by function modes, which belong to a thread;
names in other modules are replaced for all threads, by functions that pass every other thread on to the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

__all__ = ["draw_function", "drawing", "in_float64"]

# Held while names are replaced: two threads at once could restore them in the wrong order.
_lock = RLock()
_BROWNIAN_TREE = "BrownianTreeNoiseSampler"


@contextmanager
def drawing(
    sampler: Any, draw: Callable[[Tensor | None], Tensor], brownian_tree: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Context in which a scheduler or sampling function draws from `draw`, called with an uninitialised tensor of the
    shape and dtype. `brownian_tree` replaces k-diffusion's class in the function's module."""

    def randn_tensor(shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(torch.empty(tuple(shape), dtype=dtype))

    functions: list[tuple[Any, str, Callable[..., Any]]]
    functions = [(module, "randn_tensor", randn_tensor) for module in _modules(type(sampler))]
    if brownian_tree is not None:
        functions.append((inspect.getmodule(sampler), _BROWNIAN_TREE, brownian_tree))
    with _replaced(functions), _Draws(draw):
        yield


def in_float64() -> TorchFunctionMode:
    """Context in which float64 samples keep their dtype. Schedulers that compute half-precision samples in float32 do
    so by converting every sample, which would round the coefficients read off a float64 run."""
    return _InFloat64()


def draw_function(scheduler_class: type) -> Callable[..., Tensor]:
    """The function a scheduler class draws with: diffusers' `randn_tensor` where its module has it."""
    with _lock:  # no other thread's replacement is in place
        for module in _modules(scheduler_class):
            draw: Callable[..., Tensor] | None = getattr(module, "randn_tensor", None)
            if draw is not None:
                return draw
    return torch.randn


class _Draws(BaseTorchFunctionMode):
    def __init__(self, draw: Callable[[Tensor | None], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            size = args or (kwargs["size"],)
            return self._draw(torch.empty(*size, dtype=kwargs.get("dtype")))
        if func is torch.randn_like:
            return self._draw(args[0] if args else kwargs["input"])
        # The base class makes the call: a warning torch raises in it is then not attributed to this file.
        return super().__torch_function__(func, types, args, kwargs)


class _InFloat64(BaseTorchFunctionMode):
    _CONVERSIONS = (Tensor.to, Tensor.float, Tensor.type)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in self._CONVERSIONS or not isinstance(result, Tensor):
            return result
        values = args[0]
        narrowed = result.is_floating_point() and result.dtype != torch.float64
        return values if narrowed and values.dtype == torch.float64 and values.ndim == 4 else result


@contextmanager
def _replaced(functions: Sequence[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
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
                    originals.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, for_this_thread(function, originals[-1][-1]))
            yield
        finally:
            active = False
            for owner, name, original in reversed(originals):
                setattr(owner, name, original)


def _modules(kind: type) -> Iterator[Any]:
    """The modules of a class and its bases."""
    return filter(None, (inspect.getmodule(base) for base in kind.__mro__ if base is not object))
