"""What every training recipe says: everything a run's result depends on, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar, TypeVar

_Recipe = TypeVar("_Recipe", bound="TrainConfig")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, whatever it is trained on; ``ShapesConfig`` and ``FolderConfig`` add theirs.

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
        mse_weight_cap: see ``HybridLoss``.
        noisy_share: share of pictures diffused to the last 15 % of the steps, where layouts are decided, on top of
            those that chance puts there.
        bf16: run the model under bfloat16 autocast.
        channels_last: lay pictures and convolution weights out channels-last.
        accumulate: parts a batch is split into, computed one after the other, so that only one part's activations need
            memory. The gradient is the whole batch's.
        shards: parts each of these is split into, each computed by a thread of its own. On a CPU two threads with a
            core each, meeting once per step, bear other load far better than one on two cores, which waits for both in
            every layer: beside one busy process, 60 pictures per second against 8.
        seed: seed of initial weights, data, noise and dropout.
        model: the network, in the words of the recipe's kind.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    # Settings that leave the result as it is, so that a run may go on with others.
    FREE: ClassVar[frozenset[str]] = frozenset()
    # What ``model`` says where a recipe leaves it out.
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
        for name in ("steps", "batch_size", "accumulate"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("accumulate", self.accumulate, self.accumulate <= self.batch_size, "1 to batch_size")
        most = self.batch_size // self.accumulate
        expected = "1 to batch_size" if self.accumulate == 1 else f"1 to batch_size / accumulate = {most}"
        require("shards", self.shards, 1 <= self.shards <= most, expected)
        if self.shards > 1 and self.model.get("dropout"):
            raise ValueError(f"shards: got {self.shards} with dropout, expected 1: threads share the random generator")
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            require(name, value, math.isfinite(value) and value > 0, "a positive number")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "seed"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("ema_decay", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= value < 1")
        require("noisy_share", self.noisy_share, 0 <= self.noisy_share <= 1, "0 <= value <= 1")
        require("mse_weight_cap", self.mse_weight_cap, self.mse_weight_cap >= 1, "at least 1")

    def at(self: _Recipe, step: int) -> _Recipe:
        """The settings that hold at a step."""
        return self

    def starts(self) -> set[int]:
        """The steps from which other settings may hold than before."""
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
        checked: dict[str, Any] = {}
        for name, value in values.items():
            factory, default = fields[name].default_factory, fields[name].default
            wanted = type(default if factory is dataclasses.MISSING else factory())
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                raise ValueError(f"{name}: got {value!r}, expected a value of type {wanted.__name__}")
            checked[name] = value
        if "model" in checked:
            checked["model"] = {**cls.DEFAULT_MODEL, **checked["model"]}
        return cls(**checked)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError unless ``holds``.

    Args:
        name: the setting.
        value: what it was given.
        holds: whether that will do.
        expected: what would.

    Raises:
        ValueError: it does not.
    """
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
