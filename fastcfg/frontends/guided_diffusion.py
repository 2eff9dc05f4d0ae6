"""Drop-in for guided-diffusion's `gaussian_diffusion`, `respace` and `script_util`.

    from fastcfg.frontends.guided_diffusion import create_gaussian_diffusion    # was guided_diffusion.script_util

Names, arguments, defaults, attributes and results are the originals'; sampling loops run on the engine.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..models.classifier import EncoderUNetModel
from ..models.guided_diffusion import (
    NUM_CLASSES,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_model,
    diffusion_defaults,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_model_and_diffusion_defaults,
)
from ..models.image_conditioned import SuperResModel
from ..models.unet import UNetModel
from ..reference import bits_per_dim, originals
from ._gaussian import schedules as _schedules
from ._gaussian.loops import Function, Keywords, Model
from ._gaussian.process import Process, SpacedProcess
from ._gaussian.schedules import betas_for_alpha_bar, check_options, make_schedule, named_betas

__all__ = ["NUM_CLASSES", "GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "SpacedDiffusion"]
__all__ += ["betas_for_alpha_bar", "create_gaussian_diffusion", "get_named_beta_schedule", "space_timesteps"]
__all__ += ["create_classifier", "create_classifier_and_diffusion", "create_model", "create_model_and_diffusion"]
__all__ += ["classifier_and_diffusion_defaults", "classifier_defaults", "diffusion_defaults", "sr_create_model"]
__all__ += ["model_and_diffusion_defaults", "sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults"]


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X, START_X, EPSILON = range(1, 4)


class ModelVarType(enum.Enum):
    """Where the variance comes from; LEARNED_RANGE lets the model interpolate between FIXED_SMALL and FIXED_LARGE."""

    LEARNED, FIXED_SMALL, FIXED_LARGE, LEARNED_RANGE = range(1, 5)


class LossType(enum.Enum):
    """What training minimises."""

    MSE, RESCALED_MSE, KL, RESCALED_KL = range(1, 5)

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


_PREDICTIONS = {"PREVIOUS_X": "previous_x", "START_X": "x0", "EPSILON": "epsilon"}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> NDArray[np.float64]:
    """Betas by name: "linear" or "cosine". UnknownScheduleError (also a NotImplementedError, as in the original) for
    another name, ValueError for fewer than 1 timestep."""
    return named_betas(schedule_name, ("linear", "cosine"), num_diffusion_timesteps)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Timesteps to keep: "100", "10,15,20", a list, or "ddim25"; see `fastcfg.schedule.space_timesteps`. ValueError for
    counts that do not fit, or "fast27", which only GLIDE knows."""
    if section_counts == "fast27":
        raise ValueError("section_counts: got 'fast27', expected a form such as '100', '10,15,20' or 'ddim25'")
    return _schedules.space_timesteps(num_timesteps, section_counts)


class GaussianDiffusion(Process):
    """guided-diffusion's `GaussianDiffusion`.

    Args:
        betas: [T] in (0, 1].
        model_mean_type, model_var_type: what the model predicts, and where the variance comes from.
        loss_type: of `training_losses`.
        rescale_timesteps: give the model float times in the range of a 1000-step process.

    Raises:
        ValueError: betas that are not a process (also an AssertionError, as in the original), or a single one (also an
            IndexError).

    Example:
        >>> diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="ddim25")
        >>> model = lambda x, t: torch.cat([0.1 * x, 0 * x], dim=1)
        >>> diffusion.ddim_sample_loop(model, (2, 3, 8, 8), device="cpu").shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        # Enums are taken by name: they may be the original's.
        self.model_mean_type = ModelMeanType[model_mean_type.name]
        self.model_var_type = ModelVarType[model_var_type.name]
        self.loss_type = LossType[loss_type.name]
        self.rescale_timesteps = rescale_timesteps
        self._set_schedule(make_schedule(betas))

    @property
    def _prediction(self) -> str:  # type: ignore[override]
        return _PREDICTIONS[self.model_mean_type.name]

    @property
    def _variance(self) -> str:  # type: ignore[override]
        return self.model_var_type.name.lower()

    @property
    def _rescale(self) -> bool:  # type: ignore[override]
        return self.rescale_timesteps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return originals.predict_xstart_from_xprev(self._arrays(), x_t, t, xprev)

    def ddim_reverse_sample(  # type: ignore[override]
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function | None = None,
        model_kwargs: Keywords = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """As GLIDE's, without a cond_fn."""
        return super().ddim_reverse_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Keywords = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of one step at t (int64 [B]) for images x_start [B, C, ...] in [-1, 1]; noise is drawn like x_start
        by default.

        Returns:
            "loss" [B], and its parts "mse" and "vb" (in bits per dimension) if it has them.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs)
        types = {"prediction": self._prediction, "variance": self._variance, "loss": self.loss_type.name.lower()}
        return bits_per_dim.training_losses(self._arrays(), output, x_start, x_t, t, noise, **types)

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Keywords = None,
    ) -> dict[str, Tensor]:
        p = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return bits_per_dim.vb_terms(self._arrays(), p, x_start, x_t, t)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        return bits_per_dim.prior_bpd(self._arrays(), x_start)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Keywords = None
    ) -> dict[str, Tensor]:
        """The variational bound of images x_start [B, C, ...], in bits per dimension.

        Returns:
            total_bpd and prior_bpd [B]; vb, xstart_mse and mse (of ε) [B, T], the noisiest step first.
        """
        predict = partial(self.p_mean_variance, model, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return bits_per_dim.bits_per_dimension(self._arrays(), predict, x_start)


class SpacedDiffusion(SpacedProcess, GaussianDiffusion):
    """guided-diffusion's `SpacedDiffusion`."""


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> SpacedDiffusion:
    """guided-diffusion's `script_util.create_gaussian_diffusion`.

    Args:
        steps: T of the original process.
        learn_sigma, sigma_small: the variance is LEARNED_RANGE, or else FIXED_SMALL instead of FIXED_LARGE.
        noise_schedule: for `get_named_beta_schedule`.
        use_kl, rescale_learned_sigmas: the loss is RESCALED_KL, or else RESCALED_MSE instead of MSE.
        predict_xstart: the model predicts x0, else ε.
        rescale_timesteps: as `GaussianDiffusion`.
        timestep_respacing: for `space_timesteps`; empty keeps all.
    """
    betas, kept = get_named_beta_schedule(noise_schedule, steps), space_timesteps(steps, timestep_respacing or [steps])
    mean = ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    variance = ModelVarType.LEARNED_RANGE if learn_sigma else fixed
    loss = LossType.RESCALED_KL if use_kl else LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    types: dict[str, Any] = {"model_mean_type": mean, "model_var_type": variance, "loss_type": loss}
    return SpacedDiffusion(use_timesteps=kept, betas=betas, **types, rescale_timesteps=rescale_timesteps)


def create_model_and_diffusion(**options: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """guided-diffusion's `script_util.create_model_and_diffusion`: takes all of `model_and_diffusion_defaults()`.

    Raises:
        TypeError: an option is missing or unknown.
        ValueError: options that do not fit each other.
    """
    model, diffusion = _divided(options, model_and_diffusion_defaults())
    return create_model(**model), create_gaussian_diffusion(**diffusion)


def create_classifier_and_diffusion(**options: Any) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """guided-diffusion's `script_util.create_classifier_and_diffusion`: takes all of
    `classifier_and_diffusion_defaults()`, raises as `create_model_and_diffusion`."""
    classifier, diffusion = _divided(options, classifier_and_diffusion_defaults())
    return create_classifier(**classifier), create_gaussian_diffusion(**diffusion)


def sr_create_model_and_diffusion(**options: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """guided-diffusion's `script_util.sr_create_model_and_diffusion`: takes all of
    `sr_model_and_diffusion_defaults()`, raises as `create_model_and_diffusion`."""
    model, diffusion = _divided(options, sr_model_and_diffusion_defaults())
    return sr_create_model(**model), create_gaussian_diffusion(**diffusion)


def _divided(options: dict[str, Any], expected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the network, and arguments of `create_gaussian_diffusion`."""
    check_options(options, expected)
    diffusion = {name: options[name] for name in diffusion_defaults()}
    network = {name: value for name, value in options.items() if name not in diffusion}
    if "classifier_width" not in options:
        network["learn_sigma"] = options["learn_sigma"]
    diffusion["steps"] = diffusion.pop("diffusion_steps")
    return network, diffusion
