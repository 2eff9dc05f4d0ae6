"""A folder with a project's source, whose modules are imported without a trace.

While a checkout is open its folder comes first in `sys.path`, modules of its names that were imported before are out of
the way, and packages that are not installed are stand-ins: modules whose every attribute is a class that can be
inherited from, called and used as a decorator, but not calculated with. Closing it puts everything back.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch


class _Attributes(type):
    """Classes whose absent attributes are further such classes, and which as decorators change nothing."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__bases__ == (object,) and len(args) == 1 and inspect.isroutine(args[0]):
            return args[0]
        return super().__call__(*args, **kwargs)


def _stand_in(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    body = {
        "__init__": lambda self, *_, **__: None,
        "__call__": lambda self, *args, **_: args[0] if len(args) == 1 and callable(args[0]) else self,
        "__getattr__": lambda self, name: _stand_in(name),
    }
    return _Attributes(name, (), body)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = _stand_in(name)
        setattr(self, name, value)
        return value


class _Absent(MetaPathFinder, Loader):
    """Makes stand-ins for packages that are not installed, where the importing file is the checkout's."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}{os.sep}"

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        parent = sys.modules.get(fullname.rpartition(".")[0])
        wanted = frame is not None and frame.f_code.co_filename.startswith(self.folder)
        return ModuleSpec(fullname, self) if wanted and ("." not in fullname or isinstance(parent, _Package)) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Package(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@dataclass(frozen=True)
class Checkout:
    """An open checkout; `opened` makes it.

    Attributes:
        folder: the project's root.
    """

    folder: Path

    def load(self, name: str, root: str = ".") -> Any:
        """A module of the project, without what the `__init__` files of its packages import.

        Args:
            name: its dotted name; a package's own gives what its `__init__` holds.
            root: the folder that its names start in.
        """
        top = self.folder / root
        if str(top) not in sys.path:
            sys.path.insert(0, str(top))
            _put_away(top)
        *packages, _ = name.split(".")
        for i in range(len(packages)):
            package = ".".join(packages[: i + 1])
            if package not in sys.modules:
                bare = ModuleType(package)
                bare.__path__ = [str(top.joinpath(*packages[: i + 1]))]
                sys.modules[package] = bare
        return importlib.import_module(name)

    def stand_in(self, name: str, **attributes: Any) -> None:
        """Put a module of these attributes in another's place: one that sampling does not need, or needs little of."""
        module = _Package(name)
        module.__path__ = []
        module.__dict__.update(attributes)
        sys.modules[name] = module


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkout]:
    """Open a checkout and work in it; where there is no GPU, `.cuda()` is the CPU there."""
    folder = folder.resolve()
    place, modules, path, finders = os.getcwd(), dict(sys.modules), list(sys.path), list(sys.meta_path)
    sys.meta_path.append(_Absent(folder))
    try:
        with _cuda_is_here(), _names_of_old_numpy():
            os.chdir(folder)
            yield Checkout(folder)
    finally:
        os.chdir(place)
        ours = {name: module for name, module in sys.modules.items() if _of(module, folder)}
        for name in ours:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in modules.items() if name not in sys.modules})
        sys.path[:], sys.meta_path[:] = path, finders


def _put_away(root: Path) -> None:
    """Forget modules whose names mean the project's files."""
    names = {path.stem for path in root.iterdir()} - {
        "torch",
        "numpy",
        "fastcfg",
        "benchmarks",
        *sys.stdlib_module_names,
    }
    for name in list(sys.modules):
        if name.partition(".")[0] in names and not _of(sys.modules[name], root):
            del sys.modules[name]


def _of(module: Any, folder: Path) -> bool:
    if isinstance(module, _Package):
        return True
    own = getattr(module, "__dict__", {})
    places = [own.get("__file__") or "", *(own.get("__path__") or ())]
    return any(str(place).startswith(f"{folder}{os.sep}") for place in places)


@contextlib.contextmanager
def _cuda_is_here() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    kinds = (torch.Tensor, torch.nn.Module)
    before = [kind.cuda for kind in kinds]
    try:
        for kind in kinds:
            kind.cuda = lambda self, *_, **__: self
        yield
    finally:
        for kind, method in zip(kinds, before, strict=True):
            kind.cuda = method


@contextlib.contextmanager
def _names_of_old_numpy() -> Iterator[None]:
    """`numpy.float` and its like, which numpy 1.24 took away."""
    names = {name: kind for name, kind in {"float": float, "int": int, "bool": bool}.items() if name not in vars(np)}
    try:
        for name, kind in names.items():
            setattr(np, name, kind)
        yield
    finally:
        for name in names:
            delattr(np, name)


def commit(folder: Path) -> str:
    """The newest commit of a checkout, its short hash and day; "" where git knows none."""
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h %cs"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
