"""motion-diffusion-model and what grew from it: everything in a nested `y`, further arguments of the loops, editing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.descendants.calls import Call, Project, drawn, loops
from benchmarks.descendants.checkout import Checkout
from benchmarks.descendants.networks import Network, share

STEPS = 20
SHAPE = (2, 8, 1, 12)
# As the scripts give them, most at their defaults.
GIVEN: dict[str, Any] = {
    "clip_denoised": False,
    "skip_timesteps": 0,
    "init_image": None,
    "progress": False,
    "dump_steps": None,
    "noise": None,
    "const_noise": False,
}


def make(checkout: Checkout, kind: Any = None, steps: int = STEPS, **own: Any) -> Any:
    """The object of utils/model_util.py's create_gaussian_diffusion, in fewer steps."""
    gd, respace = checkout.load("diffusion.gaussian_diffusion"), checkout.load("diffusion.respace")
    return (kind or respace.SpacedDiffusion)(
        use_timesteps=respace.space_timesteps(1000, [steps]),
        betas=gd.get_named_beta_schedule("cosine", 1000, 1.0),
        model_mean_type=gd.ModelMeanType.START_X,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=False,
        **own,
    )


def network(channels: int = SHAPE[1], frames: int = SHAPE[2], **more: Any) -> Network:
    """With what the wrapper for guidance reads off MDM, and its results' order in memory, frames first."""
    names = {"njoints": channels, "nfeats": frames, "data_rep": "hml_vec", "cond_mode": "text", "cond_mask_prob": 0.1}
    rest = {"rot2xyz": None, "translation": True, "encode_text": encoded}
    return Network(channels, size=0.7, order=(3, 0, 1, 2), **names | rest | more)


def encoded(said: list[str]) -> torch.Tensor:
    """What the loop of MDM asks of the network, once."""
    return torch.stack([share(text, 1)[0] for text in said])


def texts(batch: int = SHAPE[0], frames: int = SHAPE[-1]) -> dict[str, Any]:
    """The `y` of a text."""
    mask = torch.ones(batch, 1, 1, frames, dtype=torch.bool)
    said = ["a person walks", "a person jumps"]
    return {"text": said, "mask": mask, "lengths": torch.full((batch,), frames), "scale": torch.full((batch,), 2.5)}


def edited(y: dict[str, Any], shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    """What sample/edit.py adds: the first quarter and the last are known."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., : shape[-1] // 4] = mask[..., -shape[-1] // 4 :] = True
    return y | {"inpainting_mask": mask, "inpainted_motion": drawn(*shape, seed=3, scale=0.5)}


def cond_fn(x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A gradient."""
    return 0.2 * torch.tanh(x)


def of_mdm(diffusion: Any, model: Any, y: dict[str, Any], shape: tuple[int, ...] = SHAPE) -> Iterator[Call]:
    """generate.py's call, edit.py's, and each further argument."""
    plain = {"model_kwargs": {"y": y}}
    yield from loops(diffusion, model, shape, **GIVEN, **plain)
    yield from loops(diffusion, model, shape, "editing", **GIVEN, model_kwargs={"y": edited(y, shape)})
    yield from loops(
        diffusion, model, shape, "`const_noise`", names=["p_sample_loop"], **GIVEN | {"const_noise": True}, **plain
    )
    skipped = {"skip_timesteps": 5, "init_image": drawn(*shape, seed=4)}
    yield from loops(diffusion, model, shape, "`skip_timesteps`, `init_image`", **GIVEN | skipped, **plain)
    dumped = GIVEN | {"dump_steps": [1, 5, 10]}
    yield from loops(diffusion, model, shape, "`dump_steps`", names=["p_sample_loop"], **dumped, **plain)
    yield from loops(diffusion, model, shape, "`cond_fn`", cond_fn=cond_fn, **plain)
    yield from loops(diffusion, model, shape, names=["plms_sample_loop"], clip_denoised=False, **plain)


def mdm(checkout: Checkout) -> Iterator[Call]:
    """sample/generate.py and sample/edit.py."""
    guided = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(network())
    yield from of_mdm(make(checkout), guided, texts())


def flow_mdm(checkout: Checkout) -> Iterator[Call]:
    """runners/generate.py: one motion of several texts, by a wrapper with a loop of its own."""
    diffusion, model = make(checkout), network()
    guided = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(model)
    wrapper = checkout.load("diffusion.diffusion_wrappers").DiffusionWrapper_FlowMDM
    y = {"text": ["walk", "sit"], "lengths": torch.tensor([7, 5])}
    args = SimpleNamespace(guidance_param=2.5)
    given = {"clip_denoised": False, "model_kwargs": {"y": y}, "progress": False}
    yield Call(
        "DiffusionWrapper_FlowMDM.p_sample_loop",
        diffusion,
        lambda obj: wrapper(args, obj, guided).p_sample_loop(**given),
        STEPS,
    )
    yield from of_mdm(diffusion, guided, texts())


def anytop(checkout: Checkout) -> Iterator[Call]:
    """sample/generate.py: joints are the channels, features come second."""
    shape = (2, 6, 5, 12)
    y = {"joints_mask": torch.ones(2, 1, 1, 6), "n_joints": torch.tensor([5, 6]), "crop_start_ind": torch.zeros(2)}
    yield from of_mdm(make(checkout), network(6, 5), y, shape)


def prior_mdm(checkout: Checkout) -> Iterator[Call]:
    """sample/finetuned_motion_control.py and utils/sampling_utils.py."""
    guided = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(network())
    diffusion, y = make(checkout), texts()
    yield from of_mdm(diffusion, guided, y)
    handshake = {"unfolding_handshake": 3, "arb_len": True}
    given = GIVEN | handshake | {"model_kwargs": {"y": y}}
    yield from loops(diffusion, guided, SHAPE, "`unfolding_handshake`", names=["p_sample_loop"], **given)
    own = make(checkout, checkout.load("diffusion.inpainting_gaussian_diffusion").InpaintingGaussianDiffusion)
    y = edited(y)
    y["inpainting_mask"] = y["inpainting_mask"].float()
    y["inpainted_motion"] = y["inpainted_motion"] * 0.5
    given = GIVEN | {"init_image": y["inpainted_motion"], "model_kwargs": {"y": y}}
    yield from loops(own, guided, SHAPE, "InpaintingGaussianDiffusion", names=["p_sample_loop"], **given)


def omni_control(checkout: Checkout) -> Iterator[Call]:
    """sample/generate.py, with a hint and without; statistics of the data set are made up."""
    shape = (1, 263, 1, 196)
    drawing = np.random.default_rng(0)
    with mock.patch.object(np, "load", lambda path: drawing.uniform(0.5, 1.0, 66 if "raw" in path.lower() else 263)):
        diffusion, short = make(checkout, dataset="humanml"), make(checkout, steps=3, dataset="humanml")
    guided = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(network(263, cond_mode="both_text_spatial"))
    y = texts(1, 196) | {"text": ["a person walks"]}
    yield from loops(diffusion, guided, shape, "no hint", **GIVEN, model_kwargs={"y": y})
    hint = torch.zeros(1, 196, 66)
    hint[:, ::40, :3] = drawn(1, 5, 3, seed=5)
    yield from loops(short, guided, shape, "a hint, 3 steps", **GIVEN, model_kwargs={"y": y | {"hint": hint}})


def gmd(checkout: Checkout) -> Iterator[Call]:
    """sample/generate.py: the trajectory's and the motion's, of START_X and of EPSILON."""
    gd, respace = checkout.load("diffusion.gaussian_diffusion"), checkout.load("diffusion.respace")
    for name, clip in (("START_X", False), ("START_X", True), ("EPSILON", True)):
        config = gd.DiffusionConfig(
            betas=gd.get_named_beta_schedule("cosine", 1000, 1.0),
            model_mean_type=gd.ModelMeanType[name],
            clip_range=6.0,
            abs_3d=True,
            traj_only=True,
        )
        diffusion = respace.SpacedDiffusion(respace.space_timesteps(1000, [STEPS]), config)
        model = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(network())
        given = GIVEN | {"clip_denoised": clip, "dump_steps": [1, 5, 10, 19], "model_kwargs": {"y": texts()}}
        yield from loops(diffusion, model, SHAPE, f"{name}, `clip_denoised={clip}`", cond_fn=None, **given)
        given["dump_steps"] = None
        yield from loops(
            diffusion, model, SHAPE, f"{name}, `clip_denoised={clip}`, no `dump_steps`", cond_fn=None, **given
        )


def inter_gen(checkout: Checkout) -> Iterator[Call]:
    """models/nets.py: [B, T, D], guidance by a doubled batch."""
    gd = checkout.load("models.gaussian_diffusion")
    diffusion = gd.MotionDiffusion(
        use_timesteps=gd.space_timesteps(1000, f"ddim{STEPS}"),
        betas=gd.get_named_beta_schedule("cosine", 1000),
        motion_rep="global",
        model_mean_type=gd.ModelMeanType.START_X,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
        rescale_timesteps=False,
    )
    model = checkout.load("models.cfg_sampler").ClassifierFreeSampleModel(Network(12, axis=2), 3.5)
    given = {"clip_denoised": False, "progress": False, "model_kwargs": {"mask": None, "cond": drawn(2, 7)}}
    yield from loops(diffusion, model, (2, 10, 12), names=["ddim_sample_loop"], x_start=None, **given)
    yield from loops(diffusion, model, (2, 10, 12), names=["p_sample_loop"], **given)


def audio2photoreal(checkout: Checkout) -> Iterator[Call]:
    """sample/generate.py: the network answers [B, T, C] for [B, C, 1, T]."""

    class Turned(Network):
        def forward(self, x: Any, t: Any, *more: Any, **named: Any) -> Any:
            return super().forward(x, t, *more, **named).squeeze(2).permute(0, 2, 1)

    diffusion = make(checkout, data_format="pose", model_path="none")
    names = {"nfeats": 8, "cond_mode": "audio", "add_frame_cond": None}
    guided = checkout.load("model.cfg_sampler").ClassifierFreeSampleModel(Turned(8, size=0.7, **names))
    y = {"audio": drawn(2, 12, 3), "mask": torch.ones(2, 1, 1, 12), "scale": torch.full((2,), 2.0)}
    given = {name: value for name, value in GIVEN.items() if name != "skip_timesteps"} | {"model_kwargs": {"y": y}}
    yield from loops(diffusion, guided, SHAPE, names=["ddim_sample_loop"], **given)


_LOOPS = "diffusion/gaussian_diffusion.py"

PROJECTS = (
    Project("BarqueroGerman/FlowMDM", ("model/FlowMDM.py", _LOOPS), flow_mdm),
    Project("Anytop2025/Anytop", ("model/anytop.py", _LOOPS), anytop),
    Project("priorMDM/priorMDM", ("model/comMDM.py", _LOOPS), prior_mdm),
    Project("neu-vi/OmniControl", ("model/cmdm.py", _LOOPS), omni_control),
    Project("korrawe/guided-motion-diffusion", ("model/mdm_unet.py", _LOOPS), gmd),
    Project("tr3e/InterGen", ("models/gaussian_diffusion.py: class MotionDiffusion",), inter_gen),
    Project("facebookresearch/audio2photoreal", ("model/vqvae.py", _LOOPS), audio2photoreal),
    Project("GuyTevet/motion-diffusion-model", ("model/mdm.py", _LOOPS), mdm),
)
