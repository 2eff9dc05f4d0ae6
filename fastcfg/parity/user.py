"""A user's own sampler or model, from a function in a file or a module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.sampler import Sampler
from ..utils.checks import listed
from .loops import Problem
from .pipelines import PipelineProblem

_CALL = ("shape", "cond", "uncond", "branches")
_OPTIONS = ("clip", "denoised_fn", "cond_fn", "dtype", "memory_format")
_NAMES = ("model", "table", "sampler", "guidance", *_CALL, *_OPTIONS)


def load_problem(source: str, device: torch.device | str) -> Problem | PipelineProblem:
    """The result of a user's function, ready to sample; `device` is that of a model without parameters.

    The function, "PATH.py:function" or "module:function", takes no arguments and returns a dictionary, or an object
    with such attributes: "model" and "table" (or a `Sampler` as "sampler"), "shape", and any of "cond", "uncond",
    "branches", "guidance", "clip", "denoised_fn", "cond_fn", "dtype" and "memory_format", as `Sampler` and
    `Sampler.sample` take them. Or {"pipeline": one of diffusers', "call": its arguments}. ValueError for no such file,
    module or function, an error in it, or another kind of result.
    """
    module, _, name = source.rpartition(":")
    if not module or not name:
        raise ValueError(f"--model: got {source!r}, expected PATH.py:function or module:function")
    try:
        function: Callable[[], Any] = getattr(_import(module), name)
        returned = function()
    except Exception as error:
        raise ValueError(f"--model: {source!r} failed: {type(error).__name__}: {error}") from error
    if isinstance(returned, Mapping) and "pipeline" in returned:
        if unknown := sorted(set(returned) - {"pipeline", "call"}, key=str):
            raise ValueError(f"--model: {source!r} returned {unknown[0]!r} beside a pipeline, expected 'call'")
        pipeline = returned["pipeline"]
        if not callable(pipeline) or not hasattr(pipeline, "scheduler"):
            raise ValueError(f"--model: pipeline: got {type(pipeline).__name__}, expected one of diffusers' pipelines")
        return PipelineProblem(pipeline, dict(returned.get("call", {})))
    items = returned if isinstance(returned, Mapping) else {name: getattr(returned, name, None) for name in _NAMES}
    given: dict[str, Any] = {key: value for key, value in items.items() if value is not None}
    if unknown := sorted(set(given) - set(_NAMES), key=str):
        raise ValueError(f"--model: {source!r} returned {unknown[0]!r}, expected some of {', '.join(_NAMES)}")
    sampler = given.get("sampler")
    if sampler is not None:
        if not isinstance(sampler, Sampler):
            raise ValueError(f"--model: sampler: got {type(sampler).__name__}, expected a Sampler")
        if clash := sorted(set(given) & {"model", "table", "guidance", *_OPTIONS}):
            raise ValueError(f"--model: {source!r} returned {clash[0]!r} beside a sampler, expected it in the sampler")
        given |= {name: getattr(sampler, name) for name in ("model", "table", "guidance", *_OPTIONS)}
        device = sampler.device
    if missing := [name for name in ("model", "table", "shape") if name not in given]:
        raise ValueError(f"--model: {source!r} returned {listed(sorted(given))}, expected also {missing[0]!r}")
    options = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    parameters = given["model"].parameters() if isinstance(given["model"], torch.nn.Module) else ()
    options["device"] = next((p.device for p in parameters), device)
    arguments = {name: given[name] for name in (*_CALL, "guidance") if given.get(name) is not None}
    try:
        arguments["shape"] = tuple(arguments["shape"])
        problem = Problem(given["model"], given["table"], **arguments, options=options)
        problem.sampler()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model: {source!r}: {error}") from error
    return problem


def _import(name: str) -> Any:
    """A module by the path of its file or by name; like a script, it sees the files beside it."""
    path = Path(name).resolve()
    folder = str(path.parent) if name.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module
