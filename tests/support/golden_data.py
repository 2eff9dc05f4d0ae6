"""Recorded answers of guided-diffusion and GLIDE, and the toy models that their recorded loops ran."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcfg.schedule import Schedule
from support import GOLDEN

FOLDER = GOLDEN

PREDICTIONS = {"EPSILON": "epsilon", "START_X": "x0", "PREVIOUS_X": "previous_x"}


def cases(stem: str) -> list[dict[str, Any]]:
    """The entries of a JSON file."""
    return json.loads((FOLDER / f"{stem}.json").read_text(encoding="utf-8"))


@cache
def arrays(stem: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(FOLDER / f"{stem}.npz") as file:
        return dict(file)


def tensor(stem: str, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A fresh tensor of one array, cast if a dtype is given."""
    return torch.from_numpy(arrays(stem)[name].copy()).to(dtype)


def schedule_of(case: dict[str, Any]) -> Schedule:
    """The (re-spaced) process of a case."""
    return _schedule(case["sched"], case["T"], case["respacing"])


@cache
def _schedule(name: str, num_timesteps: int, respacing: str | None) -> Schedule:
    schedule = Schedule.named(name, num_timesteps)
    return schedule.respace(respacing) if respacing else schedule


def assert_recorded(got: Tensor, stem: str, name: str, dtype: str, tolerance: float) -> None:
    """`got` is the recorded array to the bit, of the recorded dtype.

    torch's float32 functions and its CPU generator give the recorded bits on x86 with AVX2 or AVX-512; on any other CPU
    the tolerance holds instead.
    """
    want = tensor(stem, name, getattr(torch, dtype))
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(got, want), f"{name}: {int((got != want).sum())} values differ, error {error(got, want):.3g}"
    else:
        assert error(got, want) <= tolerance


def error(got: Tensor, want: Tensor) -> float:
    """Largest |got - want| / (1 + |want|)."""
    got, want = got.double(), want.double()
    return float(((got - want).abs() / (1 + want.abs())).max())


def fill_known(image: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The denoised_fn of inpainting."""
    return lambda x0: x0 * (1 - mask) + image * mask


def toy(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Noise and variance channels, [B, 2C, H, W]."""
    return torch.cat([toy_eps(x, t, y), 0.8 * torch.sin(1.3 * x + _per_sample(y, x) + _pattern(x))], dim=1)


def toy_eps(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Noise, about that of data around `_mean`."""
    s, k = _noise_and_signal(x, t)
    return s * (x - k * _mean(x, y)) / (0.2 * k * k + s * s) + 0.05 * torch.tanh(0.7 * x + 0.1 * _per_sample(y, x))


def toy_x0(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The clean image."""
    b = _per_sample((t.to(x.dtype) + 1) / 1001, x)
    mean = _mean(x, y)
    return (1 - b) * (0.5 * torch.tanh(x) + 0.5 * mean) + b * mean


def toy_up(x: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
    """Noise and variance channels of an upsampler."""
    s, k = _noise_and_signal(x, t)
    m = 0.9 * F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear", align_corners=False)
    eps = s * (x - k * m) / (0.1 * k * k + s * s) + 0.05 * torch.tanh(0.7 * x)
    return torch.cat([eps, 0.8 * torch.sin(1.3 * x + 2.0 * m)], dim=1)


def toy_gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """What a classifier's cond_fn returns."""
    return 2.0 * (1 + _per_sample(t.to(x.dtype), x) / 1000) * (_mean(x, y) - 0.5 * x)


TOYS: dict[str, Callable[..., Tensor]] = {"toy": toy, "toy_eps": toy_eps, "toy_x0": toy_x0, "toy_up": toy_up}


def guided(model: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """GLIDE's recipe: both halves of a doubled batch see the first half's x, and both get the blended noise."""

    def model_fn(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        output = model(torch.cat([half, half]), t, **conditioning)
        eps, rest = output[:, : x.shape[1]], output[:, x.shape[1] :]
        cond, uncond = eps.chunk(2)
        blended = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([blended, blended]), rest], dim=1)

    return model_fn


def _pattern(x: Tensor) -> Tensor:
    c, i, j = (torch.arange(n, dtype=x.dtype) for n in x.shape[1:])
    return 0.3 * c[:, None, None] + 0.2 * i[:, None] - 0.1 * j


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return 0.6 * torch.sin(_per_sample(y, x) + _pattern(x))


def _noise_and_signal(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    angle = (t.to(x.dtype) + 1) / 1001 * math.pi / 2
    return _per_sample(torch.sin(angle), x), _per_sample(torch.cos(angle), x)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, 1, 1, 1)
