"""Training from scratch on captioned shapes, with reading lessons and the layout loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...models.checkpoint import CheckpointMeta
from ...models.text2im import Text2ImUNet
from ...models.tokenizer import Tokenizer
from ..config import TrainConfig
from ..task import Task, seed_for
from .config import ShapesConfig
from .data import ShapesData
from .layout import LayoutHead
from .reading import ReadingHeads, reading_parameters, train_reading
from .scenes import IMAGE_SIZE, VOCABULARY

# Captions are short and depend on word order, so positions start as large as words; the constructor makes them a
# hundred times smaller.
_TEXT_INIT_STD = 0.3


def build_model(config: ShapesConfig) -> Text2ImUNet:
    """The network of a recipe in train mode on the CPU; its initial weights depend on the recipe's seed only.

    ValueError if `config.model` does not describe a network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "weights"))
        try:
            model = Text2ImUNet(tokenizer=Tokenizer.word_level(VOCABULARY), **config.model)
        except TypeError as error:
            raise ValueError(f"model: got {config.model}, expected arguments of Text2ImUNet ({error})") from error
        for weight in (model.token_embedding.weight, model.positional_embedding, model.padding_embedding):
            nn.init.normal_(weight, std=_TEXT_INIT_STD)
    return model.train()


class ShapesTask(Task):
    """The `Task` of shapes, with a `LayoutHead` and `ReadingHeads`; ValueError as `build_model`."""

    def __init__(self, config: ShapesConfig) -> None:
        self._config = config
        self.model = build_model(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(config.seed, "layout"))
            self._layout = LayoutHead(self.model)
            self._reading = ReadingHeads(self.model.xf_width)
        self.heads = nn.ModuleList([self._layout, self._reading])
        self.meta = CheckpointMeta(config.model, config.schedule, config.num_timesteps, IMAGE_SIZE)
        assert isinstance(self.model.tokenizer, Tokenizer)
        self._data = ShapesData(config, self.model.tokenizer)

    def batch(self, step: int) -> dict[str, Tensor]:
        """See `ShapesData.batch`."""
        return self._data.batch(step)

    def before(self, step: int) -> list[nn.Parameter]:
        """Give reading lessons at the steps the recipe asks for them."""
        if not (steps := self._config.lessons_at(step)):
            return []
        heads, _ = train_reading(self.model, dataclasses.replace(self._config, reading_steps=steps))
        self._reading.load_state_dict(heads.state_dict())
        return [*(parameter for _, parameter in reading_parameters(self.model)), *self._reading.parameters()]

    def trained_heads(self, config: TrainConfig) -> list[nn.Parameter]:
        """The heads with a nonzero weight."""
        assert isinstance(config, ShapesConfig)
        weights = ((self._layout, config.layout_weight), (self._reading, config.reading_weight))
        return [parameter for head, weight in weights if weight for parameter in head.parameters()]

    def losses(
        self, shard: Mapping[str, Tensor], text: Mapping[str, Tensor], config: TrainConfig
    ) -> dict[str, tuple[float, Tensor]]:
        """The layout loss and the reading loss."""
        assert isinstance(config, ShapesConfig)
        layout = reading = text["xf_out"].new_zeros((), dtype=torch.float32)
        if config.layout_weight:
            layout = self._layout(shard["colours"], shard["shapes"]).sum()
        if config.reading_weight:
            reading = self._reading(text["xf_out"], shard["at_words"], shard["about"])[0] * len(shard["tokens"])
        return {"layout": (config.layout_weight, layout), "reading": (config.reading_weight, reading)}
