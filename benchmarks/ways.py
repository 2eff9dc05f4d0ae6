"""Ways to sample: solver, steps and guidance, with what they cost and how well their pictures follow prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastcfg import AdaptiveCFG
from fastcfg.guidance import CFG, Guidance
from fastcfg.guidance.scales import Interval

GUIDANCE: dict[str, type[CFG]] = {"cfg": CFG, "adaptive": AdaptiveCFG}


@dataclass(frozen=True)
class Way:
    """A way to sample: names as `TextToImage.sample` takes them (schedule None is the solver's own), and the guidance's
    scale and interval."""

    solver: str
    steps: int
    scale: float = 3.0
    guidance: str = "cfg"
    interval: Interval = (0.0, 1.0)
    schedule: str | None = None

    def spec(self) -> Guidance:
        """Its guidance."""
        return GUIDANCE[self.guidance](self.scale, interval=self.interval)

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {**asdict(self), "interval": list(self.interval)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Way:
        """From `as_json`, with anything else beside it."""
        return cls(**{**{name: row[name] for name in cls.__dataclass_fields__}, "interval": tuple(row["interval"])})

    def label(self, steps: bool = True) -> str:
        """In words, with the number of steps or without."""
        named = self.solver + (f" {self.schedule}" if self.schedule else "") + (f" {self.steps}" if steps else "")
        where = "" if self.interval == (0, 1) else " in {:g}-{:g}".format(*self.interval)
        return f"{named}, {self.guidance} {self.scale:g}{where}"


@dataclass(frozen=True)
class Measured:
    """A way with what was measured of it.

    Attributes:
        way: the way.
        verdicts: of each prompt in order, "1" where the picture shows everything that it asks for, else "0".
        forwards: of the network, summed over pictures.
        seconds: CPU time that sampling took, in all.
    """

    way: Way
    verdicts: str = ""
    forwards: float = 0.0
    seconds: float = 0.0

    @property
    def forwards_per_picture(self) -> float:
        """Forwards of the network that a picture takes."""
        return self.forwards / len(self.verdicts)

    @property
    def fraction(self) -> float:
        """Adherence: the share of pictures that show everything."""
        return self.verdicts.count("1") / len(self.verdicts)

    @property
    def standard_error(self) -> float:
        """Of the adherence, binomial."""
        return math.sqrt(self.fraction * (1 - self.fraction) / len(self.verdicts))

    def and_also(self, verdicts: str, forwards: float, seconds: float) -> Measured:
        """With the pictures of the next prompts."""
        more = {"forwards": self.forwards + forwards, "seconds": self.seconds + seconds}
        return replace(self, verdicts=self.verdicts + verdicts, **more)  # type: ignore[arg-type]

    def as_json(self, verdicts: bool = True) -> dict[str, Any]:
        """For a report, without the verdicts if these are not wanted; adherence and error are there for readers."""
        told = {"num_prompts": len(self.verdicts), "adherence": self.fraction, "standard_error": self.standard_error}
        told |= {"forwards_per_picture": self.forwards_per_picture, "forwards": self.forwards, "seconds": self.seconds}
        return {**self.way.as_json(), **told, **({"verdicts": self.verdicts} if verdicts else {})}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Measured:
        """From `as_json`."""
        return cls(Way.from_json(row), row["verdicts"], row["forwards"], row["seconds"])


@dataclass(frozen=True)
class Best:
    """What the cheapest way is held against: `fastcfg sample --quality best`, measured on as many prompts.

    Attributes:
        way: ddpm in 50 steps.
        adherence, standard_error, num_prompts: as in the report of `python -m benchmarks adherence`.
    """

    adherence: float
    standard_error: float
    num_prompts: int
    way: Way = Way("ddpm", 50)

    @property
    def wanted(self) -> float:
        """The adherence that is one standard error less."""
        return self.adherence - self.standard_error

    @property
    def forwards_per_picture(self) -> float:
        """Two in every step."""
        return 2.0 * self.way.steps

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        told = {"num_prompts": self.num_prompts, "adherence": self.adherence, "standard_error": self.standard_error}
        return {**self.way.as_json(), **told, "forwards_per_picture": self.forwards_per_picture}

    @classmethod
    def from_adherence(cls, path: Path, settings: Mapping[str, Any]) -> Best:
        """From the report of `adherence`; ValueError for one of other weights, prompts, solver or steps."""
        report = json.loads(path.read_text(encoding="utf-8"))
        way = cls.way
        wanted = {"weights_sha256": settings["weights_sha256"], "prompts_seed": settings["prompts_seed"]}
        wanted |= {"solver": way.solver, "steps": way.steps}
        if other := {
            name: report["settings"].get(name) for name in wanted if report["settings"].get(name) != wanted[name]
        }:
            raise ValueError(f"{path.name}: got {other}, expected { ({name: wanted[name] for name in other}) }")
        row = next(row for row in report["scales"] if row["scale"] == way.scale)["own_prompts"]["correct"]
        return cls(row["fraction"], row["standard_error"], report["settings"]["num_prompts"])


def allowed_failures(count: int, wanted: float) -> int:
    """How many of so many pictures may be wrong for an adherence of at least `wanted`."""
    return math.floor(count * (1 - wanted) + 1e-9)


def cheapest(measured: Iterable[Measured], best: Best, num_prompts: int) -> Measured | None:
    """The way of the fewest forwards per picture, of those within one standard error of the best on `num_prompts`
    prompts or more; of equals the one that follows best. None if there is none."""
    good = [row for row in measured if len(row.verdicts) >= num_prompts and row.fraction >= best.wanted]
    return min(good, key=lambda row: (row.forwards_per_picture, -row.fraction), default=None)
