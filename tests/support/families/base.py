"""guided-diffusion's interface: a Gaussian process, and the same with some of the steps of a longer one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .process import Loss, Mean, Process, Var, betas, extract

__all__ = ["GaussianDiffusion", "Loss", "Mean", "SpacedDiffusion", "Var", "betas", "extract", "spaced"]


class GaussianDiffusion(Process):
    """Single steps, and the loops over them."""

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = torch.randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {
            "sample": out["mean"] + self._not_last(t, x) * self._std(out) * noise,
            "pred_xstart": out["pred_xstart"],
        }

    def ddim_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {"sample": self._ddim(out["pred_xstart"], x, t, eta), "pred_xstart": out["pred_xstart"]}

    def _ddim(self, x0: Tensor, x: Tensor, t: Tensor, eta: float) -> Tensor:
        eps = self._predict_eps_from_xstart(x, t, x0)
        now, then = (extract(table, t, x.shape) for table in (self.alphas_cumprod, self.alphas_cumprod_prev))
        sigma = eta * torch.sqrt((1 - then) / (1 - now)) * torch.sqrt(1 - now / then)
        noise = torch.randn_like(x)
        mean = x0 * torch.sqrt(then) + torch.sqrt(1 - then - sigma**2) * eps
        return mean + self._not_last(t, x) * sigma * noise

    def ddim_reverse_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        assert eta == 0.0, "the reverse is deterministic"
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        then = extract(self.alphas_cumprod_next, t, x.shape)
        sample = out["pred_xstart"] * torch.sqrt(then) + torch.sqrt(1 - then) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # Loops.

    def p_sample_loop(
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
    ) -> Tensor:
        final: Any = None
        for sample in self.p_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
        ):
            final = sample
        return final["sample"]

    def p_sample_loop_progressive(
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
    ) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device if device is None else device
        assert isinstance(shape, tuple | list)
        x = torch.randn(*shape, device=device) if noise is None else noise
        indices = list(range(self.num_timesteps))[::-1]
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for i in indices:
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.p_sample(
                    model,
                    x,
                    t,
                    clip_denoised=clip_denoised,
                    denoised_fn=denoised_fn,
                    cond_fn=cond_fn,
                    model_kwargs=model_kwargs,
                )
                yield out
                x = out["sample"]

    def ddim_sample_loop(
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
        eta: float = 0.0,
    ) -> Tensor:
        final: Any = None
        for sample in self.ddim_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            eta=eta,
        ):
            final = sample
        return final["sample"]

    def ddim_sample_loop_progressive(
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
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device if device is None else device
        assert isinstance(shape, tuple | list)
        x = torch.randn(*shape, device=device) if noise is None else noise
        indices = list(range(self.num_timesteps))[::-1]
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for i in indices:
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.ddim_sample(
                    model,
                    x,
                    t,
                    clip_denoised=clip_denoised,
                    denoised_fn=denoised_fn,
                    cond_fn=cond_fn,
                    model_kwargs=model_kwargs,
                    eta=eta,
                )
                yield out
                x = out["sample"]


class SpacedDiffusion(GaussianDiffusion):
    """Some of the steps of a longer process; networks are given the longer one's times."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.timestep_map: list[int] = []
        self.original_num_steps = len(kwargs["betas"])
        whole, last, kept = GaussianDiffusion(**kwargs), 1.0, []
        for i, share in enumerate(whole.alphas_cumprod):
            if i in self.use_timesteps:
                kept.append(1 - share / last)
                last = share
                self.timestep_map.append(i)
        kwargs["betas"] = np.array(kept)
        super().__init__(**kwargs)

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model: Any) -> Any:
        if isinstance(model, WrappedModel):
            return model
        rescaled = getattr(self, "rescale_timesteps", False)
        return WrappedModel(model, self.timestep_map, rescaled, self.original_num_steps)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model does


class WrappedModel:
    """A network that is given the longer process's times."""

    def __init__(self, model: Any, timestep_map: Any, rescale_timesteps: bool, original_num_steps: int) -> None:
        self.model, self.timestep_map, self.rescale_timesteps = model, timestep_map, rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        times = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        times = times.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else times
        return self.model(x, times, **kwargs)


def spaced(kind: type[SpacedDiffusion], steps: int = 6, mean: Any = Mean.EPSILON, var: Any = Var.LEARNED_RANGE) -> Any:
    """A process of `steps` of 24."""
    kept = np.linspace(0, 23, steps).round().astype(int).tolist()
    return kind(use_timesteps=kept, betas=betas(), model_mean_type=mean, model_var_type=var, loss_type=Loss.MSE)
