"""Whole loops, and the first rows of a user's own: where they end up, against the same loop in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from .. import solvers
from ..engine.sampler import Sampler
from ..guidance import CFG, Guidance, NoGuidance
from ..pipelines.text_to_image import TextToImage
from ..reference.plain import PlainTable, original_row
from ..schedule import Schedule
from ..step import StepSpec
from ..table import StepTable
from .findings import Finding, dtype_name

STEPS, SCALE, PROMPT = 50, 3.0, "a red circle above a blue square"

Model = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is sampled: arguments of `Sampler` (options are its further keyword arguments) and `Sampler.sample`."""

    model: Model
    table: StepTable
    shape: tuple[int, ...]
    cond: dict[str, Any] | None = None
    uncond: dict[str, Any] | None = None
    branches: dict[str, dict[str, Any]] | None = None
    guidance: Guidance = field(default_factory=NoGuidance)
    options: dict[str, Any] = field(default_factory=dict)

    def sampler(self, **options: Any) -> Sampler:
        """A sampler for it, with some options replaced."""
        return Sampler(options.pop("model", self.model), self.table, guidance=self.guidance, **self.options | options)

    def run(self, sampler: Sampler, seed: int, rows: int | None = None) -> list[Tensor]:
        """The states [B, C, ...] on the CPU after every row, from seeded recorded noise."""
        given: dict[str, Any] = self._conditions(sampler.device)
        given = {name: given.pop(name) for name in ("cond", "uncond")} | {"branches": given or None}
        steps = sampler.iterate(self.shape, **given, x_T=self.start(seed), noise=lambda row, _: self.noise(seed, row))
        return [step.x.cpu() for step in islice(steps, rows)]

    def start(self, seed: int) -> Tensor:
        """float32 [B, C, ...]."""
        return self.noise(seed, -1) * self.table.initial_scale

    def noise(self, seed: int, row: int) -> Tensor:
        """float32 standard normals of a row: the same on every device."""
        generator = torch.Generator().manual_seed(((seed << 20) + row + 1) % 2**63)
        return torch.randn(self.shape, generator=generator)

    def packed(self, model: Model, device: torch.device, active: Sequence[int]) -> dict[str, Any]:
        """The keyword arguments of a model for some branches, one after the other along the batch; text is encoded."""
        conditions = self._conditions(device)
        values = [conditions[self.guidance.branches[branch]] or {} for branch in active]
        if hasattr(model, "precompute"):
            values = [model.precompute(**value) for value in values]
        return {name: _along_batch([value[name] for value in values], self.shape[0]) for name in values[0]}

    def _conditions(self, device: torch.device) -> dict[str, dict[str, Any] | None]:
        """Every branch's keyword arguments, with tensors on a device."""
        by_name = {"cond": self.cond, "uncond": self.uncond, **(self.branches or {})}
        return {
            branch: given and {name: v.to(device) if isinstance(v, Tensor) else v for name, v in given.items()}
            for branch, given in by_name.items()
        }


def _along_batch(values: list[Any], batch: int) -> Any:
    if not all(isinstance(v, Tensor) and v.ndim and len(v) in (1, batch) for v in values):
        return values[0]
    return torch.cat([v.expand(batch, *v.shape[1:]) for v in values])


class Analytic(torch.nn.Module):
    """A bounded model without weights, in the dtype of its input: noise and variance channels."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [N, C, ...] to [N, 2C, ...]."""
        shift = (y + torch.sin(0.01 * t.to(x.dtype))).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([torch.tanh(0.8 * x + shift), torch.cos(x - shift)], dim=1)


def standard(
    solver: str, quick: bool, device: torch.device
) -> tuple[Problem, Schedule, Callable[[torch.dtype], Model]]:
    """A loop of ddpm (learned range) or ddim with guidance; its schedule, and its model in a dtype."""
    if quick:
        schedule = Schedule.named("squaredcos_cap_v2").respace(STEPS)
        conditions: list[dict[str, Any]] = [{"y": torch.tensor([0.5, -0.3])}, {"y": torch.zeros(1)}]
        shape: tuple[int, ...] = (2, 3, 16, 16)
    else:
        pipeline = TextToImage.load(device=device)
        schedule, size = pipeline.schedule.respace(STEPS), pipeline.meta.image_size
        texts = [pipeline.tokenizer.encode(PROMPT), []]
        read = [pipeline.tokenizer.padded_tokens_and_mask(ids, pipeline.model.text_ctx) for ids in texts]
        conditions = [{"tokens": torch.tensor([tokens]), "mask": torch.tensor([mask])} for tokens, mask in read]
        shape = (1, 3, size, size)

    def in_dtype(dtype: torch.dtype) -> Model:
        return Analytic() if quick else TextToImage.load(device=device, dtype=dtype).model

    given = dict(zip(("cond", "uncond"), conditions, strict=True))
    table = solvers.ddpm(schedule) if solver == "ddpm" else solvers.ddim(schedule)
    problem = Problem(Analytic(), table, shape, **given, guidance=CFG(SCALE), options={"clip": 1.0, "device": device})
    return problem, schedule, in_dtype


def check_loops(
    backends: Sequence[str], device: torch.device, quick: bool, seed: int, progress: Callable[..., Any]
) -> list[Finding]:
    """Loops of 50 steps by every backend, and by plain torch; arguments as for `check_steps`. `quick` takes an analytic
    model instead of the embedded one, and leaves out Inductor."""
    found: list[Finding] = []
    gpu = device.type == "cuda"
    ways, dtypes = ["eager"] + ["captured"] * gpu, [torch.float32] + [torch.bfloat16] * gpu
    backends = [backend for backend in backends if not (quick and backend == "inductor")]
    for solver in progress(("ddpm", "ddim"), desc="loops"):
        problem, schedule, in_dtype = standard(solver, quick, device)
        wide = problem.sampler(model=in_dtype(torch.float64), dtype=torch.float64, graph=False)
        truth = plain_loop(problem, wide, wide.model, seed, STEPS, torch.float64)
        formula = partial(original_row, schedule, solver, scale=SCALE)
        for dtype in dtypes:
            own = replace(problem, model=in_dtype(dtype))
            base = own.sampler(dtype=dtype, graph=False)
            plain = plain_loop(own, base, own.model, seed, STEPS, formula=formula)
            for backend, way in product(backends, ways):
                states = own.run(own.sampler(dtype=dtype, backend=backend, graph=way == "captured"), seed)
                finding = Finding("loop", backend, dtype_name(dtype), solver, way, own.shape, "x")
                found.append(finding.along(states, truth, plain))
    return found


def check_model(
    problem: Problem, backends: Sequence[str], rows: int, seed: int, progress: Callable[..., Any]
) -> list[Finding]:
    """The first rows of a user's sampler, by every backend in three ways; other arguments as for `check_steps`.

    Teacher-forced: the model's outputs are recorded in a run with a float64 state, and every backend gets these in
    place of the model, so that only fastcfg's arithmetic is compared. Free and captured: the model runs on each
    backend's own states. ValueError for guidance that evaluates other branches from run to run, or a model that fails.
    """
    base = problem.sampler(graph=False)
    plan = problem.guidance.plan(problem.table, problem.shape[0])
    if plan.agreement is not None or plan.planned is not None:
        kind = type(problem.guidance).__name__
        raise ValueError(f"guidance: got {kind}, expected one that does not look at the outputs, such as CFG")
    settings = {"dtype": base.dtype, "device": base.device, "batching": "batched", "graph": False}
    recorder = _Recorder(problem.model)
    is_plain = isinstance(base.clip, Tensor | None) and base.denoised_fn is None and base.cond_fn is None

    def run(**options: Any) -> list[Tensor]:
        return problem.run(problem.sampler(**settings | options), seed, rows)

    try:
        if is_plain:
            truth = plain_loop(problem, base, recorder, seed, min(rows, len(problem.table)), torch.float64)
        else:
            truth = run(model=recorder, state_dtype=torch.float64, backend="reference")
    except Exception as error:
        raise ValueError(f"--model: its first run failed: {type(error).__name__}: {error}") from error
    plain = free_plain = None
    if is_plain:
        plain = plain_loop(problem, base, recorder.replay(), seed, len(truth))
        free_plain = plain_loop(problem, base, problem.model, seed, len(truth))
    expected = run(model=recorder.replay(), backend="reference")
    runs = [(backend, way) for backend in backends for way in ("teacher-forced", "free", "captured")]
    found: list[Finding] = []
    for backend, way in progress(runs, desc="model"):
        options, kind = ("free", way) if way == "captured" else (way, "eager")
        finding = Finding("model", backend, dtype_name(base.dtype), options, kind, problem.shape, "x")
        if way == "teacher-forced":
            states = run(model=recorder.replay(), backend=backend)
            # Recorded outputs leave the bits no freedom but the learned variance's exponential.
            allowed = None if base.table.learned_variance else 0.0
            note = "" if plain else "bound: the reference's own error, plain torch has no such options here"
            finding = replace(finding, note=note).against(torch.stack(states), torch.stack(expected), allowed)
            found.append(finding.along(states, truth, plain or expected))
            continue
        sampler = problem.sampler(**settings | {"backend": backend, "graph": way == "captured"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            states = problem.run(sampler, seed, rows)
        if way == "captured":
            report = sampler.report()
            graph, reason = report["graph"], report["graph_reason"]
            finding = replace(finding, note=f"ran eagerly: {reason}" if graph == "none" else f"graph: {graph}")
        found.append(finding.along(states, truth, free_plain))
    return found


class _Recorder:
    """A model that keeps its outputs."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._outputs: list[Tensor] = []
        if hasattr(model, "precompute"):
            self.precompute = model.precompute

    def __call__(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        output = self._model(x, t, **given)
        output = output[0] if isinstance(output, tuple) else output
        self._outputs.append(output.clone())
        return output

    def replay(self) -> Model:
        """A model that returns the outputs one after the other."""
        outputs = iter(self._outputs)
        return lambda x, t, **_: next(outputs)


@torch.no_grad()
def plain_loop(
    problem: Problem,
    base: Sampler,
    model: Model,
    seed: int,
    rows: int,
    state: torch.dtype = torch.float32,
    formula: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """The states after each of the first rows in plain torch, without the engine's loop, of a problem with a clip that
    is a number.

    `base` is its sampler, with table, guidance, clip, dtype, device and memory format resolved; `model` its model or
    one in place of it. A float32 state has the blend in the model's dtype, a float64 one everything beside the model in
    float64. `formula`, (x, output, row, noise) -> the next x, replaces the table's equations.
    """
    device, table, guidance = base.device, base.table, base.guidance
    batch, plan = problem.shape[0], guidance.plan(table, problem.shape[0])
    x, states = problem.start(seed).to(device, state), []
    plain = PlainTable(table, x)
    given = {active: problem.packed(model, device, active) for active in set(plan.active[:rows])}
    bound = base.clip.to(x).expand(batch) if isinstance(base.clip, Tensor) else None
    source = "tensor" if table.uses_noise else "none"
    for row, active in enumerate(plan.active[:rows]):
        time = torch.full((len(active) * batch,), table["t"][row], device=device)
        time = time.long() if table.integer_time else time.float()
        entered = (float(table["c_in"][row]) * x).to(base.dtype).repeat(len(active), *[1] * (x.ndim - 1))
        output = model(entered.contiguous(memory_format=base.memory_format), time, **given[active])
        output = output[0] if isinstance(output, tuple) else output
        output = output.double() if state == torch.float64 else output
        noise = problem.noise(seed, row).to(x)
        if formula is not None:
            x = formula(x=x, output=output, row=row, noise=noise)
        else:
            spec = StepSpec.of(table, guidance, active, clip=bound is not None, noise_source=source)
            weights = torch.from_numpy(plan.weights[row][:, list(active)]).to(x)
            x = plain(row, x, output, spec, weights=weights, bound=bound, noise=noise)["x"]
        states.append(x.cpu())
    return states
