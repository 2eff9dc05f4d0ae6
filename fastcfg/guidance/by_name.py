"""Guidance by name, for one prompt and a negative one: what `TextToImage.sample` and `fastcfg sample` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .base import Guidance, NoGuidance
from .cfg import CFG, AdaptiveCFG
from .output_methods import APG, APGMix, CFGZeroStar, MagnitudeAwareCFG, PerpNeg, TangentialCFG
from .scales import Interval, Scale

__all__ = ["METHODS", "guidance_by_name"]

# By name: the spec of a scale. Other arguments are the papers', where these give some, else the classes' defaults.
_SPECS: dict[str, Callable[[Scale], Guidance]] = {
    "cfg": CFG,
    "rescaled_cfg": lambda scale: CFG(scale, rescale=0.7),
    "adaptive": AdaptiveCFG,
    "apg": lambda scale: APG(scale, eta=0.0, momentum=-0.5),
    "apg_mix": lambda scale: APGMix(scale, apg_scale=scale),
    "cfg_zero_star": CFGZeroStar,
    "tangential": TangentialCFG,
    "magnitude_aware": MagnitudeAwareCFG,
    "perp_neg": PerpNeg,
    "none": lambda scale: NoGuidance(),
}
METHODS = tuple(_SPECS)


def guidance_by_name(name: str, scale: Scale = 3.0, interval: Interval | None = None) -> Guidance:
    """The spec of a method of `METHODS`, with a scale and an interval as `CFG`'s ("none" ignores the scale).

    Raises:
        ValueError: an unknown name, a scale that is not finite, an interval not within 0 <= start < stop <= 1, or one
            with "none".

    Example:
        >>> guidance_by_name("apg", 7.5).scale
        7.5
    """
    if name not in _SPECS:
        raise ValueError(f"guidance: got {name!r}, expected a Guidance or one of {', '.join(METHODS)}")
    spec = _SPECS[name](scale)
    if interval is None:
        return spec
    if name == "none":
        raise ValueError(f"interval: got {interval!r} with guidance 'none', expected None")
    return replace(spec, interval=interval)  # type: ignore[call-arg]
