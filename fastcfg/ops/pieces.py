"""The pieces of the guided step as operations of their own, each one kernel.

Tensors are float32, float16 or bfloat16 of any rank from 3; results are new, contiguous and float32. Model outputs are
read contiguous or channels-last as they are, anything else is copied first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import pieces as reference
from .backend import PIECE_BACKENDS, resolve_backend, through_dispatcher
from .checks import check_image, expect, readable


@torch.no_grad()
def split_model_output(output: Tensor, channels: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The prediction and the variance channels of a model with learned variances (Nichol & Dhariwal 2021).

    Args:
        output: [N, 2C, ...].
        channels: C.
        backend: "auto", "triton" or "reference".

    Returns:
        The first and the last C channels, each [N, C, ...].

    Raises:
        ValueError: an output of another shape or dtype, or a backend that cannot run.

    Example:
        >>> mean, variance = split_model_output(torch.randn(4, 6, 8, 8), 3)
        >>> mean.shape, variance.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 3, 8, 8]))
    """
    check_image("output", output)
    if output.shape[1] != 2 * channels:
        raise ValueError(f"output: got {output.shape[1]} channels, expected 2*{channels}, prediction and variance")
    output = readable(output)
    if resolve_backend(backend, output.device, backends=PIECE_BACKENDS) == "reference":
        return reference.split_model_output(output, channels)
    return (_split_op if through_dispatcher() else _split)(output, channels)


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
        weights: float32 [B, K] ([B, K + 1] with momentum); with a base that is not scaled its column is not used.
        base: index of the branch that the differences are measured from.
        scaled: whether the base is weighted as well, w_b m_b + Σ w_k (m_k - m_b); needs a base.
        momentum: float32 [B, C, ...], contiguous, added with the last weight.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, C, ...].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a base that is no branch, or a backend that cannot run.

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
    if resolve_backend(backend, output.device, backends=PIECE_BACKENDS) == "reference":
        return reference.guidance_blend(output, weights, base=base, scaled=scaled, momentum=momentum)
    run = _blend_op if through_dispatcher() else _blend
    return run(output, weights, -1 if base is None else base, scaled, momentum)


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
        x: [B, C, ...].
        output: the model's (blended) output m, [B, C, ...].
        p_x: float32 [B].
        p_m: float32 [B].
        bound: float32 [B], positive; None for no limit.
        rest: float32 [B] twice, what rounding to float32 has taken from p_x and p_m (as the columns p_x_rest and
            p_m_rest of `StepTable.on`); None for nothing.
        backend: "auto", "triton" or "reference".

    Returns:
        [B, C, ...].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.

    Example:
        >>> x, ε, ᾱ = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.5, 0.9])
        >>> x0 = predict_x0(x, ε, ᾱ.rsqrt(), -(1 / ᾱ - 1).sqrt(), bound=torch.ones(2))
        >>> bool(x0.abs().max() <= 1)
        True
    """
    check_image("x", x)
    check_image("output", output, like=x)
    batch = (len(x),)
    expect("p_x", p_x, batch, torch.float32, x.device)
    expect("p_m", p_m, batch, torch.float32, x.device)
    if bound is not None:
        expect("bound", bound, batch, torch.float32, x.device)
    if rest is not None:
        expect("rest[0]", rest[0], batch, torch.float32, x.device)
        expect("rest[1]", rest[1], batch, torch.float32, x.device)
    x, output = x.contiguous(), readable(output)
    if resolve_backend(backend, x.device, backends=PIECE_BACKENDS) == "reference":
        return reference.predict_x0(x, output, p_x, p_m, bound, rest)
    return (_x0_op if through_dispatcher() else _x0)(x, output, p_x, p_m, bound, *(rest or (None, None)))


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
        x0: the predicted x0, [B, C, ...].
        x: x_t, [B, C, ...].
        coef_x0: float32 [B].
        coef_x: float32 [B].
        min_log: float32 [B].
        max_log: float32 [B]; not used without variance channels.
        variance: the variance channels v, [B, C, ...].
        backend: "auto", "triton" or "reference". They may differ by 2 ulp in the exponential.

    Returns:
        Mean, variance and log variance, each [B, C, ...]. Without variance channels the last two are one value per
        sample, expanded.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.

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
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference.posterior_mean_variance
    if resolve_backend(backend, x.device, backends=PIECE_BACKENDS) == "triton":
        run = _posterior_op if through_dispatcher() else _posterior
    mean, sigma2, log_variance = run(x0, x, *coefficients.values(), variance)
    return mean, sigma2.expand_as(mean), log_variance.expand_as(mean)


def _like(tensor: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape or tensor.shape, dtype=torch.float32, device=tensor.device)


# For every operation: its results' memory (all there is to see for fake tensors), the launch, and the registered name.


def _split_results(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    shape = (len(output), channels, *output.shape[2:])
    return _like(output, *shape), _like(output, *shape)


def _split(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    from ..kernels.split import launch_split

    mean, variance = _split_results(output, channels)
    with torch.cuda.device_of(output):
        launch_split(output, mean, variance)
    return mean, variance


_split_op = torch.library.custom_op("fastcfg::split_model_output", _split, mutates_args=())
_split_op.register_fake(_split_results)


def _blend_result(output: Tensor, weights: Tensor, base: int, scaled: bool, momentum: Tensor | None) -> Tensor:
    return _like(output, len(weights), *output.shape[1:])


def _blend(output: Tensor, weights: Tensor, base: int, scaled: bool, momentum: Tensor | None) -> Tensor:
    from ..kernels.blend import launch_blend

    out = _blend_result(output, weights, base, scaled, momentum)
    with torch.cuda.device_of(output):
        launch_blend(output, weights, base, scaled, momentum, out)
    return out


_blend_op = torch.library.custom_op("fastcfg::guidance_blend", _blend, mutates_args=())
_blend_op.register_fake(_blend_result)


def _x0_result(x: Tensor, *_: Tensor | None) -> Tensor:
    return _like(x)


def _x0(
    x: Tensor,
    output: Tensor,
    p_x: Tensor,
    p_m: Tensor,
    bound: Tensor | None,
    p_x_rest: Tensor | None,
    p_m_rest: Tensor | None,
) -> Tensor:
    from ..kernels.x0 import launch_x0

    out = _like(x)
    rest = None if p_x_rest is None or p_m_rest is None else (p_x_rest, p_m_rest)
    with torch.cuda.device_of(x):
        launch_x0(x, output, p_x, p_m, bound, rest, out)
    return out


_x0_op = torch.library.custom_op("fastcfg::predict_x0", _x0, mutates_args=())
_x0_op.register_fake(_x0_result)


def _posterior_results(
    x0: Tensor,
    x: Tensor,
    coef_x0: Tensor,
    coef_x: Tensor,
    min_log: Tensor,
    max_log: Tensor,
    variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(x), *[1] * (x.ndim - 1)) if variance is None else x.shape
    return _like(x), _like(x, *shape), _like(x, *shape)


def _posterior(
    x0: Tensor,
    x: Tensor,
    coef_x0: Tensor,
    coef_x: Tensor,
    min_log: Tensor,
    max_log: Tensor,
    variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.posterior import launch_posterior

    results = _posterior_results(x0, x, coef_x0, coef_x, min_log, max_log, variance)
    with torch.cuda.device_of(x):
        launch_posterior(x0, x, coef_x0, coef_x, min_log, max_log, variance, *results)
    return results


_posterior_op = torch.library.custom_op("fastcfg::posterior_mean_variance", _posterior, mutates_args=())
_posterior_op.register_fake(_posterior_results)
