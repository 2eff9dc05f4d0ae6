"""DiT and what grew from it: no `rescale_timesteps`, learned variances, guidance in `forward_with_cfg`."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.descendants.calls import Call, Project, drawn, loops
from benchmarks.descendants.checkout import Checkout
from benchmarks.descendants.networks import Network, with_guidance

SHAPE = (4, 4, 8, 8)
STEPS = "10"
LABELS = torch.tensor([207, 360, 1000, 1000])


def doubled(*shape: int) -> torch.Tensor:
    """Noise for both branches, as the scripts make it."""
    return drawn(shape[0] // 2, *shape[1:]).repeat(2, *[1] * (len(shape) - 1))


def guided(diffusion: Any, forward: Any, model: Network, **given: Any) -> Iterator[Call]:
    """The call of DiT's sample.py."""
    options = {"noise": doubled(*SHAPE), "clip_denoised": False, "device": "cpu"}
    yield from loops(
        diffusion,
        with_guidance(forward, model),
        SHAPE,
        "`forward_with_cfg`",
        model_kwargs={"y": LABELS} | given,
        **options,
    )


def plain(diffusion: Any, model: Network, shape: tuple[int, ...] = SHAPE, **given: Any) -> Iterator[Call]:
    """The call without guidance."""
    yield from loops(
        diffusion, model, shape, noise=drawn(*shape), clip_denoised=False, model_kwargs=given, device="cpu"
    )


def cond_fn(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A classifier's gradient."""
    return 0.3 * torch.tanh(x)


def dit(checkout: Checkout) -> Iterator[Call]:
    """DiT, fast-DiT and DiT-MoE."""
    diffusion = checkout.load("diffusion").create_diffusion(STEPS)
    network = Network(4, 8)
    yield from guided(diffusion, checkout.load("models").DiT.forward_with_cfg, network, cfg_scale=4.0)
    yield from plain(diffusion, network, y=LABELS)
    yield from loops(diffusion, network, SHAPE, "`cond_fn`", cond_fn=cond_fn, model_kwargs={"y": LABELS})
    yield from loops(
        diffusion, Network(4, 8, output=lambda y: (y, None)), SHAPE, "a tuple from the network", model_kwargs={}
    )


def nwm(checkout: Checkout) -> Iterator[Call]:
    """isolated_nwm_infer.py."""
    diffusion = checkout.load("diffusion").create_diffusion(STEPS)
    given = {"y": drawn(4, 3), "x_cond": drawn(4, 2, 4, 8, 8), "rel_t": drawn(4)}
    yield from plain(diffusion, Network(4, 8), **given)


def mdt(checkout: Checkout) -> Iterator[Call]:
    """infer_mdt.py: a scale that grows with the time."""
    diffusion = checkout.load("masked_diffusion").create_diffusion(STEPS)
    forward = checkout.load("masked_diffusion.models").MDTv2.forward_with_cfg
    yield from guided(diffusion, forward, Network(4, 8), cfg_scale=3.8, scale_pow=0.01)


def pixart(checkout: Checkout) -> Iterator[Call]:
    """scripts/inference.py."""
    diffusion = checkout.load("diffusion.iddpm").IDDPM(STEPS)
    forward = checkout.load("diffusion.model.nets.PixArt").PixArt.forward_with_cfg
    given = {"y": drawn(4, 1, 6, 8), "mask": torch.ones(2, 6)}
    info = {"img_hw": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.tensor([[1.0]])}
    yield from guided(diffusion, forward, Network(4, 8), cfg_scale=4.5, data_info=info, **given)


def latte(checkout: Checkout) -> Iterator[Call]:
    """sample/sample.py: [B, F, C, H, W]."""
    diffusion = checkout.load("diffusion").create_diffusion(STEPS)
    network, shape = Network(4, 8, axis=2), (4, 5, 4, 8, 8)
    forward = with_guidance(checkout.load("models.latte").Latte.forward_with_cfg, network)
    given = {"y": torch.tensor([3, 5, 101, 101]), "cfg_scale": 7.0, "use_fp16": False}
    options = {"noise": doubled(*shape), "clip_denoised": False, "device": "cpu"}
    yield from loops(diffusion, forward, shape, "`forward_with_cfg`", model_kwargs=given, **options)
    yield from plain(diffusion, network, shape, y=None, use_fp16=False)


def vdt(checkout: Checkout) -> Iterator[Call]:
    """inference.ipynb: the network sees [B, F, C, H, W], and of the frames that the mask keeps the given ones."""
    diffusion = checkout.load("diffusion").create_diffusion(STEPS, num_frames=6)
    network, shape = Network(4, 8, axis=2), (2, 4, 6, 8, 8)
    mask = torch.ones(2, 6, 8, 8)
    mask[:, :2] = 0
    raw = drawn(2, 6, 4, 8, 8, seed=2)
    options = {"clip_denoised": False, "noise": drawn(*shape), "device": "cpu", "model_kwargs": {}}
    yield from loops(diffusion, network, shape, "`raw_x`, `mask`", raw_x=raw, mask=mask, **options)
    yield from loops(diffusion, network, shape, **options)


def mar(checkout: Checkout) -> Iterator[Call]:
    """models/diffloss.py: tokens [B, C]."""
    diffusion = checkout.load("diffusion").create_diffusion(STEPS, noise_schedule="cosine")
    network, shape = Network(16, 32), (8, 16)
    forward = checkout.load("models.diffloss").SimpleMLPAdaLN.forward_with_cfg
    self = SimpleNamespace(forward=network, in_channels=16)
    given = {"c": drawn(8, 12), "cfg_scale": 2.0}
    call = with_guidance(forward, self)  # type: ignore[arg-type]
    options = {"noise": doubled(*shape), "clip_denoised": False, "progress": False}
    yield from loops(diffusion, call, shape, "`forward_with_cfg`", model_kwargs=given, temperature=1.0, **options)
    yield from loops(diffusion, call, shape, "`temperature=0.9`", model_kwargs=given, temperature=0.9, **options)
    yield from loops(diffusion, network, shape, model_kwargs={"c": given["c"]}, temperature=1.0, **options)


_DIFFUSION = "diffusion/gaussian_diffusion.py"

PROJECTS = (
    Project("facebookresearch/nwm", ("isolated_nwm_infer.py", _DIFFUSION), nwm),
    Project("feizc/DiT-MoE", ("analysis/expert_data.py", _DIFFUSION), dit),
    Project("chuanyangjin/fast-DiT", ("extract_features.py", _DIFFUSION), dit),
    Project("sail-sg/MDT", ("masked_diffusion/gaussian_diffusion.py",), mdt),
    Project("PixArt-alpha/PixArt-alpha", ("diffusion/iddpm.py", "train_latents.py"), pixart),
    Project("PixArt-alpha/PixArt-sigma", ("diffusion/iddpm.py", "scripts/inference.py"), pixart),
    Project("Vchitect/Latte", ("models/latte.py", _DIFFUSION), latte),
    Project("RERV/VDT", ("mask_generator.py", _DIFFUSION), vdt),
    Project("LTH14/mar", ("models/diffloss.py", _DIFFUSION), mar),
    Project("facebookresearch/DiT", ("sample_ddp.py", "models.py: class DiT", _DIFFUSION), dit),
)
