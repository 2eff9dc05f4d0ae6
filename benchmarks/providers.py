"""Who makes the step that `benchmarks.step` measures, each from the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.originals import STYLES, Original, guided, step_of, upstream
from fastcfg import Schedule, solvers
from fastcfg.ops import GuidedStep, inductor_problem, triton_problem
from fastcfg.step import StepBuffers, StepSpec

STEPS = 100
TIMESTEP = 10  # the respaced timestep of the step; every one does the same work
SCALE = 3.0


@dataclass(frozen=True, eq=False)
class Case:
    """The inputs of one step, the same for all providers.

    Attributes:
        solver: "ddpm" or "ddim" (eta = 0).
        x: [B, C, ...], the state.
        output: [2B, 2C, ...], the model's, conditional half first.
        noise: [2B, C, ...], of which fastcfg uses the first B.
    """

    solver: str
    x: Tensor
    output: Tensor
    noise: Tensor

    @classmethod
    def random(cls, solver: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Case:
        """Standard normal inputs, the same for the same shape."""
        generator = torch.Generator().manual_seed(0)
        batch, channels, *rest = shape
        sizes = (shape, (2 * batch, 2 * channels, *rest), (2 * batch, channels, *rest))
        return cls(solver, *(torch.randn(size, generator=generator).to(device) for size in sizes))


@dataclass(frozen=True, eq=False)
class Provider:
    """Somebody who makes the step.

    Attributes:
        prepare: puts the inputs back; not timed.
        step: the step, with noise given (False) or drawn (True).
        result: the next x [B, C, ...] of the last step.
    """

    prepare: Callable[[], object]
    step: Callable[[bool], object]
    result: Callable[[], Tensor]


def original(case: Case, process: Any) -> Provider:
    """A process of `benchmarks.originals`, on the doubled batch."""
    doubled = torch.cat([case.x, case.x])
    x, results = doubled.clone(), []
    run = step_of(process, case.solver, guided(case.output, SCALE), x, TIMESTEP)

    def step(draw: bool) -> None:
        results[:] = [run(None if draw else case.noise)]

    return Provider(lambda: x.copy_(doubled), step, lambda: results[0][: len(case.x)])


def fastcfg(case: Case, schedule: Schedule, backend: str, dtype: torch.dtype = torch.float32) -> Provider:
    """The engine's step on its buffers."""
    device, batch = case.x.device, len(case.x)
    table = solvers.ddpm(schedule) if case.solver == "ddpm" else solvers.ddim(schedule)
    spec = StepSpec(
        branches=2,
        base=1,
        clip=True,
        noise="tensor" if table.uses_noise else "none",
        learned_variance=table.learned_variance,
    )
    given = case.noise[:batch].to(dtype)
    buffers = StepBuffers(
        x=case.x.to(dtype, copy=True),
        table=table.on(device, dtype),
        counter=torch.zeros(2, dtype=torch.int32, device=device),
        weights=torch.tensor([SCALE, 0.0], dtype=dtype, device=device).expand(table.num_rows, batch, 2).contiguous(),
        bound=torch.ones(batch, dtype=dtype, device=device),
        noise=given.clone(),
        model_input=torch.empty((2 * batch, *case.x.shape[1:]), dtype=dtype, device=device),
        time=torch.empty(2 * batch, dtype=torch.int64, device=device),
    )
    output, run = case.output.to(dtype), GuidedStep(spec, buffers, backend)
    # Rows are in the order of execution: the last timestep's first.
    row = table.num_rows - 1 - TIMESTEP

    def prepare() -> None:
        buffers.x.copy_(case.x)
        buffers.noise.copy_(given)  # type: ignore[union-attr]
        buffers.counter.copy_(torch.tensor([row, 0], dtype=torch.int32))

    def step(draw: bool) -> None:
        if draw and spec.noise == "tensor":
            buffers.noise.normal_()  # type: ignore[union-attr]
        run(output)

    return Provider(prepare, step, lambda: buffers.x)


def providers(case: Case, schedule: Schedule, betas: np.ndarray) -> dict[str, Provider]:
    """Everybody who can run here."""
    device = case.x.device
    found = {style: original(case, Original(schedule, style)) for style in STYLES}
    for style in STYLES:
        process = upstream(style, betas, STEPS)
        if process is not None:
            found[f"{style} itself"] = original(case, process)
    names = ["reference"]
    names += ["inductor"] if not inductor_problem(device) else []
    names += ["triton"] if device.type == "cuda" and not triton_problem(device) else []
    return {**found, **{name: fastcfg(case, schedule, name) for name in names}}
