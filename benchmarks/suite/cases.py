"""The inputs of a workload, the same for all of its providers, and providers themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastcfg import Schedule, StepTable, solvers
from fastcfg.reference.philox import philox_normal, sample_seeds

# A tenth of the timesteps: 0, 10, ..., 990, which is also diffusers' "leading" spacing.
SPACING = "ddim100"
TIMESTEP = 10  # the respaced timestep of a step; every one does the same work
SCALE = 3.0


class NotHereError(Exception):
    """A workload cannot be set up here; the message says why."""


@dataclass(frozen=True, eq=False)
class Provider:
    """One implementation of a workload.

    Attributes:
        prepare: restores the inputs; not timed.
        run: the work, with the case's noise (False) or with noise drawn (True).
        result: the last run's result, [B, C, ...]; None for floors, which have none.
        capturable: whether `run` may be recorded into a CUDA graph.
        seeded: whether drawn noise is the case's own, made from its seeds: then results with it are checked too.
        memory: bytes of buffers and graphs beside its inputs; None if unknown.
    """

    prepare: Callable[[], object]
    run: Callable[[bool], object]
    result: Callable[[], Tensor] | None
    capturable: bool = False
    seeded: bool = False
    memory: Callable[[], int] | None = None

    @classmethod
    def returning(
        cls, call: Callable[[bool], Any], pick: Callable[[Any], Tensor] = lambda made: made, **options: Any
    ) -> Provider:
        """A provider whose run is a call.

        Args:
            call: the work; takes whether noise is drawn.
            pick: takes the result out of what the last call returned; not timed.
            **options: other attributes; `prepare` does nothing by default.
        """
        last: list[Any] = []

        def run(draw: bool) -> None:
            last[:] = [call(draw)]

        return cls(options.pop("prepare", lambda: None), run, lambda: pick(last[0]), **options)


@dataclass(frozen=True, eq=False)
class StepCase:
    """One step beside the model: the model's output is given.

    Attributes:
        solver: "ddpm" (learned range), "ddpm-fixed" (fixed small variance) or "ddim" (eta = 0).
        schedule: the respaced process.
        x: float32 [B, C, ...], the state.
        output: [2B, 2C, ...] in the model's dtype, conditional half first; "ddpm-fixed" has [2B, C, ...].
        noise: float32 [2B, C, ...], of which those who keep B samples use the first B; these are what `seeds` give.
        seeds: int64 [B], for noise drawn in the step.
        scale: of the guidance.
        timestep: the respaced timestep. x0 is clipped to [-1, 1].
    """

    solver: str
    schedule: Schedule
    x: Tensor
    output: Tensor
    noise: Tensor
    seeds: Tensor
    scale: float = SCALE
    timestep: int = TIMESTEP

    @property
    def row(self) -> int:
        """The table's row: rows are in the order of execution."""
        return self.schedule.num_timesteps - 1 - self.timestep

    @property
    def table(self) -> StepTable:
        """The solver's."""
        return table_for(self.solver, self.schedule)

    @classmethod
    def random(
        cls,
        solver: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> StepCase:
        """Standard normal inputs, the same for the same arguments on every device."""
        schedule = Schedule.named("linear").respace(SPACING)
        generator = torch.Generator().manual_seed(seed)
        batch, channels, *rest = shape
        channels_out = channels if solver == "ddpm-fixed" else 2 * channels
        x = torch.randn(shape, generator=generator)
        output = torch.randn((2 * batch, channels_out, *rest), generator=generator).to(dtype)
        seeds = sample_seeds(seed, batch)
        drawn = philox_normal(seeds, shape[1:], row=schedule.num_timesteps - 1 - TIMESTEP)
        noise = torch.cat([drawn, torch.randn(shape, generator=generator)])
        return cls(solver, schedule, *(tensor.to(device) for tensor in (x, output, noise, seeds)))


@dataclass(frozen=True, eq=False)
class LoopCase:
    """A whole sampling loop with guidance.

    Attributes:
        solver: "ddpm", "ddpm-fixed" or "ddim", as in `StepCase`.
        schedule: the respaced process, of as many timesteps as the loop has rows.
        model: (x [2B, C, ...] in its dtype, t int64 [2B] (original timesteps), **conditioning) -> [2B, C or 2C, ...].
        cond, uncond: the conditioning of either branch, tensors [B, ...]; the same keys.
        start: float32 [B, C, ...], x_T.
        noise: float32 [R, B, C, ...], for the rows in the order of execution.
        dtype: the model's.
        clip: the bound of x0; None for none.
        scale: of the guidance.
    """

    solver: str
    schedule: Schedule
    model: Callable[..., Any]
    start: Tensor
    noise: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)
    uncond: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    clip: float | None = 1.0
    scale: float = SCALE

    @property
    def table(self) -> StepTable:
        """The solver's."""
        return table_for(self.solver, self.schedule)

    def doubled(self) -> dict[str, Tensor]:
        """The conditioning of both branches, conditional half first."""
        return {name: torch.cat([value, self.uncond[name]]) for name, value in self.cond.items()}


def table_for(solver: str, schedule: Schedule) -> StepTable:
    """The table of a solver by its name here."""
    if solver == "ddim":
        return solvers.ddim(schedule)
    return solvers.ddpm(schedule, variance="fixed_small" if solver == "ddpm-fixed" else "learned_range")
