"""GLIDE's networks by GLIDE's own options, as checkpoints describe networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcfg.models.checkpoint import CheckpointMeta

GLIDE_BASE: dict[str, Any] = {
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
"""Options of the 64-pixel network (GLIDE `model_creation.model_and_diffusion_defaults`)."""

GLIDE_UPSAMPLER: dict[str, Any] = {
    **GLIDE_BASE,
    "image_size": 256,
    "num_res_blocks": 2,
    "noise_schedule": "linear",
    "super_res": True,
}
"""Options of the upsampler from 64 to 256 pixels (GLIDE `model_creation.model_and_diffusion_defaults_upsampler`)."""

_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
_NETWORKS = {
    (False, False): "Text2ImUNet",
    (True, False): "InpaintText2ImUNet",
    (False, True): "SuperResText2ImUNet",
    (True, True): "SuperResInpaintText2ImUnet",
}
# Options that constructors take under the same name.
_SAME = (
    *("text_ctx", "xf_width", "xf_layers", "xf_heads", "xf_final_ln", "xf_padding", "num_res_blocks", "dropout"),
    *("num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown"),
    "cache_text_emb",
)


def glide_network(options: Mapping[str, Any], **changes: Any) -> CheckpointMeta:
    """What GLIDE's options describe (GLIDE `model_creation.create_model`), as a checkpoint says it.

    `use_fp16` and `timestep_respacing` tell how to run a network, not what it is, and leave no trace.

    Args:
        options: all of GLIDE's options, as in `GLIDE_BASE`.
        **changes: options that replace those.

    Returns:
        Network, arguments, schedule and image size; `meta.build(tokenizer)` makes the network.

    Raises:
        ValueError: options that GLIDE does not know, that are missing or of another type than GLIDE's, or an image size
            whose `channel_mult` is not given.

    Example:
        >>> glide_network(GLIDE_BASE, num_channels=64).model["model_channels"]
        64
    """
    values = {**options, **changes}
    unknown = sorted(set(values) - set(GLIDE_BASE))
    if unknown:
        raise ValueError(f"model: got unknown options {', '.join(unknown)}, expected some of {', '.join(GLIDE_BASE)}")
    missing = sorted(set(GLIDE_BASE) - set(values))
    if missing:
        raise ValueError(f"model: got no {', '.join(missing)}, expected all of GLIDE's options")
    for name, default in GLIDE_BASE.items():
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(values[name]) not in kinds:
            expected = type(default).__name__
            raise ValueError(f"model: got {name} = {values[name]!r}, expected a value of type {expected}")
    size = values["image_size"]
    if values["channel_mult"]:
        channel_mult = _integers("channel_mult", values["channel_mult"])
    elif size in _CHANNEL_MULT:
        channel_mult = list(_CHANNEL_MULT[size])
    else:
        known = ", ".join(map(str, _CHANNEL_MULT))
        raise ValueError(f"model: got image_size = {size} without channel_mult, expected one of {known}, or both")
    resolutions = _integers("attention_resolutions", values["attention_resolutions"])
    arguments = {
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": values["num_channels"],
        "channel_mult": channel_mult,
        "attention_resolutions": [size // resolution for resolution in resolutions],
        **{name: values[name] for name in _SAME},
    }
    network = _NETWORKS[values["inpaint"], values["super_res"]]
    return CheckpointMeta(arguments, values["noise_schedule"], values["diffusion_steps"], size, network=network)


def _integers(name: str, text: str) -> list[int]:
    """The positive numbers of an option like "32,16,8"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"model: got {name} = {text!r}, expected positive integers with commas between")
    return numbers
