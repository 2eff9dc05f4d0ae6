"""`fastcfg sample`: prompts to a grid of pictures."""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .options import STDOUT, add_command, add_device, add_json, add_option
from .outputs import check_json, check_output, write_json
from .parser import UsageError, any_integer, choose_device, finite, integer, interval, respacing, several_finite
from .quality import add_quality, described, settings
from .stages import Models, Request, Stages, add_arguments, load_stages
from .versions import versions

if TYPE_CHECKING:
    import torch

_DESCRIPTION = """\
Draw pictures from prompts and write them as one captioned grid.

The model that comes with the package knows coloured shapes: circle, square, triangle, star and cross; red, orange,
yellow, green, blue, purple and white; small and large; and their places: above, below, left of, right of.

With --model glide it runs OpenAI's GLIDE from its released weights (fastcfg downloads nothing): 64 pixels from the base
model, with guidance, then 256 from the upsampler, without. The inpainting weights, base_inpaint.pt and
upsample_inpaint.pt, fill in a picture where its mask is black."""

_EXAMPLES = """\
examples:
  fastcfg sample "a red circle above a blue square"
  fastcfg sample "a red circle above a blue square" --quality best --seed 0
  fastcfg sample "a green star" "a small white cross" --num-samples 8 --solver ddim --steps 25
  fastcfg sample "a green star" --solver dpmpp_2m --schedule karras --steps 20
  fastcfg sample "a red circle left of a blue square" --guidance-scale 0,1,3,6 --num-samples 8 --out guidance.png
  fastcfg sample "a red circle" --guidance apg --guidance-scale 8
  fastcfg sample "a large star" --negative-prompt "a red star" --seed -1 --json star.json
  fastcfg sample --model glide --base base.pt --upsample upsample.pt "an oil painting of a corgi"
  fastcfg sample --model glide --base base_inpaint.pt --upsample upsample_inpaint.pt \\
      --inpaint grass.png --mask keep.png "a corgi in a field"

Sample i of every prompt has the seed SEED + i, whatever the number of samples: rows of a grid share their noise, and
the seeds printed draw the same pictures again.

solvers, on timesteps:
  ddpm (with the model's learned variances), ddim, ddim_extrapolated, plms, prk, langevin, predictor_corrector;
  lcm, tcd (for distilled models); ddim_cfg_pp (CFG++: scales from 0 to 1)
solvers in noise-level space, which need fewer steps (5 to 30):
  dpmpp_2m, unipc, deis, lms, euler, heun, dpm2; with noise dpmpp_2m_sde, dpmpp_3m_sde, sa_solver, euler_ancestral,
  dpm2_ancestral, dpmpp_2s_ancestral; CFG++ euler_cfg_pp, euler_ancestral_cfg_pp"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    from fastcfg.guidance.by_name import METHODS
    from fastcfg.solvers.by_name import LEVELS, SOLVERS, SPACINGS

    text = "draw pictures from prompts"
    parser = add_command(
        commands, "sample", run, help=text, description=_DESCRIPTION, epilog=f"{_EXAMPLES}\n\n{described()}"
    )
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw; several make a grid of sections")
    text = "guide away from this instead of from the empty prompt"
    parser.add_argument("--negative-prompt", "--negative", metavar="PROMPT", help=text)
    add_option(parser, "--guidance", "NAME", ", ".join(METHODS), choices=METHODS, default="cfg")
    text = "strength of the prompt: 0 ignores it, 1 is the plain conditional model; several, with commas between or by "
    text += "repeating the option, make one grid row each (default: 3; 0.6 with a CFG++ solver)"
    add_option(parser, "--guidance-scale", "S", text, type=several_finite, action="append")
    text = "share of the steps that is guided, from 0 to 1; the others take one forward of the network in place of two"
    add_option(parser, "--guidance-interval", "START:STOP", text, type=interval)
    add_quality(parser)
    text = (
        "steps; or GLIDE's respacings 10,15,20 (of so many equal sections), ddim50 or fast27 (default: the quality's)"
    )
    add_option(parser, "--steps", "N", text, type=respacing)
    add_option(parser, "--solver", "NAME", "see below (default: the quality's)", choices=SOLVERS)
    text = f"where the steps are: {', '.join(SPACINGS)}, or in noise-level space also {', '.join(LEVELS)} (there the "
    add_option(parser, "--schedule", "NAME", f"{text}default is karras)", choices=(*LEVELS, *SPACINGS))
    add_option(parser, "--eta", "E", "noise of solvers with an eta: for ddim 0 (the default) to 1, DDPM's", type=finite)
    add_option(parser, "--num-samples", "N", "pictures per prompt (default: 16, 1 with --model glide)", type=integer(1))
    add_option(parser, "--seed", "N", "first seed (default: -1, a random one)", type=any_integer, default=-1)
    add_option(parser, "--out", "FILE", "PNG to write", default="samples.png")
    add_device(parser)
    backends = ("auto", "triton", "inductor", "reference")
    text = f"implementation of the step: {', '.join(backends)}"
    add_option(parser, "--backend", "NAME", text, choices=backends, default="auto")
    parser.add_argument("--no-graph", action="store_true", help="do not capture CUDA graphs")
    add_json(parser, "a summary")
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Sample, write the grid, print a summary."""
    check_output("--out", arguments.out, ".png")
    check_json(arguments.json)
    models = Models(**{option.name: getattr(arguments, option.name) for option in fields(Models)})
    models.check()
    device = choose_device(arguments.device)
    request = _request(arguments)
    stages = load_stages(models, device)
    stages.check(request)
    started = time.perf_counter()
    images = [stages.sample(request, scale) for scale in request.scales]
    seconds = time.perf_counter() - started
    summary = _summary(models, request, stages, arguments.out, device, seconds)
    _write_grid(request, images, summary)
    write_json(arguments.json, summary)
    if arguments.json != STDOUT:
        _print(summary)
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    from fastcfg.pipelines.pictures import random_seed
    from fastcfg.pipelines.text_to_image import default_scale

    options = {name: getattr(arguments, name) for name in ("negative_prompt", "guidance", "eta")} | settings(arguments)
    scales = [s for given in arguments.guidance_scale or [[default_scale(options["solver"])]] for s in given]
    num_samples = arguments.num_samples or (1 if arguments.model == "glide" else 16)
    if not -1 <= arguments.seed < 2**63:
        raise UsageError(f"argument --seed: got {arguments.seed}, expected -1, or 0 to 2**63 - 1")
    seed = random_seed() if arguments.seed == -1 else arguments.seed
    execution = {"backend": arguments.backend, "graph": False if arguments.no_graph else "auto"}
    return Request(arguments.prompts, scales, num_samples, seed, options, execution)


def _summary(models: Models, request: Request, stages: Stages, out: str, device: str, seconds: float) -> dict[str, Any]:
    report, dtype = stages.base.report(), str(stages.base.model.dtype).removeprefix("torch.")
    count = len(request.scales) * len(request.prompts) * request.num_samples
    summary = {"out": out, "model": models.model, "prompts": request.prompts, **request.options}
    summary |= {"num_samples": request.num_samples, "seeds": request.seeds, "guidance_scales": request.scales}
    summary |= {
        "rows": report["rows"],
        "checkpoint": models.checkpoint or models.base,
    }
    summary |= {"inpaint": models.inpaint, "mask": models.mask, "image_size": stages.image_size, "dtype": dtype}
    summary |= {"upsample": stages.summary(request, models.upsample), "device": device}
    summary |= {name: report[name] for name in ("backend", "graph", "graph_reason")}
    summary |= {"images": count, "seconds": seconds, "images_per_second": count / seconds}
    return summary | {"versions": versions()}


# The part of the summary that determines the pictures, without place and speed, so that equal runs write equal files.
_SETTINGS = (
    *("model", "prompts", "negative_prompt", "guidance", "guidance_scales", "guidance_interval"),
    *("steps", "solver", "schedule", "eta"),
    *("num_samples", "seeds", "checkpoint", "inpaint", "mask", "image_size", "dtype", "versions"),
)
_UPSAMPLE_SETTINGS = ("file", "steps", "solver", "temperature", "seeds")


def _write_grid(request: Request, images: list[torch.Tensor], summary: dict[str, Any]) -> None:
    from fastcfg.pipelines.pictures import to_bytes

    from .grid import Row, Section, draw_grid, save_png

    pictures = [to_bytes(batch) for batch in images]
    guidance, negative, eta = (request.options[name] for name in ("guidance", "negative_prompt", "eta"))
    method = "guidance" if guidance == "cfg" else guidance
    scales = [f"{method} {scale:g}" if method != "none" else "no guidance" for scale in request.scales]
    labels = scales if len(scales) > 1 else [""]
    sections = []
    for p, prompt in enumerate(request.prompts):
        own = slice(p * request.num_samples, (p + 1) * request.num_samples)
        rows = [Row(label, batch[own]) for label, batch in zip(labels, pictures, strict=True)]
        sections.append(Section(prompt, rows))
    alone = len(scales) == len(sections) == 1
    columns = math.ceil(math.sqrt(request.num_samples)) if alone else min(request.num_samples, 8)
    described = scales if len(scales) == 1 else [] if method == "guidance" else [method]
    described += [f"not: {negative}"] if negative else []
    described += [_steps(summary), *([f"eta {eta:g}"] if eta else []), _seeds(request.seeds)]
    text = {"Software": f"fastcfg {summary['versions']['fastcfg']}", "Description": "; ".join(request.prompts)}
    settings = {name: summary[name] for name in _SETTINGS}
    if summary["upsample"] is not None:
        settings["upsample"] = {name: summary["upsample"][name] for name in _UPSAMPLE_SETTINGS}
    save_png(draw_grid(sections, "   ·   ".join(described), columns), summary["out"], text, settings)


def _steps(summary: dict[str, Any]) -> str:
    stages = [summary] if summary["upsample"] is None else [summary, summary["upsample"]]
    counts = [stage["steps"] if isinstance(stage["steps"], int) else stage["rows"] for stage in stages]
    text = f"{counts[0]} steps of {summary['solver']}"
    text += f" on {summary['schedule']}" if summary["schedule"] else ""
    if (guided := summary["guidance_interval"]) is not None:
        text += ", guided from {:g} to {:g}".format(*guided)
    return text if len(stages) == 1 else f"{text}, then {counts[1]} of {stages[1]['solver']}"


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _print(summary: dict[str, Any]) -> None:
    size, count = summary["image_size"], summary["images"]
    graph = summary["graph"] + (f" ({summary['graph_reason']})" if summary["graph_reason"] else "")
    seeds = _seeds(summary["seeds"]) + (" for every prompt" if len(summary["prompts"]) > 1 else "")
    print(f"wrote    {summary['out']}: {count} pictures of {size}x{size}, {seeds}")
    print(f"time     {summary['seconds']:.1f} s, {summary['images_per_second']:.2f} images/s, {_steps(summary)}")
    print(f"backend  {summary['backend']} on {summary['device']}, graph: {graph}")
    sys.stdout.flush()
