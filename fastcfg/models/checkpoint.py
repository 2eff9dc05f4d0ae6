"""One-file checkpoints: float16 weights, and in the header all it takes to rebuild the network and sample from it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastcfg.files import replacing
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer

FORMAT = "fastcfg-checkpoint"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about its weights.

    Attributes:
        model: constructor arguments of `Text2ImUNet`, without the tokenizer.
        schedule: name of the noise schedule, for `Schedule.named`.
        num_timesteps: its length T.
        image_size: side of the square pictures in pixels.
        recipe: the training recipe, for the record.
    """

    model: dict[str, Any]
    schedule: str
    num_timesteps: int
    image_size: int
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(path: str | os.PathLike[str], model: Text2ImUNet, meta: CheckpointMeta) -> None:
    """Write a checkpoint as one safetensors file, whole or not at all.

    Args:
        path: the file to write.
        model: the network; its floating point weights are stored as float16, its `tokenizer` in the header.
        meta: what it takes to rebuild the network.

    Raises:
        ValueError: the model's tokenizer is not a `Tokenizer`.
        OSError: the file cannot be written.

    Example:
        >>> save_checkpoint("shapes.safetensors", model, meta)
        >>> model, tokenizer, meta = load_checkpoint("shapes.safetensors")
    """
    from safetensors.torch import save_file

    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError(f"model: got a tokenizer of type {type(model.tokenizer).__name__}, expected a Tokenizer")
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tokenizer": json.loads(model.tokenizer.to_json()),
        **dataclasses.asdict(meta),
    }
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"fastcfg": json.dumps(header)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Text2ImUNet, Tokenizer, CheckpointMeta]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Args:
        path: the file.

    Returns:
        The network in eval mode, float32, on the CPU; its tokenizer; what the checkpoint says.

    Raises:
        ValueError: the file is not such a checkpoint; says what was got and what is expected.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    expected = f"expected a {FORMAT} of version {FORMAT_VERSION}, as written by fastcfg train"
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no file"
        raise ValueError(f"checkpoint {os.fspath(path)}: got {kind}, {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)}: got a file that is not safetensors ({error}), {expected}"
        ) from error
    try:
        header = json.loads(metadata["fastcfg"])
        found = (header["format"], header["version"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)}: got safetensors without fastcfg's header, {expected}"
        ) from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"checkpoint {os.fspath(path)}: got {found[0]} of version {found[1]}, {expected}")
    try:
        tokenizer = Tokenizer.from_json(json.dumps(header["tokenizer"]))
        meta = CheckpointMeta(**{field.name: header[field.name] for field in dataclasses.fields(CheckpointMeta)})
        model = Text2ImUNet(tokenizer=tokenizer, **meta.model)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)}: got weights or settings that do not fit ({error}), {expected}"
        ) from error
    return model.eval(), tokenizer, meta
