"""Options of guided-diffusion's and GLIDE's factories, which are strings as in their scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..utils.checks import listed

Multiples = Sequence[float]


def level_multiples(name: str, image_size: int, defaults: Mapping[int, Multiples], given: str = "") -> Multiples:
    """Width of each level as a multiple of the base width: the integers `given`, or the default of the image size."""
    if given:
        return positive_integers("channel_mult", given)
    if image_size not in defaults:
        raise ValueError(f"{name}: got {image_size!r}, expected one of {listed(sorted(defaults))}")
    return defaults[image_size]


def downsampling_factors(name: str, image_size: int, resolutions: str) -> tuple[int, ...]:
    """Downsampling factors of an image to the comma-separated resolutions, e.g. "32,16,8"."""
    return tuple(image_size // resolution for resolution in positive_integers(name, resolutions))


def positive_integers(name: str, text: str) -> tuple[int, ...]:
    """The positive integers of a comma-separated list; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, expected positive integers separated by commas")
    return tuple(int(part) for part in parts)
