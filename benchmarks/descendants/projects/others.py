"""Other interfaces: outputs in dicts and objects, text, models inside the diffusion object, samplers of latents."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.descendants.calls import Call, Project, drawn, loops
from benchmarks.descendants.checkout import Checkout
from benchmarks.descendants.networks import Network

from .openai import SHAPE, STEPS, create


def hunyuan(checkout: Checkout) -> Iterator[Call]:
    """hydit/diffusion: a dict from the network, v-prediction, PLMS."""
    make = checkout.load("hydit.diffusion").create_diffusion
    names, shape = ("p_sample_loop", "ddim_sample_loop", "plms_sample_loop"), (2, 4, 8, 8)
    given = {"clip_denoised": False, "device": "cpu", "model_kwargs": {"encoder_hidden_states": drawn(2, 5)}}
    for kind in ("epsilon", "v_prediction"):
        diffusion = make(predict_type=kind, timestep_respacing=STEPS, beta_end=0.03)
        model = Network(4, 8, output=lambda y: {"x": y})
        yield from loops(diffusion, model, shape, kind, names=names if kind == "epsilon" else names[:2], **given)


def diffae(checkout: Checkout) -> Iterator[Call]:
    """experiment.py and renderer.py: images by DDIM, their latents [B, C], and back to noise."""
    checkout.stand_in("model", Model=torch.nn.Module)
    checkout.stand_in("model.unet_autoenc", AutoencReturn=SimpleNamespace)
    checkout.stand_in("model.nn", mean_flat=lambda x: x.mean(dim=list(range(1, x.ndim))))
    module, base = checkout.load("diffusion.diffusion"), checkout.load("choices")
    network = Network(3, output=lambda y: SimpleNamespace(pred=y))
    latents = Network(12, output=lambda y: SimpleNamespace(pred=y))

    def sampler(name: str) -> Any:
        ddim = name == "ddim"
        return module.SpacedDiffusionBeatGansConfig(
            gen_type=base.GenerativeType[name],
            model_type=base.ModelType.autoencoder,
            betas=module.get_named_beta_schedule("linear", 1000),
            model_mean_type=base.ModelMeanType.eps,
            model_var_type=base.ModelVarType.fixed_large,
            loss_type=base.LossType.mse,
            rescale_timesteps=False,
            fp16=False,
            use_timesteps=module.space_timesteps(1000, f"ddim{STEPS}" if ddim else [int(STEPS)]),
        ).make_sampler()

    given = {"noise": drawn(*SHAPE), "cond": drawn(2, 6), "x_start": None}
    for name in ("ddim", "ddpm"):
        run = lambda obj: obj.sample(model=network, **given)  # noqa: E731
        yield Call(f"sample, {name}", sampler(name), run, 20)
        run = lambda obj: obj.sample(model=latents, noise=drawn(2, 12), clip_denoised=False)  # noqa: E731
        yield Call(f"sample, {name}, latents", sampler(name), run, 20)
    run = lambda obj: obj.ddim_reverse_sample_loop(network, drawn(*SHAPE), model_kwargs={"cond": drawn(2, 6)})  # noqa: E731
    yield Call("ddim_reverse_sample_loop", sampler("ddim"), run, 20)


def nearest(x: Tensor, t: Tensor) -> Tensor:
    """What rounds to words: to the nearest of some levels."""
    return (x * 4).round() / 4


def diffusion_lm(checkout: Checkout) -> Iterator[Call]:
    """scripts/text_sample.py: words [B, L, D], noise cut off at top_p, denoised_fn(x, t)."""
    root = "improved-diffusion"
    for name in ("transformer_model", "transformer_model2"):
        checkout.stand_in(f"improved_diffusion.{name}")
    options = {"predict_xstart": True, "noise_schedule": "sqrt", "training_mode": "e2e", "model_arch": "transformer"}
    diffusion = create(checkout, "improved_diffusion", root, **options)
    model, shape = Network(8, axis=2, size=0.7), (2, 10, 8)
    given = {"clip_denoised": False, "model_kwargs": {}}
    for top_p in (-1.0, 1.5):
        yield from loops(diffusion, model, shape, f"`top_p={top_p}`", denoised_fn=None, top_p=top_p, **given)
    yield from loops(diffusion, model, shape, "`denoised_fn`", names=["p_sample_loop"], denoised_fn=nearest, **given)


def diffuseq(checkout: Checkout) -> Iterator[Call]:
    """sample_seq2seq.py: the source's words are kept by a mask."""
    gaussian = checkout.load("diffuseq.gaussian_diffusion")
    diffusion = gaussian.SpacedDiffusion(
        use_timesteps=gaussian.space_timesteps(2000, [20]),
        betas=gaussian.get_named_beta_schedule("sqrt", 2000),
        rescale_timesteps=True,
        predict_xstart=True,
        learn_sigmas=False,
        sigma_small=False,
        use_kl=False,
        rescale_learned_sigmas=False,
    )
    model, shape = Network(8, axis=2, size=0.7), (2, 10, 8)
    start, mask = drawn(*shape, seed=2), (torch.arange(10) > 4).long()[None, :, None].expand(shape)
    given = {"noise": torch.where(mask == 0, start, drawn(*shape)), "clip_denoised": False, "model_kwargs": {}}
    given |= {"denoised_fn": nearest, "top_p": -1, "clamp_step": 0, "clamp_first": True, "mask": mask, "x_start": start}
    yield from loops(diffusion, model, shape, names=["p_sample_loop", "ddim_sample_loop"], gap=1, **given)


def res_shift(checkout: Checkout) -> Iterator[Call]:
    """sampler.py, and its SpacedDiffusionDDPM."""
    checkout.stand_in("ldm.models.autoencoder")
    module = checkout.load("models.script_util")
    options = {"schedule_name": "exponential", "schedule_kwargs": {"power": 0.3}, "steps": 15, "kappa": 2.0}
    options |= {"normalize_input": True, "sf": 1, "min_noise_level": 0.2, "latent_flag": False, "scale_factor": 1.0}
    process, model = module.create_gaussian_diffusion(**options), Network(3, size=0.7)
    low = drawn(*SHAPE, scale=0.5)

    class Autoencoder(torch.nn.Linear):
        def encode(self, x: Tensor) -> Tensor:
            return x

        decode = encode

    given = {"first_stage_model": Autoencoder(1, 1), "noise": None, "noise_repeat": False, "clip_denoised": True}
    given |= {"denoised_fn": None, "model_kwargs": {"lq": low}, "progress": False}
    run = lambda obj: obj.p_sample_loop(y=low, model=model, **given)  # noqa: E731
    yield Call("p_sample_loop, its own process", process, run, 15)
    options = {"beta_start": 0.0001, "beta_end": 0.02, "sf": 1, "predict_xstart": True, "sigma_small": True}
    ddpm = module.create_gaussian_diffusion_ddpm(timestep_respacing=20, **options)
    yield from loops(ddpm, model, SHAPE, "SpacedDiffusionDDPM", clip_denoised=True, model_kwargs={})


def lucidrains(checkout: Checkout) -> Iterator[Call]:
    """The README's: the network is the object's own, and samples are scaled to 0..1."""
    kind = checkout.load("denoising_diffusion_pytorch.denoising_diffusion_pytorch").GaussianDiffusion
    model = Network(3, out_dim=3, self_condition=False, downsample_factor=1, size=0.7)
    model.channels = 3
    for objective in ("pred_v", "pred_noise", "pred_x0"):
        diffusion = kind(model, image_size=8, timesteps=20, objective=objective, beta_schedule="cosine")
        yield Call(f"sample, {objective}", diffusion, lambda obj: obj.sample(batch_size=2), 20)
    short = kind(model, image_size=8, timesteps=1000, sampling_timesteps=20)
    yield Call("sample, DDIM", short, lambda obj: obj.sample(batch_size=2), 20)
    run = lambda obj: obj.p_sample_loop((2, 3, 8, 8), return_all_timesteps=True)  # noqa: E731
    yield Call("p_sample_loop, `return_all_timesteps`", diffusion, run, 20)


def vgen(checkout: Checkout) -> Iterator[Call]:
    """tools/inferences: guidance inside, by two sets of model_kwargs."""
    registry = SimpleNamespace(register_class=lambda: lambda kind: kind)
    checkout.stand_in("utils.registry_class", DIFFUSION=registry)
    module = checkout.load("tools.modules.diffusions.diffusion_ddim")
    model, noise = Network(4), drawn(2, 4, 3, 8, 8)
    pair = [{"y": drawn(2, 6)}, {"y": torch.zeros(2, 6)}]
    schedule = {"num_timesteps": 1000, "init_beta": 0.00085, "last_beta": 0.012}
    for kind in ("eps", "v"):
        diffusion = module.DiffusionDDIM(
            schedule="linear_sd", schedule_param=schedule, mean_type=kind, var_type="fixed_small"
        )
        given = {"model": model, "model_kwargs": pair, "guide_scale": 9.0, "ddim_timesteps": 20, "eta": 0.0}
        yield Call(
            f"ddim_sample_loop, {kind}", diffusion, lambda obj, g=given: obj.ddim_sample_loop(noise=noise, **g), 20
        )


def sr3(checkout: Checkout) -> Iterator[Call]:
    """model/model.py: super_resolution of a low one, on continuous noise levels; and sample."""
    kind = checkout.load("model.sr3_modules.diffusion").GaussianDiffusion
    options = {"schedule": "linear", "n_timestep": 20, "linear_start": 1e-4, "linear_end": 0.3}
    for conditional in (True, False):
        network = Network(6 if conditional else 3, 3)
        diffusion = kind(network, image_size=8, conditional=conditional)
        diffusion.set_new_noise_schedule(options, "cpu")
        if conditional:
            run = lambda obj: obj.super_resolution(drawn(2, 3, 8, 8), True)  # noqa: E731
        else:
            run = lambda obj: obj.sample(2, True)  # noqa: E731
        yield Call("super_resolution" if conditional else "sample", diffusion, run, 20)


def comp_vis(checkout: Checkout) -> Iterator[Call]:
    """scripts/txt2img.py: DDIMSampler and PLMSSampler of a model with apply_model; and DDPM itself."""
    network = Network(4)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    tables = {"betas": betas.float(), "alphas_cumprod": bars.float(), "alphas_cumprod_prev": previous.float()}

    class Latent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.num_timesteps, self.device = network, 1000, torch.device("cpu")
            self.parameterization = "eps"
            for name, table in tables.items():
                self.register_buffer(name, table)

        def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
            return self.network(x, t, c)

    given = {"conditioning": drawn(2, 5, 6), "batch_size": 2, "shape": (4, 8, 8), "verbose": False}
    guided = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": torch.zeros(2, 5, 6)}
    for name, file, eta in (("DDIMSampler", "ddim", 0.0), ("DDIMSampler", "ddim", 0.7), ("PLMSSampler", "plms", 0.0)):
        kind = getattr(checkout.load(f"ldm.models.diffusion.{file}"), name)
        on_cpu = {"register_buffer": lambda self, name, value: setattr(self, name, value)}  # its own moves to CUDA
        sampler = type(name, (kind,), on_cpu)(Latent())
        run = lambda obj, eta=eta: obj.sample(S=20, eta=eta, **given, **guided)[0]  # noqa: E731
        yield Call(f"{name}.sample, `eta={eta}`", sampler, run, 20)

    class Lightning(torch.nn.Module):
        device = torch.device("cpu")

    checkout.stand_in("pytorch_lightning", LightningModule=Lightning)
    checkout.stand_in("pytorch_lightning.utilities.distributed", rank_zero_only=lambda method: method)
    checkout.stand_in("ldm.models.autoencoder")
    module = checkout.load("ldm.models.diffusion.ddpm")
    config = {"target": "benchmarks.descendants.networks.Network", "params": {"channels": 3, "size": 0.7}}
    options = {"timesteps": 20, "linear_end": 0.3, "image_size": 8, "use_ema": False}
    for kind in ("eps", "x0"):
        ddpm = module.DDPM(config, parameterization=kind, **options)
        yield Call(f"DDPM.sample, {kind}", ddpm, lambda obj: obj.sample(batch_size=2), 20)


PROJECTS = (
    Project("Tencent/HunyuanDiT", ("hydit/diffusion/gaussian_diffusion.py",), hunyuan),
    Project("phizaz/diffae", ("diffusion/base.py: GaussianDiffusionBeatGans",), diffae),
    Project("XiangLi1999/Diffusion-LM", ("improved-diffusion/scripts/text_sample.py",), diffusion_lm),
    Project("Shark-NLP/DiffuSeq", ("diffuseq/gaussian_diffusion.py",), diffuseq),
    Project("zsyOAOA/ResShift", ("models/gaussian_diffusion.py: sqrt_etas",), res_shift),
    Project("lucidrains/denoising-diffusion-pytorch", ("denoising_diffusion_pytorch/version.py",), lucidrains),
    Project("ali-vilab/VGen", ("tools/modules/diffusions/diffusion_ddim.py",), vgen),
    Project("Janspiry/Image-Super-Resolution-via-Iterative-Refinement", ("model/sr3_modules/diffusion.py",), sr3),
    Project("CompVis/latent-diffusion", ("ldm/models/diffusion/ddpm.py", "ldm/models/diffusion/plms.py"), comp_vis),
)
