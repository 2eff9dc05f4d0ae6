"""`backend="native"`: the bits of the reference over every pair of options, on every instruction set of this CPU."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ROOT
from support.native_numbers import native_exp2

from fastcfg import CFG, Sampler, Schedule, ops, solvers
from fastcfg.ops import GuidedStep, Stepper, extension, instruction_sets, native_problem
from fastcfg.ops.native import NativeStep, has_native_step
from fastcfg.reference import ReferenceStep
from fastcfg.reference.philox import philox_normal
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS

CPU = torch.device("cpu")
built = pytest.mark.skipif(bool(native_problem(CPU)), reason=native_problem(CPU))


def _kernel_cases() -> Any:
    """The cases that the Triton kernel is tested with."""
    path = ROOT / "tests" / "kernels" / "test_guided_step.py"
    spec = importlib.util.spec_from_file_location("guided_step_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _kernel_cases()
CASES = cases.CASES


@pytest.fixture
def our_exp2(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Give the reference the kernels' exp2, which differs from torch's in the last places."""
    instructions = request.getfixturevalue("instructions")

    def exp2(tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result = native_exp2(tensor, instructions)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(torch, "exp2", exp2)


@built
@pytest.mark.usefixtures("our_exp2")
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("index", range(len(CASES)))
def test_two_steps_are_the_reference_bit_for_bit(index: int, instructions: str) -> None:
    spec, expected, outputs = cases.build(CASES[index], seed=index)
    guarded = cases.Guarded()
    buffers = cases.map_tensors(guarded.copy, expected)
    assert has_native_step(spec, buffers)
    step, native_step = ReferenceStep(spec, expected), NativeStep(spec, buffers, instructions)
    for output in outputs:
        cases.poison_outputs(expected)
        cases.poison_outputs(buffers)
        step(output)
        native_step(guarded.copy(output))
        cases.assert_same(buffers, expected)
    assert guarded.intact()


# Beside what the case says: channels-last tensors and weights by channel take a sample in planes.
LONG: dict[str, dict[str, Any]] = {
    "contiguous": {"noise": "tensor"},
    "drawn": {"noise": "philox"},
    "channels-last": {"noise": "philox", "output layout": "channels-last", "input layout": "channels-last"},
    "channels-last outputs": {"noise": "tensor", "output layout": "channels-last", "dtype": torch.bfloat16},
    "weights by channel": {"noise": "philox", "weights by": "channel", "dtype": torch.float16},
    "weights by element": {"noise": "none", "weights by": "element"},
    "learned variance": {"noise": "philox", "variance": "learned", "output channels": "2C"},
}


@built
@pytest.mark.usefixtures("our_exp2")
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("size", [511, 512, 513, 30001])
@pytest.mark.parametrize("kind", LONG)
def test_states_longer_than_a_block_have_the_same_bits(kind: str, size: int, instructions: str) -> None:
    case = {**cases.PLAIN, "history": (2, 1, 0), "clip": "bound per sample", "channels": 3, "spatial": (size,)}
    spec, expected, outputs = cases.build(case | LONG[kind], seed=3)
    buffers = cases.map_tensors(torch.Tensor.clone, expected)
    step, native_step = ReferenceStep(spec, expected), NativeStep(spec, buffers, instructions)
    for output in outputs:
        step(output)
        native_step(output)
        cases.assert_same(buffers, expected)


@built
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_read_elsewhere_may_have_half_the_bits(dtype: torch.dtype, instructions: str) -> None:
    case = {**cases.PLAIN, "noise": "tensor", "history": (1, 0, -1), "dtype": dtype, "channels": 3}
    spec, expected, outputs = cases.build(case, seed=4)
    for name in ("x", "x0", "noise"):
        setattr(expected, name, getattr(expected, name).to(dtype))
    expected.source = expected.x.clone()
    guarded = cases.Guarded()
    buffers = cases.map_tensors(guarded.copy, expected)
    assert has_native_step(spec, buffers)
    step, native_step = ReferenceStep(spec, expected), NativeStep(spec, buffers, instructions)
    for output in outputs:
        step(output)
        native_step(output)
        cases.assert_same(buffers, expected)
        # The caller moves on.
        expected.source, expected.noise = expected.x.clone(), expected.noise.flip(0)
        buffers.source, buffers.noise = guarded.copy(buffers.x), buffers.noise.flip(0)
    assert guarded.intact()


@built
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("bound", [0.5, math.nan])
@pytest.mark.parametrize(("clip", "rescale"), [("off", False), ("one bound", False), ("one bound", True)])
def test_nan_and_infinity_come_through(clip: str, rescale: bool, bound: float, instructions: str) -> None:
    spec, expected, (output, _) = cases.build({**cases.PLAIN, "clip": clip, "rescale": rescale}, seed=1)
    if expected.bound is not None:
        expected.bound[1] = bound
    expected.x[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    output[1, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    buffers = cases.map_tensors(torch.Tensor.clone, expected)
    ReferenceStep(spec, expected)(output)
    NativeStep(spec, buffers, instructions)(output)
    for name in ("x", "x0", "model_input"):
        got, want = getattr(buffers, name), getattr(expected, name)
        assert want.isnan().any(), name
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@built
def test_a_model_may_return_a_part_of_its_input() -> None:
    spec, expected, _ = cases.build({**cases.PLAIN, "slots": 3}, seed=5)
    buffers = cases.map_tensors(torch.Tensor.clone, expected)
    for used, step in ((expected, ReferenceStep(spec, expected)), (buffers, NativeStep(spec, buffers))):
        used.model_input.copy_(torch.arange(float(used.model_input.numel())).view_as(used.model_input))
        step(used.model_input[1:5])
    cases.assert_same(buffers, expected)


@built
def test_a_stepper_has_the_bits_of_the_reference() -> None:
    table, x = solvers.ddpm(Schedule.named("linear").respace(5), variance="fixed_small"), torch.randn(2, 3, 5, 7)
    samples = {}
    for backend in ("reference", "native"):
        stepper, sample = Stepper(table, like=x, clip=1.0, backend=backend), x
        generator = torch.Generator().manual_seed(0)
        for row in range(len(table)):
            output, noise = (torch.randn(x.shape, generator=generator) for _ in range(2))
            sample, x0 = stepper(row, output, sample, noise)
        samples[backend] = torch.stack([sample, x0])
    assert torch.equal(samples["native"], samples["reference"])


@built
@pytest.mark.parametrize("graph", [False, True])
def test_a_sampler_has_the_bits_of_the_reference(graph: bool) -> None:
    table, guidance = solvers.ddpm(Schedule.named("linear").respace(4), variance="fixed_small"), CFG(3.0)
    conditioning = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}}
    images = [
        Sampler(model, table, guidance=guidance, clip=1.0, noise_source="torch", backend=backend, graph=graph).sample(
            (2, 3, 4, 4), **conditioning, seed=1
        )
        for backend in ("reference", "native")
    ]
    assert torch.equal(*images)


def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


@built
@pytest.mark.parametrize("time", [torch.int64, torch.float32, torch.float64])
def test_a_model_may_take_its_time_in_any_common_dtype(time: torch.dtype) -> None:
    spec, expected, (output, _) = cases.build({**cases.PLAIN, "time": time}, seed=5)
    buffers = cases.map_tensors(torch.Tensor.clone, expected)
    assert has_native_step(spec, buffers)
    ReferenceStep(spec, expected)(output)
    NativeStep(spec, buffers)(output)
    assert torch.equal(buffers.time, expected.time)
    assert buffers.time.all()


@built
def test_outputs_of_eight_bits_are_converted_first() -> None:
    spec, expected, (output, _) = cases.build(cases.PLAIN, seed=5)
    output = output.to(torch.float8_e4m3fn)
    buffers = cases.map_tensors(torch.Tensor.clone, expected)
    ReferenceStep(spec, expected)(output)
    NativeStep(spec, buffers)(output)
    cases.assert_same(buffers, expected)


@built
@pytest.mark.parametrize(("name", "dtype"), [("model_input", torch.float64), ("time", torch.float16)])
def test_a_step_without_a_kernel_is_the_reference(name: str, dtype: torch.dtype) -> None:
    spec, buffers, (output, _) = cases.build(cases.PLAIN, seed=1)
    setattr(buffers, name, getattr(buffers, name).to(dtype))
    step = GuidedStep(spec, buffers, backend="native")
    assert step.backend == "reference"
    step(output)
    assert int(buffers.counter[0]) == 1


@built
def test_the_columns_are_those_of_the_table() -> None:
    header = (ROOT / "kernels" / "cpu" / "guided_step.h").read_text()
    names, *_ = re.findall(r"enum \{(.*?)\}", header, re.DOTALL)
    columns = [name.strip().lower() for name in names.split(",")]
    assert columns == [*DEVICE_COLUMNS, "width"]


@built
def test_addresses_and_sets_that_cannot_be_are_refused() -> None:
    module = extension.native_module()
    with pytest.raises(TypeError, match="got 1 arguments, expected 8"):
        module.guided_step(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        module.guided_step(9, b"", *[0] * 6)
    with pytest.raises(ValueError, match="plan: got 3 bytes, expected 312"):
        module.guided_step(0, b"abc", *[0] * 6)


@built
def test_the_environment_names_the_widest_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    every = ("baseline", "avx2")
    monkeypatch.setattr(extension, "native_module", lambda: SimpleNamespace(instruction_sets=lambda: list(every)))
    choose = instruction_sets.__wrapped__
    monkeypatch.delenv("FASTCFG_CPU", raising=False)
    assert choose() == every
    for name, chosen in {"": every, "baseline": ("baseline",), "avx2": every}.items():
        monkeypatch.setenv("FASTCFG_CPU", name)
        assert choose() == chosen
    for name, problem in {"avx512": "this CPU does not have it", "neon": "expected one of"}.items():
        monkeypatch.setenv("FASTCFG_CPU", name)
        with pytest.warns(UserWarning, match=f"FASTCFG_CPU: got '{name}': {problem}.*; the kernels use 'avx2'"):
            assert choose() == every


@built
@pytest.mark.parametrize("name", ["baseline", "sse9"])
def test_a_process_told_another_instruction_set_has_the_same_bits(name: str) -> None:
    code = """
        import torch
        from fastcfg.ops import instruction_sets
        from fastcfg.ops.native import native_normal
        print(instruction_sets()[-1], native_normal(torch.empty(1, 9), torch.zeros(1, dtype=torch.int64)).sum().item())
    """
    environment = {**os.environ, "FASTCFG_CPU": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    widest = extension.native_module().instruction_sets()[-1] if name == "sse9" else name
    want = philox_normal(torch.zeros(1, dtype=torch.int64), (9,)).sum().item()
    assert done.stdout.split() == [widest, str(want)]
    assert ("FASTCFG_CPU: got 'sse9': expected one of" in done.stderr) == (name == "sse9")


def test_without_the_extension_the_backend_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension, "instruction_sets", tuple)
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(ValueError, match=r"'native' cannot run here: .* there is no C compiler 'no-such-compiler'"):
        ops.resolve_backend("native", "cpu")
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(extension.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "headers are not installed" in native_problem(CPU)
    (tmp_path / "Python.h").touch()
    assert native_problem(CPU).endswith("not built: 'pip install .' in a checkout builds it")


def test_an_extension_of_other_sources_is_not_used(tmp_path: Path) -> None:
    built, source = tmp_path / "_native.so", tmp_path / "cpu" / "native.c"
    built.touch()
    assert not extension._is_old(built)
    source.parent.mkdir()
    source.touch()
    os.utime(source, (0, 0))
    assert not extension._is_old(built)
    os.utime(source, (2**32, 2**32))
    assert extension._is_old(built)


def test_other_devices_and_dtypes_are_refused() -> None:
    buffers = StepBuffers(torch.zeros(1, 1), torch.zeros(2, len(DEVICE_COLUMNS)), torch.zeros(2, dtype=torch.int32))
    assert has_native_step(StepSpec(), buffers)
    with pytest.raises(ValueError, match="a CPU's"):
        ops.resolve_backend("native", "cuda")
    with pytest.raises(ValueError, match="float64"):
        ops.resolve_backend("native", "cpu", torch.float64)
