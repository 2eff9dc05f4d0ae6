"""Rows of exponential multistep methods, with or without a corrector.

Between two levels of λ = -log σ the exact x is A x + ∫ k(λ) m(λ) dλ, with m the x0 (or the slope d) of the model. A
method replaces m by the polynomial through the m of some levels, so that a step is A x + sum_i w_i m_i. A corrector
takes the step to a level again once the m there is known. It starts from x minus the predictor's terms, so no state has
to be saved for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ._prediction import Array
from .denoiser import Denoiser, denoising_table

# Exact to rounding for the kernels here up to steps of 20 in λ.
_GAUSS = np.polynomial.legendre.leggauss(32)


def integrals(kernel: Callable[[Array], Array], λ: float, λ_to: float, known: Array, rule: Any = _GAUSS) -> Array:
    """w_i = ∫ k(λ) ℓ_i(λ) dλ from λ to λ_to by a Gauss rule; ℓ_i are the Lagrange polynomials of the levels `known`."""
    nodes, weights = rule
    τ = λ + (λ_to - λ) * (nodes + 1) / 2
    basis = [np.prod([(τ - b) / (a - b) for b in known if b != a], axis=0) * np.ones_like(τ) for a in known]
    return (λ_to - λ) / 2 * (np.array(basis) @ (weights * kernel(τ)))


def data_weights(λ: float, λ_to: float, known: Array, B: float, c: float = 1.0) -> Array:
    """Weights of the x0 at levels `known`, with k(λ) = c e^(-c (λ_to - λ)).

    For two levels, of which one is λ, the weight of the other one is -B/(2r) with r its distance from λ in steps, which
    differs from the integral by what the order allows: UniPC and SA-Solver take B(h) = -h, e^-h - 1 or -c h.
    """
    total = -np.expm1(-c * (λ_to - λ))
    if len(known) == 1:
        return np.array([total])
    if len(known) == 2:
        other = known != λ
        weight = -B * (λ_to - λ) / (2 * (known[other][0] - λ))
        return np.where(other, weight, total - weight)
    return integrals(lambda τ: c * np.exp(-c * (λ_to - τ)), λ, λ_to, known)


def orders(levels: Array, order: int, lower_order_final: bool) -> list[int]:
    """The order of every step: limited by the steps before it, optionally by those left, and 1 for a step to 0."""
    N = len(levels) - 1
    most = [min(order, n + 1, N - n if lower_order_final else order) for n in range(N)]
    return [*most[:-1], most[-1] if levels[-1] > 0 else 1]


def multistep_table(
    denoiser: Denoiser,
    σ: Array,
    A: Array,
    predictor: Sequence[Array],
    corrector: Sequence[Array] = (),
    *,
    slopes: bool = False,
    **columns: Any,
) -> StepTable:
    """The table of steps at levels σ [N], from A [N] and the weights of m_n, m_{n-1}, ...: N arrays each for the step
    from level n (predictor) and, unless empty, for the step to level n taken again (corrector). m is x0, or with
    `slopes` d = (x - x0)/σ; `columns` are further ones."""
    on = np.zeros((1 + max(map(len, [*predictor, *corrector])), len(σ)))
    for n, weights in enumerate(predictor):
        on[: len(weights), n] += weights
        if corrector and len(corrector[n]):
            on[: len(corrector[n]), n] += A[n] * corrector[n]
            on[1 : 1 + len(predictor[n - 1]), n] -= A[n] * predictor[n - 1]
    ages = int(np.flatnonzero(on.any(axis=1)).max(initial=0))
    m_x, m_0 = (1 / σ, -1 / σ) if slopes else (np.zeros_like(σ), np.ones_like(σ))
    saved: dict[str, Any] = {"k_x": m_x, "k_0": m_0, **history(on[1 : ages + 1])} if ages else {}
    return denoising_table(denoiser, σ, σ[0], a_x=A + on[0] * m_x, a_0=on[0] * m_0, **saved, **columns)


def data_table(
    denoiser: Denoiser,
    levels: Array,
    order: int,
    corrector_order: int,
    lower_order_final: bool,
    B: Callable[[Array], Array],
    c: ArrayLike = 1.0,
    **columns: Any,
) -> StepTable:
    """The table of a predictor and a corrector with `data_weights`, for c [N] and B(h), h [N] being the steps in λ. The
    corrector's order counts the x0 at the end of its step."""
    σ, c = levels[:-1], np.broadcast_to(c, len(levels) - 1)
    with np.errstate(divide="ignore"):
        λ = -np.log(levels)
    predictor, corrector, Bs = [], [np.zeros(0)], B(np.diff(λ))
    for n, p in enumerate(orders(levels, order, lower_order_final)):
        predictor.append(data_weights(λ[n], λ[n + 1], λ[n - np.arange(p)], Bs[n], c[n]))
    for n, q in enumerate(orders(levels, corrector_order - 1, lower_order_final)[:-1]):
        corrector.append(data_weights(λ[n], λ[n + 1], λ[n + 1 - np.arange(q + 1)], Bs[n], c[n]))
    columns["end"] = levels[-1]
    return multistep_table(denoiser, σ, (levels[1:] / σ) ** c, predictor, corrector, **columns)


def history(weights: Array) -> dict[str, Any]:
    """The columns a_h0 to a_h2 and slot of rows that save one tensor each, from the weights [ages, R] of what the row
    before, the one before that, ... saved; up to 3 ages."""
    ages, rows = len(weights), np.arange(weights.shape[1])
    # A row's tensor replaces that of `ages` rows before, which it is the last to read.
    a_h = np.zeros((3, len(rows)))
    for age in range(1, ages + 1):
        a_h[(rows - age) % ages, rows] = weights[age - 1]
    return {"a_h0": a_h[0], "a_h1": a_h[1], "a_h2": a_h[2], "slot": rows % ages if ages else -1}
