"""The options of guided-diffusion's and GLIDE's factories, in the string form their scripts pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Multiples = Sequence[float]


def level_multiples(name: str, image_size: int, defaults: Mapping[int, Multiples], given: str = "") -> Multiples:
    """Width of each level as a multiple of the base width.

    Args:
        name: what the factory calls the image size.
        image_size: the image size.
        defaults: multiples by image size.
        given: comma-separated multiples, e.g. "1,2,4"; empty for the default.

    Raises:
        ValueError: an image size without default, or multiples that are not positive integers.
    """
    if given:
        return positive_integers("channel_mult", given)
    if image_size not in defaults:
        sizes = ", ".join(str(size) for size in sorted(defaults))
        raise ValueError(f"{name}: got {image_size!r}, expected one of {sizes}")
    return defaults[image_size]


def downsampling_factors(name: str, image_size: int, resolutions: str) -> tuple[int, ...]:
    """The factors at which features have the comma-separated resolutions, e.g. "32,16,8".

    Raises:
        ValueError: resolutions that are not positive integers.
    """
    return tuple(image_size // resolution for resolution in positive_integers(name, resolutions))


def positive_integers(name: str, text: str) -> tuple[int, ...]:
    """Numbers of a comma-separated list; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, expected positive integers separated by commas")
    return tuple(int(part) for part in parts)
