"""Modules that have moved, importable under their old names: the module itself, with a `DeprecationWarning`.

And the kernels of a checkout without symbolic links (Windows), in which `fastcfg/kernels` is a text file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from .utils.caller import warn_caller

__all__ = ["MOVED", "install"]

# Old name below `fastcfg` -> new name below it.
MOVED = {
    "files": "utils.files",
    "stage": "pipelines.base",
    "pipeline": "pipelines.text_to_image",
    "upsampler": "pipelines.upsampler",
    "inpainting": "pipelines.inpainting",
    "noise": "reference.philox",
    "parity.plain": "reference.plain",
    "reference.gaussian": "reference.originals",
    "reference.bound": "reference.bits_per_dim",
    "threshold": "clip",
    "guidance.statistic": "guidance.output_methods",
    "sampler": "engine.sampler",
    "run": "engine.loop",
    "keeper": "engine.program_cache",
    "programs": "engine.programs",
    "workspace": "engine.buffers",
    "statistics": "engine.branch_weights",
    "hooks": "engine.user_functions",
    "sources": "engine.noise",
    "conditioning": "engine.conditioning",
    "fingerprint": "engine.staleness",
    "readback": "engine.readback",
    "streams": "engine.graphs.streams",
    "graphs": "engine.graphs",
    "graphs.cuda": "engine.graphs.cuda",
    "graphs.trace": "engine.graphs.trace",
    "graphs.modes": "engine.graphs.trace",
    "graphs.comparison": "engine.graphs.comparison",
    "graphs.examine": "engine.graphs.trace",
    "graphs.stand_in": "engine.graphs.stand_in",
    "graphs.errors": "engine.graphs.errors",
    "graphs.opaque": "engine.graphs.stand_in",
    "stepper": "ops.stepper",
    "blender": "ops.blender",
    "frontends._scheduler_run": "frontends._fused.steps",
    "models.glide_meta": "models.glide",
    "models.attention": "models.blocks",
    "models.resblock": "models.blocks",
    "models.transformer": "models.text2im",
    "training.judge": "training.shapes.judge",
    "training.folder_data": "training.folder.data",
    "training.folder_config": "training.folder.config",
    "training.folder_task": "training.folder.task",
    "training.shapes_task": "training.shapes.task",
    "training.shapes_config": "training.shapes.config",
    "training.data": "training.shapes.data",
    "training.reading": "training.shapes.reading",
    "training.layout": "training.shapes.layout",
}

_KERNELS = Path(__file__).parents[1] / "kernels"


class _Finder(MetaPathFinder, Loader):
    """Finds the old names and the kernels, after every other finder; any other import passes it by."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "fastcfg.kernels" and _KERNELS.is_dir():
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(_KERNELS)]
            return spec
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "fastcfg" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = "fastcfg." + MOVED[module.__name__.partition(".")[2]]
        warn_caller(f"{module.__name__} has moved to {new}", DeprecationWarning)
        # The import system takes what it finds here: both names are one module.
        sys.modules[module.__name__] = importlib.import_module(new)


def install() -> None:
    """Make them importable. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # First: a folder of bytecode that an old checkout left behind would be found as a package.
        sys.meta_path.insert(0, _Finder())
