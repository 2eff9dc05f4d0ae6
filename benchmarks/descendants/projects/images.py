"""Changed copies of guided-diffusion's files: inpainting, skipped steps, other clamps, other channels, conditions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.descendants.calls import Call, Project, drawn, kept, loops
from benchmarks.descendants.checkout import Checkout
from benchmarks.descendants.networks import Network

from .openai import SHAPE, STEPS, cond_fn, create, labels, with_guidance


def disco(checkout: Checkout) -> Iterator[Call]:
    """crowsonkb's fork, as Disco Diffusion calls it."""
    diffusion, model = create(checkout, learn_sigma=True, rescale_timesteps=True), Network(3, 6)
    given = {"clip_denoised": False, "model_kwargs": {}, "progress": False}
    skipped = {"skip_timesteps": 5, "init_image": drawn(*SHAPE, scale=0.5)}
    defaults = {"cond_fn": cond_fn, "skip_timesteps": 0, "init_image": None, "randomize_class": False}
    names = ("p_sample_loop", "ddim_sample_loop", "plms_sample_loop")
    yield from loops(diffusion, model, SHAPE, names=names, **given)
    yield from loops(diffusion, model, SHAPE, "`cond_fn`", names=names, **given, **defaults)
    yield from loops(diffusion, model, SHAPE, "`skip_timesteps`, `init_image`", names=names, **given, **skipped)
    classes = given | {"model_kwargs": labels(), "randomize_class": True, "cond_fn": cond_fn}
    model.num_classes = 10
    yield from loops(diffusion, model, SHAPE, "`randomize_class`", names=names[:2], **classes)

    def with_grad(x: Tensor, t: Tensor, p_mean_var: Any, **kwargs: Any) -> Tensor:
        loss = (p_mean_var["pred_xstart"] - 0.3).square().sum()
        return -torch.autograd.grad(loss, x)[0]

    graded = given | {"cond_fn": with_grad, "cond_fn_with_grad": True}
    yield from loops(diffusion, model, SHAPE, "`cond_fn_with_grad`", names=names[:2], **graded)


def glid_3_xl(checkout: Checkout) -> Iterator[Call]:
    """sample.py: clamps to ±2 where it clamps, skips steps with an initial image, samples by PLMS."""
    options = {"learn_sigma": True, "rescale_timesteps": True}
    diffusion, shape = create(checkout, **options), (4, 4, 8, 8)
    model = with_guidance(Network(4, 8), 5.0)
    given = {"model_kwargs": {"context": drawn(4, 6)}, "device": "cpu", "cond_fn": None, "progress": False}
    for clip in (False, True):
        what = f"`clip_denoised={clip}`"
        yield from loops(diffusion, model, shape, what, clip_denoised=clip, **given)
    for name in ("ddim_sample_loop_progressive", "plms_sample_loop_progressive"):
        for skip, init in ((0, None), (6, drawn(*shape, seed=2))):
            more = {"clip_denoised": False, "init_image": init, "skip_timesteps": skip}
            run = lambda obj, name=name, more=more: kept(getattr(obj, name)(model, shape, **given, **more))  # noqa: E731
            yield Call(f"{name}, `skip_timesteps={skip}`", diffusion, run, diffusion.num_timesteps - skip)


def sdm(checkout: Checkout) -> Iterator[Call]:
    """image_sample.py: guidance is in p_mean_variance."""
    diffusion, model = create(checkout, learn_sigma=True), Network(3, 6)
    given = {"clip_denoised": True, "progress": False}
    for s in (1.0, 1.5):
        yield from loops(diffusion, model, SHAPE, f"`s={s}`", model_kwargs={"y": drawn(2, 5, 8, 8), "s": s}, **given)


def repaint(checkout: Checkout) -> Iterator[Call]:
    """test.py: known pixels are put in before every step, and steps are taken back."""
    conf = checkout.load("conf_mgt.conf_base").Default_Conf()
    jumps = {"t_T": 10, "n_sample": 1, "jump_length": 3, "jump_n_sample": 2}
    settings = {"inpa_inj_sched_prev": True, "inpa_inj_sched_prev_cumnoise": False, "schedule_jump_params": jumps}
    conf.update(settings | {"timestep_respacing": "10", "diffusion_steps": 1000})
    conf.pget = lambda name, default=None: default
    diffusion = create(checkout, learn_sigma=True, timestep_respacing="10", conf=conf)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    known = {"gt": drawn(*SHAPE, scale=0.5), "gt_keep_mask": mask, "y": torch.tensor([1, 2])}
    given = {"clip_denoised": True, "device": "cpu", "progress": False, "conf": conf}
    network = Network(3, 6)

    def model_fn(x: Tensor, t: Tensor, y: Any = None, gt: Any = None, **kwargs: Any) -> Tensor:
        return network(x, t, y)

    yield from loops(diffusion, model_fn, SHAPE, model_kwargs=known, cond_fn=None, return_all=True, **given)


def kandinsky(checkout: Checkout) -> Iterator[Call]:
    """kandinsky2_model.py and kandinsky2_1_model.py: a clamp to a percentile, and one's own."""
    make = checkout.load("kandinsky2.model.model_creation").create_gaussian_diffusion
    diffusion = make(learn_sigma=True, rescale_timesteps=True, timestep_respacing=STEPS)
    model, shape = with_guidance(Network(4, 8), 4.0, 4), (4, 4, 8, 8)
    given = {"device": "cpu", "progress": False, "model_kwargs": {"full_emb": drawn(4, 3)}, "noise": drawn(*shape)}
    clamp = functools.partial(torch.clamp, min=-2, max=2)
    yield from loops(diffusion, model, shape, "2.0's", init_step=None, denoised_fn=None, **given)
    yield from loops(
        diffusion, model, shape, "2.1's", names=["p_sample_loop"], init_step=None, denoised_fn=clamp, **given
    )
    yield from loops(diffusion, model, shape, "`init_step=12`", names=["p_sample_loop"], init_step=12, **given)
    yield from loops(diffusion, model, shape, "`clip_denoised=False`", clip_denoised=False, **given)


def ilvr(checkout: Checkout) -> Iterator[Call]:
    """scripts/ilvr_sample.py: low frequencies of a reference after every step."""
    diffusion = create(checkout, learn_sigma=True)
    resizer = checkout.load("resizer").Resizer
    down, up = resizer((2, 3, 8, 8), 1 / 2), resizer((2, 3, 4, 4), 2)
    network = Network(3, 6)

    def model(x: Tensor, t: Tensor, ref_img: Any = None) -> Tensor:
        return network(x, t)

    given = {"clip_denoised": True, "model_kwargs": {"ref_img": drawn(*SHAPE, scale=0.5)}, "device": "cpu"}
    yield from loops(diffusion, model, SHAPE, names=["p_sample_loop"], resizers=(down, up), range_t=4, **given)
    yield from loops(diffusion, model, SHAPE, "no resizers", **given)


def mcg(checkout: Checkout) -> Iterator[Call]:
    """scripts/sample_inpainting.py."""
    diffusion, network = create(checkout, learn_sigma=True), Network(3, 6)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1

    def model(x: Tensor, t: Tensor, ref_img: Any = None) -> Tensor:
        return network(x, t)

    given = {"clip_denoised": True, "model_kwargs": {"ref_img": drawn(*SHAPE, scale=0.5)}, "progress": False}
    for method in ("vanilla", "repaint", "MCG"):
        more = {"mask": mask, "save_root": None, "sample_method": method, "device": "cpu"}
        yield from loops(diffusion, model, SHAPE, method, names=["p_sample_loop"], **given, **more)


def dif_face(checkout: Checkout) -> Iterator[Call]:
    """sampler.py: DDIM from a noised estimate on, and DDPM."""
    diffusion, model = create(checkout, "models", learn_sigma=True, timestep_respacing="25"), Network(3, 6)
    estimate = drawn(*SHAPE, scale=0.5)
    noised = diffusion.q_sample(x_start=estimate, t=torch.tensor([12, 12]), noise=drawn(*SHAPE, seed=2))
    given: dict[str, Any] = {"clip_denoised": True, "denoised_fn": None, "model_kwargs": None, "device": None}
    given |= {"progress": False, "gamma": 0.0, "num_update": 1, "regularizer": None, "cond_kwargs": None}
    started = {"y0": estimate, "noise": noised, "start_timesteps": 12, **given}
    yield from loops(
        diffusion, model, SHAPE, "`start_timesteps`", names=["ddim_sample_loop"], eta=0.5, steps=12, **started
    )
    yield from loops(diffusion, model, SHAPE, names=["p_sample_loop"], y0=None, noise=None, **given)


def med_seg_diff(checkout: Checkout) -> Iterator[Call]:
    """scripts/segmentation_sample.py: the last of the channels is sampled, the others condition it."""
    diffusion = create(checkout, learn_sigma=False, dpm_solver=False)
    model = Network(4, 1, output=lambda y: (y, y.sigmoid()))
    image = drawn(2, 4, 8, 8, scale=0.5)
    given = {"clip_denoised": True, "model_kwargs": {}}
    run = lambda obj: obj.p_sample_loop_known(model, (2, 3, 8, 8), image, step=20, **given)  # noqa: E731
    yield Call("p_sample_loop_known", diffusion, run, 20)
    noise = drawn(2, 4, 8, 8)
    more = {"time": 20, "noise": noise, **given}
    run = lambda obj: kept(obj.p_sample_loop_progressive(model, (2, 3, 8, 8), **more))  # noqa: E731
    yield Call("p_sample_loop_progressive", diffusion, run, 20)


def anomaly(checkout: Checkout) -> Iterator[Call]:
    """scripts/classifier_sample_known.py: noised and back, or reversed and back by DDIM."""
    checkout.stand_in("visdom")
    gaussian = checkout.load("guided_diffusion.gaussian_diffusion")
    respace = checkout.load("guided_diffusion.respace")
    diffusion = respace.SpacedDiffusion(  # as script_util does, whose unet.py has a syntax error
        use_timesteps=respace.space_timesteps(1000, [1000]),
        betas=gaussian.get_named_beta_schedule("linear", 1000),
        model_mean_type=gaussian.ModelMeanType.EPSILON,
        model_var_type=gaussian.ModelVarType.LEARNED_RANGE,
        loss_type=gaussian.LossType.MSE,
    )
    model, image = Network(4, 8), drawn(1, 1, 4, 8, 8, scale=0.5)

    def gradient(x: Tensor, t: Tensor, y: Any = None, **kwargs: Any) -> Any:
        return cond_fn(x, t), x.abs()

    given = {"clip_denoised": True, "model_kwargs": {"y": torch.tensor([1])}, "cond_fn": gradient, "device": "cpu"}
    for name, steps in (("p_sample_loop_known", 10), ("ddim_sample_loop_known", 18)):
        run = lambda obj, name=name: getattr(obj, name)(  # noqa: E731
            model, (1, 4, 8, 8), [image[0]], org=image, noise_level=10, **given
        )
        yield Call(name, diffusion, run, steps)


def sc_diffusion(checkout: Checkout) -> Iterator[Call]:
    """cell_sample.py and classifier_sample.py: cells [B, D]."""
    diffusion, model, shape = create(checkout), Network(16), (4, 16)
    given = {"clip_denoised": False, "model_kwargs": {}, "start_time": diffusion.num_timesteps}
    yield from loops(diffusion, model, shape, names=["p_sample_loop"], **given)
    more = {"cond_fn": cond_fn, "device": "cpu", "noise": None, "start_guide_steps": 10}
    yield from loops(diffusion, model, shape, "`start_guide_steps=10`", names=["p_sample_loop"], **given, **more)
    yield from loops(diffusion, model, shape, names=["ddim_sample_loop"], clip_denoised=False, model_kwargs={})


def dps(checkout: Checkout) -> Iterator[Call]:
    """sample_condition.py: super-resolution, a gradient through the network after every step."""
    checkout.stand_in("motionblur.motionblur")
    gaussian = checkout.load("guided_diffusion.gaussian_diffusion")
    conditions = checkout.load("guided_diffusion.condition_methods")
    noiser = SimpleNamespace(__name__="gaussian")
    operator = SimpleNamespace(forward=lambda x, **kwargs: torch.nn.functional.avg_pool2d(x, 2))
    method = conditions.get_conditioning_method("ps", operator, noiser, scale=0.3)
    given = {"steps": 1000, "noise_schedule": "linear", "model_mean_type": "epsilon", "dynamic_threshold": False}
    given |= {"clip_denoised": True, "rescale_timesteps": False, "timestep_respacing": STEPS}
    model, shape = Network(3, 6), (1, *SHAPE[1:])
    measured = torch.nn.functional.avg_pool2d(drawn(*shape, scale=0.5), 2)

    def run(obj: Any) -> Any:
        start = torch.randn(shape).requires_grad_()
        return obj.p_sample_loop(
            model=model,
            measurement_cond_fn=method.conditioning,
            x_start=start,
            measurement=measured,
            record=False,
            save_root="",
        )

    for sampler in ("ddpm", "ddim"):
        diffusion = gaussian.create_sampler(sampler=sampler, model_var_type="learned_range", **given)
        yield Call(f"p_sample_loop, {sampler}", diffusion, run, 20)


_GUIDED = "guided_diffusion/gaussian_diffusion.py"

PROJECTS = (
    Project("Jack000/glid-3-xl", ("autoedit.py", _GUIDED), glid_3_xl),
    Project("WeilunWang/semantic-diffusion-model", ("image_sample.py", _GUIDED), sdm),
    Project("andreas128/RePaint", ("guided_diffusion/scheduler.py", _GUIDED), repaint),
    Project("ai-forever/Kandinsky-2", ("kandinsky2/model/gaussian_diffusion.py",), kandinsky),
    Project("HJ-harry/MCG_diffusion", ("scripts/sample_inpainting.py", _GUIDED), mcg),
    Project("jychoi118/ilvr_adm", ("scripts/ilvr_sample.py", _GUIDED), ilvr),
    Project("zsyOAOA/DifFace", ("models/gaussian_diffusion.py: y0", "sampler.py: DifFaceSampler"), dif_face),
    Project("SuperMedIntel/MedSegDiff", ("scripts/segmentation_sample.py", _GUIDED), med_seg_diff),
    Project("JuliaWolleb/diffusion-anomaly", ("scripts/classifier_sample_known.py", _GUIDED), anomaly),
    Project("EperLuo/scDiffusion", ("cell_sample.py", _GUIDED), sc_diffusion),
    Project("DPS2022/diffusion-posterior-sampling", ("sample_condition.py", _GUIDED), dps),
    Project("crowsonkb/guided-diffusion", (f"{_GUIDED}: randomize_class",), disco),
)
