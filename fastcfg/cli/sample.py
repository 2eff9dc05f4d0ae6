"""`fastcfg sample`: prompts to a grid of pictures."""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from .outputs import STDOUT, check_output, write_json
from .parser import any_integer, choose_device, finite, integer, one_of, several_finite
from .versions import versions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastcfg.pipeline import TextToImage

_DESCRIPTION = """\
Draw pictures from prompts and write them as one captioned grid.

The model that comes with the package knows coloured shapes: circle, square, triangle, star and cross; red, orange,
yellow, green, blue, purple and white; small and large; and where they lie: above, below, left of, right of."""

_EXAMPLES = """\
examples:
  fastcfg sample "a red circle above a blue square"
  fastcfg sample "a green star" "a small white cross" --num-samples 8 --solver ddim --steps 25
  fastcfg sample "a red circle left of a blue square" --guidance-scale 0,1,3,6 --num-samples 8 --out guidance.png
  fastcfg sample "a large star" --negative "a red star" --seed 7 --json star.json

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
    parser.add_argument("--steps", metavar="N", type=integer(1), default=50, help="timesteps (default: %(default)s)")
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
        "--num-samples", metavar="N", type=integer(1), default=16, help="pictures per prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", metavar="N", type=any_integer, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", default="samples.png", help="PNG to write (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of `fastcfg train` (default: the package's)")
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


def run(arguments: argparse.Namespace) -> int:
    """Sample, write the grid, tell what was done."""
    check_output("--out", arguments.out, ".png")
    if arguments.json not in (None, STDOUT):
        check_output("--json", arguments.json, ".json")
    device = choose_device(arguments.device)
    scales = [scale for given in arguments.guidance_scale or [[3.0]] for scale in given]

    from fastcfg.pipeline import TextToImage

    pipeline = TextToImage.load(arguments.checkpoint, device)
    started = time.perf_counter()
    images = [_sample(pipeline, arguments, scale).cpu() for scale in scales]
    seconds = time.perf_counter() - started
    summary = _summary(arguments, pipeline, scales, device, seconds)
    _write_grid(arguments, scales, images, summary)
    if arguments.json is not None:
        write_json(arguments.json, summary)
    if arguments.json != STDOUT:
        _tell(summary)
    return 0


def _sample(pipeline: TextToImage, arguments: argparse.Namespace, scale: float) -> torch.Tensor:
    return pipeline.sample(
        arguments.prompts,
        negative=arguments.negative,
        guidance_scale=scale,
        steps=arguments.steps,
        solver=arguments.solver,
        eta=arguments.eta,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        backend=arguments.backend,
        graph=False if arguments.no_graph else "auto",
        progress=f"guidance {scale:g}",
    )


def _summary(
    arguments: argparse.Namespace, pipeline: TextToImage, scales: list[float], device: str, seconds: float
) -> dict[str, Any]:
    report = pipeline.report()
    count = len(scales) * len(arguments.prompts) * arguments.num_samples
    return {
        "out": arguments.out,
        "prompts": arguments.prompts,
        "negative": arguments.negative,
        "guidance_scales": scales,
        "steps": arguments.steps,
        "solver": arguments.solver,
        "eta": arguments.eta,
        "num_samples": arguments.num_samples,
        "seeds": [arguments.seed + i for i in range(arguments.num_samples)],
        "checkpoint": arguments.checkpoint,
        "image_size": pipeline.meta.image_size,
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
    *("prompts", "negative", "guidance_scales", "steps", "solver", "eta", "num_samples", "seeds"),
    *("checkpoint", "image_size", "versions"),
)


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
    described += [f"{arguments.steps} steps of {arguments.solver}"]
    described += [f"eta {arguments.eta:g}"] if arguments.eta else []
    described += [_seeds(summary["seeds"])]
    image = draw_grid(sections, "   ·   ".join(described), columns)
    text = {"Software": f"fastcfg {summary['versions']['fastcfg']}", "Description": "; ".join(arguments.prompts)}
    save_png(image, arguments.out, text, {name: summary[name] for name in _SETTINGS})


def _to_bytes(images: torch.Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3]."""
    import torch

    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _tell(summary: dict[str, Any]) -> None:
    size, count = summary["image_size"], summary["images"]
    graph = summary["graph"] + (f" ({summary['graph_reason']})" if summary["graph_reason"] else "")
    rate = f"{summary['images_per_second']:.2f} images/s"
    seeds = _seeds(summary["seeds"]) + (" for every prompt" if len(summary["prompts"]) > 1 else "")
    print(f"wrote    {summary['out']}: {count} pictures of {size}x{size}, {seeds}")
    print(f"time     {summary['seconds']:.1f} s, {rate}, {summary['steps']} steps of {summary['solver']}")
    print(f"backend  {summary['backend']} on {summary['device']}, graph: {graph}")
    sys.stdout.flush()
