"""GLIDE's networks, and their descriptions in checkpoints, from the options of `glide_text2im.model_creation`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .checkpoint import CheckpointMeta
from .image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResText2ImUNet
from .options import downsampling_factors, level_multiples
from .text2im import HasVocabulary, Text2ImUNet

N_VOCAB = 50257
"""Size of GPT-2's vocabulary, which GLIDE uses."""

_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}

# Options of the diffusion, and of how a network is run.
_NOT_THE_NETWORK = ("noise_schedule", "diffusion_steps", "timestep_respacing", "use_fp16")

# By (inpaint, super_res).
_CLASSES: dict[tuple[bool, bool], type[Text2ImUNet]] = {
    (False, False): Text2ImUNet,
    (False, True): SuperResText2ImUNet,
    (True, False): InpaintText2ImUNet,
    (True, True): SuperResInpaintText2ImUnet,
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of GLIDE's base model and its diffusion process."""
    return {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "channel_mult": "",
        "num_heads": 1,
        "num_head_channels": 64,
        "num_heads_upsample": -1,
        "attention_resolutions": "32,16,8",
        "dropout": 0.1,
        "text_ctx": 128,
        "xf_width": 512,
        "xf_layers": 16,
        "xf_heads": 8,
        "xf_final_ln": True,
        "xf_padding": True,
        "diffusion_steps": 1000,
        "noise_schedule": "squaredcos_cap_v2",
        "timestep_respacing": "",
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_fp16": True,
        "cache_text_emb": False,
        "inpaint": False,
        "super_res": False,
    }


def model_and_diffusion_defaults_upsampler() -> dict[str, Any]:
    """Options of GLIDE's upsampler and its diffusion process."""
    changes = {"image_size": 256, "num_res_blocks": 2, "noise_schedule": "linear", "super_res": True}
    return {**model_and_diffusion_defaults(), **changes}


GLIDE_BASE = model_and_diffusion_defaults()
"""Options of the 64-pixel network."""

GLIDE_UPSAMPLER = model_and_diffusion_defaults_upsampler()
"""Options of the upsampler from 64 to 256 pixels."""


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    text_ctx: int,
    xf_width: int,
    xf_layers: int,
    xf_heads: int,
    xf_final_ln: bool,
    xf_padding: bool,
    resblock_updown: bool,
    use_fp16: bool,
    cache_text_emb: bool,
    inpaint: bool,
    super_res: bool,
    *,
    tokenizer: HasVocabulary | None = None,
) -> Text2ImUNet:
    """Make a `Text2ImUNet`, or a subclass, from GLIDE's options (`model_creation.create_model`).

    Arguments and errors are those of `Text2ImUNet`, except (ValueError also for lists not of positive integers):

    Args:
        image_size: height and width: 64, 128 or 256, or 2 ** (levels + 2) if `channel_mult` is given, or ValueError.
        num_channels: base width.
        channel_mult: width of each level as a multiple of `num_channels`, e.g. "1,2,4"; empty for the size's default.
        attention_resolutions: heights of the feature maps with attention, e.g. "32,16,8".
        inpaint: the model also sees the known part of the image and its mask.
        super_res: the model also sees a smaller image.
        tokenizer: becomes the model's `tokenizer`; None for the size of GLIDE's vocabulary only.
    """
    options = {name: value for name, value in locals().items() if name not in ("use_fp16", "tokenizer")}
    network, arguments = describe_model(**options)
    levels = len(arguments["channel_mult"])
    if channel_mult and image_size != 2 ** (levels + 2):
        expected = f"{2 ** (levels + 2)} for the {levels} levels of channel_mult {channel_mult!r}"
        raise ValueError(f"image_size: got {image_size}, expected {expected}")
    vocabulary = SimpleNamespace(n_vocab=N_VOCAB) if tokenizer is None else tokenizer
    return network(tokenizer=vocabulary, image_size=image_size, use_fp16=use_fp16, **arguments)


def describe_model(
    *,
    image_size: int,
    num_channels: int,
    channel_mult: str,
    attention_resolutions: str,
    inpaint: bool,
    super_res: bool,
    **others: Any,
) -> tuple[type[Text2ImUNet], dict[str, Any]]:
    """The class and the arguments for options of `create_model`, without `image_size`, `use_fp16` and the tokenizer.

    `others` keep their names. Errors are those of `create_model`, which alone (as in GLIDE) ties size to levels.
    """
    arguments = {
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": num_channels,
        "channel_mult": level_multiples("image_size", image_size, _CHANNEL_MULT, channel_mult),
        "attention_resolutions": downsampling_factors("attention_resolutions", image_size, attention_resolutions),
        **others,
    }
    return _CLASSES[bool(inpaint), bool(super_res)], arguments


def glide_network(options: Mapping[str, Any], **changes: Any) -> CheckpointMeta:
    """Describe the network of GLIDE's options, all given as in `GLIDE_BASE`, with `changes`.

    `use_fp16` and `timestep_respacing` concern the running of a network and have no effect. ValueError for unknown or
    missing options, values of the wrong type, and the errors of `describe_model`.

    Example:
        >>> glide_network(GLIDE_BASE, num_channels=64).model["model_channels"]
        64
    """
    values = {**options, **changes}
    if unknown := sorted(set(values) - set(GLIDE_BASE)):
        raise ValueError(f"model: got unknown options {', '.join(unknown)}, expected some of {', '.join(GLIDE_BASE)}")
    if missing := sorted(set(GLIDE_BASE) - set(values)):
        raise ValueError(f"model: got no {', '.join(missing)}, expected all of GLIDE's options")
    for name, default in GLIDE_BASE.items():
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(values[name]) not in kinds:
            expected = f"a value of type {type(default).__name__}"
            raise ValueError(f"model: got {name} = {values[name]!r}, expected {expected}")
    schedule, steps, *_ = (values.pop(name) for name in _NOT_THE_NETWORK)
    network, arguments = describe_model(**values)
    # Lists as in the JSON of a checkpoint's header, so that a description equals the one read back.
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return CheckpointMeta(arguments, schedule, steps, values["image_size"], network=network.__name__)
