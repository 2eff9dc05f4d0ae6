"""The calls of projects of images whose loops are guided-diffusion's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import images
from .base import GaussianDiffusion, Loss, SpacedDiffusion, Var, betas, spaced
from .beside import Call, Family
from .calls import (
    EPS,
    IMAGE,
    LARGE,
    LATENT,
    LEARNED,
    PREVIOUS,
    RANGE,
    SMALL,
    X0,
    ddim,
    drawn,
    label,
    labels,
    p,
)
from .networks import Captioned, Classifier, Network, Wrapped


def halved(x0: Tensor) -> Tensor:
    return x0 * 0.9


def rescaled(mean: Any, var: Any) -> Any:
    options = {"model_mean_type": mean, "model_var_type": var, "loss_type": Loss.RESCALED_MSE}
    return GaussianDiffusion(betas=betas(7), rescale_timesteps=True, **options)


def pairs(batch: int, size: Any = LATENT) -> Tensor:
    return drawn(batch // 2, *size).repeat(2, *[1] * len(size))


def cfg(batch: int, model: str = "forward_with_cfg", size: Any = LATENT, **more: Any) -> Call:
    kwargs = {"y": labels(batch), "cfg_scale": 3.0, **more}
    return p(batch, size, pairs(batch, size), clip_denoised=False, model_kwargs=kwargs, progress=True, model=model)


def pixart(batch: int) -> Call:
    more: dict[str, Any] = {"y": drawn(batch, 3, 2), "mask": torch.ones(batch, 3)}
    more["data_info"] = {"img_hw": torch.full((batch, 2), 4.0), "aspect_ratio": torch.ones(batch, 1)}
    return cfg(batch, **more)


def of_images() -> dict[str, Family]:
    kinds = {f"{mean.name} {var.name}": (mean, var) for mean in (EPS, X0) for var in Var} | {
        "PREVIOUS_X": (PREVIOUS, SMALL)
    }
    found = {
        f"guided-diffusion {name}": Family(
            partial(spaced, SpacedDiffusion, 6, *kind),
            partial(Network, 2 if kind[1] in (RANGE, LEARNED) else 1),
            {"ddpm": lambda b: p(b, model_kwargs=label(b)), "ddim": lambda b: ddim(b, clip_denoised=False, eta=0.5)},
        )
        for name, kind in kinds.items()
    }
    found["guided-diffusion, classifier"] = Family(
        partial(spaced, SpacedDiffusion, 5),
        partial(Network, 2),
        {
            "ddpm": lambda b: p(b, cond_fn=Classifier(), model_kwargs=label(b)),
            "ddim": lambda b: ddim(
                b, cond_fn=Classifier(), model_kwargs=label(b), denoised_fn=halved, noise=drawn(b, *IMAGE)
            ),
        },
    )
    found["guided-diffusion, times rescaled"] = Family(
        partial(rescaled, EPS, LARGE), Network, {"ddpm": lambda b: p(b), "ddim": lambda b: ddim(b, clip_denoised=False)}
    )
    found["improved-diffusion"] = Family(
        partial(spaced, images.ImprovedDiffusion, 6, EPS, LARGE),
        Network,
        {
            "by position": lambda b: p(b, IMAGE, None, True, None, {"y": labels(b)}),
            "by name": lambda b: p(b, clip_denoised=False, model_kwargs=label(b)),
        },
    )
    even = (2, 4)
    found["DiT"] = Family(partial(spaced, images.DiT, 6), partial(Network, 2), {"script": cfg}, even)
    found["DiT, no guidance"] = Family(
        partial(spaced, images.DiT, 6), partial(Network, 2), {"ddpm": lambda b: p(b), "ddim": lambda b: ddim(b, LATENT)}
    )
    found["DiT, tuples"] = Family(partial(spaced, images.DiT, 6), lambda: Wrapped("tuple", 2), {"ddpm": lambda b: p(b)})
    rising = partial(cfg, model="forward_with_rising_cfg")
    found["MDT"] = Family(partial(spaced, images.DiT, 6), partial(Network, 2), {"script": rising}, even)
    found["PixArt"] = Family(partial(spaced, images.DiT, 6), partial(Captioned, 2), {"script": pixart}, even)
    found["GLIDE"] = Family(
        partial(spaced, images.Glide, 6),
        partial(Network, 2),
        {"ddpm": lambda b: p(b, model_kwargs=label(b)), "ddim": ddim},
    )
    found["glid-3-xl"] = Family(
        partial(spaced, images.OtherClamp, 6, EPS, SMALL),
        Network,
        {
            "script": lambda b: ddim(b, noise=4 * drawn(b, *IMAGE), init_image=None, skip_timesteps=0, eta=1.0),
            "ddpm": lambda b: p(b, noise=4 * drawn(b, *IMAGE)),
            "not clipped": lambda b: p(b, noise=4 * drawn(b, *IMAGE), clip_denoised=False),
        },
    )
    found["Kandinsky 2"] = Family(
        partial(spaced, images.Percentile, 6, EPS, LARGE),
        Network,
        {
            "script": lambda b: p(b, noise=4 * drawn(b, *IMAGE), init_step=None),
            "not clipped": lambda b: p(b, clip_denoised=False),
            "from an image": lambda b: p(b, noise=drawn(b, *IMAGE), init_step=4),
        },
    )
    found["HunyuanDiT"] = Family(
        partial(spaced, images.Hunyuan, 6, images.Velocity.VELOCITY, SMALL),
        partial(Wrapped, "dict"),
        {"ddpm": lambda b: p(b), "ddim": lambda b: ddim(b, clip_denoised=False)},
    )
    found["HunyuanDiT, epsilon"] = Family(
        partial(spaced, images.Hunyuan, 6, images.Velocity.EPSILON),
        partial(Wrapped, "dict", 2),
        {"ddpm": lambda b: p(b)},
    )
    found["semantic diffusion"] = Family(
        partial(spaced, images.Semantic, 6),
        partial(Network, 2),
        {
            "script": lambda b: p(b, model_kwargs={"y": labels(b), "s": 1.5}),
            "no guidance": lambda b: p(b, model_kwargs={"y": labels(b), "s": 1.0}),
        },
    )
    return found
