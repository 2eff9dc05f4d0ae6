"""DEIS (Zhang & Chen 2022, https://arxiv.org/abs/2204.13902) in noise-level space."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ..utils.checks import takes_numbers
from ._multistep import integrals, multistep_table, orders
from ._rebuild import rebuilt
from .denoiser import RAW, Denoiser, noise_levels


@rebuilt
@takes_numbers
def deis(sigmas: ArrayLike, *, order: int = 3, lower_order_final: bool = True, denoiser: Denoiser = RAW) -> StepTable:
    """Exponential Adams-Bashforth on ε = d: equation 15 of the paper, with polynomials in log ρ, ρ being σ.

    It is diffusers' `DEISMultistepScheduler` ("logrho"). The paper's ρAB, with polynomials in ρ, is `lms`; its tAB has
    them in the time t of the process.

    Args, errors: as `euler`, and
        order: the number of ε combined, 1 (`euler`) to 3, less in the first steps.
        lower_order_final: whether the last steps are of lower order too, as diffusers takes them in fewer than 15
            steps. A step to 0 is of first order in any case.

    Result: as `euler`, with order - 1 saved tensors.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: got {order}, expected 1, 2 or 3")
    levels = noise_levels(sigmas)
    σ, σ_to = levels[:-1], levels[1:]
    weights = [np.array([step]) for step in σ_to - σ]
    λ = -np.log(σ)
    for n, p in enumerate(orders(levels, order, lower_order_final)):
        if p > 1:
            weights[n] = integrals(lambda τ: -np.exp(-τ), λ[n], -np.log(σ_to[n]), λ[n - np.arange(p)])
    return multistep_table(denoiser, σ, np.ones_like(σ), weights, slopes=True, end=levels[-1], name="deis")
