"""The Gram matrix of a model's branches, from which guidance computes weights that depend on the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import gram as reference
from ..reference import rescale_factor
from .backend import resolve_piece
from .checks import expect, readable
from .native_pieces import MAX_VECTORS, native_gram
from .registered import Operation


@torch.no_grad()
def gram(
    output: Tensor,
    branches: int,
    base: int,
    *,
    channels: int | None = None,
    momentum: Tensor | None = None,
    decay: float = 0.0,
    conditional: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Inner products and sums of every sample's V vectors: the base branch's output, the other branches' differences
    from it (in the branches' order), and the momentum if there is one.

    An inner product <a, b> is off by less than 2**-19 Σ|a_i b_i|, a sum by less than 2**-19 Σ|a_i|: differences are
    rounded to float32 once, products once, and added in a tree. Norms are thus good to a millionth however close the
    branches are. Squares beyond float32's range become infinite (outputs of 1e19) or 0 (of 1e-23). Results do not
    depend on the batch and are the same at every call.

    Args:
        output: the model's, [K*B, C or 2C, ...], as for `GuidedStep`.
        branches, base: K, at least 2, and the index of the branch that differences are measured from.
        channels: C, the first channels of the output; all of them by default.
        momentum: float32 [B, C, ...], contiguous, rewritten in the same pass: h <- decay*h + (m_c - m_base).
        decay: finite.
        conditional: c, another branch than the base; needed with momentum.
        backend: "auto" (on a CPU "native" where that can run), "triton", "native", "inductor" (which runs the reference
            here) or "reference". Native and reference add in float64, in different orders.

    Returns:
        float64 [B, V, V], symmetric, and float64 [B, V], with V = K, or K + 1 with momentum.

    Raises:
        ValueError: shapes, dtypes, devices or indices that do not fit, or a backend that cannot run.

    Example:
        >>> cond, uncond = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
        >>> products, sums = gram(torch.cat([cond, uncond]), branches=2, base=1)
        >>> products                                    # of (cond - uncond, uncond)
        tensor([[[16.,  0.],
                 [ 0.,  9.]]], dtype=torch.float64)
        >>> sums
        tensor([[4., 3.]], dtype=torch.float64)
    """
    if branches < 2 or output.ndim < 2 or not output.numel() or len(output) % branches:
        raise ValueError(f"output: got shape {tuple(output.shape)}, expected [K*B, C, ...] of K = {branches} >= 2")
    if not output.dtype.is_floating_point:
        raise ValueError(f"output: got {output.dtype}, expected a floating dtype")
    channels = output.shape[1] if channels is None else channels
    if not 1 <= channels <= output.shape[1]:
        raise ValueError(f"channels: got {channels}, expected 1 to {output.shape[1]}")
    if not 0 <= base < branches:
        raise ValueError(f"base: got {base}, expected a branch index below {branches}")
    if momentum is not None:
        if conditional is None or conditional == base or not 0 <= conditional < branches:
            raise ValueError(f"conditional: got {conditional}, expected a branch index below {branches} but {base}")
        wide = torch.float64 if momentum.dtype == torch.float64 else torch.float32
        expect("momentum", momentum, (len(output) // branches, channels, *output.shape[2:]), wide, output.device)
    state = torch.promote_types(output.dtype, torch.float32 if momentum is None else momentum.dtype)
    conditional, output = conditional or 0, readable(output)
    arguments = (output, momentum, branches, base, channels, conditional, float(decay))
    backend = resolve_piece(backend, output.device, state, registered=True)
    if backend == "triton":
        products = _gram(*arguments)
    elif backend == "native" and branches + (momentum is not None) <= MAX_VECTORS:
        products = _native_gram(output.float().contiguous(), *arguments[1:])
    else:
        products = reference(output, branches, base, channels, conditional, momentum, decay)
    return products[..., :-1], products[..., -1]


def _gram_result(output: Tensor, momentum: Tensor | None, branches: int, *_: Any) -> Tensor:
    vectors = branches + (momentum is not None)
    return torch.empty((len(output) // branches, vectors, vectors + 1), dtype=torch.float64, device=output.device)


def _launch_gram(*arguments: Any) -> None:
    from ..kernels.gram import launch_gram, partial_shape

    output, momentum, _, base, channels, conditional, decay, out = arguments
    spatial = output[0, 0].numel()
    shape = partial_shape(out.shape[1], len(out), channels * spatial)
    partial = torch.empty(shape, dtype=torch.float32, device=output.device)
    launch_gram(output, channels * spatial, spatial, base, conditional, momentum, decay, partial, out)


_ARGUMENTS = "Tensor output, Tensor(a!)? momentum, int branches, int base, int channels, int conditional, float decay"
_gram = Operation(f"gram({_ARGUMENTS}) -> Tensor", _gram_result, _launch_gram, mutates=("momentum",))
_native_gram = Operation(
    f"native_gram({_ARGUMENTS}) -> Tensor", _gram_result, native_gram, mutates=("momentum",), for_modes=True
)


def mixed_weights(
    products: Tensor,
    sums: Tensor,
    count: int,
    planned: Tensor,
    base: int,
    conditional: int,
    mix: Callable[[Tensor, Tensor], Tensor] | None,
    rescale: float,
) -> Tensor:
    """float64 [B, V]: a row's weights, from the Gram matrix and sums of vectors of `count` elements and the row of
    `GuidancePlan.planned`. Base and conditional are as in `gram`, mix and rescale as in `GuidancePlan`."""
    weights = planned if mix is None else mix(products, planned)
    if rescale:
        weights = weights * rescale_factor(products, sums, count, weights, base, conditional, rescale)
    return weights
