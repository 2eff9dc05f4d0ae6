"""Pictures as bytes, PIL images and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.call_noise import checked_generators
from ..engine.noise import Generators, drawn_seed
from ..utils.checks import as_integer, check_seed

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["picture_noise", "picture_seeds", "random_seed", "to_bytes", "to_pil"]


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C]: each value rounded to the nearest of 256 levels; TypeError
    or ValueError for anything but such a floating tensor."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a tensor")
    if images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images: got {got}, expected a floating dtype and [N, C, H, W]")
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    bytes_: NDArray[np.uint8] = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return bytes_


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of [N, 3, H, W] (RGB) or [N, 1, H, W] (grey) in [-1, 1], as pipelines return them; TypeError or
    ValueError for anything else.

    Example:
        >>> to_pil(torch.zeros(2, 3, 8, 8))[0].size
        (8, 8)
    """
    from PIL import Image

    pictures = to_bytes(images)
    if pictures.shape[3] not in (1, 3):
        raise ValueError(f"images: got {pictures.shape[3]} channels, expected 3 or 1")
    return [Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture) for picture in pictures]


def random_seed() -> int:
    """A seed from torch's global generator, short enough to be typed."""
    return int(torch.randint(2**31, ()))


def picture_seeds(seed: int | Sequence[int] | None, num_prompts: int, num_samples: int) -> list[int]:
    """One seed per picture: `seed + i` for sample i of every prompt, or as given; None and -1 draw a random seed.

    Raises:
        TypeError: not integers.
        ValueError: another number of seeds than of pictures, or one beyond 64 bits.
    """
    first = as_integer(seed)
    if seed is None or first == -1:
        first = random_seed()
    if first is not None and first < 0:
        raise ValueError(f"seed: got {first}, expected at least 0, or -1 for a random one")
    if first is not None:
        return [check_seed(check_seed(first) + i) for i in range(num_samples)] * num_prompts
    several = isinstance(seed, Sequence) or getattr(seed, "ndim", 0) == 1
    seeds = [as_integer(value) for value in seed] if several else [None]  # type: ignore[union-attr]
    checked = [value for value in seeds if value is not None]
    if len(checked) != len(seeds):
        raise TypeError(f"seed: got {seed!r}, expected an integer or a sequence of integers, or None for a random one")
    if len(checked) != num_prompts * num_samples:
        raise ValueError(f"seed: got {len(checked)} seeds, expected one per picture ({num_prompts * num_samples})")
    return [check_seed(value) for value in checked]


def picture_noise(
    seed: int | Sequence[int] | None,
    generator: Generators | None,
    noise_source: str,
    num_prompts: int,
    num_samples: int,
) -> tuple[list[int], Generators | None]:
    """The seed of every picture, as `picture_seeds`, or drawn from torch's generators; with noise_source="torch" the
    generators themselves instead of seeds.

    Raises:
        TypeError, ValueError: as `picture_seeds`; generators beside a seed, or of another number than pictures.
    """
    if generator is None:
        return picture_seeds(seed, num_prompts, num_samples), None
    if seed is not None:
        raise ValueError(f"generator: got one beside seed={seed!r}, expected one of the two")
    generators = checked_generators(generator, num_prompts * num_samples)
    if noise_source == "torch":
        return [], generators
    if isinstance(generators, list):
        return [drawn_seed(one) for one in generators], None
    return picture_seeds(drawn_seed(generators), num_prompts, num_samples), None
