"""diffusers' own pipelines, with small random networks: the same images with the scheduler fused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.suite.foreign import load_diffusers
from fastcfg.frontends.diffusers import fuse

diffusers: Any = load_diffusers()
pytest.importorskip("transformers", reason="diffusers' text-conditional pipelines need transformers")
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

# Between pictures with values from 0 to 1, a step of 8 bits being 4e-3. Measured: 8.6e-6 (DDIM with noise), the others
# 2.1e-6 at most.
SAME = 3e-5


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(**changes: Any) -> Any:
    options = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**options | changes)


def autoencoder(**changes: Any) -> Any:
    options = {"block_out_channels": [16], "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16}
    return diffusers.AutoencoderKL(**options | changes)


def text(pooled: int = 0) -> dict[str, Any]:
    """Two prompts, encoded."""
    given = {"prompt_embeds": normal(2, 7, 32), "negative_prompt_embeds": normal(2, 7, 32, seed=2)}
    if pooled:
        given |= {"pooled_prompt_embeds": normal(2, pooled), "negative_pooled_prompt_embeds": normal(2, pooled, seed=2)}
    return given | {"num_inference_steps": 6, "height": 16, "width": 16}


def scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


def pictures(pipeline: Any, **call: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np")
    return np.asarray(result[0])


def check_same(pipeline: Any, names: tuple[str, ...] = ("scheduler",), **call: Any) -> None:
    want = pictures(pipeline, **call)
    for name in names:
        setattr(pipeline, name, fuse(getattr(pipeline, name)))
    got = pictures(pipeline, **call)
    for name in names:
        assert getattr(pipeline, name)._fastcfg_state.last is not None, name
    assert np.isfinite(want).all()
    assert want.std() > 0.01
    assert np.abs(got - want).max() < SAME


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@pytest.mark.parametrize(
    ("name", "config", "call"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, {}),
        ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.5}),
        ("DDPMScheduler", {"clip_sample": False}, {}),
        ("EulerDiscreteScheduler", {}, {"guidance_rescale": 0.7}),
        ("EulerAncestralDiscreteScheduler", {}, {}),
        ("HeunDiscreteScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}, {}),
        ("UniPCMultistepScheduler", {}, {}),
        ("LCMScheduler", {}, {}),
    ],
    ids=str,
)
def test_stable_diffusion(name: str, config: dict[str, Any], call: dict[str, Any]) -> None:
    chosen = scheduler(name, **{key: value for key, value in STABLE.items() if key != "steps_offset"}, **config)
    pipeline = diffusers.StableDiffusionPipeline(
        autoencoder(), None, None, unet(), chosen, None, None, requires_safety_checker=False
    )
    check_same(pipeline, **text(), **call)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_stable_diffusion_from_a_picture(name: str) -> None:
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        autoencoder(), None, None, unet(), scheduler(name, **STABLE), None, None, requires_safety_checker=False
    )
    call = {key: value for key, value in text().items() if key not in ("height", "width")}
    check_same(pipeline, image=normal(2, 3, 16, 16).clamp(-1, 1), strength=0.6, **call)


def test_stable_diffusion_xl() -> None:
    network = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        autoencoder(), None, None, None, None, network, scheduler("EulerDiscreteScheduler"), add_watermarker=False
    )
    check_same(pipeline, **text(32))


def test_deepfloyd_if() -> None:
    config = {"variance_type": "learned_range", "thresholding": True, "beta_schedule": "squaredcos_cap_v2"}
    pipeline = diffusers.IFPipeline(
        None,
        None,
        unet(in_channels=3, out_channels=6, sample_size=16),
        scheduler("DDPMScheduler", **config, dynamic_thresholding_ratio=0.95, sample_max_value=1.5),
        None,
        None,
        None,
        requires_safety_checker=False,
    )
    check_same(pipeline, **text())


class Tokenizer:
    model_max_length = 7

    def __call__(self, texts: Any, **options: Any) -> Any:
        ids = torch.zeros(len(texts), self.model_max_length, dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class TextEncoder(nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, ids: Tensor) -> Any:
        return SimpleNamespace(
            text_embeds=normal(len(ids), 32, seed=3), last_hidden_state=normal(len(ids), 7, 32, seed=3)
        )


def test_unclip_and_its_three_schedulers() -> None:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    def learned(**config: Any) -> Any:
        return scheduler("UnCLIPScheduler", variance_type="learned_range", **config)

    decoder = unet(
        in_channels=3,
        out_channels=6,
        sample_size=8,
        cross_attention_dim=32,
        class_embed_type="identity",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )
    up = {
        "sample_size": 16,
        "in_channels": 6,
        "out_channels": 3,
        "block_out_channels": (16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    pipeline = diffusers.UnCLIPPipeline(
        prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=32, num_embeddings=7
        ),
        decoder=decoder,
        text_encoder=TextEncoder(),
        tokenizer=Tokenizer(),
        text_proj=UnCLIPTextProjModel(
            clip_extra_context_tokens=4, clip_embeddings_dim=32, time_embed_dim=64, cross_attention_dim=32
        ),
        super_res_first=diffusers.UNet2DModel(**up),
        super_res_last=diffusers.UNet2DModel(**up),
        prior_scheduler=scheduler("UnCLIPScheduler", prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=learned(),
        super_res_scheduler=scheduler("UnCLIPScheduler", variance_type="fixed_small_log"),
    )
    names = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
    check_same(
        pipeline,
        names,
        prompt=["two discs", "a square"],
        prior_num_inference_steps=5,
        decoder_num_inference_steps=5,
        super_res_num_inference_steps=3,
    )


def flow_autoencoder() -> Any:
    return autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def flow_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )


def test_stable_diffusion_3() -> None:
    flow = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        flow_transformer(), flow, flow_autoencoder(), None, None, None, None, None, None
    )
    check_same(pipeline, **text(64))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClassifierFreeGuidance", {}),
        ("AdaptiveProjectedGuidance", {"adaptive_projected_guidance_momentum": -0.5, "stop": 0.8}),
    ],
)
def test_modular_stable_diffusion_3_and_its_guider(name: str, options: dict[str, Any], monkeypatch: Any) -> None:
    blocks = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3")
    from support.guider_cases import Blends

    pipeline = blocks.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    flow = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    guider = getattr(diffusers, name)(guidance_scale=7.0, **options)
    pipeline.update_components(transformer=flow_transformer(), scheduler=flow, guider=guider)
    call = text(64) | {"height": 128, "width": 128, "output": "latents"}

    def latents() -> Tensor:
        return pipeline(**call, generator=torch.Generator().manual_seed(0))

    want = latents()
    pipeline.update_components(guider=fuse(pipeline.guider), scheduler=fuse(pipeline.scheduler))
    blends = Blends(monkeypatch)
    got = latents()
    assert blends.ran > 0
    assert pipeline.scheduler._fastcfg_state.last is not None
    # Latents of standard deviation 1. Measured: 1.9e-6.
    assert (got - want).abs().max() < 6e-6


def test_flux() -> None:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    flow = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    pipeline = diffusers.FluxPipeline(flow, flow_autoencoder(), None, None, None, None, transformer)
    call = {key: value for key, value in text(32).items() if not key.startswith("negative")}
    check_same(pipeline, **call)
