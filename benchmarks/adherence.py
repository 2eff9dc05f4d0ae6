"""How well the pictures follow their prompts, by guidance scale: `python -m benchmarks adherence`.

Scenes are drawn from a seed that training does not use, put into words, and the model draws one picture of each at
every scale, from the same noise. `fastcfg.training.shapes.judge`, classical vision that knows nothing of the model,
then says of each picture whether colours, shapes and relation are those asked for. Beside it stand the judge's score of
pictures that the renderer drew of the same scenes (what a perfect model would get), and at every scale the score of the
pictures against each other's prompts (chance).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.command import add_device, add_json, parser_of, write_json
from benchmarks.environment import environment, load_average
from fastcfg.cli.outputs import check_output
from fastcfg.cli.parser import Parser, UsageError, any_integer, choose_device, integer, several_finite

if TYPE_CHECKING:
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.training.shapes.scenes import Scene

SCALES = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0]
HELD_OUT_SEED = 1
PICTURE_PROMPT = "a red circle above a blue square"
PICTURE_SCALES, PICTURE_SAMPLES = "0,1,3,6", 8

_PARTS = ("correct", "colours", "shapes", "relation")
_NAMES = {"correct": "fully correct", "colours": "colours", "shapes": "shapes", "relation": "relation"}
_EXAMPLES = """examples:
  python -m benchmarks adherence --json adherence.json --plot adherence.png
  python -m benchmarks adherence --checkpoint run/model.safetensors --num-prompts 128 --scales 1,3 --solver ddim
  python -m benchmarks adherence --picture guidance.png

A run that was interrupted goes on where it was: scales that the JSON file holds already are not sampled again."""


def score(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Judge pictures.

    Args:
        images: float [N, 3, H, W] in [-1, 1].
        scenes: what each should show.

    Returns:
        By part ("correct" for everything at once, "colours", "shapes", and "relation", which counts only scenes that
        have one) its fraction and the fraction's binomial standard error.
    """
    from fastcfg.training.shapes.judge import judge

    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    related = [verdict for verdict, scene in zip(verdicts, scenes, strict=True) if scene.relation is not None]
    result = {}
    for part in _PARTS:
        counted = related if part == "relation" else verdicts
        fraction = sum(getattr(verdict, part) for verdict in counted) / max(len(counted), 1)
        error = math.sqrt(fraction * (1 - fraction) / max(len(counted), 1))
        result[part] = {"fraction": fraction, "standard_error": error}
    return result


def shuffled(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes in another order, none at its place: what pictures show by chance."""
    order = np.random.default_rng(0).permutation(len(scenes))
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)
    return [scenes[i] for i in others]


def measure(
    pipeline: TextToImage, prompts: Sequence[tuple[str, Scene]], scale: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Sample and judge one picture per prompt; picture i has the seed i at every scale."""
    scenes = [scene for _, scene in prompts]
    started = time.perf_counter()
    images = pipeline.sample(
        [text for text, _ in prompts],
        guidance_scale=scale,
        steps=arguments.steps,
        solver=arguments.solver,
        seed=list(range(len(prompts))),
        batch_size=arguments.batch_size,
        progress=f"guidance {scale:g}",
    )
    pictures = images.cpu().numpy()
    seconds, own, others = time.perf_counter() - started, score(pictures, scenes), score(pictures, shuffled(scenes))
    return {"scale": scale, "own_prompts": own, "shuffled_prompts": others, "seconds": seconds}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every scale that the JSON file lacks, writing it after each; returns the whole report."""
    from fastcfg.pipelines.text_to_image import TextToImage
    from fastcfg.training.shapes.data import evaluation_prompts
    from fastcfg.training.shapes.scenes import render_batch

    device = choose_device(arguments.device)
    pipeline = TextToImage.load(arguments.checkpoint, device)
    settings = {"weights_sha256": digest(pipeline), "num_prompts": arguments.num_prompts}
    settings |= {"prompts_seed": arguments.seed, "steps": arguments.steps, "solver": arguments.solver}
    report = _resume(arguments.json, settings)
    report["environment"] = environment(torch.device(device), load_average()) | {"threads": torch.get_num_threads()}
    prompts = evaluation_prompts(arguments.num_prompts, arguments.seed)
    scenes = [scene for _, scene in prompts]
    report["rendered"] = score(render_batch(scenes, np.random.default_rng(arguments.seed)), scenes)
    _tell("rendered", report["rendered"])
    for scale in arguments.scales:
        finished = {row["scale"]: row for row in report["scales"]}
        if scale not in finished:
            finished[scale] = measure(pipeline, prompts, scale, arguments)
            report["scales"] = [finished[known] for known in sorted(finished)]
            write_json(arguments.json, report)
        _tell(f"scale {scale:g}", finished[scale]["own_prompts"])
    return report


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines of a Markdown table, in per cent."""
    lines = [f"| guidance | {' | '.join(_NAMES.values())} | fully correct, shuffled prompts |"]
    lines.append("|" + "---|" * (len(_PARTS) + 2))
    for row in report["scales"]:
        cells = [_percent(row["own_prompts"][part]) for part in _PARTS]
        lines.append(f"| {row['scale']:g} | {' | '.join(cells)} | {_percent(row['shuffled_prompts']['correct'])} |")
    cells = [_percent(report["rendered"][part]) for part in _PARTS]
    return [*lines, f"| rendered pictures | {' | '.join(cells)} | |"]


def plot(report: dict[str, Any], path: str) -> None:
    """Draw the curve of adherence over guidance scale as a PNG, whole or not at all."""
    from matplotlib.figure import Figure

    from fastcfg.utils.files import replacing

    rows = report["scales"]
    scales = [row["scale"] for row in rows]
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for part in _PARTS:
        parts = ([100 * row["own_prompts"][part][key] for row in rows] for key in ("fraction", "standard_error"))
        width = 2.2 if part == "correct" else 1.2
        axes.errorbar(scales, *parts, label=_NAMES[part], capsize=3, marker="o", linewidth=width)
    chance = [100 * row["shuffled_prompts"]["correct"]["fraction"] for row in rows]
    axes.plot(scales, chance, color="gray", linestyle=":", label="fully correct, shuffled prompts")
    best = 100 * report["rendered"]["correct"]["fraction"]
    axes.axhline(best, color="gray", linestyle="--", linewidth=1, label="fully correct, rendered pictures")
    settings = report["settings"]
    title = f"{settings['num_prompts']} prompts, {settings['steps']} steps of {settings['solver']}"
    axes.set(xlabel="guidance scale", ylabel="pictures, %", ylim=(-2, 102), title=title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_picture(arguments: argparse.Namespace) -> int:
    """The README's picture: one prompt at several guidance scales, each column one seed."""
    from fastcfg.cli import main as fastcfg

    command = ["sample", PICTURE_PROMPT, "--guidance-scale", PICTURE_SCALES, "--num-samples", str(PICTURE_SAMPLES)]
    command += ["--steps", str(arguments.steps), "--solver", arguments.solver, "--device", arguments.device]
    command += ["--checkpoint", arguments.checkpoint] if arguments.checkpoint else []
    return fastcfg([*command, "--out", arguments.picture])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    for option in ("plot", "picture"):
        if getattr(arguments, option):
            check_output(f"--{option}", getattr(arguments, option), ".png")
    if arguments.picture:
        return draw_picture(arguments)
    report = run(arguments)
    if arguments.plot:
        plot(report, arguments.plot)
    print("\n".join(["", *table(report)]))
    return 0


def _parser() -> Parser:
    parser, default = parser_of("adherence", __doc__, _EXAMPLES), "(default: %(default)s)"
    parser.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of `fastcfg train` (default: the package's)")
    parser.add_argument("--num-prompts", metavar="N", type=integer(2), default=512, help=f"prompts {default}")
    seed = f"of the prompts {default}"
    parser.add_argument("--seed", metavar="N", type=any_integer, default=HELD_OUT_SEED, help=seed)
    parser.add_argument("--scales", metavar="S,S", type=several_finite, default=SCALES, help="(default: 0,1,2,3,4,6)")
    parser.add_argument("--steps", metavar="N", type=integer(1), default=50, help=f"timesteps {default}")
    parser.add_argument("--solver", choices=("ddpm", "ddim"), default="ddpm", help=default)
    parser.add_argument("--batch-size", metavar="N", type=integer(1), default=64, help=f"pictures at once {default}")
    add_device(parser)
    add_json(parser, "report to write after every scale, and to resume from")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the curve")
    parser.add_argument("--picture", metavar="FILE", help="only draw the README's picture, a PNG")
    return parser


def _resume(path: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The report so far.

    Raises:
        UsageError: the file is not a report, or one of other settings.
    """
    if path is None or not Path(path).exists():
        return {"settings": settings, "scales": []}
    try:
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        found, _ = report["settings"], report["scales"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"argument --json: got {path!r}, which is no report to resume from") from error
    for name, value in settings.items():
        if found.get(name) != value:
            got = f"{path!r}, a report with {name} = {found.get(name)}"
            raise UsageError(f"argument --json: got {got}, expected {value} or another file")
    return report


def digest(pipeline: TextToImage) -> str:
    """Of the weights, SHA-256."""
    digest = hashlib.sha256()
    for name, weight in sorted(pipeline.model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def _tell(label: str, scores: dict[str, dict[str, float]]) -> None:
    parts = ", ".join(f"{_NAMES[part]} {_percent(scores[part])}" for part in _PARTS)
    print(f"{label:<9} {parts}", flush=True)


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['fraction']:.1f} ± {100 * value['standard_error']:.1f}"
