"""GLIDE's networks by GLIDE's own options, as checkpoints describe networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcfg.models.checkpoint import CheckpointMeta
from fastcfg.models.glide import (
    describe_model,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)

GLIDE_BASE = model_and_diffusion_defaults()
"""Options of the 64-pixel network."""

GLIDE_UPSAMPLER = model_and_diffusion_defaults_upsampler()
"""Options of the upsampler from 64 to 256 pixels."""

# Options of the process, and those that tell how a network is run.
_NOT_THE_NETWORK = ("diffusion_steps", "noise_schedule", "timestep_respacing", "use_fp16")


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
    network, arguments = describe_model(
        **{name: value for name, value in values.items() if name not in _NOT_THE_NETWORK}
    )
    # As a checkpoint's header stores them, so that a description equals the one read back.
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    schedule, steps = values["noise_schedule"], values["diffusion_steps"]
    return CheckpointMeta(arguments, schedule, steps, values["image_size"], network=network.__name__)
