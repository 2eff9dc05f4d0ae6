"""The public operations: choice of backend, every refusal, and the step's two backends against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.native import CPU_BACKEND
from torch import Tensor

from fastcfg import ops
from fastcfg.ops import GuidedStep, backend, extension, initial_noise, is_channels_last, resolve_backend, triton_problem
from fastcfg.reference.philox import philox_normal, sample_seeds
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 3, 5, 7)
ROWS = 4

kernels = pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs a GPU or the Triton interpreter")


def make_buffers(spec: StepSpec, dtype: torch.dtype = torch.float32, **changes: Any) -> StepBuffers:
    """Buffers for `spec` with random contents, equal at every call; `changes` replace some."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    table = normal(ROWS + 1, len(DEVICE_COLUMNS))
    table[:, COLUMNS.index("slot")] = torch.tensor([0.0, 1.0, -1.0, 0.0, -1.0])
    buffers = StepBuffers(
        x=normal(*SHAPE),
        table=table,
        counter=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        weights=normal(ROWS, SHAPE[0], spec.branches + spec.momentum),
        bound=torch.tensor([0.5, 1.0], dtype=dtype, device=DEVICE),
        noise=normal(*SHAPE),
        seeds=torch.tensor([3, -4], device=DEVICE),
        history=normal(spec.history + 1, *SHAPE),
        gradient=normal(*SHAPE),
        momentum=normal(*SHAPE),
        x0=normal(*SHAPE),
        model_input=torch.zeros((4, *SHAPE[1:]), device=DEVICE),
        time=torch.zeros(4, dtype=torch.int64, device=DEVICE),
    )
    return replace(buffers, **changes)


# The choice of backend.


def test_auto_on_a_cpu_is_never_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert resolve_backend("auto", "cpu") == CPU_BACKEND
        assert resolve_backend("auto", "cpu", torch.float64) == "reference"
        assert resolve_backend("reference", "cpu") == "reference"


@pytest.mark.parametrize(("sets", "machine"), [((), "x86_64"), (("baseline",), "x86_64"), (("baseline",), "aarch64")])
def test_auto_on_a_cpu_is_native_where_that_pays(
    sets: tuple[str, ...], machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "instruction_sets", lambda: sets)
    monkeypatch.setattr(extension.platform, "machine", lambda: machine)
    assert resolve_backend("auto", "cpu") == ("native" if machine == "aarch64" else "reference")
    assert resolve_backend("auto", "cpu", backends=("auto", "triton", "reference")) == "reference"


def test_auto_on_a_gpu_is_triton_for_a_float32_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    assert resolve_backend("auto", "cuda:0") == "triton"
    assert resolve_backend("auto", torch.device("cuda"), torch.float64) == "reference"
    assert resolve_backend("reference", "cuda") == "reference"
    assert resolve_backend("auto", "meta") == "reference"


@pytest.mark.parametrize("value", ["", "0", None])
def test_triton_on_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu") == "triton"
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: the device is a CPU"):
        resolve_backend("triton", "cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float64, "the state is torch.float64"),
        ("xpu", torch.float32, "no kernels for device type 'xpu'"),
    ],
)
def test_triton_asked_for_where_it_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    with pytest.raises(ValueError, match=reason):
        resolve_backend("triton", device, dtype)
    assert resolve_backend("auto", device, dtype) == "reference"


def test_without_the_package_triton_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert resolve_backend("auto", "cuda") == "reference"
    with pytest.raises(ValueError, match="the package triton is not installed"):
        resolve_backend("triton", "cuda")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend: got 'fast', expected one of auto, triton, inductor, native, reference"
    ):
        resolve_backend("fast", "cpu")


# Layouts.


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_is_channels_last(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    last = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    assert is_channels_last(last)
    assert not is_channels_last(tensor)
    assert not is_channels_last(last[:, :-1])
    assert not is_channels_last(last.transpose(0, 1))


def test_is_channels_last_agrees_with_torch_on_images() -> None:
    tensor = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert is_channels_last(tensor)
    assert is_channels_last(torch.zeros(2, 1, 4, 5))
    assert not is_channels_last(torch.zeros(2, 3))


# The starting noise.


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 1000), (3,)])
@kernels
def test_initial_noise_is_the_same_on_both_backends(shape: tuple[int, ...]) -> None:
    seeds = sample_seeds([0, -1, 2**40], 3).to(DEVICE)
    got, want = (initial_noise(torch.empty(shape, device=DEVICE), seeds, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got, want)
    assert torch.equal(got, philox_normal(seeds, shape[1:], row=0, stream=0))


def test_initial_noise_of_a_sample_depends_on_its_seed_alone() -> None:
    together = initial_noise(torch.empty(3, 3, 5, 7), torch.tensor([5, 6, 7]))
    alone = initial_noise(torch.empty(1, 3, 5, 7), torch.tensor([6]))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_initial_noise_fills_the_given_tensor() -> None:
    out = torch.zeros(2, 3, 4)
    assert initial_noise(out, torch.tensor([0, 1])) is out
    assert out.all()


@pytest.mark.parametrize(
    ("out", "seeds", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0).long(), r"out: got shape \(0, 3\), expected \[B, ...\]"),
        (torch.zeros(()), torch.zeros(1).long(), r"out: got shape \(\)"),
        (torch.zeros(2, 3).double(), torch.zeros(2).long(), "out: got torch.float64"),
        (torch.zeros(2, 6)[:, ::2], torch.zeros(2).long(), "out: got .* expected contiguous"),
        (
            torch.zeros(2, 3),
            torch.zeros(3).long(),
            r"seeds: got torch.int64 \(3,\) on cpu, expected torch.int64 \(2,\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2).int(), "seeds: got torch.int32"),
        (torch.zeros(2, 3), torch.zeros(2).long().to("meta"), "seeds: got .* on meta, expected .* on cpu"),
        (torch.zeros(2, 3), torch.zeros(4).long()[::2], "seeds: got non-contiguous"),
    ],
)
def test_initial_noise_refuses(out: Tensor, seeds: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initial_noise(out, seeds)


# What GuidedStep refuses.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": 0}, "spec.branches: got 0, expected an integer of at least 1"),
        ({"base": 2}, "spec.base: got 2, expected a branch index below 2"),
        ({"base": -1}, "spec.base: got -1"),
        ({"conditional": 2}, "spec.conditional: got 2"),
        ({"unconditional": 5}, "spec.unconditional: got 5"),
        ({"scaled": True}, "spec: got scaled without a base"),
        ({"branches": 1, "momentum": True}, "spec: got .* momentum without branches"),
        ({"history": 4}, r"spec.history: got 4, expected 0 \.\.\. 3"),
        ({"history": -1}, "spec.history: got -1"),
        ({"saves_states": True}, "spec.saves_states: got True without history"),
        ({"rescale": True}, "spec.rescale: got True without clip"),
        ({"predict_x0": False}, "spec.predict_x0: got False, expected True"),
        ({"predict_x0": False, "raw_output": True, "clip": True}, "spec.predict_x0: got False"),
        ({"noise_source": "gaussian"}, "spec.noise_source: got 'gaussian', expected one of none, tensor, philox"),
        ({"learned_variance": True}, "spec.noise_source: got 'none' with learned_variance"),
    ],
)
def test_a_bad_spec_is_refused(changes: dict[str, Any], message: str) -> None:
    spec = StepSpec(branches=2)
    with pytest.raises(ValueError, match=message):
        GuidedStep(replace(spec, **changes), make_buffers(spec))


FULL = StepSpec(branches=2, base=1, gradient=True, history=2, clip=True, noise_source="tensor", keep_x0=True)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", zeros(2), r"x: got shape \(2,\), expected \[B, C, ...\]"),
        ("x", zeros(0, 3, 5, 7), r"x: got shape \(0, 3, 5, 7\)"),
        ("x", zeros(*SHAPE, dtype=torch.float16), "x: got torch.float16"),
        ("x", zeros(*SHAPE).mT.contiguous().mT, "x: got torch.float32 with strides .* expected contiguous"),
        ("x", torch.zeros(SHAPE, device="meta"), "table: got .* expected .* on meta"),
        ("table", zeros(ROWS + 1, 5), r"table: got torch.float32 \(5, 5\)"),
        ("table", zeros(ROWS + 1, len(DEVICE_COLUMNS), dtype=torch.float64), "table: got torch.float64"),
        ("table", zeros(len(DEVICE_COLUMNS), ROWS + 1).T, "table: got non-contiguous"),
        ("counter", zeros(2, dtype=torch.int64), "counter: got torch.int64"),
        ("counter", zeros(1, dtype=torch.int32), r"counter: got torch.int32 \(1,\)"),
        ("weights", None, r"weights: got None, expected torch.float32 \(4, 2, 2\)"),
        ("weights", zeros(ROWS, 2, 3), r"weights: got torch.float32 \(4, 2, 3\)"),
        ("weights", zeros(ROWS, 2, 2, dtype=torch.float16), "weights: got torch.float16"),
        ("weights", torch.zeros(ROWS, 2, 2, device="meta"), "weights: got .* on meta"),
        ("bound", None, "bound: got None"),
        ("bound", zeros(1), r"bound: got torch.float32 \(1,\)"),
        ("noise", None, "noise: got None"),
        ("noise", zeros(2, 3, 5, 6), "noise: got torch.float32"),
        ("noise", zeros(*SHAPE, dtype=torch.bfloat16), "noise: got torch.bfloat16"),
        ("history", None, "history: got None"),
        ("history", zeros(2, *SHAPE), r"history: got torch.float32 \(2, .* expected torch.float32 \(3, "),
        ("gradient", None, "gradient: got None"),
        ("gradient", zeros(2, 3, 5, 6), "gradient: got torch.float32"),
        ("x0", None, "x0: got None"),
        ("x0", zeros(*SHAPE).to(memory_format=torch.channels_last), "x0: got non-contiguous"),
        ("model_input", zeros(3, *SHAPE[1:]), r"model_input: got \(3, 3, 5, 7\) .* expected \[S\*2, 3, 5, 7\]"),
        ("model_input", zeros(0, *SHAPE[1:]), r"model_input: got \(0, "),
        ("model_input", zeros(4, 3, 5, 6), r"model_input: got \(4, 3, 5, 6\)"),
        ("model_input", zeros(4, *SHAPE[1:], dtype=torch.int64), "model_input: got torch.int64, expected a floating"),
        ("model_input", zeros(4, *SHAPE[1:]).mT.contiguous().mT, "model_input: got strides"),
        ("model_input", torch.zeros(4, *SHAPE[1:], device="meta"), "model_input: got .* on meta"),
        ("time", None, r"time: got None, expected \[4\]"),
        ("time", zeros(2, dtype=torch.int64), r"time: got \(\(2,\)"),
        ("time", zeros(8, dtype=torch.int64)[::2], "time: got"),
        ("time", zeros(4, dtype=torch.int32), "time: got torch.int32, expected torch.int64 or a floating dtype"),
        ("time", torch.zeros(4, device="meta"), "time: got .*meta"),
    ],
)
def test_bad_buffers_are_refused(name: str, value: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedStep(FULL, make_buffers(FULL, **{name: value}))


@pytest.mark.parametrize(
    ("by", "weights", "message"),
    [
        (
            "channel",
            zeros(ROWS, 2, 2),
            r"weights: got torch.float32 \(4, 2, 2\) .* expected torch.float32 \(4, 2, 2, 3\)",
        ),
        ("channel", zeros(1, 2, 2, 3), r"weights: got torch.float32 \(1, 2, 2, 3\)"),
        ("element", zeros(ROWS, 2, 2, 3), r"weights: got .* expected torch.float32 \(4, 2, 2, 3, 5, 7\)"),
        ("element", zeros(1, 1, 2, *SHAPE[1:]).expand(ROWS, 2, -1, -1, -1, -1), r"weights: got non-contiguous"),
        ("element", None, "weights: got None"),
    ],
)
def test_weights_by_place_are_of_that_shape(by: str, weights: Tensor | None, message: str) -> None:
    spec = StepSpec(2, 1, weights_by=by, clip=True)
    with pytest.raises(ValueError, match=message):
        GuidedStep(spec, make_buffers(spec, weights=weights))


@pytest.mark.parametrize(
    "spec",
    [
        StepSpec(weights_by="channel"),
        StepSpec(2, 1, weights_by="element", scaled=True),
        StepSpec(2, 1, weights_by="element", momentum=True),
        StepSpec(2, 1, weights_by="pixel"),
    ],
)
def test_weights_by_place_are_of_plain_blends(spec: StepSpec) -> None:
    with pytest.raises(
        ValueError, match=r"spec.weights_by: got '\w+', expected|weights_by: got 'pixel', expected one of"
    ):
        GuidedStep(spec, make_buffers(spec))


def test_seeds_are_checked_where_the_step_draws() -> None:
    spec = replace(FULL, noise_source="philox")
    GuidedStep(spec, make_buffers(spec, noise=None))
    for seeds, message in ((None, "seeds: got None"), (zeros(2), "seeds: got torch.float32")):
        with pytest.raises(ValueError, match=message):
            GuidedStep(spec, make_buffers(spec, seeds=seeds))


def test_buffers_that_no_term_needs_may_be_absent() -> None:
    spec = StepSpec()
    absent = dict.fromkeys(("weights", "bound", "noise", "seeds", "history", "gradient", "x0", "model_input", "time"))
    GuidedStep(spec, make_buffers(spec, **absent))(zeros(*SHAPE))


OUTPUT = (4, *SHAPE[1:])
WIDE = (4, 6, *SHAPE[2:])


@pytest.mark.parametrize(
    ("learned", "output", "message"),
    [
        (
            False,
            zeros(2, 3, 5, 7),
            r"model output: got shape \(2, 3, 5, 7\), expected \(4, 3, 5, 7\) or \(4, 6, 5, 7\)",
        ),
        (False, zeros(4, 4, 5, 7), r"model output: got shape \(4, 4, 5, 7\)"),
        (False, zeros(4, 3, 5, 7, 1), "model output: got shape"),
        (True, zeros(*OUTPUT), r"expected \(4, 6, 5, 7\) \(the solver uses learned variances\)"),
        (False, zeros(*OUTPUT, dtype=torch.int32), "model output: got torch.int32, expected a floating dtype"),
        (False, zeros(*OUTPUT, dtype=torch.float64), "model output: got torch.float64, expected a floating dtype no"),
        (False, torch.zeros(OUTPUT, device="meta"), "model output: got device meta, expected"),
    ],
)
def test_bad_model_output_is_refused_and_nothing_moves(learned: bool, output: Tensor, message: str) -> None:
    buffers = make_buffers(FULL)
    before = buffers.x.clone()
    step = GuidedStep(replace(FULL, learned_variance=learned), buffers)
    with pytest.raises(ValueError, match=message):
        step(output)
    assert torch.equal(buffers.x, before)
    assert int(buffers.counter[0]) == 0


def test_a_model_output_is_checked_again_when_it_changes() -> None:
    step = GuidedStep(FULL, make_buffers(FULL))
    step(zeros(*OUTPUT))
    step(zeros(*WIDE))
    with pytest.raises(ValueError, match=r"model output: got torch\.float64"):
        step(zeros(*WIDE, dtype=torch.float64))


def test_an_explicit_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StepSpec()
    with pytest.raises(ValueError, match=r"the state is torch\.float64"):
        GuidedStep(spec, make_buffers(spec, torch.float64), backend="triton")
    assert GuidedStep(spec, make_buffers(spec, torch.float64)).backend == "reference"


# The step on its two backends.


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


CASES: dict[str, tuple[StepSpec, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "cfg with clip, in-kernel noise, channels-last half-precision model": (
        StepSpec(branches=2, base=1, clip=True, noise_source="philox", keep_x0=True),
        {"model_input": channels_last(zeros(4, *SHAPE[1:], dtype=torch.float16)), "time": zeros(4)},
        lambda output: channels_last(output.half()),
    ),
    "no x0, one saved tensor": (
        StepSpec(branches=2, base=1, raw_output=True, predict_x0=False, history=1, noise_source="philox"),
        {},
        torch.Tensor.contiguous,
    ),
    "weighted sum of three with history, raw output, CFG++ and given noise": (
        StepSpec(3, unconditional=2, raw_output=True, history=2, clip=True, rescale=True, noise_source="tensor"),
        {},
        strided,
    ),
}


@kernels
@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_same_on_both_backends(case: str) -> None:
    spec, changes, convert = CASES[case]
    runs = {}
    for name in ("triton", "reference"):
        buffers = make_buffers(spec, **{key: value.clone() for key, value in changes.items()})
        step = GuidedStep(spec, buffers, backend=name)
        assert step.backend == name
        for row in range(ROWS):
            output = torch.randn(spec.branches * 2, 6, *SHAPE[2:], generator=torch.Generator().manual_seed(row))
            step(convert(output.to(DEVICE)))
        assert int(buffers.counter[0]) == ROWS
        # The reference writes what a row does not save to the last slot.
        runs[name] = replace(buffers, history=buffers.history[:-1])
    for name, got in vars(runs["triton"]).items():
        assert got is None or torch.equal(got, getattr(runs["reference"], name)), name


def test_guided_step_is_one_call_of_the_step() -> None:
    first, second = make_buffers(FULL), make_buffers(FULL)
    GuidedStep(FULL, first)(zeros(*OUTPUT))
    ops.guided_step(zeros(*OUTPUT), FULL, second)
    assert torch.equal(first.x, second.x)
    assert int(second.counter[0]) == 1


@pytest.mark.parametrize("name", [pytest.param("triton", marks=kernels), "reference"])
def test_a_model_output_with_a_gradient_is_taken_without_it(name: str) -> None:
    buffers = make_buffers(FULL)
    GuidedStep(FULL, buffers, backend=name)(zeros(*OUTPUT).requires_grad_())
    assert not buffers.x.requires_grad


# Registration.


@pytest.mark.parametrize("name", [pytest.param("triton", marks=kernels), "reference"])
def test_a_compiled_step_gives_the_same_bits(name: str) -> None:
    spec = replace(FULL, noise_source="philox", learned_variance=True)
    eager, compiled = make_buffers(spec), make_buffers(spec)
    step, other = GuidedStep(spec, eager, backend=name), GuidedStep(spec, compiled, backend=name)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(output: Tensor) -> None:
        other(output * 2)

    for row in range(ROWS):
        output = torch.randn(WIDE, generator=torch.Generator().manual_seed(row)).to(DEVICE)
        step(output * 2)
        program(output)
    for key, want in vars(eager).items():
        assert want is None or torch.equal(getattr(compiled, key), want), key


@kernels
@pytest.mark.parametrize(
    "spec", [StepSpec(), replace(FULL, noise_source="philox", learned_variance=True, scaled=True, momentum=True)]
)
def test_the_registered_step_passes_opcheck(spec: StepSpec) -> None:
    buffers = make_buffers(spec)
    if spec == StepSpec():
        absent = dict.fromkeys(
            ("weights", "bound", "noise", "seeds", "history", "gradient", "momentum", "x0", "model_input", "time")
        )
        buffers = replace(buffers, **absent)
    recorded: list[tuple[Any, ...]] = []
    step = GuidedStep(spec, buffers, backend="triton")
    operation = torch.ops.fastcfg.guided_step.default
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcfg.ops.step._guided_step_op", lambda *arguments: recorded.append(arguments))
        patch.setenv("TRITON_INTERPRET", "1")
        step._dispatched(zeros(spec.branches * 2, 6, *SHAPE[2:]))
    torch.library.opcheck(operation, recorded[0])
