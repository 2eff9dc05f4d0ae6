"""`fastcfg train`: a recipe to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outputs import check_folder
from .parser import UsageError, any_integer, choose_device, finite, integer, one_of

if TYPE_CHECKING:
    from fastcfg.training.config import TrainConfig

_DESCRIPTION = """\
Train a text-conditional model for classifier-free guidance on captioned shapes, drawn as it goes.

Writes to DIR: recipe.json, log.jsonl, loss_curve.png, state.pt (to resume from) and model.safetensors (the averaged
weights, for `fastcfg sample --checkpoint`). The same recipe on the same machine gives the same weights, interrupted
or not. What the recipe leaves out keeps its default; options override the recipe."""

_EXAMPLES = """\
examples:
  fastcfg train --out run
  fastcfg train --out run --resume
  fastcfg train --out small --steps 2000 --set cond_drop=0.2 --set 'model={"model_channels": 32}'
  fastcfg sample "a red circle" --checkpoint run/model.safetensors"""

# Options that are settings of the recipe by another spelling.
_SETTINGS = ("steps", "batch_size", "learning_rate", "seed")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    recipe = "(default: the recipe's)"
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write to, made if missing")
    parser.add_argument("--recipe", metavar="FILE", help="JSON file of settings (default: the built-in recipe)")
    parser.add_argument("--resume", action="store_true", help="go on from DIR, with its recipe unless one is given")
    parser.add_argument("--steps", metavar="N", type=integer(1), help=f"optimizer steps {recipe}")
    parser.add_argument("--batch-size", metavar="N", type=integer(1), help=f"pictures per step {recipe}")
    parser.add_argument("--learning-rate", metavar="R", type=finite, help=f"AdamW's rate after warm-up {recipe}")
    parser.add_argument("--seed", metavar="N", type=any_integer, help=f"seed of weights, data and noise {recipe}")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="any other setting of the recipe, its value as JSON; may be repeated",
    )
    parser.add_argument("--threads", metavar="N", type=integer(1), help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--device",
        metavar="NAME",
        type=one_of("auto", "cpu", "cuda"),
        default="auto",
        help="auto (a GPU if there is one), cpu or cuda (default: %(default)s)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train, tell what came of it."""
    from importlib.util import find_spec

    import torch

    from fastcfg.training.train import STATE, train

    if find_spec("matplotlib") is None:
        raise UsageError(
            "train draws its loss curve with matplotlib, which is not installed: pip install fastcfg[train]"
        )
    check_folder("--out", arguments.out)
    config = _config(arguments)
    device = choose_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        result = train(
            config, arguments.out, resume=arguments.resume, progress=not arguments.no_progress, device=device
        )
    except KeyboardInterrupt:
        if (Path(arguments.out) / STATE).is_file():
            raise KeyboardInterrupt("the same command with --resume goes on from the last save") from None
        raise
    print(f"wrote    {result.checkpoint}")
    print(f"trained  {result.steps} steps in {result.seconds / 60:.1f} min, loss {result.loss:.4f} at the end")
    return 0


def _config(arguments: argparse.Namespace) -> TrainConfig:
    """The recipe asked for."""
    from fastcfg.training.config import TrainConfig
    from fastcfg.training.train import RECIPE

    recipe = arguments.recipe
    if recipe is None and arguments.resume:
        recipe = Path(arguments.out) / RECIPE
        if not recipe.is_file():
            raise UsageError(
                f"argument --resume: got {arguments.out!r}, which has no {RECIPE}, expected a run's folder"
            )
    values = {} if recipe is None else _read(recipe)
    for name in _SETTINGS:
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    for setting in arguments.set:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"argument --set: got {setting!r}, expected NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        merge = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if merge else value
    return TrainConfig.from_dict(values)


def _read(recipe: str | Path) -> dict[str, Any]:
    from fastcfg.training.config import TrainConfig

    try:
        return dataclasses.asdict(TrainConfig.from_file(recipe))
    except OSError as error:
        raise UsageError(
            f"argument --recipe: got {str(recipe)!r}, expected a JSON file of settings ({error.strerror})"
        ) from error
