"""UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867) in noise-level space, predicting x0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..table import StepTable
from ..utils.checks import check_one_of, takes_numbers
from ._multistep import data_table
from ._rebuild import rebuilt
from .denoiser import RAW, Denoiser, noise_levels

VARIANTS = ("bh1", "bh2")


@rebuilt
@takes_numbers
def unipc(
    sigmas: ArrayLike, *, order: int = 2, variant: str = "bh2", lower_order_final: bool = True, denoiser: Denoiser = RAW
) -> StepTable:
    """UniP-p and UniC-p: every step is predicted from the last p x0, and taken again with the x0 seen at its end.

    Algorithms 1 to 4 of the paper, one model evaluation a step: the x0 that corrects a step also begins the next one.
    It is diffusers' `UniPCMultistepScheduler`. B(h) counts only where two x0 are combined; elsewhere the solution of
    equation 3 does not contain it.

    Args, errors: as `euler`, and
        order: p, 1 to 3, less in the first steps.
        variant: B(h): "bh1" is -h, "bh2" is e^-h - 1, in λ = -log σ.
        lower_order_final: whether the last steps are of lower order too, as diffusers takes them. A step to 0 is of
            first order in any case.

    Result: as `euler`, with p saved tensors.

    Example:
        >>> from fastcfg import sigmas
        >>> table = unipc(sigmas.karras(10, 0.1, 10.0), order=3)
        >>> len(table), table.num_history
        (10, 3)
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: got {order}, expected 1, 2 or 3")
    check_one_of("variant", variant, VARIANTS)
    levels = noise_levels(sigmas)
    B = np.negative if variant == "bh1" else lambda h: np.expm1(-h)
    return data_table(denoiser, levels, order, order + 1, lower_order_final, B, name="unipc")
