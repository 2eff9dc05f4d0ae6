"""Solvers: each builds a `StepTable` from a schedule or noise levels. One module per family, in the paper's symbols."""

from .ddim import ddim, ddim_extrapolated, ddim_reverse
from .ddpm import ddpm
from .denoiser import Denoiser
from .langevin import langevin, predictor_corrector, sgld
from .pndm import plms, prk
from .sigma import dpm2, dpm2_ancestral, dpmpp_2s_ancestral, euler, euler_ancestral, heun
from .sigma_multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms

__all__ = [
    "Denoiser",
    "ddim",
    "ddim_extrapolated",
    "ddim_reverse",
    "ddpm",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "langevin",
    "lms",
    "plms",
    "predictor_corrector",
    "prk",
    "sgld",
]
