"""Replacements for the functions that draw, which give a run's noise and note the draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..patching import modules_of
from .parts import SAMPLE, Draw, UntraceableError
from .tensors import MAX_DRAWS, Inputs, Tensors, order_of


class Drawing:
    """What a step draws in one run after another.

    Attributes:
        tensors: of the run.
        noise: its noise, and `draws`, how it was drawn, in order.
    """

    def __init__(self, generator: Any, inputs: Inputs) -> None:
        self._generator, self._order = generator, inputs.orders[SAMPLE]
        self._randn, self._randn_like = torch.randn, torch.randn_like
        self.tensors = Tensors()
        self.noise: list[Tensor] = []
        self.draws: list[Draw] = []
        self._versions: list[int] = []

    def start(self, tensors: Tensors) -> None:
        """Begin a run on some tensors."""
        self.tensors, self.noise, self.draws, self._versions = tensors, [], [], []

    def changed(self) -> bool:
        """Whether the run's noise was changed in place."""
        return any(noise._version != version for noise, version in zip(self.noise, self._versions, strict=True))

    def replacements(self, kind: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Replacements (owner, name, function) for a class of schedulers."""
        found: list[tuple[Any, str, Callable[..., Any]]]
        found = [(torch, "randn", self._torch), (torch, "randn_like", self._like)]
        for module in _modules(kind):
            if (function := getattr(module, "randn_tensor", None)) is not None:
                found.append((module, "randn_tensor", partial(self._tensor, module, function)))
        return found

    def _tensor(
        self,
        module: Any,
        function: Callable[..., Tensor],
        shape: Any,
        generator: Any = None,
        device: Any = None,
        dtype: Any = None,
        layout: Any = None,
    ) -> Tensor:
        """diffusers' `randn_tensor`."""
        given, given_device = self._given(generator), device is not None
        draw = Draw(module, "randn_tensor", function, dtype, generator=given, device=given_device)
        return self._drawn(draw, shape, layout=None if layout is torch.strided else layout)

    def _torch(
        self, *size: Any, generator: Any = None, dtype: Any = None, device: Any = None, **unknown: Any
    ) -> Tensor:
        size = size or (unknown.pop("size", ()),)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        draw = Draw(torch, "randn", self._randn, dtype, generator=self._given(generator), device=device is not None)
        return self._drawn(draw, shape, **unknown)

    def _like(self, input: Tensor, *, dtype: Any = None, **unknown: Any) -> Tensor:
        of_caller = self.tensors.dtype is None
        if of_caller and order_of(input) != self._order:
            # Its numbers depend on the layout.
            raise UntraceableError("its noise is drawn like a tensor of another layout than the sample's")
        dtype = dtype or (input.dtype if of_caller else None)
        return self._drawn(Draw(torch, "randn_like", self._randn_like, dtype, like=True), input.shape, input, **unknown)

    def _given(self, generator: Any) -> bool:
        if generator is not None and generator is not self._generator:
            raise UntraceableError("it draws with a generator of its own")
        return generator is not None

    def _drawn(self, draw: Draw, shape: Any, like: Tensor | None = None, **unknown: Any) -> Tensor:
        if unknown := {name: value for name, value in unknown.items() if value is not None}:
            raise UntraceableError(f"its noise is drawn with {', '.join(unknown)}")
        if tuple(shape) != self.tensors.shape:
            raise UntraceableError("its noise has another shape than the sample")
        if len(self.draws) == MAX_DRAWS:
            raise UntraceableError(f"it draws noise more than {MAX_DRAWS} times")
        noise = self.tensors.tensor(("draw", len(self.draws)), draw.dtype)
        if like is not None:
            noise = torch.empty_like(like, dtype=noise.dtype).copy_(noise)
        self.draws.append(draw)
        self.noise.append(noise)
        self._versions.append(noise._version)
        return noise


@cache
def _modules(kind: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(modules_of(kind)))
