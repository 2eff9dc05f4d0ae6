"""Training from scratch on captioned shapes, reading and naming what lies where on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastcfg.models.checkpoint import CheckpointMeta
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.training.config import TrainConfig
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.data import ShapesData
from fastcfg.training.shapes.layout import LayoutHead
from fastcfg.training.shapes.reading import ReadingHeads, reading_parameters, train_reading
from fastcfg.training.shapes.scenes import IMAGE_SIZE, VOCABULARY
from fastcfg.training.task import seed_for

# Captions are short and their meaning hangs on word order, so places start as loud as words; the constructor leaves
# them a hundred times quieter.
_TEXT_INIT_STD = 0.3


def build_model(config: ShapesConfig) -> Text2ImUNet:
    """The network of a recipe with its initial weights, which depend on the recipe's seed alone.

    Args:
        config: the recipe.

    Returns:
        The network in train mode on the CPU, its tokenizer as attribute.

    Raises:
        ValueError: the recipe's ``model`` does not describe a network.
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


class ShapesTask:
    """The ``Task`` of shapes.

    Args:
        config: the recipe.

    Attributes:
        model: see ``Task``.
        heads: a ``LayoutHead`` and ``ReadingHeads``.
        meta: see ``Task``.
        fingerprint, summary: empty.
        glide: False.

    Raises:
        ValueError: the recipe's ``model`` does not describe a network.
    """

    fingerprint = ""
    summary = ""
    glide = False

    def __init__(self, config: ShapesConfig) -> None:
        self._config = config
        self.model = build_model(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(config.seed, "layout"))
            self._layout = LayoutHead(self.model)
            self._reading = ReadingHeads(self.model.xf_width)
        self.heads: nn.Module = nn.ModuleList([self._layout, self._reading])
        self.meta = CheckpointMeta(config.model, config.schedule, config.num_timesteps, IMAGE_SIZE)
        assert isinstance(self.model.tokenizer, Tokenizer)
        self._data = ShapesData(config, self.model.tokenizer)

    def empty_model(self) -> Text2ImUNet:
        """See ``Task``."""
        with torch.device("meta"):
            return build_model(self._config)

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """See ``Task``."""
        return vars(self._data.batch(step))

    def before(self, step: int) -> list[nn.Parameter]:
        """Train the text transformer alone, where the recipe says so."""
        steps = self._config.lessons_at(step)
        if not steps:
            return []
        heads, _ = train_reading(self.model, dataclasses.replace(self._config, reading_steps=steps))
        self._reading.load_state_dict(heads.state_dict())
        return [*(parameter for _, parameter in reading_parameters(self.model)), *self._reading.parameters()]

    def conditioning(self, shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None."""
        return {}

    def trained_heads(self, config: TrainConfig) -> list[nn.Parameter]:
        """The heads whose losses count."""
        assert isinstance(config, ShapesConfig)
        layout = list(self._layout.parameters()) if config.layout_weight else []
        return layout + (list(self._reading.parameters()) if config.reading_weight else [])

    def losses(
        self, shard: Mapping[str, Tensor], text: Mapping[str, Tensor], config: TrainConfig
    ) -> dict[str, tuple[float, Tensor]]:
        """The losses of layout and reading."""
        assert isinstance(config, ShapesConfig)
        layout = reading = text["xf_out"].new_zeros((), dtype=torch.float32)
        if config.layout_weight:
            layout = self._layout(shard["colours"], shard["shapes"]).sum()
        if config.reading_weight:
            rows = len(shard["tokens"])
            reading = self._reading(text["xf_out"], shard["at_words"], shard["about"])[0] * rows
        return {"layout": (config.layout_weight, layout), "reading": (config.reading_weight, reading)}

    def close(self) -> None:
        """Nothing works ahead."""
