"""guided-diffusion's networks from its options: the networks of `guided_diffusion.script_util`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .classifier import EncoderUNetModel
from .image_conditioned import SuperResModel
from .options import Multiples, downsampling_factors, level_multiples
from .unet import UNetModel

NUM_CLASSES = 1000

_UNet = TypeVar("_UNet", bound=UNetModel)

_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
_SUPER_RES_CHANNEL_MULT = {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (1, 1, 2, 2, 4, 4)}


def diffusion_defaults() -> dict[str, Any]:
    """Default options of the diffusion process."""
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def classifier_defaults() -> dict[str, Any]:
    """Default arguments of `create_classifier`."""
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Default options of an image model and its diffusion process, some unlike those of `create_model`."""
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        **diffusion_defaults(),
    }


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Default options of a classifier and its diffusion process."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Default options of an upsampler and its diffusion process."""
    without = ("image_size", "channel_mult", "use_new_attention_order")
    options = {name: value for name, value in model_and_diffusion_defaults().items() if name not in without}
    return {**options, "large_size": 256, "small_size": 64}


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
) -> UNetModel:
    """Make an image model from guided-diffusion's options (`script_util.create_model`).

    Arguments and errors are those of `UNetModel`, except (ValueError also for lists not of positive integers):

    Args:
        image_size: height and width: 64, 128, 256 or 512, or ValueError, unless `channel_mult` is given.
        num_channels: base width.
        channel_mult: width of each level as a multiple of `num_channels`, e.g. "1,2,3,4"; empty for the size's default.
        learn_sigma: the model learns its variance: it has six output channels, not three.
        class_cond: the model is conditioned on `NUM_CLASSES` classes.
        attention_resolutions: heights of the feature maps with attention, e.g. "32,16,8".
    """
    return _make_unet(UNetModel, "image_size", _CHANNEL_MULT, **locals())  # the arguments by name


def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
) -> EncoderUNetModel:
    """Make a classifier from guided-diffusion's options (`script_util.create_classifier`).

    Width and depth are the base width and the residual blocks per level, the pool is that of `EncoderUNetModel`; the
    other arguments and the errors are those of `create_model`.
    """
    name, resolutions = "classifier_attention_resolutions", classifier_attention_resolutions
    return EncoderUNetModel(
        image_size,
        in_channels=3,
        model_channels=classifier_width,
        out_channels=NUM_CLASSES,
        num_res_blocks=classifier_depth,
        attention_resolutions=downsampling_factors(name, image_size, resolutions),
        channel_mult=level_multiples("image_size", image_size, _CHANNEL_MULT),
        use_fp16=classifier_use_fp16,
        num_head_channels=64,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
) -> SuperResModel:
    """Make an upsampler from guided-diffusion's options (`script_util.sr_create_model`).

    Arguments and errors are those of `create_model`, with two sizes: `large_size` is the height and width of the
    output, 64, 256 or 512; `small_size` has no effect: `low_res` may have any size.
    """
    options = {name: value for name, value in locals().items() if name != "small_size"}
    return _make_unet(SuperResModel, "large_size", _SUPER_RES_CHANNEL_MULT, **options)


def _make_unet(
    network: type[_UNet],
    size_name: str,
    multiples: Mapping[int, Multiples],
    *,
    num_channels: int,
    attention_resolutions: str,
    learn_sigma: bool,
    class_cond: bool,
    channel_mult: str = "",
    **options: Any,
) -> _UNet:
    """Make a network from options of `create_model`; its size is the option `size_name`."""
    size = options.pop(size_name)
    return network(
        size,
        in_channels=3,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        attention_resolutions=downsampling_factors("attention_resolutions", size, attention_resolutions),
        channel_mult=level_multiples(size_name, size, multiples, channel_mult),
        num_classes=NUM_CLASSES if class_cond else None,
        **options,
    )
