"""`fastcfg sample`: prompts to a grid of pictures."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from .outputs import STDOUT, check_output, write_json
from .parser import any_integer, choose_device, finite, integer, one_of, respacing, several_finite
from .stages import Stages, add_arguments, check_arguments, load_stages
from .versions import versions

if TYPE_CHECKING:
    import numpy as np
    import torch

_DESCRIPTION = """\
Draw pictures from prompts and write them as one captioned grid.

The model that comes with the package knows coloured shapes: circle, square, triangle, star and cross; red, orange,
yellow, green, blue, purple and white; small and large; and where they lie: above, below, left of, right of.

With --model glide it runs OpenAI's GLIDE from its released weights (fastcfg downloads nothing): 64 pixels from the base
model, with guidance, then 256 from the upsampler, without. A picture and a mask are filled in by the inpainting
weights, base_inpaint.pt and upsample_inpaint.pt, and what the mask keeps stays as it is."""

_EXAMPLES = """\
examples:
  fastcfg sample "a red circle above a blue square"
  fastcfg sample "a green star" "a small white cross" --num-samples 8 --solver ddim --steps 25
  fastcfg sample "a red circle left of a blue square" --guidance-scale 0,1,3,6 --num-samples 8 --out guidance.png
  fastcfg sample "a large star" --negative "a red star" --seed 7 --json star.json
  fastcfg sample --model glide --base base.pt --upsample upsample.pt "an oil painting of a corgi"
  fastcfg sample --model glide --base base_inpaint.pt --upsample upsample_inpaint.pt \\
      --inpaint grass.png --mask keep.png "a corgi in a field"

Sample i of every prompt has the seed SEED + i, whatever the number of samples: rows of a grid share their noise, and a
picture found once is found again."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sample",
        help="draw pictures from prompts",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw; several make a grid of sections")
    parser.add_argument("--negative", metavar="PROMPT", help="guide away from this instead of from the empty prompt")
    parser.add_argument(
        "--guidance-scale",
        metavar="S",
        type=several_finite,
        action="append",
        help="strength of the prompt: 0 ignores it, 1 is the plain conditional model; several, with commas between or "
        "by repeating the option, make one grid row each (default: 3)",
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=respacing,
        help="timesteps; or GLIDE's respacings 10,15,20 (of so many equal sections), ddim50 or fast27 (default: 50, "
        "100 with --model glide)",
    )
    parser.add_argument(
        "--solver",
        metavar="NAME",
        type=one_of("ddpm", "ddim"),
        default="ddpm",
        help="ddpm (with the model's learned variances) or ddim (default: %(default)s)",
    )
    parser.add_argument(
        "--eta", metavar="E", type=finite, default=0.0, help="noise of ddim, 1 for DDPM's (default: %(default)s)"
    )
    parser.add_argument(
        "--num-samples",
        metavar="N",
        type=integer(1),
        help="pictures per prompt (default: 16, 1 with --model glide)",
    )
    parser.add_argument("--seed", metavar="N", type=any_integer, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", default="samples.png", help="PNG to write (default: %(default)s)")
    parser.add_argument(
        "--device",
        metavar="NAME",
        type=one_of("auto", "cpu", "cuda"),
        default="auto",
        help="auto (a GPU if there is one), cpu or cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        type=one_of("auto", "triton", "inductor", "reference"),
        default="auto",
        help="what runs the step: auto, triton, inductor or reference (default: %(default)s)",
    )
    parser.add_argument("--no-graph", action="store_true", help="do not capture CUDA graphs")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=STDOUT,
        help="write a summary as JSON to FILE, or alone to standard output where no FILE is given",
    )
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Sample, write the grid, tell what was done."""
    check_output("--out", arguments.out, ".png")
    if arguments.json not in (None, STDOUT):
        check_output("--json", arguments.json, ".json")
    check_arguments(arguments)
    device = choose_device(arguments.device)
    scales = [scale for given in arguments.guidance_scale or [[3.0]] for scale in given]
    glide = arguments.model == "glide"
    arguments.steps = arguments.steps or (100 if glide else 50)
    arguments.num_samples = arguments.num_samples or (1 if glide else 16)

    stages = load_stages(arguments, device)
    started = time.perf_counter()
    images = [stages.sample(arguments, scale) for scale in scales]
    seconds = time.perf_counter() - started
    summary = _summary(arguments, stages, scales, device, seconds)
    _write_grid(arguments, scales, images, summary)
    if arguments.json is not None:
        write_json(arguments.json, summary)
    if arguments.json != STDOUT:
        _tell(summary)
    return 0


def _summary(
    arguments: argparse.Namespace, stages: Stages, scales: list[float], device: str, seconds: float
) -> dict[str, Any]:
    report = stages.base.report()
    count = len(scales) * len(arguments.prompts) * arguments.num_samples
    return {
        "out": arguments.out,
        "model": arguments.model,
        "prompts": arguments.prompts,
        "negative": arguments.negative,
        "guidance_scales": scales,
        "steps": arguments.steps,
        "rows": report["rows"],
        "solver": arguments.solver,
        "eta": arguments.eta,
        "num_samples": arguments.num_samples,
        "seeds": [arguments.seed + i for i in range(arguments.num_samples)],
        "checkpoint": arguments.checkpoint or arguments.base,
        "inpaint": arguments.inpaint,
        "mask": arguments.mask,
        "image_size": stages.image_size,
        "dtype": str(stages.base.model.dtype).removeprefix("torch."),
        "upsample": stages.summary(arguments),
        "device": device,
        "backend": report["backend"],
        "graph": report["graph"],
        "graph_reason": report["graph_reason"],
        "images": count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "versions": versions(),
    }


# What of the summary tells the pictures: not where and how fast they were made, so that equal runs write equal files.
_SETTINGS = (
    *("model", "prompts", "negative", "guidance_scales", "steps", "solver", "eta", "num_samples", "seeds"),
    *("checkpoint", "inpaint", "mask", "image_size", "dtype", "versions"),
)
_UPSAMPLE_SETTINGS = ("file", "steps", "solver", "temperature", "seeds")


def _write_grid(
    arguments: argparse.Namespace, scales: list[float], images: list[torch.Tensor], summary: dict[str, Any]
) -> None:
    from .grid import Row, Section, draw_grid, save_png

    pictures = [_to_bytes(batch) for batch in images]
    sections = []
    for p, prompt in enumerate(arguments.prompts):
        own = slice(p * arguments.num_samples, (p + 1) * arguments.num_samples)
        labels = [f"guidance {scale:g}" if len(scales) > 1 else "" for scale in scales]
        sections.append(
            Section(prompt, [Row(label, batch[own]) for label, batch in zip(labels, pictures, strict=True)])
        )
    alone = len(scales) == len(sections) == 1
    columns = math.ceil(math.sqrt(arguments.num_samples)) if alone else min(arguments.num_samples, 8)
    described = [f"guidance {scales[0]:g}"] if len(scales) == 1 else []
    described += [f"not: {arguments.negative}"] if arguments.negative else []
    described += [_steps(summary)]
    described += [f"eta {arguments.eta:g}"] if arguments.eta else []
    described += [_seeds(summary["seeds"])]
    image = draw_grid(sections, "   ·   ".join(described), columns)
    text = {"Software": f"fastcfg {summary['versions']['fastcfg']}", "Description": "; ".join(arguments.prompts)}
    settings = {name: summary[name] for name in _SETTINGS}
    if summary["upsample"] is not None:
        settings["upsample"] = {name: summary["upsample"][name] for name in _UPSAMPLE_SETTINGS}
    save_png(image, arguments.out, text, settings)


def _to_bytes(images: torch.Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3]."""
    import torch

    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _steps(summary: dict[str, Any]) -> str:
    told = f"{summary['rows']} steps of {summary['solver']}"
    second = summary["upsample"]
    return told if second is None else f"{told}, then {second['rows']} of {second['solver']}"


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _tell(summary: dict[str, Any]) -> None:
    size, count = summary["image_size"], summary["images"]
    graph = summary["graph"] + (f" ({summary['graph_reason']})" if summary["graph_reason"] else "")
    rate = f"{summary['images_per_second']:.2f} images/s"
    seeds = _seeds(summary["seeds"]) + (" for every prompt" if len(summary["prompts"]) > 1 else "")
    print(f"wrote    {summary['out']}: {count} pictures of {size}x{size}, {seeds}")
    print(f"time     {summary['seconds']:.1f} s, {rate}, {_steps(summary)}")
    print(f"backend  {summary['backend']} on {summary['device']}, graph: {graph}")
    sys.stdout.flush()
