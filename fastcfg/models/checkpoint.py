"""One-file checkpoints: float16 weights, and in the header all it takes to rebuild the network and sample from it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastcfg.models.image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResText2ImUNet
from fastcfg.models.text2im import HasVocabulary, Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.utils.files import replacing

FORMAT = "fastcfg-checkpoint"
FORMAT_VERSION = 1

NETWORKS: dict[str, type[Text2ImUNet]] = {
    network.__name__: network
    for network in (Text2ImUNet, SuperResText2ImUNet, InpaintText2ImUNet, SuperResInpaintText2ImUnet)
}
"""The networks that a checkpoint may hold, by name."""


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about its weights.

    Attributes:
        model: constructor arguments of the network, without the tokenizer.
        schedule: name of the noise schedule, for `Schedule.named`.
        num_timesteps: its length T.
        image_size: side of the square pictures in pixels.
        recipe: the training recipe, for the record.
        network: name of the network's class, one of `NETWORKS`.
    """

    model: dict[str, Any]
    schedule: str
    num_timesteps: int
    image_size: int
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    network: str = Text2ImUNet.__name__

    def build(self, tokenizer: HasVocabulary | None, device: str = "meta") -> Text2ImUNet:
        """Make the network.

        Args:
            tokenizer: kept as its `tokenizer`.
            device: where; on torch's meta device it has no weights and waits for `load_state_dict(..., assign=True)`.

        Raises:
            KeyError, TypeError, ValueError: there is no such network.
        """
        with torch.device(device):
            return NETWORKS[self.network](tokenizer=tokenizer, **self.model)


def save_checkpoint(path: str | os.PathLike[str], model: Text2ImUNet, meta: CheckpointMeta) -> None:
    """Write a checkpoint as one safetensors file, whole or not at all.

    Args:
        path: the file to write.
        model: the network; its floating point weights are stored as float16, its `tokenizer` in the header (GLIDE's
            adds 2.3 MB to 770 MB of weights, and the file then needs no other).
        meta: what it takes to rebuild the network.

    Raises:
        ValueError: the model's tokenizer is not a `Tokenizer`, or the model is not what `meta` says.
        OSError: the file cannot be written.

    Example:
        >>> save_checkpoint("shapes.safetensors", model, meta)
        >>> model, tokenizer, meta = load_checkpoint("shapes.safetensors")
    """
    from safetensors.torch import save_file

    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError(f"model: got a tokenizer of type {type(model.tokenizer).__name__}, expected a Tokenizer")
    if type(model).__name__ != meta.network:
        raise ValueError(f"model: got a {type(model).__name__}, expected the {meta.network} that meta names")
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tokenizer": json.loads(model.tokenizer.to_json()),
        **dataclasses.asdict(meta),
    }
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"fastcfg": json.dumps(header)})


def has_header(path: str | os.PathLike[str]) -> bool:
    """Whether a file is safetensors with the header that `save_checkpoint` writes, of any version.

    Args:
        path: the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "fastcfg" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


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
        # Checkpoints from before there was a choice of networks do not name theirs.
        header.setdefault("network", Text2ImUNet.__name__)
        meta = CheckpointMeta(**{field.name: header[field.name] for field in dataclasses.fields(CheckpointMeta)})
        model = meta.build(tokenizer)
        model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {os.fspath(path)}: got weights or settings that do not fit ({error}), {expected}"
        ) from error
    return model.eval(), tokenizer, meta
