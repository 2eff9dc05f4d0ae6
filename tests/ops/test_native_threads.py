"""Threads of the native kernels: the same bits by any number of them, none for small states, and none lost in forks."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import ROOT
from torch import Tensor

from fastcfg.ops.extension import native_problem
from fastcfg.ops.native import LARGE, NativeStep, native_normal
from fastcfg.reference import ReferenceStep
from fastcfg.reference.philox import philox_normal, sample_seeds
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS

CPU = torch.device("cpu")
built = pytest.mark.skipif(bool(native_problem(CPU)), reason=native_problem(CPU))
pytestmark = built
SHAPES = [(1, 3, 5, LARGE // 12), (5, 1, LARGE // 4 + 1), (LARGE // 2, 2)]
SPEC = StepSpec(branches=2, base=1, clip=True, noise_source="philox")


def build(shape: tuple[int, ...], seed: int = 0) -> tuple[StepBuffers, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(3, *shape, generator=generator)
    table = torch.randn(2, len(DEVICE_COLUMNS), generator=generator)
    buffers = StepBuffers(
        numbers[0],
        table,
        torch.zeros(2, dtype=torch.int32),
        weights=torch.randn(1, len(numbers[0]), 2, generator=generator),
        bound=torch.ones(len(numbers[0])),
        seeds=sample_seeds(seed, len(numbers[0])),
    )
    return buffers, numbers[1:].flatten(0, 1)


def stepped(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    buffers, outputs = build(shape, seed)
    NativeStep(SPEC, buffers)(outputs)
    return buffers.x


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads_gives_the_bits_of_the_reference(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, outputs = build(shape)
    ReferenceStep(SPEC, buffers)(outputs)
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(stepped(shape).view(torch.int32), buffers.x.view(torch.int32))


@pytest.mark.parametrize("size", [LARGE // 2 - 1, LARGE // 2, LARGE + 1])
def test_any_number_of_threads_draws_the_same_noise(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = sample_seeds(3, 2)
    want = philox_normal(seeds, (size,), row=5)
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(native_normal(torch.full((2, size), math.nan), seeds, row=5), want)


def test_callers_beside_each_other_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # Long enough to overlap.
    shape = (4, LARGE)
    want = [stepped(shape, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(30):
            for got, expected in zip(pool.map(lambda seed: stepped(shape, seed), range(3)), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_threads_are_started_once_for_large_states_and_again_in_a_fork() -> None:
    code = """
        import os, signal, torch
        from test_native_threads import LARGE, SPEC, NativeStep, build, stepped

        def threads():
            return len(os.listdir("/proc/self/task"))

        # torch's own operations start no threads here.
        torch.set_num_threads(1)
        torch.get_num_threads = lambda: 3
        before = threads()
        stepped((1, 2, LARGE // 2 - 1))
        assert threads() == before, "a small state has threads"
        want = stepped((2, LARGE))
        assert threads() == before + 2, (before, threads())
        assert torch.equal(stepped((2, LARGE)), want)
        assert threads() == before + 2, "each step has threads of its own"
        child = os.fork()
        if not child:
            signal.alarm(20)
            alone = threads()
            is_same = torch.equal(stepped((2, LARGE)), want)
            os._exit(0 if is_same and threads() == alone + 2 else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child failed or hung"
        assert torch.equal(stepped((2, LARGE)), want)

        small, outputs = build((2, 2 * LARGE))
        small.table *= 1e-39
        start = small.x.clone()
        torch.set_flush_denormal(True)
        # Some of the times the threads are awake before the caller has done all.
        for _ in range(20):
            small.x.copy_(start)
            small.counter.zero_()
            NativeStep(SPEC, small)(outputs)
            # Comparisons take denormals for zero.
            assert not (small.x.view(torch.int32) & 0x7FFFFFFF).any(), "the threads do not flush denormals"
    """
    run_python(code)


def run_python(code: str) -> None:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
