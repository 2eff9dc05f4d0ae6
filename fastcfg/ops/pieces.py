"""The pieces of the guided step as operations of their own, each one kernel.

Tensors are float32, float16 or bfloat16 of any rank from 3; results are new, contiguous and float32. Contiguous and
channels-last model outputs are read as they are, others are copied first. `backend` is "auto" (on a CPU "native" where
that can run), "triton", "native" or "reference"; natively, splitting and the posterior run on the reference.
A call raises ValueError for shapes, dtypes, devices or indices that do not fit, and for a backend that cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import pieces as reference
from .backend import PIECE_BACKENDS, resolve_piece
from .checks import check_image, expect, readable
from .native_pieces import native_blend, native_x0
from .registered import Operation


@torch.no_grad()
def split_model_output(output: Tensor, channels: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The prediction and the variance channels of a model with learned variances (Nichol & Dhariwal 2021).

    `output` is [N, 2C, ...] with C = `channels`; the results are its first and its last C channels, each [N, C, ...].

    Example:
        >>> mean, variance = split_model_output(torch.randn(4, 6, 8, 8), 3)
        >>> mean.shape, variance.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 3, 8, 8]))
    """
    check_image("output", output)
    if output.shape[1] != 2 * channels:
        raise ValueError(f"output: got {output.shape[1]} channels, expected 2*{channels}, prediction and variance")
    output = readable(output)
    on_triton = resolve_piece(backend, output.device, backends=PIECE_BACKENDS) == "triton"
    return _split(output, channels) if on_triton else reference.split_model_output(output, channels)


@torch.no_grad()
def guidance_blend(
    output: Tensor,
    weights: Tensor,
    *,
    base: int | None = None,
    scaled: bool = False,
    momentum: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The guided output of K >= 2 branches: m_b + Σ w_k (m_k - m_b) over k != b for base b, or Σ w_k m_k without one.

    Args:
        output: [K*B, C, ...], the branches one after the other.
        weights: float32 [B, K], or [B, K + 1] with momentum; the column of a base that is not scaled is not used.
        base: index of the branch that the differences are measured from.
        scaled: whether the base is weighted too, w_b m_b + Σ w_k (m_k - m_b); needs a base.
        momentum: float32 [B, C, ...], contiguous, added with the last weight.

    Example:
        >>> output = torch.randn(4, 3, 8, 8)                         # [cond; uncond]
        >>> weights = torch.tensor([[3.0, 0.0], [5.0, 0.0]])         # scale 3 and scale 5
        >>> guidance_blend(output, weights, base=1).shape
        torch.Size([2, 3, 8, 8])
    """
    check_image("output", output)
    if weights.ndim != 2 or not weights.shape[0] or weights.shape[1] < 2:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected [B, K] with K >= 2 branches")
    expect("weights", weights, tuple(weights.shape), torch.float32, output.device)
    batch, branches = weights.shape[0], weights.shape[1] - (momentum is not None)
    if len(output) != batch * branches:
        raise ValueError(f"output: got {len(output)} samples, expected {batch * branches} ({branches} x {batch})")
    if base is not None and not 0 <= base < branches:
        raise ValueError(f"base: got {base}, expected a branch index below {branches}, or None")
    if scaled and base is None:
        raise ValueError("base: got None with scaled, expected a branch index")
    if momentum is not None:
        expect("momentum", momentum, (batch, *output.shape[1:]), torch.float32, output.device)
    output = readable(output)
    backend = resolve_piece(backend, output.device, backends=PIECE_BACKENDS)
    if backend == "native":
        out = _like(output, batch, *output.shape[1:])
        return native_blend(output.float().contiguous(), weights, base, scaled, momentum, out)
    if backend == "reference":
        return reference.guidance_blend(output, weights, base=base, scaled=scaled, momentum=momentum)
    return _blend(output, weights, -1 if base is None else base, scaled, momentum)


@torch.no_grad()
def predict_x0(
    x: Tensor,
    output: Tensor,
    p_x: Tensor,
    p_m: Tensor,
    bound: Tensor | None = None,
    *,
    rest: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """x0 = p_x*x + p_m*m, the columns of a `StepTable`, limited to ±bound; NaN stays NaN.

    Args:
        x, output: the state and the model's (blended) output m, each [B, C, ...].
        p_x, p_m: float32 [B].
        bound: float32 [B], positive; None for no limit.
        rest: float32 [B] twice, what rounding to float32 took from p_x and p_m (the columns p_x_rest and p_m_rest of
            `StepTable.on`); None for nothing.

    Example:
        >>> x, ε, ᾱ = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 0.9])
        >>> x0 = predict_x0(x, ε, ᾱ.rsqrt(), -(1 / ᾱ - 1).sqrt(), bound=torch.ones(2))
        >>> bool(x0.abs().max() <= 1)
        True
    """
    check_image("x", x)
    check_image("output", output, like=x)
    p_x_rest, p_m_rest = rest or (None, None)
    numbers = {"p_x": p_x, "p_m": p_m, "bound": bound, "rest[0]": p_x_rest, "rest[1]": p_m_rest}
    for name, value in numbers.items():
        if value is not None or name in ("p_x", "p_m"):
            expect(name, value, (len(x),), torch.float32, x.device)
    x, output = x.contiguous(), readable(output)
    backend = resolve_piece(backend, x.device, backends=PIECE_BACKENDS)
    if backend == "native":
        return native_x0(x.float(), output.float().contiguous(), p_x, p_m, bound, rest, _like(x))
    if backend == "reference":
        return reference.predict_x0(x, output, p_x, p_m, bound, rest)
    return _x0(x, output, p_x, p_m, bound, p_x_rest, p_m_rest)


@torch.no_grad()
def posterior_mean_variance(
    x0: Tensor,
    x: Tensor,
    coef_x0: Tensor,
    coef_x: Tensor,
    min_log: Tensor,
    max_log: Tensor,
    variance: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of p(x_{t-1} | x_t) with the mean coef_x0*x0 + coef_x*x.

    The log variance is f*max_log + (1 - f)*min_log with f = (v + 1)/2 for the model's variance channels v (Nichol &
    Dhariwal 2021, https://arxiv.org/abs/2102.09672), or min_log where there are none.

    Args:
        x0, x: the predicted x0 and x_t, each [B, C, ...].
        coef_x0, coef_x, min_log, max_log: float32 [B]; max_log is not used without variance channels.
        variance: the variance channels v, [B, C, ...].
        backend: they may differ by 2 ulp in the exponential.

    Returns:
        Mean, variance and log variance, each [B, C, ...]. Without variance channels the last two are one value per
        sample, expanded.

    Example:
        >>> x0, x, v, one = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.ones(2)
        >>> mean, variance, log_variance = posterior_mean_variance(x0, x, 0.1 * one, 0.9 * one, -4 * one, -3 * one, v)
        >>> float(log_variance[0, 0, 0, 0])
        -3.5
    """
    check_image("x0", x0)
    check_image("x", x, like=x0)
    coefficients = {"coef_x0": coef_x0, "coef_x": coef_x, "min_log": min_log, "max_log": max_log}
    for name, value in coefficients.items():
        expect(name, value, (len(x),), torch.float32, x.device)
    if variance is not None:
        check_image("variance", variance, like=x0)
        variance = readable(variance)
    x0, x = x0.contiguous(), x.contiguous()
    on_triton = resolve_piece(backend, x.device, backends=PIECE_BACKENDS) == "triton"
    run: Any = _posterior if on_triton else reference.posterior_mean_variance
    mean, sigma2, log_variance = run(x0, x, *coefficients.values(), variance)
    return mean, sigma2.expand_as(mean), log_variance.expand_as(mean)


def _like(tensor: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape or tensor.shape, dtype=torch.float32, device=tensor.device)


# The kernels, imported at the first launch, and their results' memory.


def _split_results(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    shape = (len(output), channels, *output.shape[2:])
    return _like(output, *shape), _like(output, *shape)


def _launch_split(output: Tensor, channels: int, mean: Tensor, variance: Tensor) -> None:
    from ..kernels.split import launch_split

    launch_split(output, mean, variance)


def _launch_x0(*arguments: Any) -> None:
    from ..kernels.x0 import launch_x0

    x, output, p_x, p_m, bound, p_x_rest, p_m_rest, out = arguments
    launch_x0(x, output, p_x, p_m, bound, None if p_x_rest is None else (p_x_rest, p_m_rest), out)


def _posterior_results(x0: Tensor, x: Tensor, *coefficients: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(x), *[1] * (x.ndim - 1)) if coefficients[-1] is None else x.shape
    return _like(x), _like(x, *shape), _like(x, *shape)


_split = Operation("split_model_output(Tensor output, int channels) -> (Tensor, Tensor)", _split_results, _launch_split)
_blend = Operation(
    "guidance_blend(Tensor output, Tensor weights, int base, bool scaled, Tensor? momentum) -> Tensor",
    lambda output, weights, *_: _like(output, len(weights), *output.shape[1:]),
    "blend",
)
_X0 = "Tensor x, Tensor output, Tensor p_x, Tensor p_m, Tensor? bound, Tensor? p_x_rest, Tensor? p_m_rest"
_x0 = Operation(f"predict_x0({_X0}) -> Tensor", lambda x, *_: _like(x), _launch_x0)
_posterior = Operation(
    "posterior_mean_variance(Tensor x0, Tensor x, Tensor coef_x0, Tensor coef_x, Tensor min_log, Tensor max_log,"
    " Tensor? variance) -> (Tensor, Tensor, Tensor)",
    _posterior_results,
    "posterior",
)
