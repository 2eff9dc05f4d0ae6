"""A diffusers pipeline's first steps: its scheduler's samples, and the fused step's with the scheduler's compiled table
and the same model outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..compiler import compile_scheduler, scheduler_clip
from ..compiler.patching import draw_function, modules_of, replaced
from ..engine.sampler import Sampler
from .findings import Finding, distance_in_ulps, dtype_name

# Between the scheduler's samples and ours, in ulps of its dtype at the largest value, per row; measured over 20 rows of
# twelve schedulers: 5.1 in float32 (DDIM; the others 2), 1 in float16 and bfloat16.
_ALLOWED_ULP = {torch.float32: 10.0, torch.float16: 3.0, torch.bfloat16: 3.0}
# A table sums saved tensors where a scheduler recomputes: measured at most 2.5 times its error in float32.
_FACTOR = 4.0
_PER_CALL = ("generator", "return_dict")


@dataclass(frozen=True, eq=False)
class PipelineProblem:
    """A pipeline, an object with `scheduler`, called as `pipeline(**call)`."""

    pipeline: Any
    call: dict[str, Any]


@dataclass(eq=False)
class _Recorded:
    """The calls of a scheduler: the arguments of `set_timesteps` by name and the further ones of every step, the steps'
    times, the model's outputs after guidance, the sample before the first step and after every one, and each step's
    draw."""

    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)


class _EnoughError(Exception):
    """Stops a pipeline."""


def check_pipeline(
    problem: PipelineProblem, backends: Sequence[str], rows: int, progress: Callable[..., Any]
) -> list[Finding]:
    """The first rows of a pipeline, by every backend; other arguments as for `check_steps`.

    The pipeline runs until its scheduler has made that many steps. The fused step gets the same outputs, start and
    noise (teacher-forced), and is compared with the scheduler's samples and with the table in float64. ValueError for a
    scheduler that is no table, or a pipeline that fails, begins in the middle, or changes the arguments of its
    scheduler's steps.
    """
    scheduler = problem.pipeline.scheduler
    recorded = _record(problem, rows)
    settings = dict(recorded.settings)
    count, timesteps = settings.pop("num_inference_steps", None), scheduler.timesteps.tolist()
    if recorded.times != timesteps[: len(recorded.times)]:
        raise ValueError(f"--model: the pipeline begins at timestep {recorded.times[0]}, expected {timesteps[0]}")
    settings.pop("device", None)
    table = compile_scheduler(scheduler, count or len(timesteps), step_options=recorded.options, **settings)
    start, dtype = recorded.states[0], recorded.states[0].dtype

    def run(backend: str, state: torch.dtype) -> list[Tensor]:
        outputs: Iterator[Tensor] = iter(recorded.outputs)
        options: dict[str, Any] = {"backend": backend, "graph": False, "device": start.device, "state_dtype": state}
        options |= {"dtype": torch.float64 if state == torch.float64 else dtype, "clip": scheduler_clip(scheduler)}
        sampler = Sampler(lambda x, t: next(outputs).to(x.dtype), table, **options)
        noise = (lambda row, shape: recorded.noise[row].to(state)) if table.uses_noise else None
        steps = sampler.iterate(tuple(start.shape), x_T=start.to(state), noise=noise)
        return [step.x.cpu() for step in islice(steps, len(recorded.times))]

    truth = run("reference", torch.float64)
    originals = [state.float().cpu() for state in recorded.states[1:]]
    options, found = f"{type(problem.pipeline).__name__}, {table.name}", []
    for backend in progress(backends, desc="pipeline"):
        states = run(backend, torch.float32)
        pairs = zip(states, originals, strict=True)
        apart = max(distance_in_ulps(got.to(dtype), want.to(dtype))[1] for got, want in pairs)
        finding = Finding("model", backend, dtype_name(dtype), options, "eager", tuple(start.shape), "x")
        limits: dict[str, Any] = {"allowed_ulp": _ALLOWED_ULP[dtype] * len(originals), "factor": _FACTOR}
        found.append(replace(finding, reference_ulp=apart, **limits).along(states, truth, originals))
    return found


def _record(problem: PipelineProblem, rows: int) -> _Recorded:
    scheduler, recorded = problem.pipeline.scheduler, _Recorded()
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    named = inspect.signature(step).parameters

    @wraps(set_timesteps)
    def recording_set_timesteps(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(set_timesteps).bind(*arguments, **options)
        recorded.settings = {name: value for name, value in bound.arguments.items() if name != "kwargs"}
        return set_timesteps(*arguments, **options)

    @wraps(step)
    def recording_step(model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **options: Any) -> Any:
        if len(recorded.times) == rows:
            raise _EnoughError
        further = {n: v for n, v in options.items() if n not in _PER_CALL and v not in (None, named[n].default)}
        if arguments or (recorded.states and further != recorded.options):
            raise ValueError(f"its steps are given {further or 'further arguments'}, expected the same in every step")
        recorded.options = further
        if not recorded.states:
            recorded.states.append(sample.detach().clone())
        recorded.times.append(float(timestep))
        recorded.outputs.append(model_output.detach().clone())
        drawn = len(recorded.noise)
        result = step(model_output, timestep, sample, **options)
        if len(recorded.noise) > drawn + 1:
            raise ValueError("its scheduler draws noise several times a step, expected once")
        if len(recorded.noise) == drawn:
            recorded.noise.append(torch.zeros_like(sample))
        made = result[0] if isinstance(result, tuple) else result.prev_sample
        recorded.states.append(made.detach().clone())
        return result

    draw = draw_function(type(scheduler))

    def recording_draw(*arguments: Any, **options: Any) -> Tensor:
        recorded.noise.append(draw(*arguments, **options))
        return recorded.noise[-1].clone()

    scheduler.set_timesteps, scheduler.step = recording_set_timesteps, recording_step
    try:
        draws = [(module, "randn_tensor", recording_draw) for module in modules_of(type(scheduler))]
        with replaced(draws), suppress(_EnoughError):
            problem.pipeline(**problem.call)
    except Exception as error:
        raise ValueError(f"--model: the pipeline failed: {type(error).__name__}: {error}") from error
    finally:
        del scheduler.set_timesteps, scheduler.step
    if not recorded.times:
        raise ValueError("--model: the pipeline made no step of its scheduler, expected some")
    return recorded
