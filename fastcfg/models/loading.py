"""GLIDE's text-conditional networks from checkpoints of fastcfg and from state dicts of GLIDE."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointMeta, has_header, load_checkpoint
from .glide import GLIDE_BASE, GLIDE_UPSAMPLER, glide_network
from .text2im import Text2ImUNet
from .tokenizer import Tokenizer
from .vocabulary import read_tokenizer
from .weights import load_weights, read_state_dict

# Options `inpaint` and `super_res` of a network by the number of input channels of its first convolution.
_FIRST = "input_blocks.0.0.weight"
_KINDS = {3: (False, False), 6: (False, True), 7: (True, False), 10: (True, True)}


def load_network(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Text2ImUNet, Tokenizer, CheckpointMeta]:
    """Read a checkpoint of `save_checkpoint`, or a state dict of GLIDE such as its `base.pt`.

    Args:
        path: the file. A state dict is read by `read_state_dict`; its shapes determine the network.
        tokenizer: for a state dict: a tokenizer, or an argument of `read_tokenizer`. A checkpoint has its own.
        options: for a state dict: GLIDE's options that differ from its defaults for the network.

    Returns what `load_checkpoint` does. ValueError if the file is neither, options or tokenizer do not fit the weights,
    or for a checkpoint with options; OSError if a file cannot be read.

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
    first = weights.get(_FIRST)
    channels = 0 if first is None or first.ndim != 4 else first.shape[1]
    if channels not in _KINDS:
        got = f"no {_FIRST}" if first is None else f"{_FIRST} of shape {list(first.shape)}"
        raise ValueError(f"weights {os.fspath(path)}: got {got}, expected one of GLIDE's text-conditional networks")
    inpaint, super_res = _KINDS[channels]
    kind = {"inpaint": inpaint, "super_res": super_res, **(options or {})}
    meta = glide_network(GLIDE_UPSAMPLER if super_res else GLIDE_BASE, **kind)
    words = tokenizer if isinstance(tokenizer, Tokenizer) else read_tokenizer(tokenizer)
    model = meta.build(words)
    load_weights(model, weights, path)
    return model.eval(), words, meta
