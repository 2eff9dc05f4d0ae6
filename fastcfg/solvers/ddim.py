"""Denoising diffusion implicit models (Song et al. 2020, https://arxiv.org/abs/2010.02502)."""

from __future__ import annotations

import numpy as np

from ..schedule import Schedule
from ..table import StepTable
from ..utils.checks import check_finite, takes_numbers
from ._prediction import Array, check_schedule, timestep_table
from ._rebuild import rebuilt


@takes_numbers
def ddim(
    schedule: Schedule, *, eta: float = 0.0, prediction: str = "epsilon", rescale_timesteps: bool = False
) -> StepTable:
    """Equation 12 of the paper: guided-diffusion's and GLIDE's `ddim_sample_loop`.

    ε is re-derived from the clipped x0, as in the originals; learned variances are ignored. A classifier's gradient g
    moves ε by -√(1-ᾱ) g, and x0 is not clipped again (Dhariwal & Nichol 2021, algorithm 2; guided-diffusion's
    `condition_score`).

    Args:
        schedule: the process, re-spaced to the number of steps wanted.
        eta: 0 for the deterministic sampler, 1 for the noise level of DDPM; finite, at least 0, and such that σ² is at
            most 1 - ᾱ of the previous step.
        prediction: "epsilon", "x0", "v" or "previous_x".
        rescale_timesteps: give the model float times in the range of a 1000-step process.

    Result: a table of `schedule.num_timesteps` rows, noisiest first. The last row returns x0.

    Raises:
        TypeError: schedule not a Schedule.
        ValueError: unknown prediction, or eta out of its range.

    Example:
        >>> ddim(Schedule.named("linear", 1000).respace("ddim25")).uses_noise
        False
    """
    σ, direction = noise_split(schedule, eta)
    columns = _columns(schedule, schedule.alphas_cumprod_prev, direction)
    return timestep_table(schedule, prediction, rescale_timesteps, **columns, s=σ, name="ddim")


@takes_numbers
def ddim_reverse(schedule: Schedule, *, prediction: str = "epsilon", rescale_timesteps: bool = False) -> StepTable:
    """The deterministic ODE run from image to noise: guided-diffusion's `ddim_reverse_sample_loop`.

    Args, errors, result: as `ddim`, with the least noisy row first. Start it from an image in [-1, 1].
    """
    check_schedule(schedule)
    ᾱ_next = schedule.alphas_cumprod_next
    columns = _columns(schedule, ᾱ_next, np.sqrt(1 - ᾱ_next))
    return timestep_table(schedule, prediction, rescale_timesteps, True, **columns, name="ddim_reverse")


@rebuilt
@takes_numbers
def ddim_extrapolated(schedule: Schedule, *, prediction: str = "epsilon", rescale_timesteps: bool = False) -> StepTable:
    """DDIM with ε extrapolated along the run: glide-finetune's `dpm_solver_sample_loop` of order 2.

    x' = √ᾱ_prev x0 + √(1-ᾱ_prev) (3/2 ε - 1/2 ε_last), from the second step on; ε is re-derived from the clipped x0.
    This is for reproducing that fork's images: it is not DPM-Solver++, and more steps do not bring it nearer to the
    ODE's solution, because x0 stays that of ε. `plms` of order 2 extrapolates both.

    Args, errors, result: as `ddim`, with one saved tensor.
    """
    check_schedule(schedule)
    ᾱ, ᾱ_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    ε_x, ε_0 = 1 / np.sqrt(1 - ᾱ), -np.sqrt(ᾱ / (1 - ᾱ))
    direction = np.sqrt(1 - ᾱ_prev)
    # The first step has no ε before it.
    first = np.arange(len(ᾱ)) == len(ᾱ) - 1
    now, last = np.where(first, 1.0, 1.5) * direction, np.where(first, 0.0, -0.5) * direction
    columns = {"a_x": now * ε_x, "a_0": np.sqrt(ᾱ_prev) + now * ε_0, "a_h0": last, "k_x": ε_x, "k_0": ε_0, "slot": 0}
    return timestep_table(schedule, prediction, rescale_timesteps, **columns, name="ddim_extrapolated")


def noise_split(schedule: Schedule, eta: float) -> tuple[Array, Array]:
    """(σ, √(1 - ᾱ_prev - σ²)), each [T] by timestep: equation 16 of the paper, and what is left for ε."""
    check_schedule(schedule)
    check_finite("eta", eta, least=0)
    ᾱ, ᾱ_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    σ = eta * np.sqrt((1 - ᾱ_prev) / (1 - ᾱ)) * np.sqrt(1 - ᾱ / ᾱ_prev)
    direction = 1 - ᾱ_prev - σ**2
    # At eta = 1 rounding may take the first step a little below 0.
    if direction.min() < -1e-12:
        steps = int((direction < 0).sum())
        raise ValueError(f"eta: got {eta}, expected less: sigma exceeds the noise that is left at {steps} steps")
    return σ, np.sqrt(np.maximum(direction, 0))


def _columns(schedule: Schedule, ᾱ_to: Array, direction: Array) -> dict[str, Array]:
    """x' = √ᾱ_to x0 + direction ε + s z with ε = (x - √ᾱ x0) / √(1-ᾱ), as rows over (x, x0)."""
    # Where ᾱ is 0 nothing of the image is left, and a classifier's gradient vanishes.
    ᾱ = schedule.alphas_cumprod
    p_g = np.divide(1 - ᾱ, np.sqrt(ᾱ), out=np.zeros_like(ᾱ), where=ᾱ > 0)
    a_x = direction / schedule.sqrt_one_minus_alphas_cumprod
    return {"a_x": a_x, "a_0": np.sqrt(ᾱ_to) - a_x * schedule.sqrt_alphas_cumprod, "p_g": p_g}
