"""CFG++ (Chung et al. 2024, https://arxiv.org/abs/2406.08070): x0 from the guided output, ε from the unconditional one.

Guidance then keeps to the data: its scale is λ in [0, 1] (`CFG(0.6)`; 1 is the conditional x0), and the paper's λ of
0.2 to 1 look like ordinary scales of 2.5 to 12.5. The branch "uncond" is evaluated in every row. x0 may be clipped; ε
is the model's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..schedule import Schedule
from ..table import StepTable
from ..utils.checks import takes_numbers
from ._prediction import epsilon_coefficients, timestep_table, x0_coefficients
from .ddim import noise_split
from .denoiser import RAW, Denoiser, denoising_table
from .sigma import ancestral_levels


@takes_numbers
def ddim_cfg_pp(
    schedule: Schedule, *, eta: float = 0.0, prediction: str = "epsilon", rescale_timesteps: bool = False
) -> StepTable:
    """DDIM with CFG++: algorithm 2 of the paper.

    Args, errors, result: as `ddim`.

    Example:
        >>> ddim_cfg_pp(Schedule.named("linear", 1000).respace(25)).uses_unconditional
        True
    """
    σ, direction = noise_split(schedule, eta)
    p_x, p_m = x0_coefficients(schedule, prediction)
    e_x, e_m = epsilon_coefficients(schedule.alphas_cumprod, p_x, p_m, prediction)
    columns = {"a_x": direction * e_x, "a_0": np.sqrt(schedule.alphas_cumprod_prev), "a_u": direction * e_m, "s": σ}
    return timestep_table(schedule, prediction, rescale_timesteps, **columns, name="ddim_cfg_pp")


@takes_numbers
def euler_cfg_pp(sigmas: ArrayLike, *, denoiser: Denoiser = RAW) -> StepTable:
    """Euler steps with CFG++: ComfyUI's `euler_cfg_pp`, which is `ddim_cfg_pp` in noise-level space. All as `euler`."""
    return _euler(sigmas, denoiser, 0.0, 1.0, "euler_cfg_pp")


@takes_numbers
def euler_ancestral_cfg_pp(
    sigmas: ArrayLike, *, eta: float = 1.0, s_noise: float = 1.0, denoiser: Denoiser = RAW
) -> StepTable:
    """Ancestral Euler steps with CFG++: ComfyUI's `euler_ancestral_cfg_pp`. All as `euler_ancestral`."""
    return _euler(sigmas, denoiser, eta, s_noise, "euler_ancestral_cfg_pp")


def _euler(sigmas: ArrayLike, denoiser: Denoiser, eta: float, s_noise: float, name: str) -> StepTable:
    σ, σ_to, σ_down, σ_up = ancestral_levels(sigmas, eta, s_noise)
    # x' = α' x0 + σ_down ε with ε = (x - α u0)/σ, where α is 1, or 1 - σ of a flow.
    flow = denoiser.prediction == "flow"
    α, α_to = (1 - σ, 1 - σ_to) if flow else (np.ones_like(σ), np.ones_like(σ))
    model = denoiser.columns(σ)
    ratio = σ_down / σ
    columns = {"a_x": ratio * (1 - α * model["p_x"]), "a_0": α_to, "a_u": -ratio * α * model["p_m"], "s": σ_up}
    return denoising_table(denoiser, σ, σ[0], **columns, end=σ_to[-1], name=name)
