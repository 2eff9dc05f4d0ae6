"""The recipe of training from scratch on captioned shapes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from fastcfg.training.config import TrainConfig, require
from fastcfg.training.shapes.scenes import MAX_CAPTION_WORDS

# Constructor arguments of Text2ImUNet; attention_resolutions are downsampling factors, as there.
_DEFAULT_MODEL: dict[str, Any] = {
    "text_ctx": MAX_CAPTION_WORDS,
    "xf_width": 128,
    "xf_layers": 3,
    "xf_heads": 4,
    "xf_final_ln": True,
    "xf_padding": True,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 64,
    "channel_mult": [1, 1.5, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_head_channels": 32,
    "dropout": 0.0,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
}

# What may change on the way; the rest is built into the network, the optimizer or the data.
_STAGED = {"reading_steps", "reading_weight", "layout_weight", "noisy_share"}


@dataclasses.dataclass(frozen=True)
class ShapesConfig(TrainConfig):
    """A recipe for captioned shapes. The same recipe on the same machine and torch version gives the same weights.

    Attributes:
        cond_drop: probability that a caption is replaced by the empty one, in [0, 1).
        two_objects: share of pictures with two objects.
        name_sizes: probability that a caption names an object's size.
        schedule: name of the noise schedule.
        num_timesteps: its length T.
        reading_steps: steps of training the text transformer alone to read captions, see ``train_reading``, before all
            else, or before the stage that says so; 0 for none.
        reading_batch_size: captions per such step.
        reading_rate: its learning rate.
        reading_weight: weight of the loss of reading each batch's captions, so that it is not forgotten; 0 for none.
        layout_weight: weight of the layout loss, see ``LayoutHead``; 0 for none.
        stages: changes on the way: each an object of the step it starts ``at`` and settings that hold from there on.
        model: constructor arguments of ``Text2ImUNet``.

    Raises:
        ValueError: a value out of its range, naming it.

    Example:
        >>> ShapesConfig(steps=1000, seed=1).learning_rate_at(0) < ShapesConfig().learning_rate
        True
    """

    DEFAULT_MODEL: ClassVar[dict[str, Any]] = _DEFAULT_MODEL

    mse_weight_cap: float = 8.0
    noisy_share: float = 0.3
    bf16: bool = True
    shards: int = 2
    cond_drop: float = 0.12
    two_objects: float = 0.75
    name_sizes: float = 0.5
    schedule: str = "squaredcos_cap_v2"
    num_timesteps: int = 1000
    reading_steps: int = 500
    reading_batch_size: int = 128
    reading_rate: float = 1e-3
    reading_weight: float = 0.02
    layout_weight: float = 0.05
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    model: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(_DEFAULT_MODEL))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_timesteps", "reading_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        rate = self.reading_rate
        require("reading_rate", rate, math.isfinite(rate) and rate > 0, "a positive number")
        for name in ("reading_steps", "reading_weight", "layout_weight"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        require("cond_drop", self.cond_drop, 0 <= self.cond_drop < 1, "0 <= value < 1")
        for name in ("two_objects", "name_sizes"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "0 <= value <= 1")
        for stage in self.stages:
            if type(stage) is not dict or type(stage.get("at")) is not int or set(stage) - {"at"} - _STAGED:
                expected = f"'at', a step, and some of {', '.join(sorted(_STAGED))}"
                raise ValueError(f"stages: got {stage!r}, expected an object of {expected}")
            ShapesConfig.from_dict({name: value for name, value in stage.items() if name != "at"})

    def at(self, step: int) -> ShapesConfig:
        """The settings that hold at a step: those of the stages begun, over the recipe's own; without stages."""
        changes: dict[str, Any] = {}
        for stage in sorted(self.stages, key=lambda stage: stage["at"]):
            if stage["at"] <= step:
                changes |= {name: value for name, value in stage.items() if name != "at"}
        return dataclasses.replace(self, stages=[], **changes)

    def starts(self) -> set[int]:
        """The steps at which a stage starts, and the first."""
        return {0, *(stage["at"] for stage in self.stages)}

    def lessons_at(self, step: int) -> int:
        """How many steps of reading lessons come right before a step."""
        stages = [{"at": 0, "reading_steps": self.reading_steps}, *self.stages]
        return sum(stage.get("reading_steps", 0) for stage in stages if stage["at"] == step)
