"""Each module of fastcfg imports only from the layers above it, read off its source; function-level imports count."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT

pytestmark = pytest.mark.quick

LAYERS = (
    "utils",
    "schedule",
    "sigmas",
    "table",
    "step",
    "clip",
    "combination",
    "state_change",
    "known_pixels",
    "solvers",
    "guidance",
    "reference",
    "compiler",
    "kernels",
    "ops",
    "engine",
    "models",
    "training",
    "pipelines",
    "frontends",
    "parity",
    "cli",
)

# The order inside a layer that has one.
INSIDE = {
    "engine": (
        "graphs",
        "staleness",
        "holders",
        "snapshot",
        "trial",
        "readback",
        "model_input",
        "config",
        "run_state",
        "span",
        "model_output",
        "conditioning",
        "by_row",
        "row_plan",
        "packing",
        "place_weights",
        "noise",
        "call_noise",
        "state_function",
        "call",
        "user_functions",
        "branch_weights",
        "finite",
        "buffers",
        "programs",
        "program_cache",
        "loop",
        "trajectory",
        "sampler",
    )
}

# Layers that may import fewer of fastcfg's than those above them.
NARROWER = {
    "kernels": set(),
    "models": {"utils"},
    "training": {"utils", "schedule", "models", "reference"},
}

# The package itself: its public names, and what `python -m` runs. It stands outside the order.
TOP = {"fastcfg", "fastcfg.__main__", "fastcfg._moved"}

THIRD_PARTY_UIS = {"diffusers", "k_diffusion", "transformers"}


class Import(NamedTuple):
    target: str  # absolute dotted name, the imported name included
    relative: bool
    deferred: bool  # inside a function or an `if TYPE_CHECKING:` block
    line: int


def find_imports(tree: ast.AST, package: str, deferred: bool = False) -> Iterator[Import]:
    """Every import below `tree` of a module in `package`, `importlib.import_module("constant")` included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, False, deferred, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.level > 0, deferred, node.lineno)
        elif isinstance(node, ast.Call) and (name := dynamic_target(node)):
            yield Import(resolve(name, package), name.startswith("."), deferred, node.lineno)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from find_imports(ast.Module(node.body, []), package, deferred=True)
            yield from find_imports(ast.Module(node.orelse, []), package, deferred)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from find_imports(node, package, deferred or function)


def resolve(name: str, package: str) -> str:
    """The absolute name of `name`, which may begin with dots, in a module of `package`."""
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name[level:]])])


def dynamic_target(call: ast.Call) -> str | None:
    """The module that `import_module("…")` or `__import__("…")` imports."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    argument = call.args[0] if call.args else None
    if name in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
        return str(argument.value)
    return None


def layer_of(name: str) -> str:
    """The layer a dotted fastcfg name belongs to; "fastcfg" for names of the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS and name not in TOP else "fastcfg"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports and may not, one line each."""
    inner = module.split(".")[2:3]
    if inner and inner[0] not in INSIDE.get(layer_of(module), inner):
        return [
            f"{module} belongs to no place in {layer_of(module)}: expected one of {', '.join(INSIDE[layer_of(module)])}"
        ]
    if module not in TOP and layer_of(module) == "fastcfg":
        return [f"{module} belongs to no layer: expected one of {', '.join(LAYERS)}"]
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for item in find_imports(ast.parse(source), package):
        if reason := forbidden(layer_of(module), module, item):
            found.append(f"{module}:{item.line} imports {item.target}: {reason}")
    return found


def forbidden(layer: str, module: str, item: Import) -> str | None:
    """Why `module`, which is of `layer`, may not import `item`."""
    distribution = item.target.split(".")[0]
    if distribution == "fastcfg":
        return forbidden_inside(layer, module, item)
    if distribution == "kernels":
        return "kernels is another project's package"
    if distribution == "triton" and layer != "kernels":
        return "only kernels imports triton"
    if distribution in THIRD_PARTY_UIS and not (layer == "frontends" and item.deferred):
        return "third-party interfaces are imported only inside functions of frontends"
    if distribution not in sys.stdlib_module_names:
        if layer == "kernels" and distribution != "triton":
            return "kernels imports triton only"
        if layer == "cli" and not item.deferred:
            return "cli imports lazily, inside functions"
    return None


def out_of_order(layer: str, module: str, target: str) -> str | None:
    """Why `module` may not import `target` of the same layer."""
    order = INSIDE.get(layer)
    importer, imported = (name.split(".")[2:3] for name in (module, target))
    if order is None or not importer or importer == imported:
        return None  # the package itself, and what is in one of its own packages, may import all of it
    if imported and imported[0] in order and order.index(imported[0]) < order.index(importer[0]):
        return None
    return f"{importer[0]} may import {', '.join(order[: order.index(importer[0])])} of {layer}"


def forbidden_inside(layer: str, module: str, item: Import) -> str | None:
    """Why a module of `layer` may not import `item`, which is fastcfg's own."""
    target = layer_of(item.target)
    if target == layer:
        if layer == "kernels" and not item.relative:
            return "kernels import each other relatively"
        return out_of_order(layer, module, item.target)
    if target == "kernels" and layer != "ops":
        return "only ops imports kernels"
    if layer == "fastcfg":
        return None
    if layer == "cli":
        return None if item.deferred or target == "fastcfg" else "cli imports lazily, inside functions"
    if target == "fastcfg":
        return "the package itself stands below every layer"
    allowed = NARROWER.get(layer, LAYERS[: LAYERS.index(layer)])
    return None if target in allowed else f"{layer} may import {', '.join(sorted(allowed)) or 'none of fastcfg'}"


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module; the kernels by their real folder."""
    found = []
    for folder, package in ((ROOT / "fastcfg", "fastcfg"), (ROOT / "kernels", "fastcfg.kernels")):
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder).with_suffix("")
            parts = [package, *relative.parts]
            if folder / "kernels" not in path.parents:
                found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_module_imports_only_from_layers_above(module: str, path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(module, source, is_package=path.name == "__init__.py") == []


def test_every_package_of_the_checkout_was_read() -> None:
    names = {module for module, _ in modules()}
    assert "fastcfg" in names
    assert {f"fastcfg.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastcfg.schedule", "from fastcfg import table"),
        ("fastcfg.schedule", "from . import table"),
        ("fastcfg.schedule", "from .table import StepTable"),
        ("fastcfg.table", "def f():\n    import fastcfg.engine.sampler"),
        ("fastcfg.table", "class C:\n    from fastcfg.ops import guided_step"),
        ("fastcfg.table", "try:\n    import fastcfg.ops\nexcept ImportError:\n    ops = None"),
        ("fastcfg.table", "if TYPE_CHECKING:\n    from fastcfg.engine.sampler import Sampler"),
        ("fastcfg.table", "import importlib\nops = importlib.import_module('fastcfg.ops')"),
        ("fastcfg.table", "ops = import_module('.ops', 'fastcfg')"),
        ("fastcfg.table", "ops = __import__('fastcfg.ops')"),
        ("fastcfg.table", "from fastcfg import Sampler"),
        ("fastcfg.solvers.ddim", "from ..sampler import Sampler"),
        ("fastcfg.solvers.ddim", "from .. import compiler"),
        ("fastcfg.engine.sampler", "def f():\n    from fastcfg.kernels import guided_step"),
        ("fastcfg.cli", "def f():\n    import fastcfg.kernels.guided_step"),
        ("fastcfg", "def f():\n    from fastcfg.kernels import guided_step"),
        ("fastcfg.engine.sampler", "from fastcfg import models"),
        ("fastcfg.ops", "def f():\n    import triton.language as tl"),
        ("fastcfg", "from triton import jit"),
        ("fastcfg.cli", "def f():\n    import triton"),
        ("fastcfg.ops", "import kernels"),
        ("fastcfg.ops", "def f():\n    from kernels.guided_step import launch"),
        ("fastcfg.kernels.guided_step", "import torch"),
        ("fastcfg.kernels.guided_step", "import numpy as np"),
        ("fastcfg.kernels.guided_step", "from fastcfg.kernels._math import philox"),
        ("fastcfg.kernels.guided_step", "from ..table import COLUMNS"),
        ("fastcfg.frontends.diffusers", "import diffusers"),
        ("fastcfg.frontends.diffusers", "class C:\n    from diffusers import DDIMScheduler"),
        ("fastcfg.frontends", "from transformers import CLIPTextModel"),
        ("fastcfg.compiler", "def f():\n    import k_diffusion"),
        ("fastcfg.models.unet", "from fastcfg.schedule import Schedule"),
        ("fastcfg.models.unet", "def f():\n    from ..ops import guided_step"),
        ("fastcfg.training.loop", "from fastcfg.engine.sampler import Sampler"),
        ("fastcfg.training.loop", "def f():\n    from fastcfg import graphs"),
        ("fastcfg.training.loop", "from ..kernels import guided_step"),
        ("fastcfg.training.loop", "from fastcfg import table"),
        ("fastcfg.cli", "from fastcfg.engine.sampler import Sampler"),
        ("fastcfg.cli", "import torch"),
        ("fastcfg.helpers", "import math"),
    ],
)
def test_a_module_out_of_order_is_reported(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastcfg.schedule", "from __future__ import annotations\nimport math\nimport numpy as np"),
        ("fastcfg.table", "from fastcfg.schedule import Schedule"),
        ("fastcfg.solvers.ddim", "from . import _prediction\nfrom ..table import StepTable\nfrom .. import schedule"),
        ("fastcfg.ops", "def f():\n    from fastcfg.kernels import guided_step"),
        ("fastcfg.kernels.guided_step", "import dataclasses\nimport triton\nfrom . import _math\nfrom ._math import f"),
        ("fastcfg.frontends.diffusers", "def f():\n    import diffusers"),
        ("fastcfg.models.unet", "import torch\nfrom .nn import timestep_embedding\nfrom . import nn"),
        ("fastcfg.training.loop", "from ..models import Text2ImUNet\nfrom .. import reference, schedule"),
        (
            "fastcfg.cli",
            "import argparse\nfrom fastcfg import __version__\ndef f():\n    import torch\n    from . import ops",
        ),
        ("fastcfg", "from .sampler import Sampler\nfrom fastcfg.cli import main"),
        ("fastcfg.__main__", "from .cli import main"),
    ],
)
def test_a_module_in_order_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_package_resolves_its_relative_imports_from_itself() -> None:
    assert violations("fastcfg.solvers", "from .ddim import ddim\nfrom ..table import StepTable", is_package=True) == []
    assert len(violations("fastcfg.solvers", "from ..sampler import Sampler", is_package=True)) == 1
    assert violations("fastcfg", "from . import sampler\nfrom .cli import main", is_package=True) == []
