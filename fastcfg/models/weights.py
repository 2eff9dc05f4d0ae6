"""State dicts of GLIDE: read without running what is in the file, and checked before they are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

# How many names a message lists.
_SHOWN = 3
# torch.compile names what it wraps so, and glide-finetune saves such names.
_COMPILED = "_orig_mod."


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from one of `torch.save`, of which only tensors are unpickled.

    Args:
        path: the file; its name says which, `.safetensors` or any other.

    Returns:
        The tensors by name, on the CPU, in the file's dtypes; the prefix that `torch.compile` adds is taken off.

    Raises:
        ValueError: the file is not a state dict.
        OSError: the file cannot be read.

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
    except Exception as error:  # torch.load raises whatever its unpickler meets in a foreign file
        raise ValueError(f"weights {os.fspath(path)}: got a file that cannot be loaded, {expected}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        kind = f"an object with {_listed(weights)}" if isinstance(weights, Mapping) else f"a {type(weights).__name__}"
        raise ValueError(f"weights {os.fspath(path)}: got {kind}, {expected}")
    return {name.removeprefix(_COMPILED): value for name, value in weights.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load a copy of a state dict as float32, if it is exactly the model's.

    Args:
        model: the network, possibly on torch's meta device.
        weights: its tensors by name, floating.
        source: where they come from, for messages.

    Raises:
        ValueError: names are missing or foreign, or a shape differs; the first few are listed.
    """
    wanted = model.state_dict()
    problems = []
    if missing := [name for name in wanted if name not in weights]:
        problems.append(f"no {_listed(missing)}")
    if foreign := [name for name in weights if name not in wanted]:
        problems.append(f"foreign {_listed(foreign)}")
    other = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    if other:
        shapes = [f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}" for name in other]
        problems.append(f"shapes of {_listed(shapes)}")
    if problems:
        raise ValueError(
            f"weights {os.fspath(source)}: got {'; '.join(problems)}, "
            f"expected the {len(wanted)} tensors of a {type(model).__name__} with these options"
        )
    # Copies: training must not write to what the caller holds, or to a mapped file.
    model.load_state_dict({name: weights[name].to(torch.float32, copy=True) for name in wanted}, assign=True)


def _listed(names: Iterable[object]) -> str:
    """The first few names and how many more there are."""
    words = [str(name) for name in names]
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
