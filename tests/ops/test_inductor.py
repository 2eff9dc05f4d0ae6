"""`backend="inductor"`: the bits of the reference, one compilation for a layout, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastcfg import CFG, Sampler, Schedule, ops
from fastcfg.clip import DynamicThreshold
from fastcfg.ops import GuidedStep, backend, extension, inductor_problem, resolve_backend
from fastcfg.ops.inductor import InductorStep
from fastcfg.solvers import ddpm
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

CPU = torch.device("cpu")
SHAPE = (2, 3, 5, 7)
ROWS = 4

compiled = pytest.mark.skipif(bool(inductor_problem(CPU)), reason=inductor_problem(CPU))
LEARNED = StepSpec(
    branches=2,
    base=1,
    scaled=True,
    momentum=True,
    learned_variance=True,
    clip=True,
    rescale=True,
    noise_source="tensor",
)


def make_buffers(spec: StepSpec, dtype: torch.dtype = torch.float32, **changes: Any) -> StepBuffers:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    table = normal(ROWS + 1, len(DEVICE_COLUMNS))
    table[:, COLUMNS.index("slot")] = torch.tensor([0.0, 1.0, -1.0, 0.0, -1.0])
    buffers = StepBuffers(
        x=normal(*SHAPE),
        table=table,
        counter=torch.zeros(2, dtype=torch.int32),
        weights=normal(ROWS, SHAPE[0], spec.branches + spec.momentum),
        bound=torch.tensor([0.5, 1.0], dtype=dtype),
        noise=normal(*SHAPE),
        seeds=torch.tensor([3, -4]),
        history=normal(spec.history + 1, *SHAPE),
        gradient=normal(*SHAPE),
        momentum=normal(*SHAPE),
        x0=normal(*SHAPE),
        model_input=torch.zeros(4, *SHAPE[1:], dtype=dtype),
        time=torch.zeros(4, dtype=torch.int64),
    )
    return replace(buffers, **changes)


def output_of(row: int, spec: StepSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(row)
    return torch.randn(spec.branches * SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], generator=generator).to(dtype)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def compilations() -> int:
    return counters["aot_autograd"]["total"]


# Every term of the step occurs; each case compiles, for seconds.
CASES: dict[str, tuple[StepSpec, torch.dtype, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "cfg, learned variance, clip, rescale, given noise": (LEARNED, torch.float32, {}, lambda output: output),
    "weighted sum of three, every other term, drawn noise, half-precision channels-last model": (
        StepSpec(
            branches=3, unconditional=2, raw_output=True, gradient=True, history=2, noise_source="philox", keep_x0=True
        ),
        torch.float32,
        {"model_input": channels_last(torch.zeros(4, *SHAPE[1:], dtype=torch.float16)), "time": torch.zeros(4)},
        lambda output: channels_last(output.half()),
    ),
    "a weight of every element's own": (
        StepSpec(branches=2, base=1, weights_by="element", clip=True),
        torch.float32,
        {"weights": torch.rand(ROWS, SHAPE[0], 2, *SHAPE[1:], generator=torch.Generator().manual_seed(1)) * 3},
        lambda output: output,
    ),
    "one branch in float64, nothing to write but x": (
        StepSpec(noise_source="tensor"),
        torch.float64,
        dict.fromkeys(("weights", "bound", "seeds", "history", "gradient", "momentum", "x0", "model_input", "time")),
        lambda output: output,
    ),
}


@compiled
@pytest.mark.parametrize("case", CASES)
def test_the_step_has_the_bits_of_the_reference_and_compiles_once(case: str) -> None:
    spec, dtype, changes, convert = CASES[case]
    runs = {}
    for name in ("reference", "inductor"):
        own = {key: None if value is None else value.clone() for key, value in changes.items()}
        buffers = make_buffers(spec, dtype, **own)
        step = GuidedStep(spec, buffers, backend=name)
        before, memory = compilations(), {key: v.data_ptr() for key, v in vars(buffers).items() if v is not None}
        for row in range(ROWS):
            step(convert(output_of(row, spec, dtype)))
            # Values of every kind change, and nothing is compiled in.
            for tensor in (buffers.noise, buffers.bound, buffers.weights, buffers.gradient, buffers.seeds):
                if tensor is not None:
                    tensor.mul_(2)
        assert compilations() - before == (name == "inductor")
        assert memory == {key: v.data_ptr() for key, v in vars(buffers).items() if v is not None}
        runs[name] = buffers
    assert int(runs["inductor"].counter[0]) == ROWS
    for name, want in vars(runs["reference"]).items():
        got = getattr(runs["inductor"], name)
        assert want is None or torch.equal(got, want), name


@compiled
def test_samplers_with_and_without_the_stand_in_share_one_compilation() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x * y.view(-1, 1, 1, 1), 0.1 * x], dim=1)

    table = ddpm(Schedule.named("linear").respace(3))
    conditioning = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}}
    before, images = compilations(), []
    for options in ({"backend": "reference"}, {"backend": "inductor"}, {"backend": "inductor", "graph": True}):
        sampler = Sampler(model, table, guidance=CFG(3.0), clip=1.0, noise_source="torch", **options)
        for scale in (3.0, 1.5):
            sampler.guidance = CFG(scale)
            images.append(sampler.sample((2, 3, 4, 4), **conditioning, seed=int(scale)))
    assert sampler.report()["graph"] == "stand-in"
    assert compilations() - before == 1
    for got, want in zip(images[2:], images[:2] * 2, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(images[0], images[1])


def test_under_torch_compile_the_step_becomes_part_of_the_program() -> None:
    spec = replace(LEARNED, noise_source="philox")
    eager, traced = make_buffers(spec), make_buffers(spec)
    step, other = GuidedStep(spec, eager, "reference"), InductorStep(spec, traced)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(output: Tensor) -> None:
        other(output * 2)

    for row in range(2):
        step(output_of(row, spec) * 2)
        program(output_of(row, spec))
    for name, want in vars(eager).items():
        if isinstance(want, Tensor):
            assert torch.equal(getattr(traced, name), want), name


class Compiled:
    """Stands for `_compile`: keeps what it was asked for and what the result was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.outputs: list[Tensor] = []
        monkeypatch.setattr("fastcfg.ops.inductor._compile", self)

    def __call__(self, *arguments: Any) -> Callable[..., None]:
        self.asked.append(arguments)
        return lambda output, *_: self.outputs.append(output)


def test_a_step_asks_again_for_another_layout_or_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    record, threads = Compiled(monkeypatch), torch.get_num_threads()
    step, output = InductorStep(LEARNED, make_buffers(LEARNED)), output_of(0, LEARNED)
    try:
        for count, call in enumerate(
            (
                lambda: step(output),
                lambda: step(channels_last(output)),
                lambda: step(output.half()),
                lambda: torch.set_num_threads(threads + 1),
            ),
            start=1,
        ):
            call()
            step(output if count == 4 else record.outputs[-1].clone())
            assert len(record.asked) == count
    finally:
        torch.set_num_threads(threads)
    assert len(set(record.asked)) == 4


def test_an_output_that_is_the_model_input_is_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    record, spec = Compiled(monkeypatch), StepSpec(branches=2, base=1)
    buffers = make_buffers(spec)
    step = InductorStep(spec, buffers)
    buffers.model_input.normal_()
    own = torch.zeros_like(buffers.model_input)
    step(buffers.model_input)
    step(own)
    assert torch.equal(record.outputs[0], buffers.model_input)
    assert record.outputs[0].data_ptr() != buffers.model_input.data_ptr()
    assert record.outputs[1] is own


# What it needs.


@pytest.fixture
def no_cache() -> Any:
    backend._cpp_problem.cache_clear()
    yield
    backend._cpp_problem.cache_clear()


def test_without_a_compiler_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, no_cache: None) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    message = r"backend: 'inductor' cannot run here: Inductor finds no C\+\+ compiler"
    with pytest.raises(ValueError, match=message):
        GuidedStep(LEARNED, make_buffers(LEARNED), "inductor")
    with pytest.raises(ValueError, match=message):
        Sampler(lambda x, t: x, ddpm(Schedule.named("linear").respace(3)), backend="inductor")


def test_without_pythons_headers_it_is_refused(monkeypatch: pytest.MonkeyPatch, no_cache: None, tmp_path: Any) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="Python's C headers are not installed"):
        resolve_backend("inductor", "cpu")
    backend._cpp_problem.cache_clear()
    (tmp_path / "Python.h").touch()
    assert resolve_backend("inductor", "cpu") == "inductor"


def test_on_other_devices_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="the package triton, with which Inductor compiles for GPUs, is not installed"):
        resolve_backend("inductor", "cuda")
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    assert resolve_backend("inductor", "cuda", torch.float64) == "inductor"
    with pytest.raises(ValueError, match="no code generator for device type 'xpu'"):
        resolve_backend("inductor", "xpu")


def test_the_pieces_have_no_such_backend() -> None:
    output = torch.zeros(2, 6, 4, 4)
    for call in (
        lambda: ops.split_model_output(output, 3, backend="inductor"),
        lambda: ops.dynamic_threshold(output, backend="inductor"),
        lambda: ops.quantile_bound(output, backend="inductor"),
    ):
        expected = "backend: got 'inductor', expected one of auto, triton, native, reference"
        with pytest.raises(ValueError, match=expected):
            call()


@compiled
def test_the_bound_of_dynamic_thresholding_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcfg.ops.threshold._launch_step_bound", lambda *_: pytest.fail("the kernel was launched"))
    spec, found = StepSpec(branches=2, base=1), []
    for name in ("reference", "inductor"):
        buffers = make_buffers(spec)
        ops.QuantileBound(DynamicThreshold(0.9), spec, buffers, name)(output_of(0, spec))
        found.append(buffers.bound)
    assert torch.equal(*found)
