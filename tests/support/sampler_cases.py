"""k-diffusion's sampling functions with the options that change their numbers, and a denoiser for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES: list[tuple[str, dict[str, Any]]] = [
    ("sample_euler", {}),
    ("sample_heun", {}),
    ("sample_dpm_2", {}),
    ("sample_lms", {}),
    ("sample_lms", {"order": 2}),
    ("sample_dpmpp_2m", {}),
    *((f"sample_{name}", {"eta": eta}) for name in ("euler_ancestral", "dpm_2_ancestral") for eta in (0.0, 0.5, 1.0)),
    *(("sample_dpmpp_2s_ancestral", {"eta": eta, "s_noise": 0.9}) for eta in (0.0, 1.0)),
    *(("sample_dpmpp_sde", {"eta": eta, "r": r}) for eta, r in ((1.0, 0.5), (0.5, 0.4), (0.0, 0.5))),
    *(("sample_dpmpp_2m_sde", {"eta": 1.0, "solver_type": kind}) for kind in ("midpoint", "heun")),
    ("sample_dpmpp_3m_sde", {"eta": 0.7, "s_noise": 1.1}),
    *((f"sample_{name}", {"s_churn": 5.0, "s_noise": 1.003}) for name in ("euler", "heun", "dpm_2")),
    ("sample_euler", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 10.0}),
]


def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """A smooth denoiser without weights; the sampler's times are float32."""
    sigma = sigma.float().double().view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + sigma**2)) + 0.1 * torch.cos(sigma)
