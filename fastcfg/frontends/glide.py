"""Drop-in for GLIDE's `gaussian_diffusion`, `respace`, `model_creation` and `clip.model_creation`.

    from fastcfg.frontends.glide import create_model_and_diffusion    # was glide_text2im.model_creation

Names, arguments, defaults, attributes and results are the originals'; sampling loops run on the engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..models.clip import CLIPModel, create_clip_model
from ..models.glide import create_model, model_and_diffusion_defaults, model_and_diffusion_defaults_upsampler
from ..models.text2im import HasVocabulary, Text2ImUNet
from ..models.vocabulary import glide_tokenizer
from ..models.weights import read_state_dict
from ..schedule import legacy_betas
from ._gaussian import schedules as _schedules
from ._gaussian.process import Process, SpacedProcess
from ._gaussian.schedules import UnknownScheduleError, betas_for_alpha_bar, space_timesteps

# The names the original's `load_checkpoint` downloads.
CHECKPOINT_NAMES = ("base", "base-inpaint", "clip/image-enc", "clip/text-enc", "upsample", "upsample-inpaint")

__all__ = ["CHECKPOINT_NAMES", "CLIPModel", "GaussianDiffusion", "SpacedDiffusion", "create_clip_model"]
__all__ += ["betas_for_alpha_bar", "get_beta_schedule", "get_named_beta_schedule", "space_timesteps"]
__all__ += ["create_gaussian_diffusion", "create_model", "create_model_and_diffusion", "glide_tokenizer"]
__all__ += ["load_checkpoint", "model_and_diffusion_defaults", "model_and_diffusion_defaults_upsampler"]


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> NDArray[np.float64]:
    """Betas by name: "linear" or "squaredcos_cap_v2". UnknownScheduleError (also a NotImplementedError, as in the
    original) for another name, ValueError for fewer than 1 timestep."""
    return _schedules.named_betas(schedule_name, ("linear", "squaredcos_cap_v2"), num_diffusion_timesteps)


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> NDArray[np.float64]:
    """Betas of the deprecated schedules: "quad", "linear", "warmup10", "warmup50", "const" or "jsd";
    UnknownScheduleError as `get_named_beta_schedule`."""
    ends = {"beta_start": beta_start, "beta_end": beta_end}
    try:
        return legacy_betas(beta_schedule, **ends, num_timesteps=num_diffusion_timesteps)
    except ValueError as error:
        raise UnknownScheduleError(str(error)) from None


class GaussianDiffusion(Process):
    """GLIDE's `GaussianDiffusion`: the model predicts ε and a variance in the learned range.

    Raises:
        ValueError: betas that are not a process (also an AssertionError, as in the original), or a single one (also an
            IndexError).

    Example:
        >>> diffusion = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "10")
        >>> model = lambda x, t: torch.cat([0.1 * x, 0 * x], dim=1)
        >>> diffusion.p_sample_loop(model, (2, 3, 8, 8), device="cpu").shape
        torch.Size([2, 3, 8, 8])
    """

    _takes_tuples = True

    def __init__(self, *, betas: ArrayLike) -> None:
        self._set_schedule(_schedules.make_schedule(betas))


class SpacedDiffusion(SpacedProcess, GaussianDiffusion):
    """GLIDE's `SpacedDiffusion`."""


def create_gaussian_diffusion(
    steps: int, noise_schedule: str, timestep_respacing: str | Sequence[int]
) -> SpacedDiffusion:
    """GLIDE's `model_creation.create_gaussian_diffusion`: a schedule of `get_named_beta_schedule`, respaced
    by `space_timesteps` (empty keeps all)."""
    betas = get_named_beta_schedule(noise_schedule, steps)
    return SpacedDiffusion(use_timesteps=space_timesteps(steps, timestep_respacing or [steps]), betas=betas)


def create_model_and_diffusion(
    *, tokenizer: HasVocabulary | None = None, **options: Any
) -> tuple[Text2ImUNet, SpacedDiffusion]:
    """GLIDE's `model_creation.create_model_and_diffusion`.

    Args:
        tokenizer: becomes the model's `tokenizer`; None looks for GLIDE's own (`glide_tokenizer`).
        **options: all of `model_and_diffusion_defaults()`.

    Raises:
        TypeError: an option is missing or unknown.
        ValueError: options that do not fit each other, or GLIDE's vocabulary is not found.

    Example:
        >>> options = model_and_diffusion_defaults()
        >>> options["timestep_respacing"] = "100"
        >>> model, diffusion = create_model_and_diffusion(**options)
    """
    _schedules.check_options(options, model_and_diffusion_defaults())
    names = ("diffusion_steps", "noise_schedule", "timestep_respacing")
    steps, noise_schedule, respacing = (options.pop(name) for name in names)
    model = create_model(**options, tokenizer=glide_tokenizer() if tokenizer is None else tokenizer)
    return model, create_gaussian_diffusion(steps, noise_schedule, respacing)


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Weights for `load_state_dict`, on a device. The original downloads them by name; this reads local files only: a
    state dict in safetensors, or written by `torch.save` (`base.pt`), of which only tensors are unpickled. ValueError
    for a file that does not exist or is not a state dict, OSError for one that cannot be read.
    """
    if not Path(path).is_file():
        hint = " (fastcfg downloads nothing)" if os.fspath(path) in CHECKPOINT_NAMES else ""
        got = f"{os.fspath(path)!r}, which is not a file{hint}"
        raise ValueError(f"path: got {got}, expected a checkpoint such as base.pt")
    return {name: value.to(device) for name, value in read_state_dict(path).items()}
