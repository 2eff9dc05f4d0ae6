"""From JSON to the recipe of its kind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastcfg.training.config import TrainConfig
from fastcfg.training.folder.config import FolderConfig
from fastcfg.training.shapes.config import ShapesConfig


def make_recipe(values: dict[str, Any]) -> TrainConfig:
    """Make a recipe from JSON values: with ``data`` one for a folder of pictures, otherwise one for shapes.

    Args:
        values: settings by name.

    Returns:
        The recipe.

    Raises:
        ValueError: unknown names, values of the wrong type or out of range.
    """
    kind = FolderConfig if isinstance(values, dict) and "data" in values else ShapesConfig
    return kind.from_dict(values)


def read_recipe(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a recipe from a JSON file.

    Args:
        path: the file.

    Returns:
        The recipe.

    Raises:
        ValueError: not JSON, or not a recipe.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"recipe {path}: got a file that is not JSON ({error}), expected a training recipe") from error
    return make_recipe(values)
