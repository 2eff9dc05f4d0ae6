"""The calls of projects of motion, points, videos, vectors and words."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import motion, others
from .base import spaced
from .beside import Call, Family
from .calls import (
    EPS,
    IMAGE,
    LARGE,
    MOTION,
    SMALL,
    VIDEO,
    X0,
    ddim,
    drawn,
    labels,
    p,
)
from .networks import Classifier, Network, Text, TextGuided, Wrapped


def motions(batch: int, **y: Any) -> dict[str, Any]:
    texts = ["a walk", "she jumps over it", "turns", "sits"]
    return {
        "y": {
            "mask": torch.ones(batch, 1, 1, MOTION[2]),
            "text": texts[:batch],
            "lengths": [7] * batch,
            "scale": torch.full((batch,), 2.5),
            **y,
        }
    }


def edited(batch: int) -> dict[str, Any]:
    mask = (torch.arange(MOTION[2]) < 3).expand(batch, *MOTION)
    return {"inpainting_mask": mask, "inpainted_motion": drawn(batch, *MOTION, seed=4)}


def of_motion() -> dict[str, Family]:
    def call(batch: int, kwargs: Any, **more: Any) -> Call:
        defaults = {"skip_timesteps": 0, "init_image": None, "dump_steps": None, "noise": None, "const_noise": False}
        return p(batch, MOTION, clip_denoised=False, model_kwargs=kwargs, **{**defaults, "progress": False, **more})

    def script(batch: int) -> Call:
        return call(batch, motions(batch))

    hint = {"hint": 0.5, "hint_mask": (torch.arange(MOTION[2]) == 2).float()}
    return {
        "motion diffusion": Family(
            partial(spaced, motion.Motion, 6, X0, SMALL),
            TextGuided,
            {
                "script": script,
                "editing": lambda b: call(b, motions(b, **edited(b))),
                "skip": lambda b: call(b, motions(b), skip_timesteps=2, init_image=drawn(b, *MOTION)),
                "dump": lambda b: call(b, motions(b), dump_steps=[1, 5]),
                "const_noise": lambda b: call(b, motions(b), const_noise=True),
                "ddim": lambda b: ddim(b, MOTION, clip_denoised=False, model_kwargs=motions(b)),
            },
        ),
        "motion diffusion, no guidance": Family(partial(spaced, motion.Motion, 6, X0, SMALL), Text, {"script": script}),
        "OmniControl": Family(
            partial(spaced, motion.Controlled, 6, X0, SMALL),
            TextGuided,
            {"hint": lambda b: call(b, motions(b, **hint)), "no hint": script},
        ),
        "guided motion diffusion": Family(
            partial(spaced, motion.Guided, 6, X0, SMALL),
            lambda: Wrapped("tuple"),
            {
                "clip": lambda b: p(b, MOTION, noise=5 * drawn(b, *MOTION)),
                "no clip": lambda b: p(b, MOTION, clip_denoised=False),
            },
        ),
        "priorMDM": Family(
            partial(spaced, motion.Inpainting, 6, X0, SMALL),
            TextGuided,
            {
                "script": lambda b: call(
                    b, motions(b, inpainting_mask=edited(b)["inpainting_mask"]), init_image=drawn(b, *MOTION)
                )
            },
        ),
        "audio2photoreal": Family(
            partial(spaced, motion.Turned, 6, X0, SMALL), partial(Network, dim=2), {"ddpm": lambda b: p(b, MOTION)}
        ),
    }


def of_others() -> dict[str, Family]:
    scales = {"channel_scales": np.array([2.0, 2.0, 0.5, 1.0]), "channel_biases": np.array([0.0, 0.1, -1.0, 0.0])}
    points = partial(others.Points, **scales)
    vectors = (8,)
    return {
        "point-e": Family(
            partial(spaced, points, 6),
            partial(Network, 2),
            {
                "script": lambda b: p(b, (4, 9), model_kwargs={"y": labels(b)}),
                "clip": lambda b: p(b, (4, 9), clip_denoised=True),
                "temp": lambda b: p(b, (4, 9), temp=0.7),
                "ddim": lambda b: ddim(b, (4, 9)),
            },
        ),
        "shap-e": Family(partial(spaced, others.Points, 6, X0), partial(Network, 2), {"ddpm": lambda b: p(b, vectors)}),
        "Latte": Family(
            partial(spaced, others.Frames, 6),
            partial(Network, 2, dim=2),
            {"ddpm": lambda b: p(b, VIDEO, clip_denoised=False), "ddim": lambda b: ddim(b, VIDEO)},
        ),
        "VDT": Family(
            partial(spaced, others.KnownFrames, 6),
            partial(Network, 2, dim=2),
            {
                "prediction": lambda b: p(
                    b, VIDEO, raw_x=drawn(b, *VIDEO), mask=drawn(b, *VIDEO, seed=5).gt(0).float()
                ),
                "free": lambda b: p(b, VIDEO),
            },
        ),
        "mar": Family(
            partial(spaced, others.Tokens, 6),
            partial(Network, 2),
            {
                name: lambda b, t=t: Call(
                    "p_sample_loop", ((b, *vectors), None), {"clip_denoised": False, "temperature": t}
                )
                for name, t in (("temperature", 0.8), ("as it is", 1.0))
            },
        ),
        "diffae": Family(
            partial(spaced, others.Latents, 6, EPS, LARGE),
            partial(Wrapped, "object"),
            {
                "latents": lambda b: ddim(b, vectors),
                "sample": lambda b: Call("sample", ((b, *IMAGE),)),
                "ddpm": lambda b: p(b),
            },
        ),
        "scDiffusion": Family(
            partial(spaced, others.Cells, 6, EPS, LARGE),
            Squeezed,
            {
                "script": lambda b: p(
                    b, vectors, start_time=6, start_guide_steps=3, cond_fn=Classifier(), model_kwargs={}
                ),
                "no guidance": lambda b: p(b, vectors, clip_denoised=False),
            },
        ),
        "DiffuSeq": Family(
            partial(spaced, others.Words, 6, X0, SMALL),
            Network,
            {
                "script": lambda b: Call(
                    "p_sample_loop",
                    ((b, 5, 3),),
                    {
                        "top_p": 1.0,
                        "clamp_step": 2,
                        "denoised_fn": rounded,
                        "mask": torch.ones(b, 5, 3).tril(),
                        "x_start": drawn(b, 5, 3),
                    },
                ),
                "plain": lambda b: Call("p_sample_loop", ((b, 5, 3),), {"clip_denoised": False}),
            },
        ),
    }


def rounded(x0: Tensor, t: Tensor) -> Tensor:
    assert len(t) == len(x0)
    return (x0 * 4).round() / 4


class Squeezed(Network):
    """Times come as [B, 1]."""

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        assert t.shape == (len(x), 1)
        return super().forward(x, t[:, 0], **kwargs)
