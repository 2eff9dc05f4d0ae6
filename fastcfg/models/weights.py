"""State dicts of GLIDE: read without running code in the file, and checked before they are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils.checks import listed

_SHOWN = 3  # names listed in a message
_COMPILED = "_orig_mod."  # the prefix of torch.compile, which glide-finetune saves


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or any other file of `torch.save`, unpickling tensors only.

    Returns the tensors by name, on the CPU, in the file's dtypes, without the name prefix of `torch.compile`.
    ValueError if the file is not a state dict; OSError if it cannot be read.

    Example:
        >>> load_weights(model, read_state_dict("base.pt"), "base.pt")
    """
    expected = "expected a state dict: tensors by name, in safetensors or from torch.save"
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load passes on any exception of its unpickler
        raise ValueError(f"weights {os.fspath(path)}: got a file that cannot be loaded, {expected}") from error
    is_mapping = isinstance(weights, Mapping)
    if not is_mapping or not all(isinstance(value, Tensor) for value in weights.values()):
        kind = f"an object with {listed(weights, _SHOWN)}" if is_mapping else f"a {type(weights).__name__}"
        raise ValueError(f"weights {os.fspath(path)}: got {kind}, {expected}")
    return {name.removeprefix(_COMPILED): value for name, value in weights.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load a copy of floating-point weights as float32 into a model, which may be on the meta device.

    ValueError, with their origin `source`, if names are missing or foreign, or shapes differ.
    """
    wanted = model.state_dict()
    problems = []
    if missing := [name for name in wanted if name not in weights]:
        problems.append(f"no {listed(missing, _SHOWN)}")
    if foreign := [name for name in weights if name not in wanted]:
        problems.append(f"foreign {listed(foreign, _SHOWN)}")
    if other := [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]:
        shapes = [f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}" for name in other]
        problems.append(f"shapes of {listed(shapes, _SHOWN)}")
    if problems:
        expected = f"the {len(wanted)} tensors of a {type(model).__name__} with these options"
        raise ValueError(f"weights {os.fspath(source)}: got {'; '.join(problems)}, expected {expected}")
    # Copies: training must not write to the caller's tensors or to a mapped file.
    model.load_state_dict({name: weights[name].to(torch.float32, copy=True) for name in wanted}, assign=True)
