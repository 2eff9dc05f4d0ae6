"""The settings that --quality stands for."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any

from .options import add_option


@dataclass(frozen=True)
class Quality:
    """How pictures are drawn where no option says it: arguments of `TextToImage.sample`."""

    solver: str = "ddpm"
    steps: int | str = 50
    schedule: str | None = None
    guidance_interval: tuple[float, float] | None = None


QUALITIES = {
    "best": Quality(),
    "fast": Quality("euler_ancestral", 8, "align_your_steps", (0.0, 0.5)),
}
# What `python -m benchmarks forwards` measured with the embedded model: forwards of the network for a picture, and the
# per cent of 512 prompts that they follow. "fast" is the cheapest way found within one standard error of "best".
MEASURED = {"best": (100, 99.2), "fast": (12, 99.4)}
GLIDE_STEPS = 100


def described() -> str:
    """The qualities in lines, for a command's help."""
    lines = [
        "qualities, measured with the embedded model: forwards of the network for a picture, prompts followed of 512:"
    ]
    for name, quality in QUALITIES.items():
        told = f"{quality.steps} steps of {quality.solver}" + (f" on {quality.schedule}" if quality.schedule else "")
        if quality.guidance_interval is not None:
            told += ", guided from {:g} to {:g} of the way".format(*quality.guidance_interval)
        forwards, share = MEASURED[name]
        lines.append(f"  {name}  {told}: {forwards:g} forwards, {share:.1f} %")
    return "\n".join(lines)


def add_quality(parser: argparse.ArgumentParser) -> None:
    """Add --quality, which `settings` reads."""
    text = "solver, steps, schedule and guided steps where they are not given: best or fast, see below (default: fast, "
    add_option(parser, "--quality", "NAME", f"{text}best with --model glide or --checkpoint)", choices=tuple(QUALITIES))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to draw with, by the fields of `Quality`: an option that was given replaces that of the quality.

    What was measured together stays together: with a solver or a respacing of the user's, what was not given is as with
    "best"; and with a method of guidance, a scale or a negative prompt all steps are guided, as with "best".
    """
    name = arguments.quality or ("fast" if arguments.model == "shapes" and arguments.checkpoint is None else "best")
    if arguments.solver is not None or isinstance(arguments.steps, str):
        name = "best"
    chosen, best = QUALITIES[name], QUALITIES["best"]
    if arguments.guidance != "cfg" or arguments.guidance_scale is not None or arguments.negative_prompt is not None:
        chosen = replace(chosen, guidance_interval=best.guidance_interval)
    if chosen == best and arguments.model == "glide":
        chosen = replace(chosen, steps=GLIDE_STEPS)
    given = {option: getattr(arguments, option) for option in asdict(chosen)}
    return asdict(chosen) | {option: value for option, value in given.items() if value is not None}
