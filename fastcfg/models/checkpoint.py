"""One-file checkpoints: float16 weights, and a header with all that is needed to rebuild the network and sample."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..utils.files import replacing
from .image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResText2ImUNet
from .text2im import HasVocabulary, Text2ImUNet
from .tokenizer import Tokenizer

FORMAT = "fastcfg-checkpoint"
FORMAT_VERSION = 1

_NETWORKS = (Text2ImUNet, SuperResText2ImUNet, InpaintText2ImUNet, SuperResInpaintText2ImUnet)
NETWORKS: dict[str, type[Text2ImUNet]] = {network.__name__: network for network in _NETWORKS}
"""Networks that a checkpoint can contain, by name."""


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """The description of a network in a checkpoint.

    Attributes:
        model: constructor arguments of the network, without the tokenizer.
        schedule, num_timesteps: name and length T of the noise schedule, see `Schedule.named`.
        image_size: height and width of the pictures in pixels.
        recipe: the training recipe, for information.
        network: class of the network, a name in `NETWORKS`.
    """

    model: dict[str, Any]
    schedule: str
    num_timesteps: int
    image_size: int
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    network: str = Text2ImUNet.__name__

    def build(self, tokenizer: HasVocabulary | None, device: str = "meta") -> Text2ImUNet:
        """Make the network; on the meta device without weights, for `load_state_dict(..., assign=True)`.

        KeyError, TypeError or ValueError for an unknown network or unsuitable arguments.
        """
        with torch.device(device):
            return NETWORKS[self.network](tokenizer=tokenizer, **self.model)


def save_checkpoint(path: str | os.PathLike[str], model: Text2ImUNet, meta: CheckpointMeta) -> None:
    """Write a checkpoint as one safetensors file, whole or not at all.

    Stored are the weights as float16, the model's tokenizer (GLIDE's adds 2.3 MB to 770 MB) and the description.
    ValueError if the tokenizer is not a `Tokenizer`, or the model is not `meta.network`.

    Example:
        >>> save_checkpoint("shapes.safetensors", model, meta)
        >>> model, tokenizer, meta = load_checkpoint("shapes.safetensors")
    """
    from safetensors.torch import save_file

    if not isinstance(model.tokenizer, Tokenizer):
        raise ValueError(f"model: got a tokenizer of type {type(model.tokenizer).__name__}, expected a Tokenizer")
    if type(model).__name__ != meta.network:
        raise ValueError(f"model: got a {type(model).__name__}, expected the {meta.network} that meta names")
    tokenizer = json.loads(model.tokenizer.to_json())
    header = {"format": FORMAT, "version": FORMAT_VERSION, "tokenizer": tokenizer, **dataclasses.asdict(meta)}
    weights = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={"fastcfg": json.dumps(header)})


def has_header(path: str | os.PathLike[str]) -> bool:
    """Whether a file is safetensors with a header of `save_checkpoint`, of any version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "fastcfg" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Text2ImUNet, Tokenizer, CheckpointMeta]:
    """Read a checkpoint of `save_checkpoint`: the network in eval mode, float32, on the CPU; tokenizer; description.

    ValueError if the file is not such a checkpoint; OSError if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    source = f"checkpoint {os.fspath(path)}"
    expected = f"expected a {FORMAT} of version {FORMAT_VERSION}, as written by fastcfg train"
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no file"
        raise ValueError(f"{source}: got {kind}, {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{source}: got a file that is not safetensors ({error}), {expected}") from error
    try:
        header = json.loads(metadata["fastcfg"])
        found = (header["format"], header["version"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: got safetensors without fastcfg's header, {expected}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"{source}: got {found[0]} of version {found[1]}, {expected}")
    try:
        tokenizer = Tokenizer.from_json(json.dumps(header["tokenizer"]))
        # The first checkpoints do not name their network.
        header.setdefault("network", Text2ImUNet.__name__)
        meta = CheckpointMeta(**{field.name: header[field.name] for field in dataclasses.fields(CheckpointMeta)})
        model = meta.build(tokenizer)
        model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: got weights or settings that do not fit ({error}), {expected}") from error
    return model.eval(), tokenizer, meta
