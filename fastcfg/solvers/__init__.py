"""Solvers: each builds a `StepTable` from a `Schedule` or noise levels. One module per family, in the paper's symbols.

All raise TypeError for anything else in place of these. `by_name` builds tables from names.
"""

from .cfg_pp import ddim_cfg_pp, euler_ancestral_cfg_pp, euler_cfg_pp
from .consistency import lcm, tcd
from .ddim import ddim, ddim_extrapolated, ddim_reverse
from .ddpm import ddpm
from .deis import deis
from .denoiser import Denoiser
from .langevin import langevin, predictor_corrector, sgld
from .pndm import plms, prk
from .sa import sa_solver
from .sigma import dpm2, dpm2_ancestral, dpmpp_2s_ancestral, euler, euler_ancestral, heun
from .sigma_multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms
from .unipc import unipc

__all__ = ["Denoiser", "ddim", "ddim_cfg_pp", "ddim_extrapolated", "ddim_reverse", "ddpm", "deis", "dpm2"]
__all__ += ["dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "euler"]
__all__ += ["euler_ancestral", "euler_ancestral_cfg_pp", "euler_cfg_pp", "heun", "langevin", "lcm", "lms", "plms"]
__all__ += ["predictor_corrector", "prk", "sa_solver", "sgld", "tcd", "unipc"]
