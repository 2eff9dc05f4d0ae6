"""Solvers: each builds a `StepTable` from a schedule. One module per family, in the paper's symbols."""

from .ddim import ddim, ddim_reverse
from .ddpm import ddpm

__all__ = ["ddim", "ddim_reverse", "ddpm"]
