"""One fused step on random inputs: its bits against the reference, its error against float64 and plain torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import solvers
from ..ops import GuidedStep, initial_noise
from ..ops.backend import interpreting
from ..reference import ReferenceStep
from ..reference.philox import INITIAL_STREAM, philox_normal, sample_seeds
from ..reference.plain import original_row, plain_row
from ..schedule import Schedule
from ..step import StepBuffers, StepSpec
from ..table import COLUMNS, DEVICE_COLUMNS
from .findings import Finding, dtype_name, measure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((4, 3, 64, 64), (3, 5, 13, 29), (2, 4, 1000), (1, 3, 32, 32))
SMALL_SHAPES = ((2, 3, 32, 32), (3, 5, 13, 17), (2, 4, 1000), (1, 3, 24, 24))

_GUIDED = StepSpec(branches=2, base=1, clip=True, noise_source="philox")
OPTIONS = {
    "plain": StepSpec(),
    "cfg": _GUIDED,
    "threshold": replace(_GUIDED, rescale=True),
    "x0 kept": replace(_GUIDED, keep_x0=True, noise_source="none"),
    "gradient": replace(_GUIDED, gradient=True, noise_source="tensor"),
    "raw output": StepSpec(branches=2, base=0, raw_output=True, noise_source="tensor", keep_x0=True),
    "history": StepSpec(branches=3, noise_source="tensor", history=3, unconditional=2, keep_x0=True),
    "saved states": StepSpec(branches=3, noise_source="tensor", history=3, saves_states=True),
    # Rows of these solvers, with the originals' own formulas for plain torch; the rest are random rows.
    "ddpm": replace(_GUIDED, learned_variance=True, noise_source="tensor"),
    "ddim": replace(_GUIDED, noise_source="none"),
}
_SCALE, _STEPS, _ROW = 3.0, 50, 20

# The kernels' exponential and torch's may each be 2 ulp off: up to 4 at the largest value, and a rounding.
LEARNED_ULP, LEARNED_ULP_ROUNDED = 5.0, 1.0


@dataclass(frozen=True, eq=False)
class Case:
    """The inputs of a row of a table (float64 [R + 1, columns]) for an option set and a model's dtype: the model's
    output in that dtype, and further buffers by name, float32 on the CPU. `schedule` is that of ddpm and ddim."""

    options: str
    dtype: torch.dtype
    schedule: Schedule | None
    table: Tensor
    row: int
    output: Tensor
    tensors: dict[str, Tensor]

    @property
    def spec(self) -> StepSpec:
        """Which terms exist."""
        return OPTIONS[self.options]

    def buffers(self, state: torch.dtype, model: torch.dtype, device: torch.device) -> StepBuffers:
        """Fresh buffers in a state's and a model's dtype."""
        x, rows = self.tensors["x"], self.spec.branches * len(self.tensors["x"])
        placed = {n: v.to(device, state if v.is_floating_point() else None, copy=True) for n, v in self.tensors.items()}
        counter = torch.tensor([self.row, 0], dtype=torch.int32, device=device)
        x0 = torch.full(x.shape, torch.nan, dtype=state, device=device) if self.spec.keep_x0 else None
        model_input = torch.full((rows, *x.shape[1:]), torch.nan, dtype=model, device=device)
        placed |= {"time": torch.zeros(rows, device=device), "model_input": model_input}
        return StepBuffers(table=self.table.to(device, state), counter=counter, x0=x0, **placed)

    def written(self, buffers: StepBuffers) -> dict[str, Tensor]:
        """The buffers that a step writes, by name."""
        history = None if buffers.history is None else buffers.history[: self.spec.history]
        written = {"x": buffers.x, "model_input": buffers.model_input, "x0": buffers.x0, "history": history}
        return {name: tensor for name, tensor in written.items() if tensor is not None}

    def plain(self) -> dict[str, Tensor]:
        """The same by plain torch."""
        given, spec, row = self.tensors, self.spec, self.table[self.row].float().tolist()
        x, noise = given["x"], given["noise"]
        if spec.noise_source == "philox":
            noise = philox_normal(given["seeds"], x.shape[1:], row=self.row)
        if self.schedule is not None:
            found = {"x": original_row(self.schedule, self.options, x, self.output, self.row, _SCALE, noise)}
        else:
            history = given["history"][: spec.history] if spec.history else ()
            weights = given["weights"][self.row]
            terms: dict[str, Any] = {"weights": weights, "noise": noise, "history": history}
            found = plain_row(row, x, self.output, spec, bound=given["bound"], gradient=given["gradient"], **terms)
            if spec.history:
                slot = int(row[COLUMNS.index("slot")])
                found["history"] = torch.stack([found["saved"] if j == slot else h for j, h in enumerate(history)])
        c_in = float(self.table[self.row + 1, COLUMNS.index("c_in")])
        found["model_input"] = (c_in * found["x"]).to(self.dtype).repeat(spec.branches, *[1] * (x.ndim - 1))
        return found


def make_case(options: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Case:
    """Seeded random inputs: the same on every machine."""
    spec, (batch, channels, *rest) = OPTIONS[options], shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {options} {dtype} {shape}".encode()))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    schedule = None
    if options in ("ddpm", "ddim"):
        schedule, row = Schedule.named("squaredcos_cap_v2").respace(_STEPS), _ROW
        table = (solvers.ddpm(schedule) if options == "ddpm" else solvers.ddim(schedule)).on("cpu", torch.float64)
        weights, bound = torch.tensor([_SCALE, 0.0]).expand(_STEPS, batch, 2).contiguous(), torch.ones(batch)
    else:
        table, row = normal(5, len(DEVICE_COLUMNS)).double(), 1
        table[:, len(COLUMNS) :] *= 2.0**-25  # as rounding leaves it
        table[:, COLUMNS.index("s")].abs_()
        table[:, COLUMNS.index("slot")] = torch.tensor([0.0, 2, 1, -1, -1])
        weights, bound = normal(4, batch, spec.branches), normal(batch).abs() + 0.1
    tensors = {"x": normal(*shape), "weights": weights, "bound": bound, "noise": normal(*shape)}
    tensors |= {"gradient": normal(*shape), "seeds": sample_seeds(seed + 2**40, batch)}
    if spec.history:
        tensors["history"] = normal(spec.history + 1, *shape)
    output = normal(spec.branches * batch, 2 * channels, *rest).to(dtype)
    return Case(options, dtype, schedule, table, row, output, tensors)


def grid(backend: str, quick: bool, device: torch.device) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Option sets, dtypes and shapes for a backend. Inductor compiles each for seconds: it varies one at a time."""
    small = quick or (backend == "triton" and device.type == "cpu")
    shapes = SMALL_SHAPES if small else SHAPES
    if backend == "inductor":
        if quick:
            return [("cfg", torch.float32, shapes[0])]
        one_by_one = [(options, torch.float32, shapes[0]) for options in OPTIONS]
        one_by_one += [("cfg", dtype, shapes[0]) for dtype in DTYPES[1:]]
        return one_by_one + [("cfg", torch.float32, shape) for shape in shapes[1:]]
    dtypes: Sequence[torch.dtype] = DTYPES
    if backend == "triton" and device.type == "cpu" and interpreting():
        # Triton's interpreter drops the low half of a float32 where a GPU rounds to bfloat16.
        dtypes = (torch.float32, torch.float16)
    return list(product(OPTIONS, dtypes, shapes))


def check_step(case: Case, backend: str, device: torch.device) -> Iterator[Finding]:
    """Run one step with a backend, with the reference on the CPU, in float64, and in plain torch."""
    cpu, spec = torch.device("cpu"), case.spec
    ours = case.buffers(torch.float32, case.dtype, device)
    reference = case.buffers(torch.float32, case.dtype, cpu)
    exact = case.buffers(torch.float64, torch.float64, cpu)
    GuidedStep(spec, ours, backend)(case.output.to(device))
    ReferenceStep(spec, reference)(case.output)
    ReferenceStep(spec, exact)(case.output.double())
    # A step that ends at another row than the reference is wrong, whatever its numbers.
    advanced = torch.equal(ours.counter.cpu(), reference.counter)
    advanced = advanced and torch.equal(ours.time.cpu(), reference.time)  # type: ignore[arg-type, union-attr]
    expected, truth, plain = case.written(reference), case.written(exact), case.plain()
    for name, got in case.written(ours).items():
        allowed = 0.0
        if spec.learned_variance and name in ("x", "model_input") and advanced:
            allowed = LEARNED_ULP if got.dtype == torch.float32 else LEARNED_ULP_ROUNDED
        shape = tuple(case.tensors["x"].shape)
        finding = Finding("step", backend, dtype_name(case.dtype), case.options, "eager", shape, name)
        finding = finding.against(got, expected[name], allowed)
        if not advanced:
            finding = replace(finding, bitwise=False, note="counter or time is wrong")
        yield replace(finding, error=measure(got, truth[name]), torch=measure(plain[name], truth[name]))


def check_noise(backend: str, shape: tuple[int, ...], device: torch.device, seed: int) -> Iterator[Finding]:
    """A backend's noise, at the start and in a step, against `fastcfg.reference.philox` on the CPU, bit for bit."""
    seeds = sample_seeds(seed + 2**63 - 2, shape[0])
    start = initial_noise(torch.empty(shape, device=device), seeds.to(device), backend)
    table = torch.zeros(4, len(DEVICE_COLUMNS), device=device)
    table[:, COLUMNS.index("s")] = 1
    counter = torch.tensor([2, 0], dtype=torch.int32, device=device)
    buffers = StepBuffers(torch.zeros(shape, device=device), table, counter, seeds=seeds.to(device))
    GuidedStep(StepSpec(noise_source="philox"), buffers, backend)(torch.zeros(shape, device=device))
    finding = Finding("noise", backend, "float32", "philox, start", "eager", shape, "x")
    yield finding.against(start, philox_normal(seeds, shape[1:], stream=INITIAL_STREAM), 0.0)
    finding = replace(finding, options="philox, step")
    yield finding.against(buffers.x, philox_normal(seeds, shape[1:], row=2), 0.0)


def check_steps(backends: Sequence[str], device: torch.device, quick: bool, seed: int, progress: Any) -> list[Finding]:
    """Steps and noise by every backend of fastcfg on a device: with `quick` in fewer and smaller cases, with inputs of
    a seed. `progress` wraps the list of cases, as tqdm does."""
    cases = [(backend, *case) for backend in backends for case in grid(backend, quick, device)]
    found: list[Finding] = []
    for backend in (backend for backend in backends if not (quick and backend == "inductor")):
        found += check_noise(backend, SMALL_SHAPES[1], device, seed)
    for backend, options, dtype, shape in progress(cases, desc="steps"):
        found += check_step(make_case(options, dtype, shape, seed), backend, device)
    return found
