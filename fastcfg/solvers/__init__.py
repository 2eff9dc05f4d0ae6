"""Solvers: each builds a `StepTable` from a schedule. One module per family, in the paper's symbols."""

from .ddim import ddim, ddim_extrapolated, ddim_reverse
from .ddpm import ddpm
from .langevin import langevin, predictor_corrector, sgld
from .pndm import plms, prk

__all__ = [
    "ddim",
    "ddim_extrapolated",
    "ddim_reverse",
    "ddpm",
    "langevin",
    "plms",
    "predictor_corrector",
    "prk",
    "sgld",
]
