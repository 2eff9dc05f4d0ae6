"""What GLIDE's notebooks and guided-diffusion's scripts do, call by call, for whichever library has the functions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLIDE_SMALL = {
    "image_size": 16,
    "channel_mult": "1,2",
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "attention_resolutions": "8",
    "text_ctx": 8,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "use_fp16": False,
}
GLIDE_SMALL_UP = {**GLIDE_SMALL, "image_size": 32, "channel_mult": "1,1,2"}
GD_SMALL = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "attention_resolutions": "16",
    "learn_sigma": True,
    "timestep_respacing": "3",
}
PROMPT = "an oil painting of a corgi"


def seeded_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights under which no output is constant: what is zero at the start would stay zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            weights[name] = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
        else:
            # The output's layer is a quieter one, so that x0 does not stick to the clip everywhere.
            weights[name] = (0.3 if name == "out.2.weight" else 1.0) * noise / max(value[0].numel(), 1) ** 0.5
    return weights


def text_kwargs(model: Any, options: dict[str, Any], batch_size: int, guided: bool) -> dict[str, Tensor]:
    tokens, mask = model.tokenizer.padded_tokens_and_mask(model.tokenizer.encode(PROMPT), options["text_ctx"])
    rows, masks = [tokens] * batch_size, [mask] * batch_size
    if guided:
        tokens, mask = model.tokenizer.padded_tokens_and_mask([], options["text_ctx"])
        rows, masks = rows + [tokens] * batch_size, masks + [mask] * batch_size
    return {"tokens": torch.tensor(rows), "mask": torch.tensor(masks, dtype=torch.bool)}


def make_model_fn(model: Any, guidance_scale: float) -> Callable[..., Tensor]:
    """The function that the notebooks define."""

    def model_fn(x_t: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        half = x_t[: len(x_t) // 2]
        both = model(torch.cat([half, half], dim=0), ts, **kwargs)
        eps, rest = both[:, :3], both[:, 3:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2, dim=0)
        half_eps = uncond_eps + guidance_scale * (cond_eps - uncond_eps)
        return torch.cat([torch.cat([half_eps, half_eps], dim=0), rest], dim=1)

    return model_fn


def glide(
    lib: Any, *, inpaint: bool = False, batch_size: int = 2, guide: Any = make_model_fn, **engine: Any
) -> tuple[Tensor, Tensor]:
    """The text2im notebook, or the inpaint notebook: base samples and upsampled samples."""
    options = {**lib.model_and_diffusion_defaults(), **GLIDE_SMALL, "inpaint": inpaint, "timestep_respacing": "4"}
    model, diffusion = lib.create_model_and_diffusion(**options)
    model.eval()
    model.load_state_dict(seeded_weights(model, 0))
    options_up = {**lib.model_and_diffusion_defaults_upsampler(), **GLIDE_SMALL_UP, "inpaint": inpaint}
    options_up["timestep_respacing"] = "fast27"
    model_up, diffusion_up = lib.create_model_and_diffusion(**options_up)
    model_up.eval()
    model_up.load_state_dict(seeded_weights(model_up, 1))

    # Here, not before the networks are made: their discarded initial weights may be drawn differently.
    torch.manual_seed(11)
    full_batch_size = 2 * batch_size
    small, large = options["image_size"], options_up["image_size"]
    source_large = torch.linspace(-1, 1, 3 * large * large).view(1, 3, large, large)
    source = F.interpolate(source_large, (small, small), mode="area")
    source_mask = torch.ones_like(source)[:, :1]
    source_mask[:, :, small // 3 :] = 0
    source_mask_large = F.interpolate(source_mask, (large, large), mode="nearest")

    model_kwargs = text_kwargs(model, options, batch_size, guided=True)
    arguments: dict[str, Any] = {"clip_denoised": True, "progress": False, "cond_fn": None, "device": "cpu"}
    if inpaint:
        model_kwargs["inpaint_image"] = (source * source_mask).repeat(full_batch_size, 1, 1, 1)
        model_kwargs["inpaint_mask"] = source_mask.repeat(full_batch_size, 1, 1, 1)
        arguments["denoised_fn"] = known_pixels(model_kwargs)
    model.del_cache()
    samples = diffusion.p_sample_loop(
        guide(model, 3.0), (full_batch_size, 3, small, small), model_kwargs=model_kwargs, **arguments, **engine
    )[:batch_size]
    model.del_cache()

    model_kwargs = {
        "low_res": ((samples + 1) * 127.5).round() / 127.5 - 1,
        **text_kwargs(model_up, options_up, batch_size, guided=False),
    }
    if inpaint:
        model_kwargs["inpaint_image"] = (source_large * source_mask_large).repeat(batch_size, 1, 1, 1)
        model_kwargs["inpaint_mask"] = source_mask_large.repeat(batch_size, 1, 1, 1)
        arguments["denoised_fn"] = known_pixels(model_kwargs)
    model_up.del_cache()
    shape = (batch_size, 3, large, large)
    loop = diffusion_up.p_sample_loop if inpaint else diffusion_up.ddim_sample_loop
    upsampled = loop(
        model_up, shape, noise=torch.randn(shape) * 0.997, model_kwargs=model_kwargs, **arguments, **engine
    )
    model_up.del_cache()
    return samples, upsampled[:batch_size]


def known_pixels(model_kwargs: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def denoised_fn(x_start: Tensor) -> Tensor:
        mask = model_kwargs["inpaint_mask"]
        return x_start * (1 - mask) + model_kwargs["inpaint_image"] * mask

    return denoised_fn


def to_bytes(sample: Tensor) -> Tensor:
    return ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def gd_image(
    lib: Any, *, use_ddim: bool = False, class_cond: bool = True, **engine: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """image_sample.py: samples, their bytes [N, H, W, 3], and labels."""
    options = {**lib.model_and_diffusion_defaults(), **GD_SMALL, "image_size": 32, "channel_mult": "1,2"}
    options["class_cond"] = class_cond
    model, diffusion = lib.create_model_and_diffusion(**options)
    model.load_state_dict(seeded_weights(model, 2))
    model.eval()
    classes = torch.randint(low=0, high=lib.NUM_CLASSES, size=(2,))
    sample_fn = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    kwargs = {"y": classes} if class_cond else {}
    sample = sample_fn(model, (2, 3, 32, 32), clip_denoised=True, model_kwargs=kwargs, **engine)
    return sample, to_bytes(sample), classes


def gd_classifier(lib: Any, *, use_ddim: bool = False, **engine: Any) -> Tensor:
    """classifier_sample.py: samples."""
    options = {**lib.model_and_diffusion_defaults(), **GD_SMALL, "image_size": 64, "channel_mult": "1,1,1"}
    model, diffusion = lib.create_model_and_diffusion(**options)
    model.load_state_dict(seeded_weights(model, 3))
    model.eval()
    settings = {**lib.classifier_defaults(), "classifier_width": 32, "classifier_depth": 1}
    settings["classifier_attention_resolutions"] = "8"
    classifier = lib.create_classifier(**settings)
    classifier.load_state_dict(seeded_weights(classifier, 4))
    classifier.eval()

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            selected = log_probs[range(len(log_probs)), y.view(-1)]  # type: ignore[union-attr]
            return torch.autograd.grad(selected.sum(), x_in)[0] * 10.0

    def model_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return model(x, t, None)

    classes = torch.randint(low=0, high=lib.NUM_CLASSES, size=(1,))
    sample_fn = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    return sample_fn(
        model_fn,
        (1, 3, 64, 64),
        clip_denoised=True,
        model_kwargs={"y": classes},
        cond_fn=cond_fn,
        device="cpu",
        **engine,
    )


def gd_super_res(lib: Any, **engine: Any) -> Tensor:
    """super_res_sample.py: samples."""
    options = {**lib.sr_model_and_diffusion_defaults(), **GD_SMALL, "large_size": 64, "small_size": 16}
    options["attention_resolutions"] = "8"
    model, diffusion = lib.sr_create_model_and_diffusion(**options)
    model.load_state_dict(seeded_weights(model, 5))
    model.eval()
    low_res = torch.arange(3 * 16 * 16).remainder(256).view(1, 3, 16, 16).float() / 127.5 - 1
    return diffusion.p_sample_loop(
        model, (1, 3, 64, 64), clip_denoised=True, model_kwargs={"low_res": low_res}, **engine
    )


def original_glide() -> SimpleNamespace:
    """The functions of glide-text2im, where it can be imported."""
    import pytest

    module = pytest.importorskip("glide_text2im.model_creation", reason="glide-text2im is not on the path")
    return SimpleNamespace(**vars(module))


def original_gd() -> SimpleNamespace:
    """The functions of guided-diffusion, where it can be imported."""
    import pytest

    module = pytest.importorskip("guided_diffusion.script_util", reason="guided-diffusion is not on the path")
    return SimpleNamespace(**vars(module))
