"""The calls of projects whose loops do more."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import conditioned
from .base import spaced
from .beside import Call, Family
from .calls import (
    EPS,
    IMAGE,
    LARGE,
    SMALL,
    X0,
    ddim,
    drawn,
    p,
)
from .forks import Fork
from .networks import Classifier, Network


def of_forks() -> dict[str, Family]:
    def class_of(batch: int, **more: Any) -> Call:
        return p(batch, model_kwargs={"y": torch.ones(batch, dtype=torch.long)}, **more)

    class Labelled(Network):
        num_classes = 3

    def with_grad(x: Tensor, t: Tensor, out: Any, **_: Any) -> Tensor:
        return torch.autograd.grad(-(out["pred_xstart"] - 0.5).square().sum(), x)[0]

    def image(batch: int) -> Tensor:
        return drawn(batch, *IMAGE, seed=2).clamp(-1, 1)

    return {
        "Disco Diffusion": Family(
            partial(spaced, Fork, 6),
            partial(Labelled, 2),
            {
                "defaults": lambda b: class_of(
                    b, skip_timesteps=0, init_image=None, randomize_class=False, dump_steps=None
                ),
                "skip": lambda b: class_of(b, skip_timesteps=2, init_image=image(b)),
                "skip to zeros": lambda b: class_of(b, skip_timesteps=2),
                "random classes": lambda b: class_of(b, randomize_class=True),
                "gradient": lambda b: p(b, cond_fn=with_grad, cond_fn_with_grad=True),
                "dump": lambda b: class_of(b, dump_steps=[0, 3]),
                "const_noise": lambda b: class_of(b, const_noise=True),
                "classifier ddim": lambda b: ddim(
                    b, cond_fn=Classifier(), model_kwargs={}, skip_timesteps=1, init_image=image(b)
                ),
                "plms": lambda b: Call("plms_sample_loop", ((b, *IMAGE),), {"device": "cpu"}),
            },
        ),
        "RePaint": Family(
            partial(spaced, conditioned.RePaint, 6),
            partial(Network, 2),
            {
                "script": lambda b: p(b, model_kwargs=known(b), conf={"jumps": 2}, return_all=True),
                "nothing known": lambda b: p(b),
            },
        ),
        "ILVR": Family(
            partial(spaced, conditioned.Reference, 6),
            partial(Network, 2),
            {"script": lambda b: p(b, model_kwargs={"ref_img": image(b)}, range_t=2), "no reference": lambda b: p(b)},
        ),
        "DPS": Family(
            partial(spaced, conditioned.Posterior, 5),
            partial(Network, 2),
            {
                "script": lambda b: Call(
                    "p_sample_loop",
                    (),
                    {
                        "x_start": drawn(b, *IMAGE),
                        "measurement": image(b),
                        "measurement_cond_fn": conditioned.towards,
                        "record": False,
                    },
                )
            },
        ),
        "DifFace": Family(
            partial(spaced, conditioned.Restoring, 6, X0, SMALL),
            Network,
            {
                "script": lambda b: Call("p_sample_loop", ((b, *IMAGE),), {"start_timesteps": 4, "y0": image(b)}),
                "ddpm": lambda b: p(b),
            },
        ),
        "MedSegDiff": Family(
            partial(spaced, conditioned.Segmenting, 6, EPS, LARGE),
            Network,
            {
                "known": lambda b: Call("p_sample_loop_known", ((b, 3, 4, 4), image(b)), {}),
                "more than samples": lambda b: p(b),
            },
        ),
    }


def known(batch: int) -> dict[str, Any]:
    keep = torch.zeros(batch, *IMAGE)
    keep[..., :2] = 1
    return {"gt": drawn(batch, *IMAGE, seed=3).clamp(-1, 1), "gt_keep_mask": keep}
