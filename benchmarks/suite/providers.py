"""The registry of providers: which take part in which workload, and why one cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite import diffusers_rival, engine, k_diffusion_rival, originals, pieces, plain
from benchmarks.suite.architectures import ARCHITECTURES
from benchmarks.suite.cases import LoopCase, NotHereError, Provider, StepCase
from benchmarks.suite.workloads import ROWS, SHAPES, Workload
from fastcfg import Schedule
from fastcfg.ops import inductor_problem, native_problem, resolve_backend, triton_problem
from fastcfg.parity.steps import Case as OptionCase
from fastcfg.parity.steps import make_case

# Largest distances from the exact result, by the model's dtype. Measured: 2.7e-6 (a threshold), 7.8e-4 and 8.0e-3
# (diffusers, which keeps its state in the model's dtype); of loops in float32 1.8e-4 (diffusers).
TOLERANCES = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}
LOOP_TOLERANCE = 5e-4
# A loop in half precision, or of a network (a GPU may run it in TF32), may be so many times as far from the exact one
# as the plain loop is, and this far anyhow.
# Measured, with a state in bfloat16 (diffusers): 1.3e-2 where the plain loop has 1.9e-3.
PLAIN_FACTOR, HALF_FLOOR = 4.0, 3e-2
# The processes that models were trained on.
_PROCESSES = {"embedded": "squaredcos_cap_v2", "glide-base": "squaredcos_cap_v2", "adm-64": "squaredcos_cap_v2"}
_PROCESSES |= {"sd15": "scaled_linear", "sdxl": "scaled_linear"}
COPY = "copy of the same bytes"
META_SHAPE = torch.Size((2, 3, 64, 64))  # what is dispatched does not depend on the shape


@dataclass(frozen=True)
class Entry:
    """A provider that takes part.

    Attributes:
        make: sets it up for a case.
        problem: why it cannot run here; empty if it can.
        own: whether it is fastcfg.
        counted: whether what it dispatches is counted on a CPU: not where torch.compile is in it.
        on_meta: the same on tensors that hold no data, for counting.
    """

    make: Callable[[Any], Provider]
    problem: str = ""
    own: bool = False
    counted: bool = True
    on_meta: Callable[[], Provider] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A workload ready to be measured.

    Attributes:
        shape: of the samples, [B, C, ...].
        case: the inputs, by seed: rotating them keeps a GPU's cache cold. Made once: providers do not change them.
        truth: the right result of seed 0, more exact than the model's dtype.
        tolerance: the largest distance from it.
        moved: bytes that one run must move; None if unknown.
        rows: rows that a run executes.
        entries: the providers, by name.
        moved_drawing: the same where noise is drawn: a fused step draws it where it is used.
    """

    shape: tuple[int, ...]
    case: Callable[[int], Any]
    truth: Callable[[], Tensor]
    tolerance: Callable[[], float]
    moved: int | None
    rows: int
    entries: dict[str, Entry]
    moved_drawing: int | None = None


def job(workload: Workload, device: torch.device) -> Job:
    """Everything about a workload on a device."""
    return {"step": _step, "option": _option, "op": _op, "loop": _loop}[workload.kind](workload, device)


def _step(workload: Workload, device: torch.device) -> Job:
    shape = (workload.batch, *SHAPES[workload.family])
    case = cache(lambda seed: StepCase.random(workload.what, shape, workload.torch_dtype, device, seed))
    learned, first = workload.what != "ddpm-fixed", case(0)
    meta = StepCase.random(workload.what, META_SHAPE, device="meta")
    entries: dict[str, Entry] = {}
    for style in originals.STYLES[: 2 if learned else 1]:  # GLIDE's has no fixed small variances
        make = partial(_original_step, style=style, learned=learned)
        entries[style] = Entry(make, on_meta=partial(make, meta))
        if (found := originals.upstream(style, first.schedule, learned)) is not None:
            entries[f"{style} itself"] = Entry(partial(originals.step, process=found))
    entries["diffusers"] = Entry(diffusers_rival.step, diffusers_rival.problem())
    entries["k-diffusion"] = Entry(k_diffusion_rival.step, k_diffusion_rival.problem(workload.what))
    entries |= _plain(plain.step, device) | _own(engine.step, device)
    # In float64, where the reference need not try how the device rounds.
    entries["reference"] = replace(entries["reference"], on_meta=lambda: engine.step(meta, "reference", torch.float64))
    spec = replace(engine.step_spec(first), noise_source="none") if workload.what == "ddim" else engine.step_spec(first)
    buffers = engine.step_buffers(first)
    moved = _bytes(spec, buffers)
    drawing = _bytes(spec if spec.noise_source == "none" else replace(spec, noise_source="philox"), buffers)
    entries |= _floors(moved, device)
    tolerance = TOLERANCES[workload.dtype]
    return Job(shape, case, lambda: engine.exact_step(first), lambda: tolerance, moved, 1, entries, drawing)


def _option(workload: Workload, device: torch.device) -> Job:
    shape = (workload.batch, *SHAPES[workload.family])
    case = cache(partial(make_case, workload.what, workload.torch_dtype, shape))
    first: OptionCase = case(0)
    moved = _bytes(first.spec, first.buffers(torch.float32, first.dtype, device))
    entries = _plain(partial(plain.option_step, device=device), device)
    entries |= _own(partial(engine.option_step, device=device), device) | _floors(moved, device)
    tolerance = TOLERANCES[workload.dtype]
    return Job(shape, case, lambda: engine.exact_option_step(first, device), lambda: tolerance, moved, 1, entries)


def _op(workload: Workload, device: torch.device) -> Job:
    shape = (workload.batch, *SHAPES[workload.family])
    case = cache(partial(pieces.PieceCase.random, workload.what, shape, workload.torch_dtype, device))
    moved = case(0).moved
    entries = _plain(pieces.formula, device) | _own(pieces.own, device) | _floors(moved, device)
    for name in ("inductor", "native"):
        entries.pop(name)
    return Job(shape, case, lambda: case(0).exact(), lambda: TOLERANCES[workload.dtype], moved, 1, entries)


def _loop(workload: Workload, device: torch.device) -> Job:
    problem = "" if _is_null(workload) else ARCHITECTURES[workload.family].problem()
    if problem:
        raise NotHereError(problem)
    case, learned = loop_case(workload, device), _has_variance(workload)
    styles = originals.STYLES if learned else originals.STYLES[:1]
    process = originals.Original(case.schedule, styles[0], learned, case.clip is not None)
    entries: dict[str, Entry] = {}
    for style in styles:
        found = originals.Original(case.schedule, style, learned, case.clip is not None)
        entries[style] = Entry(partial(originals.loop, process=found))
        if case.clip is not None and (itself := originals.upstream(style, case.schedule, learned)) is not None:
            entries[f"{style} itself"] = Entry(partial(originals.loop, process=itself))
    entries["diffusers"] = Entry(diffusers_rival.loop, diffusers_rival.problem())
    entries["k-diffusion"] = Entry(k_diffusion_rival.loop, k_diffusion_rival.problem(workload.what))
    null, compiling = _is_null(workload), inductor_problem(device)
    if not null and device.type == "cpu":
        compiling = compiling or "compiles a network for minutes on a CPU"
    cuda = "" if device.type == "cuda" else "needs a GPU"
    if not null:
        # With CUDA graphs, but not autotuned: that takes minutes for a network.
        for name, mode in (("torch.compile", "default"), ("torch.compile reduce-overhead", "reduce-overhead")):
            problem = compiling or (cuda if mode != "default" else "")
            entries[name] = Entry(partial(_compiled_loop, process=process, mode=mode), problem, counted=False)
    noise = "philox" if resolve_backend("auto", device) != "reference" else "torch"
    own = partial(engine.loop, noise_source=noise)
    entries["fastcfg"] = Entry(partial(own, graph=False), own=True)
    entries["fastcfg inductor"] = Entry(
        partial(own, graph=False, backend="inductor"), inductor_problem(device), own=True, counted=False
    )
    entries["fastcfg captured"] = Entry(partial(own, graph=True), cuda, own=True)
    if not null:
        entries["fastcfg captured compiled"] = Entry(
            partial(own, graph=True, compile="default"), cuda or compiling, own=True
        )
        entries["model alone"] = Entry(_model_alone)
        # Thousands of operations a run, nearly all of them the network's.
        entries = {name: replace(entry, counted=False) for name, entry in entries.items()}
    exact = _exact_model(workload, device)

    @cache
    def truth() -> Tensor:
        model, dtype = exact()
        return engine.exact_loop(case, model, dtype)

    def tolerance() -> float:
        floor = LOOP_TOLERANCE if case.dtype == torch.float32 else HALF_FLOOR
        if null and case.dtype == torch.float32:
            return floor
        provider = originals.loop(case, process)
        provider.prepare()
        provider.run(False)
        assert provider.result is not None
        distance = float((provider.result() - truth()).abs().max()) / max(1.0, float(truth().abs().max()))
        return max(PLAIN_FACTOR * distance, floor)

    return Job(tuple(case.start.shape), lambda seed: case, truth, tolerance, None, ROWS, entries)


def loop_case(workload: Workload, device: torch.device) -> LoopCase:
    """The inputs of a loop; its model is loaded or made here."""
    null = _is_null(workload)
    shape = (workload.batch, *(SHAPES[workload.family.removeprefix("null-")] if null else _shape_of(workload)))
    schedule, dtype = Schedule.named(_PROCESSES.get(workload.family, "linear")), workload.torch_dtype
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).to(device)
    noise = torch.randn((ROWS, *shape), generator=generator).to(device)
    given: dict[str, Any] = {"start": start, "noise": noise, "dtype": dtype}
    if null:
        channels = shape[1] * (1 + _has_variance(workload))
        ready = torch.randn((2 * shape[0], channels, *shape[2:]), generator=generator).to(device, dtype)
        given["model"] = lambda x, t: ready
    else:
        given["model"], given["cond"], given["uncond"] = ARCHITECTURES[workload.family].build(device, dtype, shape[0])
    if not _has_variance(workload):
        given["clip"] = None
    return LoopCase(workload.what, schedule.respace(f"ddim{ROWS}"), **given)


def _is_null(workload: Workload) -> bool:
    return workload.family.startswith("null-")


def _has_variance(workload: Workload) -> bool:
    """Whether the model has variance channels: those of pixels do, whatever the solver makes of them."""
    if _is_null(workload):
        return workload.what == "ddpm" or workload.family.startswith("null-pixel")
    return ARCHITECTURES[workload.family].learned_variance


def _shape_of(workload: Workload) -> tuple[int, ...]:
    return ARCHITECTURES[workload.family].shape


def _exact_model(workload: Workload, device: torch.device) -> Callable[[], tuple[Callable[..., Any], torch.dtype]]:
    """The case's model in float64; in float32 where a network is too large for that."""

    def build() -> tuple[Callable[..., Any], torch.dtype]:
        if _is_null(workload):
            model = loop_case(replace(workload, dtype="float32"), device).model
            return lambda x, t: model(x, t).double(), torch.float64
        dtype = torch.float64 if workload.family == "embedded" else torch.float32
        return ARCHITECTURES[workload.family].build(device, dtype, workload.batch)[0], dtype

    return build


def _original_step(case: StepCase, style: str, learned: bool) -> Provider:
    return originals.step(case, originals.Original(case.schedule, style, learned))


def _compiled_loop(case: LoopCase, process: Any, mode: str) -> Provider:
    model = torch.compile(case.model, mode=mode, dynamic=False)
    begin = torch.compiler.cudagraph_mark_step_begin if mode != "default" else lambda: None

    def network(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        begin()
        output: Tensor = model(x, t, **conditioning)
        return output

    return originals.loop(case, process, network)


def _model_alone(case: LoopCase) -> Provider:
    x = torch.cat([case.start, case.start]).to(case.dtype)
    times = torch.from_numpy(case.schedule.timestep_map[::-1].copy()).to(x.device)
    conditioning = case.doubled()

    @torch.no_grad()
    def run(draw: bool) -> None:
        for t in times:
            case.model(x, t.expand(len(x)), **conditioning)

    return Provider(lambda: None, run, None)


def _plain(make: Callable[..., Provider], device: torch.device) -> dict[str, Entry]:
    problem = inductor_problem(device)
    cuda = "" if device.type == "cuda" else "needs a GPU"
    return {
        "torch eager": Entry(make),
        "torch.compile": Entry(partial(make, mode="default"), problem, counted=False),
        "torch.compile max-autotune": Entry(partial(make, mode="max-autotune"), problem or cuda, counted=False),
    }


def _own(make: Callable[..., Provider], device: torch.device) -> dict[str, Entry]:
    triton = triton_problem(device) if device.type == "cuda" else "needs a GPU"
    return {
        "reference": Entry(partial(make, backend="reference"), own=True),
        "native": Entry(partial(make, backend="native"), native_problem(device), own=True, counted=False),
        "inductor": Entry(partial(make, backend="inductor"), inductor_problem(device), own=True, counted=False),
        "triton": Entry(partial(make, backend="triton"), triton, own=True),
    }


def _floors(moved: int, device: torch.device) -> dict[str, Entry]:
    return {
        COPY: Entry(lambda case: plain.copy_of(moved, device)),
        "smallest kernel": Entry(lambda case: plain.smallest(device)),
    }


def _bytes(spec: Any, buffers: Any) -> int:
    from benchmarks.launches import step_bytes

    return step_bytes(spec, buffers) * buffers.x.numel()
