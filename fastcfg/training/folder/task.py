"""Fine-tuning of GLIDE's networks on a folder of pictures and captions (what glide-finetune does)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.checkpoint import CheckpointMeta, has_header, load_checkpoint
from ...models.glide import GLIDE_BASE, GLIDE_UPSAMPLER, glide_network
from ...models.image_conditioned import SuperResText2ImUNet
from ...models.text2im import Text2ImUNet
from ...models.tokenizer import Tokenizer
from ...models.vocabulary import read_tokenizer
from ...models.weights import load_weights, read_state_dict
from ..task import TEXT_LAYERS, Task, seed_for
from .config import FolderConfig
from .data import FolderData
from .pictures import PictureFolder

_TRANSFORMER = (*TEXT_LAYERS, "transformer_proj.")
_TEXT_ATTENTION = ".encoder_kv."  # attention blocks' layers for the text: they follow a transformer that is trained


class FolderTask(Task):
    """The `Task` of a folder: no heads, and the averaged weights also for GLIDE's own code.

    `resumed`, the checkpoint of the run to resume, replaces `init` and `tokenizer`. ValueError if weights, options,
    tokenizer or data are invalid or do not go together; OSError if a file cannot be read.
    """

    glide = True

    def __init__(self, config: FolderConfig, resumed: Path | None = None) -> None:
        # First: errors in the folder are found faster than a network is loaded.
        folder = PictureFolder(config.data, skip_uncaptioned=config.skip_uncaptioned)
        self.model, self.meta = _network(config, resumed)
        tokenizer = self.model.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        size = (config.side_x or self.meta.image_size, config.side_y or self.meta.image_size)
        if any(side % self.model.size_divisor for side in size):
            expected = f"multiples of {self.model.size_divisor}"
            raise ValueError(f"side_x, side_y: got {size[0]}x{size[1]}, expected {expected}")
        if size[0] == size[1]:
            self.meta = dataclasses.replace(self.meta, image_size=size[0])
        self.model.use_checkpoint, self.model.cache_text_emb = config.use_checkpoint, False
        self.model.train()
        _freeze(self.model, config)
        self.heads = nn.ModuleList()
        self._data = FolderData(config, folder, tokenizer, self.model.text_ctx, size)
        self.fingerprint = f"{len(folder.pictures)} pictures, SHA-256 {folder.fingerprint}"
        self.summary = f"{config.data}: {folder.summary()}"

    def batch(self, step: int) -> dict[str, Tensor]:
        """See `FolderData.batch`."""
        return self._data.batch(step)

    def conditioning(self, shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Task`."""
        return {"low_res": shard["low_res"]} if "low_res" in shard else {}

    def close(self) -> None:
        """End the decoding threads."""
        self._data.close()


def _network(config: FolderConfig, resumed: Path | None) -> tuple[Text2ImUNet, CheckpointMeta]:
    """The network with its initial weights and tokenizer, and its description."""
    if config.init and resumed is None and not Path(config.init).is_file():
        raise ValueError(f"init: got {config.init}, which is not a file, expected weights to start from")
    checkpoint = resumed or (Path(config.init) if config.init and has_header(config.init) else None)
    if checkpoint is not None:
        model, _, meta = load_checkpoint(checkpoint)
        for name in () if resumed else ("model", "tokenizer"):
            if given := getattr(config, name):
                raise ValueError(f"{name}: got {given!r}, expected none, as {config.init} brings its own")
        wanted = SuperResText2ImUNet if config.upsample else Text2ImUNet
        if type(model) is not wanted:
            raise ValueError(f"init: got {checkpoint} with a {type(model).__name__}, expected a {wanted.__name__}")
        return model, dataclasses.replace(meta, recipe={})
    if config.model.get("inpaint") or config.model.get("super_res"):
        raise ValueError("model: got inpaint or super_res, expected neither: upsample says which network is trained")
    meta = glide_network(GLIDE_UPSAMPLER if config.upsample else GLIDE_BASE, **config.model)
    if not config.model.get("xf_width", 1):
        raise ValueError("model: got xf_width = 0, expected a network with text")
    tokenizer = read_tokenizer(config.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "weights"))
        model = meta.build(tokenizer, device="meta" if config.init else "cpu")
    if config.init:
        load_weights(model, read_state_dict(config.init), config.init)
    return model, meta


def _freeze(model: Text2ImUNet, config: FolderConfig) -> None:
    """Turn off the gradient of the parameters that glide-finetune freezes."""
    for name, parameter in model.named_parameters():
        text = name.startswith(_TRANSFORMER)
        frozen = config.freeze_transformer if text else config.freeze_diffusion and _TEXT_ATTENTION not in name
        parameter.requires_grad_(not frozen)
