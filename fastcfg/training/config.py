"""The recipe of a training run: everything its result depends on, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from fastcfg.training.shapes import MAX_CAPTION_WORDS

DEFAULT_MODEL: dict[str, Any] = {
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
"""Constructor arguments of ``Text2ImUNet``; ``attention_resolutions`` are downsampling factors, as there."""


# What may change on the way; the rest is built into the network, the optimizer or the data.
_STAGED = {"reading_steps", "reading_weight", "layout_weight", "noisy_share"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training recipe. The same recipe on the same machine and torch version gives the same weights.

    The learning rate rises over ``warmup_steps``, stays, and falls as half a cosine to 0 over the last ``decay_steps``.
    A run under way can therefore be given another length on resuming, as long as its decay has not begun.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: pictures per step.
        learning_rate: AdamW's rate after warm-up.
        warmup_steps: steps of linear warm-up.
        decay_steps: steps of cosine decay at the end.
        weight_decay: AdamW's decoupled weight decay.
        beta2: AdamW's second moment decay.
        grad_clip: largest norm of the gradient.
        ema_decay: decay of the weight average that is saved.
        cond_drop: probability that a caption is replaced by the empty one, in [0, 1).
        two_objects: share of pictures with two objects.
        name_sizes: probability that a caption names an object's size.
        mse_weight_cap: see ``HybridLoss``.
        schedule: name of the noise schedule.
        num_timesteps: its length T.
        bf16: run the model under bfloat16 autocast.
        channels_last: lay pictures and convolution weights out channels-last.
        shards: parts a batch is split into, each computed by a thread of its own. On a CPU two threads with a core
            each, meeting once per step, bear other load far better than one on two cores, which waits for both in every
            layer: beside one busy process, 60 pictures per second against 8.
        reading_steps: steps of training the text transformer alone to read captions, see ``train_reading``, before all
            else, or before the stage that says so; 0 for none.
        reading_batch_size: captions per such step.
        reading_rate: its learning rate.
        reading_weight: weight of the loss of reading each batch's captions, so that it is not forgotten; 0 for none.
        layout_weight: weight of the layout loss, see ``LayoutHead``; 0 for none.
        noisy_share: share of pictures diffused to the last 15 % of the steps, where layouts are decided, on top of
            those that chance puts there.
        stages: changes on the way: each an object of the step it starts ``at`` and settings that hold from there on.
        seed: seed of initial weights, data, noise and dropout.
        model: constructor arguments of ``Text2ImUNet``.

    Raises:
        ValueError: a value out of its range, naming it.

    Example:
        >>> TrainConfig(steps=1000, seed=1).learning_rate_at(0) < TrainConfig().learning_rate
        True
    """

    steps: int = 10000
    batch_size: int = 32
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay_steps: int = 2500
    weight_decay: float = 0.01
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    cond_drop: float = 0.12
    two_objects: float = 0.75
    name_sizes: float = 0.5
    mse_weight_cap: float = 8.0
    schedule: str = "squaredcos_cap_v2"
    num_timesteps: int = 1000
    bf16: bool = True
    channels_last: bool = False
    shards: int = 2
    reading_steps: int = 500
    reading_batch_size: int = 128
    reading_rate: float = 1e-3
    reading_weight: float = 0.02
    layout_weight: float = 0.05
    noisy_share: float = 0.3
    seed: int = 0
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    model: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(DEFAULT_MODEL))

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_timesteps", "reading_batch_size"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("shards", self.shards, 1 <= self.shards <= self.batch_size, "1 to batch_size")
        if self.shards > 1 and self.model.get("dropout"):
            raise ValueError(f"shards: got {self.shards} with dropout, expected 1: threads share the random generator")
        for name in ("learning_rate", "grad_clip", "reading_rate"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value > 0, "a positive number")
        for name in (
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "seed",
            "reading_steps",
            "reading_weight",
            "layout_weight",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("cond_drop", "ema_decay", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= value < 1")
        for name in ("two_objects", "name_sizes", "noisy_share"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "0 <= value <= 1")
        for stage in self.stages:
            if type(stage) is not dict or type(stage.get("at")) is not int or set(stage) - {"at"} - _STAGED:
                expected = f"'at', a step, and some of {', '.join(sorted(_STAGED))}"
                raise ValueError(f"stages: got {stage!r}, expected an object of {expected}")
            TrainConfig.from_dict({name: value for name, value in stage.items() if name != "at"})
        _require("mse_weight_cap", self.mse_weight_cap, self.mse_weight_cap >= 1, "at least 1")

    def at(self, step: int) -> TrainConfig:
        """The settings that hold at a step: those of the stages begun, over the recipe's own; without stages."""
        changes: dict[str, Any] = {}
        for stage in sorted(self.stages, key=lambda stage: stage["at"]):
            if stage["at"] <= step:
                changes |= {name: value for name, value in stage.items() if name != "at"}
        return dataclasses.replace(self, stages=[], **changes)

    def lessons_at(self, step: int) -> int:
        """How many steps of reading lessons come right before a step."""
        stages = [{"at": 0, "reading_steps": self.reading_steps}, *self.stages]
        return sum(stage.get("reading_steps", 0) for stage in stages if stage["at"] == step)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = self.steps - step
        cool = 0.5 - 0.5 * math.cos(math.pi * left / (self.decay_steps + 1)) if left <= self.decay_steps else 1.0
        return self.learning_rate * warm * cool

    def to_json(self) -> str:
        """The recipe as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Make a recipe from JSON values; what is left out keeps its default, inside ``model`` too.

        Args:
            values: attributes by name.

        Returns:
            The recipe.

        Raises:
            ValueError: unknown names, values of the wrong type or out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"recipe: got {type(values).__name__}, expected an object of settings")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"recipe: got unknown settings {', '.join(unknown)}, expected some of {', '.join(fields)}")
        defaults = cls()
        checked: dict[str, Any] = {}
        for name, value in values.items():
            wanted = type(getattr(defaults, name))
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                raise ValueError(f"{name}: got {value!r}, expected a value of type {wanted.__name__}")
            checked[name] = {**DEFAULT_MODEL, **value} if name == "model" else value
        return cls(**checked)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a recipe from a JSON file.

        Args:
            path: the file.

        Returns:
            The recipe.

        Raises:
            ValueError: not JSON, or not a recipe.
            OSError: the file cannot be read.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"recipe {path}: got a file that is not JSON ({error}), expected a training recipe"
            ) from error
        return cls.from_dict(values)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
