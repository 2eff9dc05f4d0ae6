"""Programs watched, recorded and held against their recordings."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcfg.engine.graphs import (
    CaptureError,
    CudaGraph,
    Examined,
    Opaque,
    Pool,
    StandIn,
    compare,
    examine,
    is_compiled,
    streams,
)
from fastcfg.engine.graphs import cuda as cuda_module
from fastcfg.engine.graphs.stand_in import _THREAD
from fastcfg.engine.graphs.trace import DispatchMode, copied_operands

pytestmark = pytest.mark.quick

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Rig:
    """A model between static buffers: x becomes model(x, t)."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], device: str = "cpu") -> None:
        self.model, self.device = model, torch.device(device)
        self.x = torch.zeros(2, 6, device=device)
        self.t = torch.zeros(2, device=device)

    def begin(self, t: float = 1.0) -> None:
        if self.device.type != "meta":
            self.x.copy_(torch.linspace(-1, 1, 12).view(2, 6))
        self.t.fill_(t)

    def program(self) -> None:
        self.x.copy_(self.model(self.x, self.t))

    def examine(self, **options: Any) -> Examined:
        return examine(self.program, (self.begin, lambda: self.begin(7.0)), self.device, **options)


def embedding(t: Tensor, dim: int = 6) -> Tensor:
    """As guided-diffusion and GLIDE write it: frequencies made on the CPU and copied in every call."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half)
    args = t[:, None].float() * freqs.to(device=t.device)[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


def upstream(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x + embedding(t)


# What cannot be captured


def reads_an_item(x: Tensor, t: Tensor) -> Tensor:
    return x * t[0].item()


def asks_a_question(x: Tensor, t: Tensor) -> Tensor:
    return x * 2 if (x > 100).any() else x


def takes_masked(x: Tensor, t: Tensor) -> Tensor:
    return x + x[x > 0].sum()


def writes_masked(x: Tensor, t: Tensor) -> Tensor:
    x = x.clone()
    x[x > 0] = t.sum().expand(6)
    return x


def counts(x: Tensor, t: Tensor) -> Tensor:
    return x + x.nonzero().sum()


def compares(x: Tensor, t: Tensor) -> Tensor:
    return x if torch.equal(x, t) else -x


def repeats(x: Tensor, t: Tensor) -> Tensor:
    return x + torch.repeat_interleave(torch.ones_like(t, dtype=torch.int64), t.long()).sum()


READERS = [reads_an_item, asks_a_question, takes_masked, writes_masked, counts, compares, repeats]


@pytest.mark.parametrize("model", READERS)
def test_a_read_from_the_device_is_named_with_its_line(model: Callable[..., Tensor]) -> None:
    with pytest.raises(CaptureError) as error:
        Rig(model).examine()
    assert "reads from the device" in str(error.value)
    assert f"test_graphs.py:{model.__code__.co_firstlineno}" not in str(error.value)
    assert f" in {model.__name__}: `" in str(error.value)
    assert "aten." in str(error.value)


def test_the_line_is_the_one_that_reads() -> None:
    with pytest.raises(CaptureError, match=r"test_graphs\.py:\d+ in reads_an_item: `return x \* t\[0\]\.item\(\)`"):
        Rig(reads_an_item).examine()


class Counting:
    """A model with a step counter of its own."""

    def __init__(self, act: Callable[[Tensor, int], Tensor]) -> None:
        self.act, self.n = act, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.n += 1
        return self.act(x, self.n)


VARYING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "number": lambda x, n: x * n,
    "constant": lambda x, n: x * torch.tensor([1.0, n, 1, 1, 1, 1]),
    "scalar constant": lambda x, n: x * torch.tensor(float(n)),
    "filled": lambda x, n: x + torch.full((6,), float(n)),
    "derived": lambda x, n: x + torch.arange(n, n + 6) / 2,
    "branch": lambda x, n: x * 2 if n % 2 else x + 1,
    "extra": lambda x, n: x * 2 + 1 if n % 2 else x * 2,
    "number of operands": lambda x, n: torch.cat([x] * (1 + n % 2))[:2],
    "dtype": lambda x, n: x.to(torch.float64 if n % 2 else torch.bfloat16).float(),
    "shape": lambda x, n: x + x[:, : n % 3 + 1].sum(),
}


@pytest.mark.parametrize("name", VARYING)
def test_what_changes_from_step_to_step_is_found(name: str) -> None:
    with pytest.raises(CaptureError, match=r"steps are not alike: .*test_graphs\.py:\d+ in <lambda>"):
        Rig(Counting(VARYING[name])).examine()


def filled(x: Tensor, t: Tensor) -> Tensor:
    x = x.clone()
    x[x > 0] = 0.5
    return x


CONSTANT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "upstream": upstream,
    "reads what the host made": lambda x, t: x * torch.linspace(0, 1, 3)[1].item(),
    "buffer of zeros": lambda x, t: torch.zeros(6).add_(x[0]) + x,
    "own random numbers": lambda x, t: x + torch.randn_like(x),
    "random factory": lambda x, t: x + torch.rand(6),
    "remembered from the first call": lambda x, t, memory={}: x + memory.setdefault("ones", torch.ones(6)),
    "in place": lambda x, t: x.mul_(0.5).add_(t[:, None]),
    "a number where a mask says so": filled,
    "repeated so often": lambda x, t: x + torch.repeat_interleave(x, 2, 1, output_size=12)[:, ::2],
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_stays_the_same_may_be_captured(name: str) -> None:
    assert Rig(CONSTANT[name]).examine().constants == ()


# Copies from the host


class CopyLog(DispatchMode):
    """Counts operations that copy from the host, below whatever else is watching."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if copied_operands(function, args, kwargs or {}):
            self.copies.append(str(function))
        return function(*args, **(kwargs or {}))


COPYING: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "upstream": (upstream, 1),
    "twice": (lambda x, t: embedding(t) + embedding(t), 2),
    "converted": (lambda x, t: x + torch.arange(6).to(x.device, torch.float32), 1),
    "copy_": (lambda x, t: torch.empty_like(x[0]).copy_(torch.arange(6.0)) + x, 1),
    "number of the host's": (lambda x, t: x * torch.tensor(2.0), 0),
}


@pytest.mark.parametrize("name", COPYING)
def test_copies_from_the_host_are_reused(name: str) -> None:
    model, expected = COPYING[name]
    rig = Rig(model, "meta")
    with CopyLog() as unmodified:
        rig.program()
    examined = rig.examine()
    assert len(examined.constants) == expected
    assert all(constant.twin.device.type == "meta" for constant in examined.constants)
    with CopyLog() as log, examined.reused() as constants:
        for _ in range(3):
            constants.restart()
            rig.program()
    assert log.copies == []
    assert len(unmodified.copies) == expected


def test_a_copy_that_changes_after_all_is_an_error() -> None:
    numbers = itertools.chain([1.0] * 3, itertools.count(2.0))
    rig = Rig(lambda x, t: x + torch.tensor([next(numbers)] * 6).to(x.device), "meta")
    examined = rig.examine()
    with examined.reused(), pytest.raises(CaptureError, match=r"_to_copy.*test_graphs.py.* did not copy before"):
        rig.program()


def test_a_copy_that_was_not_there_before_is_an_error() -> None:
    rig = Rig(upstream, "meta")
    examined = rig.examine()
    with examined.reused():
        rig.program()
        with pytest.raises(CaptureError, match="did not copy before"):
            rig.program()


def test_a_constant_that_changes_is_an_error() -> None:
    rig = Rig(Counting(lambda x, n: x + torch.arange(n, n + 6).to(x.device)), "meta")
    with pytest.raises(CaptureError, match="steps are not alike"):
        rig.examine()


# Recordings


def test_a_recording_repeats_the_operations_and_no_python() -> None:
    calls = []
    rig = Rig(lambda x, t: (calls.append(1), 0.5 * x + embedding(t))[1])
    want = []
    for t in (1.0, 7.0):
        rig.begin(t)
        rig.program()
        want.append(rig.x.clone())
    recording = StandIn([rig.program])
    recorded = len(calls)
    for t, expected in zip((7.0, 1.0), reversed(want), strict=True):
        rig.begin(t)
        recording()
        assert torch.equal(rig.x, expected)
    assert len(calls) == recorded


def test_a_recording_of_several_runs() -> None:
    rig = Rig(upstream)
    rig.begin()
    for _ in range(3):
        rig.program()
    want = rig.x.clone()
    recording = StandIn([rig.program] * 3)
    rig.begin()
    recording()
    assert torch.equal(rig.x, want)


def test_what_python_changes_is_stale_in_a_recording() -> None:
    rig = Rig(Counting(lambda x, n: x * n))
    rig.begin()
    recording = StandIn([rig.program])
    for _ in range(2):
        rig.begin()
        recording()
    want = torch.linspace(-1, 1, 12).view(2, 6)
    assert torch.equal(rig.x, want)


def test_an_opaque_function_is_recorded_whole() -> None:
    def function(x: Tensor, scale: float) -> tuple[Tensor, None]:
        with torch.no_grad():
            return scale * x + 1, None

    opaque = Opaque(function)
    rig = Rig(lambda x, t: opaque(x, scale=0.5)[0])
    recording = StandIn([rig.program])
    # The multiplication is not in it, but the call and the copy are.
    assert [call[0] for call in recording._calls] == [function, torch.ops.aten.copy_.default]
    rig.begin()
    recording()
    assert torch.equal(rig.x, 0.5 * torch.linspace(-1, 1, 12).view(2, 6) + 1)
    assert torch.equal(opaque(torch.ones(1), 2.0)[0], torch.tensor([3.0]))


def test_a_failed_recording_leaves_nothing_behind() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    opaque = Opaque(fail)
    with pytest.raises(KeyboardInterrupt):
        StandIn([lambda: opaque(torch.ones(1))])
    with pytest.raises(KeyboardInterrupt):
        examine(lambda: opaque(torch.ones(1)), (lambda: None, lambda: None), CPU)
    assert _THREAD.record is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_what_torch_compile_made_is_known() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert not is_compiled(Part())
    assert not is_compiled(upstream)
    assert is_compiled(torch.compile(Part(), backend="eager"))
    assert is_compiled(torch.compile(upstream, backend="eager"))
    assert is_compiled(nn.Sequential(torch.compile(Part(), backend="eager")))
    part = Part()
    part.compile(backend="eager")
    assert is_compiled(nn.Sequential(part))


# Held against the program


def test_a_recording_that_differs_is_found() -> None:
    rig = Rig(upstream)
    assert compare(rig.program, StandIn([rig.program]), rig.begin, (rig.x,)).same
    assert not compare(rig.program, lambda: rig.x.mul_(2), rig.begin, (rig.x,)).same
    nan = Rig(lambda x, t: x / 0 * 0)
    assert compare(nan.program, StandIn([nan.program]), nan.begin, (nan.x,)).same


def test_a_program_that_does_not_repeat_itself_is_not_compared() -> None:
    rig = Rig(lambda x, t: x + torch.rand(6))
    compared = compare(rig.program, StandIn([rig.program]), rig.begin, (rig.x,))
    assert compared.same
    assert compared.program > 0
    assert compared.recording > 0


# CUDA's side of it, as far as it is Python


def test_a_pool_whose_graphs_are_gone_gets_a_new_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes no handle again whose last graph was freed."""
    handles = iter([(0, 1), (0, 2), (0, 3)])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    pool, first, second, failed = Pool(CUDA), *(object.__new__(CudaGraph) for _ in range(3))
    assert pool.admit(first) == pool.admit(second) == (0, 1)
    del first
    assert pool.admit(second) == (0, 1)
    del second
    assert pool.nbytes() == 0
    assert pool.admit(failed) == (0, 2)
    segments = [{"total_size": 5, "segment_pool_id": (0, 2)}, {"total_size": 7, "segment_pool_id": (0, 0)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert pool.nbytes() == 5
    pool.expel(failed)
    assert pool.admit(failed) == (0, 3)


def test_graphs_of_a_pool_follow_each_other_over_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    a, b = Stream("a"), Stream("b")
    pool = Pool(CUDA)
    for stream in (a, a, b, a, a):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        pool.follow()
    assert waits == [("b", "a"), ("a", "b")]


class FakeGraph:
    """Has a pool if its capture has ended."""

    ended = False

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")


class FakeCuda:
    """Captures in which torch does nothing, but end one with an error of its own if the program failed.

    Attributes:
        stream: the current one.
        log: what was done.
        interruptible: whether a capture can be ended when the program failed: only CUDA's own errors break it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interruptible: bool = False) -> None:
        cuda, self.stream, self.log, self.interruptible = self, "main", [], interruptible
        self.zeros = torch.zeros(1)

        class Capture:
            def __init__(self, graph: FakeGraph, **options: Any) -> None:
                assert options["capture_error_mode"] == "thread_local"
                assert options["stream"] is streams.own_stream("capture", torch.device("cuda", 0))
                self.graph, self.options = graph, options

            def __enter__(self) -> None:
                self.before, cuda.stream = cuda.stream, "side"

            def __exit__(self, kind: Any, *error: Any) -> None:
                if kind is not None and not cuda.interruptible:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                self.graph.ended, cuda.stream = True, self.before
                cuda.log.append(("captured", self.options.get("pool")))

        monkeypatch.setattr(streams, "_STREAMS", {})
        monkeypatch.setattr(cuda_module, "_BROKEN", [])
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(device=torch.device("cuda", 0)))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", "main"))
        monkeypatch.setattr(torch, "zeros", lambda *size, device: self.zeros)
        for name in ("endAllocateToPool", "releasePool"):
            note = lambda device, pool, name=name: self.log.append((name, device, pool))  # noqa: E731
            monkeypatch.setattr(torch.cuda.memory, f"_cuda_{name}", note)


def capture_with(monkeypatch: pytest.MonkeyPatch, program: Callable[[], None], pool: Pool) -> FakeCuda:
    """A capture on a fake device, without the autocast cache."""

    def checked() -> None:
        assert not torch.is_autocast_cache_enabled()
        program()

    cuda = FakeCuda(monkeypatch)
    CudaGraph([checked], Examined(), pool)
    return cuda


def test_a_capture_leaves_the_current_stream_current(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = capture_with(monkeypatch, lambda: None, Pool(CUDA))
    assert cuda.stream == "main"
    assert cuda.log == [("captured", (0, 1))]


def test_what_a_broken_capture_leaves_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would stay on the capture's stream, allocate for the capture, and draw for it."""

    def program() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    cuda, pool = FakeCuda(monkeypatch), Pool(CUDA)
    monkeypatch.setattr(cuda.zeros, "zero_", lambda: cuda.log.append("zeroed on " + cuda.stream), raising=False)
    with pytest.raises(CaptureError):
        CudaGraph([program], Examined(), pool)
    ended = [("endAllocateToPool", 0, (0, 1)), ("releasePool", 0, (0, 1))]
    assert cuda.log == [*ended, "zeroed on side", ("captured", None)]
    assert cuda.stream == "main"
    assert [graph.ended for graph in cuda_module._BROKEN] == [False]


def test_a_capture_that_torch_has_ended_needs_no_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> None:
        raise KeyboardInterrupt

    cuda = FakeCuda(monkeypatch, interruptible=True)
    with pytest.raises(KeyboardInterrupt):
        CudaGraph([program], Examined(), Pool(CUDA))
    assert cuda.log == [("captured", (0, 1))]
    assert not cuda_module._BROKEN
    assert cuda.stream == "main"


def test_the_first_error_of_a_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be")

    pool = Pool(CUDA)
    with pytest.raises(CaptureError) as error:
        capture_with(monkeypatch, program, pool)
    assert str(error.value).startswith("CUDA error: operation not permitted when stream is capturing (test_graphs.py:")
    assert "in program: `raise RuntimeError(" in str(error.value)
    assert len(pool._graphs) == 0
    assert torch.is_autocast_cache_enabled()


def test_an_interrupt_in_a_capture_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> None:
        raise KeyboardInterrupt

    pool = Pool(CUDA)
    with pytest.raises(KeyboardInterrupt):
        capture_with(monkeypatch, program, pool)
    assert len(pool._graphs) == 0
    assert torch.is_autocast_cache_enabled()


def test_the_reason_is_the_engines_own_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> None:
        raise CaptureError("the model copies")

    with pytest.raises(CaptureError, match=r"^the model copies$"):
        capture_with(monkeypatch, program, Pool(CUDA))


def test_an_error_handled_before_the_capture_is_not_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> None:
        raise RuntimeError("inside")

    try:
        raise ValueError("outside")
    except ValueError:
        with pytest.raises(CaptureError, match=r"^inside"):
            capture_with(monkeypatch, program, Pool(CUDA))
