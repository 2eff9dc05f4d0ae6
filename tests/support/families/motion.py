"""Stand-ins for motion diffusion and its forks: [B, J, 1, T], conditions nested in y."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SpacedDiffusion
from .forks import Fork


class Motion(Fork):
    """MDM: editing by a mask in y, one noise for all samples, text encoded once in a call."""

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        def edited(x: Tensor, t: Tensor, y: Any) -> Tensor:
            output: Tensor = model(x, t, y=y)
            if "inpainting_mask" in y and "inpainted_motion" in y:
                assert self.model_mean_type.name == "START_X"
                output = output * ~y["inpainting_mask"] + y["inpainted_motion"] * y["inpainting_mask"]
            return output

        return super().p_mean_variance(edited, x, t, clip_denoised, denoised_fn, model_kwargs)

    def p_sample_loop(self, model: Any, shape: Any, *args: Any, model_kwargs: Any = None, **kwargs: Any) -> Any:
        if "text" in model_kwargs["y"]:
            model_kwargs["y"]["text_embed"] = model.encode_text(model_kwargs["y"]["text"])
        return super().p_sample_loop(model, shape, *args, model_kwargs=model_kwargs, **kwargs)


class Controlled(Motion):
    """OmniControl: hints draw the mean nearer, more often at the end."""

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        const_noise: bool = False,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        if "hint" in model_kwargs["y"]:
            out["mean"] = self.guide(out["mean"], t, **model_kwargs["y"])
        return {"sample": self._noised(out, x, t, noise), "pred_xstart": out["pred_xstart"]}

    def guide(self, mean: Tensor, t: Tensor, hint: Tensor, hint_mask: Tensor, **_: Any) -> Tensor:
        for _ in range(1 if t[0] > 2 else 3):
            with torch.enable_grad():
                moved = mean.clone().requires_grad_(True)
                loss = ((moved - hint) ** 2 * hint_mask).sum()
                mean = mean - 0.1 * torch.autograd.grad(loss, moved)[0]
        return mean


class Guided(SpacedDiffusion):
    """Guided motion diffusion: clip_denoised does nothing with START_X, models give tuples."""

    def p_mean_variance(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Any]:
        def first(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            output = model(x, t, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        clip = clip_denoised and self.model_mean_type.name != "START_X"
        return super().p_mean_variance(first, x, t, clip, denoised_fn, model_kwargs)


class Inpainting(Motion):
    """priorMDM: known frames are neither noised nor given noise."""

    def q_sample(  # type: ignore[override]
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, model_kwargs: Any = None
    ) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        free = 1.0 if model_kwargs is None else 1.0 - model_kwargs["y"]["inpainting_mask"].float()
        return super().q_sample(x_start, t, noise * free)

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        const_noise: bool = False,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x) * (1.0 - model_kwargs["y"]["inpainting_mask"].float())
        return {
            "sample": out["mean"] + self._not_last(t, x) * self._std(out) * noise,
            "pred_xstart": out["pred_xstart"],
        }


class Turned(SpacedDiffusion):
    """audio2photoreal: the network's output has its dimensions in another order."""

    def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        wrapped = self._wrap_model(model)

        def turned(x: Tensor, t: Tensor, **model_kwargs: Any) -> Tensor:
            output: Tensor = wrapped(x.squeeze(2).permute(0, 2, 1), t, **model_kwargs)
            return output.permute(0, 2, 1).unsqueeze(2)

        return super(SpacedDiffusion, self).p_mean_variance(turned, *args, **kwargs)
