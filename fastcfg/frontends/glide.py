"""Drop-in for GLIDE's `gaussian_diffusion`, `respace` and `model_creation`.

    from fastcfg.frontends.glide import create_model_and_diffusion    # was glide_text2im.model_creation

Names, arguments, defaults, attributes and results are the originals'; sampling loops run on the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..schedule import Schedule, legacy_betas
from ._process import Function, Keywords, Model, Process, deterministic
from ._schedules import UnknownScheduleError, betas_for_alpha_bar, make_schedule, named_betas, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "SpacedDiffusion",
    "betas_for_alpha_bar",
    "create_gaussian_diffusion",
    "get_beta_schedule",
    "get_named_beta_schedule",
    "space_timesteps",
]


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> NDArray[np.float64]:
    """Betas by name: "linear" or "squaredcos_cap_v2".

    Raises:
        UnknownScheduleError: another name; a NotImplementedError, as in the original.
        ValueError: fewer than 1 timestep.
    """
    return named_betas(schedule_name, ("linear", "squaredcos_cap_v2"), num_diffusion_timesteps)


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> NDArray[np.float64]:
    """Betas of the deprecated schedules: "quad", "linear", "warmup10", "warmup50", "const" or "jsd".

    Raises:
        UnknownScheduleError: another name; a NotImplementedError, as in the original.
    """
    try:
        return legacy_betas(
            beta_schedule, beta_start=beta_start, beta_end=beta_end, num_timesteps=num_diffusion_timesteps
        )
    except ValueError as error:
        raise UnknownScheduleError(str(error)) from None


class GaussianDiffusion(Process):
    """GLIDE's `GaussianDiffusion`: the model predicts ε and a variance in the learned range.

    Args:
        betas: [T] in (0, 1].

    Attributes:
        num_timesteps: T.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, sqrt_alphas_cumprod,
        sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1,
        posterior_mean_coef2: float64 [T].

    Raises:
        ValueError: betas that are no process (an AssertionError too, as in the original), or a single one (an
            IndexError too).

    Example:
        >>> diffusion = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "10")
        >>> model = lambda x, t: torch.cat([0.1 * x, 0 * x], dim=1)
        >>> diffusion.p_sample_loop(model, (2, 3, 8, 8), device="cpu").shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, *, betas: ArrayLike) -> None:
        self._set_up(make_schedule(betas), "epsilon", "learned_range")

    def _adopt(self, other: Any, schedule: Schedule) -> None:
        """Be the process that another project's object describes."""
        self._set_up(schedule, "epsilon", "learned_range")

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Keywords = None,
    ) -> dict[str, Any]:
        """As `Process.p_mean_variance`; a model that returns (output, extra) has extra passed on as "extra"."""
        output, extra = self._call(model, x, t, model_kwargs), None
        if isinstance(output, tuple):
            output, extra = output
        return {**self._p_mean_variance(output, x, t, clip_denoised, denoised_fn), "extra": extra}

    def ddim_reverse_sample(  # type: ignore[override]
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Keywords = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """x_{t+1} of the deterministic ODE: sample and pred_xstart."""
        deterministic(eta)
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            p = self.condition_score(cond_fn, p, x, t, model_kwargs)
        return self._reversed(p, x, t)


class SpacedDiffusion(GaussianDiffusion):
    """GLIDE's `SpacedDiffusion`: a process that keeps some timesteps of another.

    Args:
        use_timesteps: those it keeps.
        **kwargs: of the `GaussianDiffusion` whose timesteps they are.

    Attributes:
        use_timesteps: as a set.
        timestep_map: as a sorted list.
        original_num_steps: T of the other process.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        self._keep(GaussianDiffusion(**kwargs), use_timesteps, ("epsilon", "learned_range"))


def create_gaussian_diffusion(
    steps: int, noise_schedule: str, timestep_respacing: str | Sequence[int]
) -> SpacedDiffusion:
    """GLIDE's `model_creation.create_gaussian_diffusion`.

    Args:
        steps: T of the original process.
        noise_schedule: for `get_named_beta_schedule`.
        timestep_respacing: for `space_timesteps`; empty keeps all.
    """
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
    )
