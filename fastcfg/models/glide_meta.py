"""Descriptions of GLIDE's networks, as in checkpoints, from GLIDE's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import CheckpointMeta
from .glide import describe_model, model_and_diffusion_defaults, model_and_diffusion_defaults_upsampler

GLIDE_BASE = model_and_diffusion_defaults()
"""Options of the 64-pixel network."""

GLIDE_UPSAMPLER = model_and_diffusion_defaults_upsampler()
"""Options of the upsampler from 64 to 256 pixels."""

# Options of the diffusion, and of how a network is run.
_NOT_THE_NETWORK = ("diffusion_steps", "noise_schedule", "timestep_respacing", "use_fp16")


def glide_network(options: Mapping[str, Any], **changes: Any) -> CheckpointMeta:
    """Describe the network of GLIDE's options, all given as in `GLIDE_BASE`, with `changes`.

    `use_fp16` and `timestep_respacing` concern the running of a network and have no effect.

    Raises:
        ValueError: unknown or missing options, values of the wrong type, or an image size without default and without
            `channel_mult`.

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
    network, arguments = describe_model(
        **{name: value for name, value in values.items() if name not in _NOT_THE_NETWORK}
    )
    # Lists as in the JSON of a checkpoint's header, so that a description equals the one read back.
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    schedule, steps = values["noise_schedule"], values["diffusion_steps"]
    return CheckpointMeta(arguments, schedule, steps, values["image_size"], network=network.__name__)
