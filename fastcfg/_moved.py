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

# By new package below `fastcfg`: modules that were directly below it, as old:new where the name changed too.
_INTO = {
    "engine": "sampler programs conditioning readback run:loop keeper:program_cache workspace:buffers sources:noise "
    "statistics:branch_weights hooks:user_functions fingerprint:staleness graphs streams:graphs.streams",
    "ops": "stepper blender",
    "pipelines": "stage:base pipeline:text_to_image upsampler inpainting",
    "utils": "files",
}
_FOLLOWING = {
    **{f"graphs.{name}": f"engine.graphs.{name}" for name in ("cuda", "trace", "comparison", "stand_in", "errors")},
    **{f"graphs.{name}": "engine.graphs.trace" for name in ("modes", "examine")},
    **{f"training.folder_{name}": f"training.folder.{name}" for name in ("data", "config", "task")},
    **{f"training.shapes_{name}": f"training.shapes.{name}" for name in ("config", "task")},
    **{f"training.{name}": f"training.shapes.{name}" for name in ("judge", "data", "reading", "layout")},
    **{f"models.{name}": "models.blocks" for name in ("attention", "resblock")},
    "frontends._scheduler_run": "compiler.scheduler",
    "graphs.opaque": "engine.graphs.stand_in",
    "guidance.statistic": "guidance.output_methods",
    "models.glide_meta": "models.glide",
    "models.transformer": "models.text2im",
    "noise": "reference.philox",
    "parity.plain": "reference.plain",
    "reference.bound": "reference.bits_per_dim",
    "reference.gaussian": "reference.originals",
    "threshold": "clip",
}
_PAIRS = ((package, *name.partition(":")[::2]) for package, names in _INTO.items() for name in names.split())
# Old name below `fastcfg` -> new name below it.
MOVED = {old: f"{package}.{new or old}" for package, old, new in _PAIRS} | _FOLLOWING

_KERNELS = Path(__file__).parents[1] / "kernels"


class _OldNames(MetaPathFinder, Loader):
    """Finds the old names; any other import passes it by."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "fastcfg" and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = "fastcfg." + MOVED[module.__name__.partition(".")[2]]
        warn_caller(f"{module.__name__} has moved to {new}", DeprecationWarning)
        # The import system takes what it finds here: both names are one module.
        sys.modules[module.__name__] = importlib.import_module(new)


class _Kernels(MetaPathFinder):
    """Finds the kernels beside the package, where nothing else has found them in it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Another project's package of that name may lie beside an installed fastcfg.
        if name != "fastcfg.kernels" or not (_KERNELS / "guided_step.py").is_file():
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(_KERNELS)]
        return spec


def install() -> None:
    """Make them importable. Idempotent."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        # First: a folder of bytecode that an old checkout left behind would be found as a package.
        sys.meta_path.insert(0, _OldNames())
        sys.meta_path.append(_Kernels())
