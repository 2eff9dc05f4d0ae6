"""What Crowson's fork (Disco Diffusion's), glid-3-xl and motion diffusion have in common: loops with further arguments,
PLMS, DDIM whose `pred_xstart` is from before the gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base import SpacedDiffusion, extract


class Fork(SpacedDiffusion):
    """Steps and loops as the fork has them."""

    def condition_mean_with_grad(self, cond_fn: Any, p_mean_var: Any, x: Tensor, t: Tensor, kwargs: Any) -> Tensor:
        gradient = cond_fn(x, t, p_mean_var, **(kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

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
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = torch.randn_like(x)
        if const_noise:
            noise = noise[[0]].repeat(len(x), 1, 1, 1)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {"sample": self._noised(out, x, t, noise), "pred_xstart": out["pred_xstart"]}

    def _noised(self, out: Any, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return out["mean"] + self._not_last(t, x) * self._std(out) * noise

    def p_sample_with_grad(
        self, model: Any, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: Any, cond_fn: Any, model_kwargs: Any
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            noise = torch.randn_like(x)
            if cond_fn is not None:
                out["mean"] = self.condition_mean_with_grad(cond_fn, out, x, t, model_kwargs)
        sample = self._noised(out, x, t, noise)
        return {"sample": sample.detach(), "pred_xstart": out["pred_xstart"].detach()}

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
        before = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        out = before
        if cond_fn is not None:
            out = self.condition_score(cond_fn, before, x, t, model_kwargs=model_kwargs)
        return {"sample": self._ddim(out["pred_xstart"], x, t, eta), "pred_xstart": before["pred_xstart"]}

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
        skip_timesteps: int = 0,
        init_image: Tensor | None = None,
        randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
        dump_steps: Any = None,
        const_noise: bool = False,
    ) -> Any:
        final: Any = None
        dump = []
        for i, sample in enumerate(
            self.p_sample_loop_progressive(
                model,
                shape,
                noise=noise,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                device=device,
                progress=progress,
                skip_timesteps=skip_timesteps,
                init_image=init_image,
                randomize_class=randomize_class,
                cond_fn_with_grad=cond_fn_with_grad,
                const_noise=const_noise,
            )
        ):
            if dump_steps is not None and i in dump_steps:
                dump.append(copy.deepcopy(sample["sample"]))
            final = sample
        return final["sample"] if dump_steps is None else dump

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
        skip_timesteps: int = 0,
        init_image: Tensor | None = None,
        randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
        const_noise: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        step = self.p_sample_with_grad if cond_fn_with_grad else self.p_sample
        options = {"const_noise": True} if const_noise else {}
        for x, t in self._begun(model, shape, noise, device, progress, skip_timesteps, init_image):
            if randomize_class and "y" in model_kwargs:
                model_kwargs["y"] = torch.randint(0, model.num_classes, model_kwargs["y"].shape)
            with torch.no_grad():
                x.append(step(model, x[0], t, clip_denoised, denoised_fn, cond_fn, model_kwargs, **options))
                yield x[1]

    def _begun(
        self, model: Any, shape: Any, noise: Tensor | None, device: Any, progress: bool, skip: int, image: Any
    ) -> Iterator[tuple[list[Any], Tensor]]:
        """Pairs of [state] and time; the user appends the step's result to the list."""
        device = next(model.parameters()).device if device is None else device
        x = torch.randn(*shape, device=device) if noise is None else noise
        image = torch.zeros_like(x) if skip and image is None else image
        indices = list(range(self.num_timesteps - skip))[::-1]
        if image is not None:
            x = self.q_sample(image, torch.ones([shape[0]], device=device, dtype=torch.long) * indices[0], x)
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for i in indices:
            state = [x]
            yield state, torch.tensor([i] * shape[0], device=device)
            x = state[1]["sample"]

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Any:
        *_, final = self.ddim_sample_loop_progressive(*args, **kwargs)
        return final["sample"]

    def ddim_sample_loop_progressive(  # type: ignore[override]
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
        skip_timesteps: int = 0,
        init_image: Tensor | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        for x, t in self._begun(model, shape, noise, device, progress, skip_timesteps, init_image):
            with torch.no_grad():
                x.append(self.ddim_sample(model, x[0], t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta))
                yield x[1]

    # PLMS: the steps before are in the result of the last.

    def plms_sample(self, model: Any, x: Tensor, t: Tensor, order: int = 2, old_out: Any = None, **options: Any) -> Any:
        out = self.p_mean_variance(model, x, t, **options)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        past = ([] if old_out is None else old_out["old_eps"])[-(order - 1) :]
        prime = eps if not past else 1.5 * eps - 0.5 * past[-1]
        then = extract(self.alphas_cumprod_prev, t, x.shape)
        x0 = self._predict_xstart_from_eps(x, t, prime)
        return {"sample": x0 * then.sqrt() + (1 - then).sqrt() * prime, "pred_xstart": x0, "old_eps": [*past, eps]}

    def plms_sample_loop(self, model: Any, shape: Any, order: int = 2, device: Any = None, **options: Any) -> Tensor:
        old: Any = None
        for x, t in self._begun(model, shape, None, device, False, 0, None):
            with torch.no_grad():
                old = self.plms_sample(model, x[0], t, order, old, **options)
            x.append(old)
        return old["sample"]
