"""The recipe of training from scratch on captioned shapes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..config import TrainConfig
from .scenes import MAX_CAPTION_WORDS

# Arguments of Text2ImUNet.
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

# Settings that stages may change; the others are built into network, optimizer or data.
_STAGED = {"reading_steps", "reading_weight", "layout_weight", "noisy_share"}


@dataclasses.dataclass(frozen=True)
class ShapesConfig(TrainConfig):
    """A recipe for captioned shapes. The same recipe on the same machine and torch version gives the same weights.

    Attributes:
        cond_drop: probability of replacing a caption by the empty one, in [0, 1).
        two_objects: share of pictures with two objects.
        name_sizes: probability that a caption names an object's size.
        schedule, num_timesteps: name of the noise schedule, and its length T.
        reading_steps: steps of training the text transformer alone (`train_reading`) before the first step, or before a
            stage with this setting.
        reading_batch_size, reading_rate: captions per such step, and its learning rate.
        reading_weight, layout_weight: weights of the loss of reading the batch's captions, and of the layout loss, see
            `LayoutHead`; 0 for none.
        stages: changes during the run, each an object of the step it starts `at` and the new settings.
        model: arguments of `Text2ImUNet`.

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
        self._check("at least 1", "num_timesteps", "reading_batch_size")
        self._check("a positive number", "reading_rate")
        self._check("at least 0", "reading_steps", "reading_weight", "layout_weight")
        self._check("0 <= value < 1", "cond_drop")
        self._check("0 <= value <= 1", "two_objects", "name_sizes")
        for stage in self.stages:
            if type(stage) is not dict or type(stage.get("at")) is not int or set(stage) - {"at"} - _STAGED:
                expected = f"'at', a step, and some of {', '.join(sorted(_STAGED))}"
                raise ValueError(f"stages: got {stage!r}, expected an object of {expected}")
            ShapesConfig.from_dict({name: value for name, value in stage.items() if name != "at"})

    def at(self, step: int) -> ShapesConfig:
        """The settings in force at a step, with those of the stages begun and no stages of their own."""
        changes: dict[str, Any] = {}
        for stage in sorted(self.stages, key=lambda stage: stage["at"]):
            changes |= stage if stage["at"] <= step else {}
        changes.pop("at", None)
        return dataclasses.replace(self, stages=[], **changes)

    def starts(self) -> set[int]:
        """Step 0 and the steps at which a stage starts."""
        return {0, *(stage["at"] for stage in self.stages)}

    def lessons_at(self, step: int) -> int:
        """Number of reading steps right before a step."""
        stages = [{"at": 0, "reading_steps": self.reading_steps}, *self.stages]
        return sum(stage.get("reading_steps", 0) for stage in stages if stage["at"] == step)
