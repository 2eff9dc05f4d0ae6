"""Stand-ins for projects whose loops do more than their steps: restoring, inpainting, segmenting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from .base import SpacedDiffusion, extract


class RePaint(SpacedDiffusion):
    """Known pixels put in by `p_sample`, and a loop that goes back by an undo of its own."""

    def p_sample(  # type: ignore[override]
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        conf: Any = None,
        pred_xstart: Tensor | None = None,
    ) -> dict[str, Tensor]:
        noise = torch.randn_like(x)
        keep = (model_kwargs or {}).get("gt_keep_mask")
        if keep is not None and pred_xstart is not None:
            share = extract(self.alphas_cumprod, t, x.shape)
            known = share.sqrt() * model_kwargs["gt"] + (1 - share).sqrt() * torch.randn_like(x)
            x = keep * known + (1 - keep) * x
        given = {name: value for name, value in (model_kwargs or {}).items() if name not in ("gt", "gt_keep_mask")}
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, given)
        sample = out["mean"] + self._not_last(t, x) * self._std(out) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"], "gt": (model_kwargs or {}).get("gt")}

    def _undo(self, x: Tensor, t: int) -> Tensor:
        beta = extract(self.betas, torch.full((len(x),), t), x.shape)
        return (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)

    def p_sample_loop(  # type: ignore[override]
        self, model: Any, shape: Any, conf: Any = None, return_all: bool = False, **options: Any
    ) -> Any:
        *_, final = self.p_sample_loop_progressive(model, shape, conf=conf, **options)
        return final if return_all else final["sample"]

    def p_sample_loop_progressive(  # type: ignore[override]
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
        conf: Any = None,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        last = None
        times = there_and_back(self.num_timesteps, (conf or {}).get("jumps", 0))
        before = self.num_timesteps
        for now in times:
            if now > before:
                x = self._undo(x, before)
            else:
                with torch.no_grad():
                    t = torch.tensor([now] * shape[0], device=device)
                    out = self.p_sample(
                        model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, conf=conf, pred_xstart=last
                    )
                    x, last = out["sample"], out["pred_xstart"]
                    yield out
            before = now


def there_and_back(steps: int, jumps: int) -> list[int]:
    """Indices from the last to 0, with the second and third again for every jump."""
    first = [steps - 1, *[steps - 2, steps - 3] * (jumps + 1)]
    return first + list(range(steps - 3))[::-1]


class Reference(SpacedDiffusion):
    """ILVR: the low frequencies of a picture, put in after every step above `range_t`."""

    def p_sample_loop_progressive(  # type: ignore[override]
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
        range_t: int = 0,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        given = {name: value for name, value in (model_kwargs or {}).items() if name != "ref_img"}
        for i in reversed(range(self.num_timesteps)):
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, given)
                if model_kwargs and "ref_img" in model_kwargs and i > range_t:
                    noised = self.q_sample(model_kwargs["ref_img"], t, torch.randn(*shape, device=device))
                    out["sample"] = out["sample"] - low(out["sample"]) + low(noised)
                yield out
                x = out["sample"]

    def p_sample_loop(self, *args: Any, range_t: int = 0, **kwargs: Any) -> Tensor:  # type: ignore[override]
        *_, final = self.p_sample_loop_progressive(*args, range_t=range_t, **kwargs)
        return final["sample"]


def low(x: Tensor) -> Tensor:
    return interpolate(avg_pool2d(x, 2), scale_factor=2)


class Posterior(SpacedDiffusion):
    """DPS: a loop of a start and a measurement, with a gradient through the network after every step."""

    def p_sample(self, model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        out = self.p_mean_variance(model, x, t)
        noise = torch.randn_like(x)
        sample = out["mean"]
        if t[0] != 0:
            sample = sample + torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(  # type: ignore[override]
        self, model: Any, x_start: Tensor, measurement: Tensor, measurement_cond_fn: Any, record: bool = False
    ) -> Tensor:
        x = x_start
        for i in list(range(self.num_timesteps))[::-1]:
            t = torch.tensor([i] * len(x))
            x = x.detach().requires_grad_()
            out = self.p_sample(model=model, x=x, t=t)
            noisy = self.q_sample(measurement, t=t)
            x = measurement_cond_fn(
                x_t=out["sample"], measurement=measurement, noisy=noisy, x_prev=x, x_0_hat=out["pred_xstart"]
            ).detach()
        return x


def towards(*, x_t: Tensor, measurement: Tensor, noisy: Tensor, x_prev: Tensor, x_0_hat: Tensor) -> Tensor:
    """A measurement's gradient: half of the picture is known."""
    distance = torch.linalg.norm((measurement - x_0_hat)[..., :3])
    return x_t - 0.3 * torch.autograd.grad(distance, x_prev)[0] + 0.01 * noisy


class Restoring(SpacedDiffusion):
    """DifFace: loops that begin from a degraded picture at a later step."""

    def p_sample_loop(  # type: ignore[override]
        self, model: Any, shape: Any, *args: Any, start_timesteps: int | None = None, y0: Any = None, **kwargs: Any
    ) -> Tensor:
        if start_timesteps is None:
            return super().p_sample_loop(model, shape, *args, **kwargs)
        x = self.q_sample(y0, torch.tensor([start_timesteps - 1] * shape[0]))
        for i in range(start_timesteps)[::-1]:
            with torch.no_grad():
                x = self.p_sample(model, x, torch.tensor([i] * shape[0]), *args, **kwargs)["sample"]
        return x


class Segmenting(SpacedDiffusion):
    """MedSegDiff: a loop beside a known picture, of another number of channels, that gives more than a sample."""

    def p_sample_loop_known(
        self, model: Any, shape: Any, img: Tensor, step: int = 6, clip_denoised: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.cat([img, torch.randn_like(img[:, :1])], dim=1)
        noisy = x.clone()
        for i in range(step)[::-1]:
            with torch.no_grad():
                t = torch.tensor([i] * shape[0])
                out = self.p_sample(lambda x, t: model(x, t), x[:, -1:], t, clip_denoised, **options)
                x = torch.cat([x[:, :-1], out["sample"]], dim=1)
        return x[:, -1:], noisy, img

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Any:
        """A mean over the batch comes with the samples."""
        samples = super().p_sample_loop(*args, **kwargs)
        return samples, samples.mean(0), {"count": len(samples)}
