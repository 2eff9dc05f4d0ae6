"""Recipes from JSON, whichever task they are for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .folder.config import FolderConfig
from .shapes.config import ShapesConfig


def make_recipe(values: dict[str, Any]) -> TrainConfig:
    """`from_dict` of `FolderConfig` if the JSON values include `data`, otherwise of `ShapesConfig`."""
    kind = FolderConfig if isinstance(values, dict) and "data" in values else ShapesConfig
    return kind.from_dict(values)


def read_recipe(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a recipe from a JSON file; ValueError if it is not JSON, or not a recipe."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"recipe {path}: got a file that is not JSON ({error}), expected a training recipe") from error
    return make_recipe(values)
