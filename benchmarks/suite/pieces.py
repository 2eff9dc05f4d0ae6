"""The public operations as workloads: fastcfg's, against the formulas in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.cases import Provider
from benchmarks.suite.plain import compiled
from fastcfg import ops

_QUANTILE, _FLOOR = 0.995, 1.0  # the defaults of `ops.dynamic_threshold`


@dataclass(frozen=True)
class Piece:
    """One operation.

    Attributes:
        own: fastcfg's, by backend and inputs; returns [B, C, ...], the result that is checked.
        formula: the same in torch.
        inputs: makes the inputs: normals of a shape, and the model's dtype.
        moved: bytes per element of the state, given the bytes of the model's dtype.
    """

    own: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    inputs: Callable[[Callable[..., Tensor], tuple[int, ...], torch.dtype], tuple[Any, ...]]
    moved: Callable[[int], int]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _blend(output: Tensor, weights: Tensor) -> Tensor:
    cond, uncond = _wide(output).chunk(2)
    return uncond + _per_sample(weights[:, 0], cond) * (cond - uncond)


def _x0(x: Tensor, output: Tensor, p_x: Tensor, p_m: Tensor, bound: Tensor) -> Tensor:
    limit = _per_sample(bound, x)
    x0 = _per_sample(p_x, x) * x + _per_sample(p_m, x) * _wide(output)
    return torch.minimum(torch.maximum(x0, -limit), limit)


def _posterior(
    x0: Tensor, x: Tensor, c_0: Tensor, c_x: Tensor, low: Tensor, high: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    fraction = (_wide(v) + 1) / 2
    log_variance = fraction * _per_sample(high, x) + (1 - fraction) * _per_sample(low, x)
    return _per_sample(c_0, x) * x0 + _per_sample(c_x, x) * x, torch.exp(log_variance), log_variance


def _threshold(x0: Tensor) -> Tensor:
    magnitudes = x0.flatten(1).abs()
    bound = _per_sample(torch.quantile(magnitudes, _QUANTILE, dim=1).clamp(min=_FLOOR), x0)
    return x0.clamp(-bound, bound) / bound


PIECES = {
    "guidance-blend": Piece(
        lambda backend, output, weights: ops.guidance_blend(output, weights, base=1, backend=backend),
        _blend,
        lambda normal, shape, dtype: (normal(2 * shape[0], *shape[1:]).to(dtype), normal(shape[0], 2)),
        lambda model: 2 * model + 4,
    ),
    "predict-x0": Piece(
        lambda backend, *inputs: ops.predict_x0(*inputs, backend=backend),
        _x0,
        lambda normal, shape, dtype: (
            normal(*shape),
            normal(*shape).to(dtype),
            *(normal(shape[0]) for _ in range(2)),
            normal(shape[0]).abs() + 0.1,
        ),
        lambda model: 4 + model + 4,
    ),
    "posterior": Piece(
        lambda backend, *inputs: ops.posterior_mean_variance(*inputs, backend=backend),
        _posterior,
        lambda normal, shape, dtype: (
            *(normal(*shape) for _ in range(2)),
            *(normal(shape[0]) for _ in range(4)),
            normal(*shape).to(dtype),
        ),
        lambda model: 8 + model + 12,
    ),
    "dynamic-threshold": Piece(
        lambda backend, x0: ops.dynamic_threshold(x0, backend=backend),
        _threshold,
        lambda normal, shape, dtype: (normal(*shape),),
        # Four passes over the magnitudes, and the division.
        lambda model: 4 * 4 + 8,
    ),
}


@dataclass(frozen=True, eq=False)
class PieceCase:
    """An operation's inputs.

    Attributes:
        piece: the operation.
        inputs: its arguments.
        moved: bytes that it must move.
    """

    piece: Piece
    inputs: tuple[Any, ...]
    moved: int

    @classmethod
    def random(
        cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> PieceCase:
        """Standard normal inputs, the same for the same arguments on every device."""
        generator = torch.Generator().manual_seed(seed)
        piece = PIECES[name]

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        inputs = tuple(tensor.to(device) for tensor in piece.inputs(normal, shape, dtype))
        elements = torch.Size(shape).numel()
        return cls(piece, inputs, elements * piece.moved(dtype.itemsize))

    def exact(self) -> Tensor:
        """The formula's result in float64."""
        return _whole(self.piece.formula(*(tensor.double() for tensor in self.inputs)))


def own(case: PieceCase, backend: str) -> Provider:
    """fastcfg's operation."""
    return _provider(partial(case.piece.own, backend), case, lambda: None, True)


def formula(case: PieceCase, mode: str | None = None) -> Provider:
    """The formula in torch, compiled if there is a mode."""
    function, begin = compiled(case.piece.formula, mode)
    return _provider(function, case, begin, mode is None)


def _provider(function: Callable[..., Any], case: PieceCase, begin: Callable[[], object], capturable: bool) -> Provider:
    def run(draw: bool) -> Any:
        begin()
        return function(*case.inputs)

    return Provider.returning(run, _whole, capturable=capturable)


def _whole(result: Any) -> Tensor:
    return torch.cat(result) if isinstance(result, tuple) else result
