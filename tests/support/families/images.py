"""Stand-ins for projects of images: what each changed of guided-diffusion's object."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import GaussianDiffusion, SpacedDiffusion, extract
from .forks import Fork


class ImprovedDiffusion(SpacedDiffusion):
    """improved-diffusion: no cond_fn anywhere, so further arguments are elsewhere by position."""

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = torch.randn_like(x)
        return {
            "sample": out["mean"] + self._not_last(t, x) * self._std(out) * noise,
            "pred_xstart": out["pred_xstart"],
        }

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        final: Any = None
        for final in self.p_sample_loop_progressive(  # noqa: B007
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress
        ):
            pass
        return final["sample"]

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)
                yield out
                x = out["sample"]


class DiT(SpacedDiffusion):
    """DiT, fast-DiT, MDT, PixArt: no rescale_timesteps, and models that may give a tuple."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        super().__init__(use_timesteps, **kwargs)
        del self.rescale_timesteps

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        extras = []

        def first(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
            output = wrapped(x, t, **model_kwargs)
            output, extra = output if isinstance(output, tuple) else (output, None)
            extras.append(extra)
            return output

        wrapped = self._wrap_model(model)
        out = GaussianDiffusion.p_mean_variance(self, first, *args, **kwargs)
        return {**out, "extra": extras[0]}


class Glide(SpacedDiffusion):
    """GLIDE: ε and a learned range, without attributes that say so."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        super().__init__(use_timesteps, **kwargs)
        del self.model_mean_type, self.model_var_type, self.loss_type, self.rescale_timesteps

    def p_mean_variance(self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._p_mean_variance(self._wrap_model(model), x, t, *args, **kwargs)

    def _p_mean_variance(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        output, share = model(x, t, **(model_kwargs or {})).chunk(2, dim=1)
        least, most = self.posterior_log_variance_clipped, np.log(self.betas)
        share = (share + 1) / 2
        log_variance = share * extract(most, t, x.shape) + (1 - share) * extract(least, t, x.shape)
        x0 = self._predict_xstart_from_eps(x_t=x, t=t, eps=output)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return self._p(mean, torch.exp(log_variance), log_variance, x0)


class OtherClamp(Fork):
    """glid-3-xl: [-2, 2]."""

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        def limited(x0: Tensor) -> Tensor:
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            return x0.clamp(-2, 2) if clip_denoised else x0

        return super().p_mean_variance(model, x, t, False, limited, model_kwargs)


class Percentile(ImprovedDiffusion):
    """Kandinsky 2: a percentile of the first sample's, and loops that begin at `init_step`."""

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        def limited(x0: Tensor) -> Tensor:
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            if not clip_denoised:
                return x0
            limit = max(float(np.percentile(x0[0].abs().reshape(-1).numpy(), 99.5)), 1.0)
            return x0.clamp(-limit, limit) / limit

        return super().p_mean_variance(model, x, t, False, limited, model_kwargs)

    def p_sample_loop(self, *args: Any, init_step: int | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        *_, final = self.p_sample_loop_progressive(*args, init_step=init_step, **kwargs)
        return final["sample"]

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
        init_step: int | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in range(self.num_timesteps if init_step is None else init_step)[::-1]:
            with torch.no_grad():
                out = self.p_sample(
                    model, x, torch.tensor([i] * shape[0]), clip_denoised, denoised_fn, model_kwargs=model_kwargs
                )
                yield out
                x = out["sample"]


Velocity = enum.Enum("Velocity", "PREVIOUS_X START_X EPSILON VELOCITY")


class Hunyuan(DiT):
    """HunyuanDiT: v, and outputs in a dictionary."""

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        def taken(x: Tensor, t: Tensor, **model_kwargs: Any) -> Any:
            output = model(x, t, **model_kwargs)
            return output["x"] if isinstance(output, dict) else output

        return super().p_mean_variance(taken, *args, **kwargs)

    def _x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.model_mean_type.name != "VELOCITY":
            return super()._x0(output, x, t)
        signal = extract(self.sqrt_alphas_cumprod, t, x.shape)
        return signal * x - extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape) * output


class Semantic(SpacedDiffusion):
    """Semantic diffusion: guidance in `p_mean_variance`, of the scale `s`, if it is above 1."""

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        def guided(x: Tensor, t: Tensor, y: Tensor, s: float = 1.0) -> Tensor:
            output = model(x, t, y=y)
            if s > 1.0:
                without = model(x, t, y=torch.zeros_like(y))
                channels = x.shape[1]
                output[:, :channels] = without[:, :channels] + s * (output[:, :channels] - without[:, :channels])
            return output

        return super().p_mean_variance(guided, x, t, clip_denoised, denoised_fn, model_kwargs)
