"""OpenAI's own repositories, and copies that change nothing that samples."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.descendants.calls import LOOPS, Call, Project, drawn, loops
from benchmarks.descendants.checkout import Checkout
from benchmarks.descendants.networks import Network

SHAPE = (2, 3, 8, 8)
STEPS = "20"


def create(checkout: Checkout, package: str = "guided_diffusion", root: str = ".", **options: Any) -> Any:
    """What a package's script_util makes, in few steps of 1000."""
    options = {"timestep_respacing": STEPS} | options
    return checkout.load(f"{package}.script_util", root).create_gaussian_diffusion(**options)


def cond_fn(x: Tensor, t: Tensor, y: Any = None, **kwargs: Any) -> Tensor:
    """A classifier's gradient as guided-diffusion's classifier_sample.py takes it, by autograd."""
    with torch.enable_grad():
        x_in = x.detach().requires_grad_(True)
        logits = (x_in.flatten(1) * torch.linspace(-1, 1, x_in[0].numel())).tanh().sum()
        return torch.autograd.grad(logits, x_in)[0]


def labels() -> dict[str, Tensor]:
    """Classes."""
    return {"y": torch.tensor([3, 7])}


def guided(checkout: Checkout) -> Iterator[Call]:
    """scripts/image_sample.py and classifier_sample.py, with every variance and both time scales."""
    network, wide = Network(3), Network(3, 6)
    given = {"clip_denoised": True, "model_kwargs": labels()}
    for options in ({}, {"sigma_small": True}, {"predict_xstart": True}, {"rescale_timesteps": True}):
        what = ", ".join(f"`{name}`" for name in options)
        yield from loops(create(checkout, **options), network, SHAPE, what, **given)
    learned = create(checkout, learn_sigma=True, rescale_timesteps=True)
    yield from loops(learned, wide, SHAPE, "`learn_sigma`", **given)
    yield from loops(learned, wide, SHAPE, "`learn_sigma`, `cond_fn`", cond_fn=cond_fn, device="cpu", **given)
    yield from loops(learned, wide, SHAPE, "`learn_sigma`, `denoised_fn`", denoised_fn=torch.tanh, **given)
    yield from loops(learned, wide, SHAPE, "`eta=0.5`", names=["ddim_sample_loop"], eta=0.5, **given)


def copied(checkout: Checkout) -> Iterator[Call]:
    """A copy of guided-diffusion's files."""
    learned = create(checkout, learn_sigma=True, rescale_timesteps=True)
    yield from loops(learned, Network(3, 6), SHAPE, model_kwargs={})
    yield from loops(learned, Network(3, 6), SHAPE, "`cond_fn`", cond_fn=cond_fn, model_kwargs=labels())


def improved(checkout: Checkout) -> Iterator[Call]:
    """scripts/image_sample.py; the loops have no cond_fn, so that positions are others."""
    diffusion, model = create(checkout, "improved_diffusion", learn_sigma=True), Network(3, 6)
    yield from loops(diffusion, model, SHAPE, clip_denoised=True, model_kwargs=labels())
    by_position = (model, SHAPE, None, True, None, labels(), "cpu", False)
    for name in LOOPS:
        run = lambda obj, name=name: getattr(obj, name)(*by_position)  # noqa: E731
        yield Call(f"{name}, by position", diffusion, run, diffusion.num_timesteps)


def with_guidance(model: Network, scale: float, channels: int = 3) -> Any:
    """The notebooks' model_fn."""

    def model_fn(x_t: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        half = x_t[: len(x_t) // 2]
        combined = torch.cat([half, half], dim=0)
        model_out = model(combined, ts, **kwargs)
        eps, rest = model_out[:, :channels], model_out[:, channels:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2, dim=0)
        half_eps = uncond_eps + scale * (cond_eps - uncond_eps)
        eps = torch.cat([half_eps, half_eps], dim=0)
        return torch.cat([eps, rest], dim=1)

    return model_fn


def tokens() -> dict[str, Tensor]:
    """Two captions and two empty ones."""
    ids = torch.arange(4 * 6).reshape(4, 6) % 11
    ids[2:] = 0
    return {"tokens": ids, "mask": ids > 0}


def glide(checkout: Checkout, root: str = ".", further: Sequence[str] = ()) -> Iterator[Call]:
    """notebooks/text2im.ipynb and inpaint.ipynb: 64 x 64 by CFG, then the upsampler by DDIM."""
    make = checkout.load("glide_text2im.model_creation", root).create_gaussian_diffusion
    diffusion = make(steps=1000, noise_schedule="squaredcos_cap_v2", timestep_respacing=STEPS)
    upsampler, shape = make(steps=1000, noise_schedule="linear", timestep_respacing="fast27"), (4, 3, 8, 8)
    model = with_guidance(Network(3, 6), 3.0)
    given = {"device": "cpu", "clip_denoised": True, "progress": False, "cond_fn": None, "model_kwargs": tokens()}
    names = (*LOOPS, "plms_sample_loop", *further)
    yield from loops(diffusion, model, shape, "CFG", names=names, **given)
    known, mask = drawn(*shape, scale=0.5), torch.zeros(4, 1, 8, 8)
    mask[..., :4] = 1
    fill = lambda x: x * (1 - mask) + known * mask  # noqa: E731
    yield from loops(diffusion, model, shape, "CFG, inpainting", names=LOOPS, denoised_fn=fill, **given)

    class Upsampler(Network):
        def forward(self, x: Tensor, t: Tensor, low_res: Any = None, **named: Any) -> Any:
            return super().forward(torch.cat([x, low_res], dim=1), t, **named)

    small = {name: value[:2] for name, value in tokens().items()} | {"low_res": drawn(2, 3, 8, 8)}
    given |= {"model_kwargs": small, "noise": drawn(2, 3, 8, 8, seed=2, scale=0.997)}
    yield from loops(upsampler, Upsampler(6, 6), (2, 3, 8, 8), "the upsampler", names=["ddim_sample_loop"], **given)


def glide_finetune(checkout: Checkout) -> Iterator[Call]:
    """glide_finetune/glide_util.py: PLMS too."""
    yield from glide(checkout, "glide-text2im")
    enhance = checkout.load("glide_finetune.enhanced_samplers").enhance_diffusion
    make = checkout.load("glide_text2im.model_creation", "glide-text2im").create_gaussian_diffusion
    diffusion = make(steps=1000, noise_schedule="squaredcos_cap_v2", timestep_respacing=STEPS)
    model = with_guidance(Network(3, 6), 3.0)
    given = {"device": "cpu", "clip_denoised": True, "progress": False, "model_kwargs": tokens(), "cond_fn": None}
    for name, eta in (("euler", 0.0), ("euler_ancestral", 1.0), ("dpm_solver", 0.0)):

        def run(obj: Any, name: str = f"{name}_sample_loop", eta: float = eta) -> Any:
            enhance(obj)
            return getattr(obj, name)(model, (4, 3, 8, 8), eta=eta, **given)

        yield Call(f"{name}_sample_loop, `enhance_diffusion`", diffusion, run, 20)


def point_e(checkout: Checkout) -> Iterator[Call]:
    """point_e/diffusion/sampler.py: the base by Karras' sampler and by DDPM, and the upsampler; [B, 6, points]."""
    configs = checkout.load("point_e.diffusion.configs")
    base = configs.diffusion_from_config(configs.DIFFUSION_CONFIGS["base40M"] | {"respacing": "32"})
    up = configs.diffusion_from_config(configs.DIFFUSION_CONFIGS["upsample"] | {"respacing": "32"})
    model = with_guidance(Network(6, 12, order=(0, 2, 1)), 3.0)
    given = {"model_kwargs": {"embeddings": torch.cat([drawn(2, 5), torch.zeros(2, 5)])}, "device": "cpu"}
    yield from loops(base, model, (4, 6, 16), "CFG", clip_denoised=True, **given)
    yield from loops(base, model, (4, 6, 16), "CFG, no clipping", **given)
    yield from loops(base, model, (4, 6, 16), "`temp=0.9`", temp=0.9, **given)
    karras = checkout.load("point_e.diffusion.k_diffusion")
    for what, diffusion, guidance, churn in (("base", base, 3.0, 3.0), ("upsampler", up, 0.0, 0.0)):
        for sampler in ("heun", "dpm", "ancestral"):
            extra = {"s_churn": churn, "sigma_min": 1e-3, "sigma_max": 120, "guidance_scale": guidance, "steps": 12}
            batch = given["model_kwargs"] if guidance else {"embeddings": drawn(2, 5)}
            options = {
                "model": Network(6, 12, order=(0, 2, 1)),
                "shape": (2, 6, 16),
                "clip_denoised": True,
                "sampler": sampler,
            }
            options |= extra | {"model_kwargs": batch, "device": "cpu"}
            run = lambda obj, options=options: karras.karras_sample(diffusion=obj, **options)  # noqa: E731
            yield Call(f"karras_sample, {sampler}, {what}", diffusion, run, 12)


def shap_e(checkout: Checkout) -> Iterator[Call]:
    """shap_e/diffusion/sample.py: latents [B, D], which the network sees as they are."""
    gaussian = checkout.load("shap_e.diffusion.gaussian_diffusion")
    config = {"schedule": "exp", "timesteps": 1024, "respacing": STEPS, "mean_type": "x_start"}
    config |= {"schedule_args": {"coefficient": -12.0}}
    for what, more in (("", {}), ("channel scales", {"channel_scales": [2.0] * 12, "channel_biases": [0.5] * 12})):
        diffusion = gaussian.diffusion_from_config(config | more)
        sample = checkout.load("shap_e.diffusion.sample").sample_latents
        model = Network(12, 24, d_latent=12)
        for karras in (False, True):

            def run(obj: Any, karras: bool = karras, sample: Any = sample, model: Any = model) -> Any:
                return sample(
                    batch_size=2,
                    model=model,
                    diffusion=obj,
                    model_kwargs={"embeddings": drawn(2, 5)},
                    guidance_scale=3.0,
                    clip_denoised=True,
                    use_fp16=False,
                    use_karras=karras,
                    karras_steps=12,
                    sigma_min=1e-3,
                    sigma_max=160,
                    s_churn=0.0,
                    progress=False,
                )

            label = f"sample_latents, `use_karras={karras}`{', ' * bool(what)}{what}"
            yield Call(label, diffusion, run, 12 if karras else diffusion.num_timesteps)


def consistency(checkout: Checkout) -> Iterator[Call]:
    """scripts/image_sample.py."""
    karras = checkout.load("cm.karras_diffusion")
    diffusion = karras.KarrasDenoiser(sigma_data=0.5, sigma_max=80.0, sigma_min=0.002, distillation=True)
    model = Network(3)
    for sampler, ts in (("heun", None), ("onestep", None), ("multistep", (0, 5, 10))):
        given = {"steps": 11, "model_kwargs": {}, "device": "cpu", "sampler": sampler, "ts": ts}
        run = lambda obj, given=given: karras.karras_sample(obj, model, SHAPE, **given)  # noqa: E731
        yield Call(f"karras_sample, {sampler}", diffusion, run, {"onestep": 1, "multistep": 2}.get(sampler, 10))
    known = inspect.signature(karras.sample_heun).parameters
    generator = checkout.load("cm.random_util").get_generator("dummy")
    sigmas, options = karras.get_sigmas_karras(11, 0.002, 80.0), {"generator": generator}

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion.denoise(model, x, sigma)[1]

    if "denoiser" in known or "model" in known:
        run = lambda obj: obj(denoiser, 80 * drawn(*SHAPE), sigmas, **options)  # noqa: E731
        yield Call("sample_heun, the function itself", karras.sample_heun, run, 10)


_GUIDED = "guided_diffusion/gaussian_diffusion.py"

PROJECTS = (
    Project("afiaka87/glide-finetune", ("glide_finetune/enhanced_samplers.py",), glide_finetune),
    Project("openai/glide-text2im", ("glide_text2im/gaussian_diffusion.py",), glide),
    Project("openai/point-e", ("point_e/diffusion/gaussian_diffusion.py",), point_e),
    Project("openai/shap-e", ("shap_e/diffusion/gaussian_diffusion.py",), shap_e),
    Project("openai/consistency_models", ("cm/karras_diffusion.py",), consistency),
    Project("openai/improved-diffusion", ("improved_diffusion/gaussian_diffusion.py",), improved),
    Project("NVlabs/DiffPure", ("runners/diffpure_guided.py", _GUIDED), copied),
    Project("yuanzhi-zhu/DiffPIR", ("main_ddpir.py", _GUIDED), copied),
    Project("openai/guided-diffusion", ("scripts/classifier_sample.py", _GUIDED), guided),
)
