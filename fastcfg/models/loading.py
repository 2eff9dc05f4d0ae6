"""GLIDE's text-conditional networks from files, whichever of two formats those have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcfg.models.checkpoint import CheckpointMeta, has_header, load_checkpoint
from fastcfg.models.glide_meta import GLIDE_BASE, GLIDE_UPSAMPLER, glide_network
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.models.vocabulary import read_tokenizer
from fastcfg.models.weights import load_weights, read_state_dict

# What the first convolution of each network sees, by its number of channels.
_FIRST = "input_blocks.0.0.weight"
_KINDS = {
    3: {"inpaint": False, "super_res": False},
    6: {"inpaint": False, "super_res": True},
    7: {"inpaint": True, "super_res": False},
    10: {"inpaint": True, "super_res": True},
}


def load_network(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Text2ImUNet, Tokenizer, CheckpointMeta]:
    """Read a checkpoint that `save_checkpoint` wrote, or a state dict of GLIDE, such as its `base.pt`.

    Args:
        path: the file. A state dict is safetensors if its name ends so, and else of `torch.save`, of which only tensors
            are unpickled; its shapes tell which of the four networks it is.
        tokenizer: of a state dict: a tokenizer, or what `read_tokenizer` takes. A checkpoint has its own.
        options: of a state dict: GLIDE's options where they differ from its defaults for the network.

    Returns:
        The network in eval mode, float32, on the CPU; its tokenizer; what describes it.

    Raises:
        ValueError: the file is neither, the options or the tokenizer do not go with the weights, or options are given
            for a checkpoint.
        OSError: a file cannot be read.

    Example:
        >>> model, tokenizer, meta = load_network("upsample.pt")
        >>> meta.network, meta.image_size
        ('SuperResText2ImUNet', 256)
    """
    if has_header(path) or not Path(path).is_file():
        if options:
            raise ValueError(f"options: got {', '.join(options)} for {os.fspath(path)}, expected none: it has its own")
        return load_checkpoint(path)
    weights = read_state_dict(path)
    kind = _kind(weights, path)
    meta = glide_network(GLIDE_UPSAMPLER if kind["super_res"] else GLIDE_BASE, **{**kind, **(options or {})})
    words = tokenizer if isinstance(tokenizer, Tokenizer) else read_tokenizer(tokenizer)
    model = meta.build(words)
    load_weights(model, weights, path)
    return model.eval(), words, meta


def _kind(weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Mapping[str, bool]:
    """Which network the weights are of."""
    first = weights.get(_FIRST)
    channels = 0 if first is None or first.ndim != 4 else first.shape[1]
    if channels not in _KINDS:
        got = f"no {_FIRST}" if first is None else f"{_FIRST} of shape {list(first.shape)}"
        raise ValueError(f"weights {os.fspath(path)}: got {got}, expected one of GLIDE's text-conditional networks")
    return _KINDS[channels]
