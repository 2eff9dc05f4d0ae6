"""The settings common to all training recipes. A recipe determines a run's result and is stored as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

_RANGES: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "a positive number": lambda value: math.isfinite(value) and value > 0,
    "0 <= value < 1": lambda value: 0 <= value < 1,
    "0 <= value <= 1": lambda value: 0 <= value <= 1,
}

_Recipe = TypeVar("_Recipe", bound="TrainConfig")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; `ShapesConfig` and `FolderConfig` add their own. ValueError for a value out of range.

    The learning rate rises linearly over `warmup_steps`, stays, and falls to 0 as half a cosine over the last
    `decay_steps`. A run can therefore be resumed with another length as long as its decay has not begun.

    Attributes:
        steps, batch_size: optimizer steps of the whole run, and pictures per step.
        learning_rate, warmup_steps, decay_steps: AdamW's rate after warm-up, and steps of warm-up and decay.
        weight_decay, beta2: AdamW's decoupled weight decay and second moment decay.
        grad_clip: largest norm of the gradient.
        ema_decay, mse_weight_cap: see `EMA` and `HybridLoss`.
        noisy_share: share of pictures moved to the last 15 % of the diffusion, where layouts are decided.
        bf16: run the model under bfloat16 autocast.
        channels_last: store pictures and convolution weights channels-last.
        accumulate: parts of a batch computed one after the other, to save memory; gradients are summed.
        shards: parts of each of these computed by one thread each. Two single-core threads that meet once per step bear
            other load better than two cores that meet in every layer: 60 pictures/s against 8 beside one busy process.
        seed: seed of initial weights, data, noise and dropout.
        model: options of the network.
    """

    # Settings that do not change the result: a resumed run may have other values.
    FREE: ClassVar[frozenset[str]] = frozenset()
    DEFAULT_MODEL: ClassVar[dict[str, Any]] = {}

    steps: int = 10000
    batch_size: int = 32
    learning_rate: float = 5e-4
    warmup_steps: int = 200
    decay_steps: int = 2500
    weight_decay: float = 0.01
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    mse_weight_cap: float = 1.0
    noisy_share: float = 0.0
    bf16: bool = False
    channels_last: bool = False
    accumulate: int = 1
    shards: int = 1
    seed: int = 0
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check("at least 1", "steps", "batch_size", "accumulate")
        require("accumulate", self.accumulate, self.accumulate <= self.batch_size, "1 to batch_size")
        most = self.batch_size // self.accumulate
        expected = "1 to batch_size" if self.accumulate == 1 else f"1 to batch_size / accumulate = {most}"
        require("shards", self.shards, 1 <= self.shards <= most, expected)
        if self.shards > 1 and self.model.get("dropout"):
            raise ValueError(f"shards: got {self.shards} with dropout, expected 1: threads share the random generator")
        self._check("a positive number", "learning_rate", "grad_clip")
        self._check("at least 0", "warmup_steps", "decay_steps", "weight_decay", "seed")
        self._check("0 <= value < 1", "ema_decay", "beta2")
        self._check("0 <= value <= 1", "noisy_share")
        self._check("at least 1", "mse_weight_cap")

    def at(self: _Recipe, step: int) -> _Recipe:
        """The settings in force at a step."""
        return self

    def starts(self) -> set[int]:
        """The steps at which settings may change."""
        return {0}

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
    def from_dict(cls: type[_Recipe], values: dict[str, Any]) -> _Recipe:
        """Make a recipe of JSON values by name; missing ones keep their default, inside `model` too.

        ValueError for unknown names, values of the wrong type or out of range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"recipe: got {type(values).__name__}, expected an object of settings")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"recipe: got unknown settings {', '.join(unknown)}, expected some of {', '.join(fields)}")
        checked = dict(values)
        for name, value in values.items():
            factory, default = fields[name].default_factory, fields[name].default
            wanted = type(default if factory is dataclasses.MISSING else factory())
            if wanted is float and type(value) is int:
                checked[name] = float(value)
            elif type(value) is not wanted:
                raise ValueError(f"{name}: got {value!r}, expected a value of type {wanted.__name__}")
        if "model" in checked:
            checked["model"] = {**cls.DEFAULT_MODEL, **checked["model"]}
        return cls(**checked)

    def _check(self, expected: str, *names: str) -> None:
        """Raise ValueError unless the settings named are in the range `expected`."""
        for name in names:
            value = getattr(self, name)
            require(name, value, _RANGES[expected](value), expected)


def require(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise ValueError ("name: got value, expected ...") unless `valid`."""
    if not valid:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
