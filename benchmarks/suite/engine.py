"""fastcfg as a provider: the fused step on its buffers, and the sampler's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.cases import LoopCase, Provider, StepCase
from fastcfg import CFG, Sampler
from fastcfg.ops import GuidedStep
from fastcfg.parity.steps import Case as OptionCase
from fastcfg.step import StepBuffers, StepSpec


def step_spec(case: StepCase) -> StepSpec:
    """The terms of a case's step, with its noise in a tensor."""
    source = "tensor" if case.table.uses_noise else "none"
    return StepSpec.of(case.table, CFG(case.scale), (0, 1), clip=True, noise_source=source)


def step_buffers(case: StepCase, dtype: torch.dtype = torch.float32) -> StepBuffers:
    """Fresh buffers of a case in a state's dtype, at its row."""
    device, batch, table = case.x.device, len(case.x), case.table
    weights = torch.tensor([case.scale, 0.0], dtype=dtype, device=device)
    model = torch.float64 if dtype == torch.float64 else case.output.dtype
    return StepBuffers(
        x=case.x.to(dtype, copy=True),
        table=table.on(device, dtype),
        counter=torch.tensor([case.row, 0], dtype=torch.int32, device=device),
        weights=weights.expand(table.num_rows, batch, 2).contiguous(),
        bound=torch.ones(batch, dtype=dtype, device=device),
        noise=case.noise[:batch].to(dtype, copy=True),
        seeds=case.seeds,
        model_input=torch.empty((2 * batch, *case.x.shape[1:]), dtype=model, device=device),
        time=torch.empty(2 * batch, dtype=torch.int64, device=device),
    )


def step(case: StepCase, backend: str, dtype: torch.dtype = torch.float32) -> Provider:
    """The fused step; noise is drawn by torch, by the kernels in the step itself."""
    spec, buffers = step_spec(case), step_buffers(case, dtype)
    output = case.output.double() if dtype == torch.float64 else case.output
    noise, seeded = case.noise[: len(case.x)], backend in ("triton", "native")
    given = GuidedStep(spec, buffers, backend)
    drawing = spec.noise_source == "tensor"
    drawn = GuidedStep(replace(spec, noise_source="philox"), buffers, backend) if drawing and seeded else given
    start = torch.tensor([case.row, 0], dtype=torch.int32, device=case.x.device)

    def prepare() -> None:
        buffers.x.copy_(case.x)
        buffers.noise.copy_(noise)  # type: ignore[union-attr]
        buffers.counter.copy_(start)

    def run(draw: bool) -> None:
        if draw and drawing and not seeded:
            buffers.noise.normal_()  # type: ignore[union-attr]
        (drawn if draw else given)(output)

    return Provider(prepare, run, lambda: buffers.x, capturable=True, seeded=seeded)


def exact_step(case: StepCase) -> Tensor:
    """The next x in float64 [B, C, ...], on the case's device."""
    buffers = step_buffers(case, torch.float64)
    GuidedStep(step_spec(case), buffers, "reference")(case.output.double())
    return buffers.x


def option_step(case: OptionCase, backend: str, device: torch.device) -> Provider:
    """The fused step with one of `fastcfg.parity`'s sets of options."""
    spec = case.spec
    buffers, output = case.buffers(torch.float32, case.dtype, device), case.output.to(device)
    fused, start, x = GuidedStep(spec, buffers, backend), buffers.counter.clone(), buffers.x.clone()
    history = None if buffers.history is None else buffers.history.clone()

    def prepare() -> None:
        buffers.x.copy_(x)
        buffers.counter.copy_(start)
        if history is not None:
            buffers.history.copy_(history)  # type: ignore[union-attr]

    return Provider(prepare, lambda draw: fused(output), lambda: buffers.x, capturable=True)


def exact_option_step(case: OptionCase, device: torch.device) -> Tensor:
    """The next x of a set of options in float64 [B, C, ...]."""
    buffers = case.buffers(torch.float64, torch.float64, device)
    GuidedStep(case.spec, buffers, "reference")(case.output.to(device, torch.float64))
    return buffers.x


def loop(case: LoopCase, **options: Any) -> Provider:
    """The sampler's loop.

    Args:
        case: what to sample.
        **options: of `Sampler`.
    """
    sampler = loop_sampler(case, **options)
    recorded = case.noise if case.table.uses_noise else None
    shape, given = tuple(case.start.shape), {"cond": case.cond, "uncond": case.uncond, "x_T": case.start, "seed": 0}
    return Provider.returning(
        lambda draw: sampler.sample(shape, **given, noise=None if draw else recorded), memory=sampler.memory
    )


def loop_sampler(case: LoopCase, model: Callable[..., Any] | None = None, **options: Any) -> Sampler:
    """A sampler for a case."""
    given: dict[str, Any] = {"dtype": case.dtype, "clip": case.clip, "device": case.start.device, **options}
    return Sampler(model or case.model, case.table, guidance=CFG(case.scale), **given)


def exact_loop(case: LoopCase, model: Callable[..., Any], dtype: torch.dtype) -> Tensor:
    """The samples [B, C, ...] by the reference with a more exact model.

    Args:
        case: what to sample.
        model: like the case's, in `dtype`.
        dtype: torch.float64 or torch.float32, of model and state.
    """
    sampler = loop_sampler(case, model, backend="reference", graph=False, dtype=dtype, state_dtype=dtype)
    recorded = case.noise.to(dtype) if case.table.uses_noise else None
    cond, uncond = (
        {n: v.to(dtype) if v.is_floating_point() else v for n, v in d.items()} for d in (case.cond, case.uncond)
    )
    return sampler.sample(
        tuple(case.start.shape), cond=cond, uncond=uncond, x_T=case.start.to(dtype), noise=recorded, seed=0
    )
