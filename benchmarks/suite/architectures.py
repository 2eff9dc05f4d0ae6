"""The networks that loops are measured with, at their published sizes; random weights but for the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suite.diffusers_rival import problem as diffusers_problem
from benchmarks.suite.foreign import load_diffusers
from fastcfg.models.glide import GLIDE_BASE, GLIDE_UPSAMPLER, N_VOCAB, glide_network
from fastcfg.models.guided_diffusion import NUM_CLASSES, create_model
from fastcfg.parity.loops import PROMPT
from fastcfg.pipelines.text_to_image import TextToImage

Device = torch.device | str
Built = tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]

_NARROW = {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 32}
_TINY_GLIDE = {**_NARROW, "xf_width": 32, "xf_layers": 1, "xf_heads": 2}

# guided-diffusion's README.
_ADM: dict[str, Any] = {"learn_sigma": True, "class_cond": True, "use_scale_shift_norm": True, "resblock_updown": True}
_ADM |= {"attention_resolutions": "32,16,8", "num_head_channels": 64}
_ADM_64 = {**_ADM, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True}
_ADM_256 = {**_ADM, "image_size": 256, "num_channels": 256, "num_res_blocks": 2}

# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0 where they leave the class's defaults.
_SD15: dict[str, Any] = {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
_SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Architecture:
    """A network and what goes into it.

    Attributes:
        name: the network's.
        shape: (C, H, W) of a sample.
        build: (device, dtype, batch, tiny=False) -> (model, cond, uncond), as `LoopCase` has them. What a prompt asks
            for once (GLIDE's text encoder) is done. A tiny model, for tests, takes samples of `tiny_shape`.
        learned_variance: the model's output has variance channels, and x0 is clipped.
        dtype: the one it is published to run in.
        problem: why it cannot be built here; empty if it can.
    """

    name: str
    shape: tuple[int, int, int]
    build: Callable[..., Built]
    learned_variance: bool = True
    dtype: torch.dtype = torch.float16
    problem: Callable[[], str] = lambda: ""

    @property
    def tiny_shape(self) -> tuple[int, int, int]:
        """As small as all of them take."""
        return (self.shape[0], 32, 32)


def _random(make: Callable[[], nn.Module], device: Device, dtype: torch.dtype) -> nn.Module:
    """A network with seeded weights, also where it would start at zero: its output would be zero too."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        network = make()
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return network.to(dtype).eval().requires_grad_(False)


def _normal(*shape: int, seed: int, device: Device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _missing() -> str:
    """What reading the embedded model needs and is not there; empty if nothing."""
    missing = [name for name in ("safetensors", "tokenizers") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def _embedded(device: Device, dtype: torch.dtype, batch: int, tiny: bool = False) -> Built:
    pipeline = TextToImage.load(device=device, dtype=dtype)
    model, tokenizer = pipeline.model.requires_grad_(False), pipeline.tokenizer
    texts = (tokenizer.padded_tokens_and_mask(ids, model.text_ctx) for ids in (tokenizer.encode(PROMPT), []))
    return _with_text(model, [map(torch.tensor, text) for text in texts], batch, device)


def _glide(options: dict[str, Any], device: Device, dtype: torch.dtype, batch: int, tiny: bool = False) -> Built:
    meta = glide_network(options, **(_TINY_GLIDE if tiny else {}))
    model: Any = _random(lambda: meta.build(SimpleNamespace(n_vocab=N_VOCAB), str(device)), device, dtype)
    tokens = torch.randint(N_VOCAB, (model.text_ctx,), generator=torch.Generator().manual_seed(0))
    masks = (torch.arange(model.text_ctx) < 16, torch.zeros(model.text_ctx, dtype=torch.bool))
    given = {"low_res": _normal(batch, 3, 64, 64, seed=1, device=device, dtype=dtype)} if options["super_res"] else {}
    return _with_text(model, [(tokens, mask) for mask in masks], batch, device, **given)


def _with_text(model: Any, texts: Iterable[Iterable[Tensor]], batch: int, device: Device, **given: Tensor) -> Built:
    """Texts are tokens and mask [text_ctx], of either branch."""
    for_all = ([part.expand(batch, -1).to(device) for part in text] for text in texts)
    cond, uncond = (model.precompute(tokens=tokens, mask=mask, **given) for tokens, mask in for_all)
    return model, cond, uncond


def _adm(options: dict[str, Any], device: Device, dtype: torch.dtype, batch: int, tiny: bool = False) -> Built:
    model = _random(lambda: create_model(**{**options, **(_NARROW if tiny else {})}), device, dtype)
    classes = torch.arange(batch, device=device) % (NUM_CLASSES - 1)
    # These models have no class for "none": another one is the same work.
    return model, {"y": classes}, {"y": torch.full_like(classes, NUM_CLASSES - 1)}


class _Plain(nn.Module):
    """A UNet of diffusers with tensors for arguments and result."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **added: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states, added_cond_kwargs=added or None).sample


def _latent(config: dict[str, Any], device: Device, dtype: torch.dtype, batch: int, tiny: bool = False) -> Built:
    diffusers: Any = load_diffusers()
    if tiny:
        widths = (32, 64, 64, 64)[: len(config["block_out_channels"])]
        small = {"attention_head_dim": 4, "layers_per_block": 1, "transformer_layers_per_block": 1}
        config = {**config, **small, "block_out_channels": widths}
    model = _random(lambda: _Plain(diffusers.UNet2DConditionModel(**config)), device, dtype)
    shapes = {"encoder_hidden_states": (77, config["cross_attention_dim"])}
    if "addition_embed_type" in config:
        shapes |= {"text_embeds": (1280,), "time_ids": (6,)}
    draw = partial(_normal, device=device, dtype=dtype)
    cond, uncond = ({name: draw(batch, *shape, seed=seed) for name, shape in shapes.items()} for seed in (1, 2))
    return model, cond, uncond


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("embedded", (3, 32, 32), _embedded, dtype=torch.float32, problem=_missing),
        Architecture("glide-base", (3, 64, 64), partial(_glide, GLIDE_BASE)),
        Architecture("glide-upsampler", (3, 256, 256), partial(_glide, GLIDE_UPSAMPLER)),
        Architecture("adm-64", (3, 64, 64), partial(_adm, _ADM_64)),
        Architecture("adm-256", (3, 256, 256), partial(_adm, _ADM_256)),
        Architecture("sd15", (4, 64, 64), partial(_latent, _SD15), False, problem=diffusers_problem),
        Architecture("sdxl", (4, 128, 128), partial(_latent, _SDXL), False, problem=diffusers_problem),
    )
}
