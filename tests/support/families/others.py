"""Stand-ins for projects of point clouds, videos, vectors and words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SpacedDiffusion, extract
from .images import DiT


class Points(SpacedDiffusion):
    """point-e and shap-e: types are strings, channels are scaled, nothing is clipped by default, a temperature."""

    def __init__(
        self, use_timesteps: Any, channel_scales: Any = None, channel_biases: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(use_timesteps, **kwargs)
        kinds = {"EPSILON": "epsilon", "START_X": "x_start", "PREVIOUS_X": "x_prev"}
        self.model_mean_type = kinds[self.model_mean_type.name]
        self.model_var_type, self.loss_type = self.model_var_type.name.lower(), "mse"
        self.channel_scales, self.channel_biases = channel_scales, channel_biases
        del self.rescale_timesteps

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        output = self._wrap_model(model)(x, t, **(model_kwargs or {}))
        log_variance = extract(self.posterior_log_variance_clipped, t, x.shape)
        if self.model_var_type == "learned_range":
            output, share = output.chunk(2, dim=1)
            share = (share + 1) / 2
            log_variance = share * extract(np.log(self.betas), t, x.shape) + (1 - share) * log_variance
        x0 = output if self.model_mean_type == "x_start" else self._predict_xstart_from_eps(x, t, output)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean, _, _ = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)
        return self._p(mean, torch.exp(log_variance), log_variance, x0)

    def scale_channels(self, x: Tensor) -> Tensor:
        return self._by_channel(x, lambda x, scales, biases: x * scales + biases)

    def unscale_channels(self, x: Tensor) -> Tensor:
        return self._by_channel(x, lambda x, scales, biases: (x - biases) / scales)

    def _by_channel(self, x: Tensor, scale: Any) -> Tensor:
        if self.channel_scales is None:
            return x
        shape = [1, -1, *[1] * (x.ndim - 2)]
        scales, biases = (torch.from_numpy(v).to(x).reshape(shape) for v in (self.channel_scales, self.channel_biases))
        return scale(x, scales, biases)

    def unscale_out_dict(self, out: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.unscale_channels(value) if isinstance(value, Tensor) else value for name, value in out.items()
        }

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        temp: float = 1.0,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x) * temp
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {
            "sample": out["mean"] + self._not_last(t, x) * self._std(out) * noise,
            "pred_xstart": out["pred_xstart"],
        }

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        final: Any = None
        for final in self.p_sample_loop_progressive(*args, **kwargs):  # noqa: B007
            pass
        return final["sample"]

    def p_sample_loop_progressive(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
        temp: float = 1.0,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, temp=temp)
                yield self.unscale_out_dict(out)
                x = out["sample"]

    def ddim_sample_loop_progressive(  # type: ignore[override]
        self, model: Any, shape: Any, noise: Tensor | None = None, eta: float = 0.0, temp: float = 1.0, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape) if noise is None else noise
        for name in ("device", "progress"):
            options.pop(name, None)
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                out = self.ddim_sample(model, x, torch.tensor([i] * shape[0]), eta=eta, **options)
                yield self.unscale_out_dict(out)
                x = out["sample"]


class Frames(DiT):
    """Latte: the channels, and so the variances, are dimension 2."""

    def _variances(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert output.shape == (*x.shape[:2], 2 * x.shape[2], *x.shape[3:])
        output, share = torch.split(output, x.shape[2], dim=2)
        share = (share + 1) / 2
        least = extract(self.posterior_log_variance_clipped, t, x.shape)
        log_variance = share * extract(np.log(self.betas), t, x.shape) + (1 - share) * least
        return output, torch.exp(log_variance), log_variance


class KnownFrames(Frames):
    """VDT: frames under a mask are the video's."""

    def p_mean_variance(self, model: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        known = kwargs.pop("known", None)
        if known is not None:
            x = known["raw_x"] * (1 - known["mask"]) + x * known["mask"]
        return super().p_mean_variance(model, x, t, *args, **kwargs)

    def p_sample(  # type: ignore[override]
        self, model: Any, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: Any = None, known: Any = None
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs=model_kwargs, known=known)
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
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
        raw_x: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = torch.randn(*shape, device=device) if noise is None else noise
        known = None if raw_x is None else {"raw_x": raw_x, "mask": mask}
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                x = self.p_sample(model, x, torch.tensor([i] * shape[0]), clip_denoised, model_kwargs, known)["sample"]
        return x if raw_x is None else raw_x * (1 - mask) + x * mask


class Tokens(DiT):
    """mar: vectors [B, C], and a temperature."""

    def p_sample(self, *args: Any, temperature: float = 1.0, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        model, x, t, *rest = args
        out = self.p_mean_variance(model, x, t, *rest, **kwargs)
        noise = torch.randn_like(x)
        sample = out["mean"] + self._not_last(t, x) * self._std(out) * noise * temperature
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: Any = None,
        temperature: float = 1.0,
    ) -> Tensor:
        x = torch.randn(*shape) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0])
            with torch.no_grad():
                x = self.p_sample(model, x, t, clip_denoised, model_kwargs=model_kwargs, temperature=temperature)[
                    "sample"
                ]
        return x


class Latents(SpacedDiffusion):
    """diffae: vectors, outputs in an object, `sample` beside the loops."""

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().p_mean_variance(lambda x, t, **more: model(x, t, **more).pred, *args, **kwargs)

    def sample(self, model: Any, shape: Any, noise: Tensor | None = None, model_kwargs: Any = None) -> Tensor:
        return self.ddim_sample_loop(model, shape, noise, model_kwargs=model_kwargs, device="cpu")


class Cells(SpacedDiffusion):
    """scDiffusion: vectors, times [B, 1], and guidance from a step on."""

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        wrapped = self._wrap_model(model)
        return super(SpacedDiffusion, self).p_mean_variance(
            lambda x, t, **more: wrapped(x, t[:, None], **more), *args, **kwargs
        )

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
        start_time: int | None = None,
        start_guide_steps: int = 3,
    ) -> tuple[Tensor, list[Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        path = []
        for i in reversed(range(self.num_timesteps if start_time is None else start_time)):
            with torch.no_grad():
                t = torch.tensor([i] * shape[0], device=device)
                guide = cond_fn if i < start_guide_steps else None
                x = self.p_sample(model, x, t, clip_denoised, denoised_fn, guide, model_kwargs)["sample"]
            path.append(x)
        return x, path


class Words(SpacedDiffusion):
    """DiffuSeq: [B, L, D], noise of limited size, known words, `denoised_fn(x, t)`, and all samples in a list."""

    def p_sample_loop(  # type: ignore[override]
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        top_p: float | None = None,
        clamp_step: int = 0,
        mask: Tensor | None = None,
        x_start: Tensor | None = None,
    ) -> list[Tensor]:
        x, samples = torch.randn(*shape) if noise is None else noise, []
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0])
            rounded = None if denoised_fn is None or i > clamp_step else lambda x0, t=t: denoised_fn(x0, t)
            with torch.no_grad():
                out = self.p_mean_variance(model, x, t, clip_denoised, rounded, model_kwargs)
                noise = torch.randn_like(x)
                while top_p is not None and bool((far := noise.abs() > top_p).any()):
                    noise[far] = torch.randn_like(noise[far])
                x = out["mean"] + self._not_last(t, x) * self._std(out) * noise
                x = x if mask is None else torch.where(mask == 0, x_start, x)  # type: ignore[arg-type]
            samples.append(x)
        return samples
