"""The captured loop on a device: on a GPU with CUDA graphs, on a CPU with their stand-in."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from support.captured_loop import (
    GUIDANCES,
    REPRESENTED,
    TABLES,
    Conv,
    assert_captured,
    assert_captured_equals_eager,
    assert_same,
    assert_what_is_done_between_rows_agrees,
    build,
    conditions,
    conv,
    draw,
    shape_on,
)
from support.launches import beside_the_graphs
from torch import Tensor, nn

from fastcfg import CFG, AdaptiveCFG, DynamicThreshold, Sampler, Schedule, solvers
from fastcfg.engine import programs
from fastcfg.engine.graphs import Comparison, Pool
from fastcfg.engine.loop import Previews
from fastcfg.engine.readback import Readback
from fastcfg.engine.staleness import Fingerprint

pytestmark = pytest.mark.filterwarnings("error:running eagerly")

CPU = torch.device("cpu")
Record = Callable[[str, object], None]

# What it computes

CLIPS = {"number": 1.0, "threshold": DynamicThreshold(0.9)}
LATER = list(itertools.product(CLIPS, ("philox", "torch"), (1, 3)))


def combinations(device: torch.device, solver: str) -> Iterator[tuple[str, str, str, int]]:
    """Guidance, clip, noise source and rows per graph: all on a GPU. On a CPU, where test_captured.py covers every
    pair of options, one combination per solver, with the options in turns. Scales within a sample refuse dynamic
    thresholding."""
    number = list(TABLES).index(solver)
    found = [(guidance, *rest) for guidance in GUIDANCES for rest in LATER]
    if device.type != "cuda":
        found = [(list(GUIDANCES)[number % len(GUIDANCES)], *LATER[5 * number % len(LATER)])]
    for guidance, clip, *others in found:
        yield guidance, "number" if guidance == "channels" else clip, *others


@pytest.mark.parametrize("solver", TABLES)
def test_captured_equals_eager(device: torch.device, solver: str) -> None:
    for guidance, clip, noise, rows in combinations(device, solver):
        options = {"guidance": GUIDANCES[guidance], "clip": CLIPS[clip], "noise_source": noise, "rows_per_graph": rows}
        assert_captured_equals_eager(device, TABLES[solver], **options)


def test_what_is_done_between_rows_agrees(device: torch.device) -> None:
    assert_what_is_done_between_rows_agrees(device, "reference")


def test_every_solver_is_covered() -> None:
    assert set(solvers.__all__) - REPRESENTED <= set(TABLES)


def test_results_belong_to_the_caller(device: torch.device) -> None:
    sampler = build(device)
    first = draw(sampler, 0)
    kept = first.clone()
    second = draw(sampler, 1)
    assert_same(first, kept, "the first result after the second call")
    assert not torch.equal(first, second)
    first.zero_()
    second.fill_(torch.nan)
    assert_same(draw(sampler, 0), kept, "the first seed again")
    assert_captured(sampler)


def test_scales_conditioning_clip_and_seeds_change_without_a_capture(device: torch.device) -> None:
    table, batch = TABLES["ddpm"], shape_on(device)[0]
    model = conv(device, table)
    sampler = build(device, model, table)
    results = [draw(sampler)]
    other = {name: {"y": -value["y"] + 0.1} for name, value in conditions(sampler, batch).items()}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"guidance": CFG(np.linspace(1.5, 4, len(table))[:, None])}, {}),
        ({"guidance": CFG(np.linspace(2, 5, batch))}, {}),
        ({"clip": 0.5}, {}),
        ({}, {"seed": 7}),
        ({}, {"branches": other}),
        ({}, {"x_T": torch.full(shape_on(device), 0.5, device=device)}),
    ]
    options: dict[str, Any] = {}
    for attributes, arguments in changes:
        for attribute, value in attributes.items():
            setattr(sampler, attribute, value)
        options |= attributes
        results.append(draw(sampler, **arguments))
        assert_same(results[-1], draw(build(device, model, table, **options), **arguments), f"{attributes}")
        assert sampler.report()["captures"] == 1
        assert not torch.equal(results[-1], results[-2])
    assert_captured(sampler)


# By model.
_NOTES: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


class Sized(Conv):
    """Notes the sizes of the batches it is called with, out of sight: what changes with each call is not captured."""

    @property
    def sizes(self) -> list[int]:
        return _NOTES.setdefault(self, [])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x, t, y)


def test_unguided_rows_run_the_batch_alone(device: torch.device) -> None:
    batch, sizes, results = shape_on(device)[0], {}, {}
    for graph in (False, True):
        model = Sized().to(device).eval()
        sampler = build(device, model, guidance=CFG(3.0, interval=(0.2, 0.7)), graph=graph)
        results[graph], sizes[graph] = draw(sampler), model.sizes
    assert_same(results[True], results[False])
    # int(0.2 * 5) <= step < int(0.7 * 5)
    assert sizes[False] == [batch, 2 * batch, 2 * batch, batch, batch]
    assert set(sizes[True]) == {batch, 2 * batch}
    report = sampler.report()
    assert report["branches"] == [1, 2, 2, 1, 1]
    assert sorted(len(program["branches"]) for program in report["programs"]) == [1, 2]
    assert_captured(sampler)


class Converging(nn.Module):
    """Branches that come together sample by sample: their cosine depends on t and on the sample's own y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        base = torch.tanh(x)
        return base + base.flip(1) * (y * t.to(x.dtype) / 100).view(-1, 1, 1, 1)


def test_adaptive_guidance_ends_when_branches_agree(device: torch.device) -> None:
    """It equals CFG until a sample's branches agree; when those of all samples do, one branch is left."""
    table = solvers.ddim(Schedule.named("squaredcos_cap_v2", 100).respace(12))
    values = {"cond": (1.6, 1.0), "uncond": (0.0, 0.0)}  # they come to agree at different rows
    branches = {name: {"y": torch.tensor(value, device=device)} for name, value in values.items()}
    states, counts = {}, {}
    for name, guidance in (("cfg", CFG(2.0)), ("adaptive", AdaptiveCFG(2.0, threshold=0.93))):
        for graph in (False, True):
            sampler = Sampler(Converging(), table, guidance=guidance, graph=graph, device=device)
            for _ in range(2):  # the second run begins again with both
                steps = list(sampler.iterate((2, 3, 4, 4), branches=branches, seed=0))
            states[name, graph] = torch.stack([step.x for step in steps])
            counts[name, graph] = sampler.report()["branches"]
        assert_captured(sampler)
        assert_same(states[name, True], states[name, False], name)
        assert counts[name, True] == counts[name, False]
    equal = (states["adaptive", True] == states["cfg", True]).flatten(2).all(2).cpu().numpy()  # [R, B]
    left = [len(table) if column.all() else int(column.argmin()) for column in equal.T]
    assert 2 < min(left) < max(left) < len(table)  # a decision acts two rows later
    assert counts["adaptive", True] == [2] * max(left) + [1] * (len(table) - max(left))


def test_previews_come_one_row_late(device: torch.device) -> None:
    """When the next row has been enqueued, in the host's memory, with the bits of `iterate`."""
    shape, every = shape_on(device), 2
    sampler = build(device)
    steps = list(sampler.iterate(shape, branches=conditions(sampler, shape[0]), seed=1))
    seen: list[Any] = []
    enqueued: list[int] = []
    result = draw(
        sampler,
        1,
        callback=lambda step: enqueued.append(step.row),
        preview=lambda preview: seen.append((preview, len(enqueued))),
        preview_every=every,
    )
    assert_captured(sampler)
    assert_same(result, steps[-1].x, "the samples beside previews")
    rows = [row for row in range(len(steps)) if row % every == 0 or row == len(steps) - 1]
    assert [(preview.row, after) for preview, after in seen] == [(row, min(row + 2, len(steps))) for row in rows]
    for preview, _ in seen:
        assert preview.x0.device.type == "cpu"
        assert_same(preview.x0, steps[preview.row].x0.cpu(), f"preview of row {preview.row}")


# Weights


class Lora(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False).to(base.weight.device)
        nn.init.constant_(self.down.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


def scaled_in_place(model: Conv) -> None:
    with torch.no_grad():
        model.first.weight.mul_(0.5)


def trained(model: Conv) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def loaded(model: Conv, **options: Any) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, **options)


def loaded_by_assignment(model: Conv) -> None:
    loaded(model, assign=True)


def replaced_data(model: Conv) -> None:
    model.first.weight.data = model.first.weight.data * 0.5


def new_parameter(model: Conv) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach() * 0.5)


def lora(model: Conv) -> None:
    model.first = Lora(model.first)  # type: ignore[assignment]


def bfloat16_and_back(model: Conv) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def moved_buffer(model: Conv) -> None:
    model.frequencies = model.frequencies * 3


def patched_forward(model: Conv) -> None:
    forward = model.first.forward
    model.first.forward = lambda x: 0.5 * forward(x)  # type: ignore[method-assign]


def hook(model: Conv) -> None:
    model.first.register_forward_hook(lambda module, args, output: 0.5 * output)


IN_PLACE = (scaled_in_place, trained, loaded)
IN_MEMORY = (replaced_data, new_parameter, lora, loaded_by_assignment, moved_buffer)
IN_PYTHON = (patched_forward, hook)
CHANGES = (*IN_PLACE, *IN_MEMORY, *IN_PYTHON, bfloat16_and_back)


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "function"])
def test_changed_weights_act_at_the_next_call(
    device: torch.device, change: Callable[[Conv], None], wrapped: bool
) -> None:
    """Only what has moved is captured again."""
    model = conv(device)
    sampler = build(device, (lambda x, t, y: model(x, t, y)) if wrapped else model)
    first, before = draw(sampler), addresses(model)
    assert_same(draw(sampler), first)
    change(model)
    moved = addresses(model) != before
    if change is not bfloat16_and_back:  # an allocator may give it the addresses it had
        assert moved == (change in IN_MEMORY)
    second = draw(sampler)
    assert not torch.equal(second, first)
    assert_same(second, draw(build(device, copy.deepcopy(model), graph=False)), "captured against eager")
    assert_same(second, draw(build(device, model)), "against a fresh sampler")
    assert_captured(sampler)
    report = sampler.report()
    assert report["captures"] == 1 + (moved or change in IN_PYTHON)
    assert bool(report["recaptured"]) == (report["captures"] == 2)


# Tensors of the host


class Upstream(Conv):
    """As guided-diffusion and GLIDE write it: frequencies are made on the CPU and copied in every call."""

    def embed(self, t: Tensor) -> Tensor:
        half = 2
        frequencies = torch.exp(
            -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half
        ).to(device=t.device)  # fmt: skip
        args = t[:, None].float() * frequencies[None]
        return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class Listing(Upstream):
    """Makes a tensor of numbers on the device in every call."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        mean = torch.tensor([0.1, 0.2, 0.3], device=x.device).view(1, 3, 1, 1)
        return super().forward(x - mean, t, y)


@pytest.mark.parametrize(("kind", "copies"), [(Upstream, 1), (Listing, 2)])
def test_tensors_copied_from_the_host_become_constants(device: torch.device, kind: type[Conv], copies: int) -> None:
    model = kind().to(device).eval()
    eager, captured = (build(device, model, graph=graph) for graph in (False, True))
    for seed in (0, 1):
        assert_same(draw(captured, seed), draw(eager, seed))
    assert_captured(captured)
    constants = [program["constants"] for program in captured.report()["programs"]]
    assert constants == [copies if device.type == "cuda" else 0]  # a CPU has nothing to copy


# What cannot be captured, and failures


class Reading(Conv):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * (0.5 if t[0].item() > 50 else 0.25)


class Counting(Conv):
    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t, y) * (1 + 0.01 * self.calls)


class Waiting(Conv):
    """No dispatcher sees this, so only the capture itself fails."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return super().forward(x, t, y)


def current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def assert_usable(device: torch.device, stream: Any) -> None:
    """The stream is what it was, and torch's generator, allocator and captures work."""
    assert current_stream(device) == stream
    assert torch.randn(1000, device=device).isfinite().all()
    sampler = build(device)
    assert_same(draw(sampler), draw(build(device, graph=False)), "another sampler, captured against eager")
    assert_captured(sampler)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Reading, r"test_captured_loop\.py:\d+ in forward: .*t\[0\]\.item\(\)"),
        (Counting, r"its state changes from call to call: model\.calls"),
        (Waiting, r"test_captured_loop\.py:\d+ in forward: .*synchronize\(\)"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly(device: torch.device, kind: type[Conv], what: str) -> None:
    """After one warning, which names the line or the attribute."""
    if kind is Waiting and device.type != "cuda":
        pytest.skip("there is no stream to wait for")
    stream, model = current_stream(device), kind().to(device).eval()
    sampler = build(device, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(sampler)
        draw(sampler, shape=(1, 3, 8, 8))
        model.calls = 0  # type: ignore[assignment]
        result = draw(sampler)
    messages = [str(warning.message) for warning in caught if "running eagerly" in str(warning.message)]
    assert len(messages) == 1
    assert re.search(what, messages[0])
    assert sampler.report()["graph"] == "none"
    model.calls = 0  # type: ignore[assignment]
    assert_same(result, draw(build(device, model, graph=False)))
    assert_usable(device, stream)


class Failing(Conv):
    """Raises at its n-th call from now."""

    error: type[BaseException] = RuntimeError

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        notes = _NOTES.setdefault(self, [-1])
        notes[0] -= 1
        if notes[0] == 0:
            raise self.error("the model failed")
        return super().forward(x, t, y)


@pytest.mark.filterwarnings("ignore:running eagerly")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_failures_leave_everything_usable(device: torch.device, error: type[BaseException]) -> None:
    """The first call is to see what it changes, three are the examination's, the fifth is the capture's, then come the
    comparison's."""
    stream, want = current_stream(device), draw(build(device, graph=False))
    for call in range(1, 8):
        model = Failing().to(device).eval()
        _NOTES[model], model.error = [call], error
        sampler = build(device, model)
        # In a capture on CUDA an error of this type is CUDA's as a rule: the model then runs eagerly.
        perhaps, ran = error is RuntimeError and call == 5 and device.type == "cuda", []
        with suppress(error) if perhaps else pytest.raises(error, match="the model failed"):
            ran.append(draw(sampler))
        _NOTES[model] = [-1]
        assert_same(draw(sampler), want, f"after call {call} failed")
        if not ran:
            assert_captured(sampler)
    assert_usable(device, stream)


# Memory and threads


def used(device: torch.device) -> dict[str, int]:
    """Bytes of torch's allocator; a CPU counts none."""
    if device.type != "cuda":
        return {}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}


def pools(device: torch.device) -> Counter[tuple[int, int]]:
    """Bytes of the allocator's private pools, by their ids."""
    found: Counter[tuple[int, int]] = Counter()
    for segment in torch.cuda.memory_snapshot() if device.type == "cuda" else ():
        if any(segment["segment_pool_id"]):
            found[tuple(segment["segment_pool_id"])] += segment["total_size"]
    return found


def test_memory_is_steady_and_given_back(device: torch.device, record_property: Record) -> None:
    """Calls of a kind add none, all shapes share one pool of graphs, and release() gives everything back."""
    model, shape = conv(device), shape_on(device)
    want = draw(build(device, model, graph=False))
    # The first round pays for what the process keeps: compiled kernels, workspaces of cuBLAS.
    for round_ in ("first", "second"):
        before, known = used(device), pools(device)
        sampler = build(device, model)
        draw(sampler)
        one, own = used(device), sampler.memory()
        for seed in range(1, 4):
            draw(sampler, seed)
        assert used(device) == one
        assert sampler.memory() == own
        draw(sampler, shape=(1, *shape[1:]))
        both, own_both = used(device), sampler.memory()
        assert_captured(sampler)
        assert own_both > own
        new = {key: size for key, size in pools(device).items() if key not in known}
        assert len(new) == (device.type == "cuda"), new
        sampler.release()
        after = used(device)
        assert sampler.memory() == 0
        assert not pools(device).keys() - known
        if round_ == "second":
            assert after == before
        assert_same(draw(sampler), want, "after release()")
        del sampler
        found = {"before": before, "one_shape": one, "two_shapes": both, "after_release": after}
        found |= {"sampler_one_shape": own, "sampler_two_shapes": own_both, "graph_pool": sum(new.values())}
        record_property(f"bytes, {round_} round", json.dumps(found))


def test_samplers_run_in_threads(device: torch.device, record_property: Record) -> None:
    """Two capture and sample at once, while a third thread queries CUDA."""
    cuda, model = device.type == "cuda", conv(device)
    want = {seed: draw(build(device, model, graph=False), seed) for seed in range(4)}
    if cuda:
        torch.cuda.synchronize()
    problems: list[str] = []
    done, queries = threading.Event(), 0

    def query() -> None:
        nonlocal queries
        event = torch.cuda.Event()
        while not done.is_set():
            event.record()
            event.query()
            torch.cuda.Event().query()
            torch.cuda.mem_get_info(device)
            queries += 1

    def sample(seed: int, own_stream: bool) -> None:
        stream = torch.cuda.Stream(device) if own_stream else None
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for _ in range(3):
                sampler = build(device, model)
                for turn in range(3):
                    assert_same(draw(sampler, seed + turn % 2), want[seed + turn % 2])
                assert_captured(sampler)

    def started(function: Callable[..., None], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:
                problems.append(f"{function.__name__}{args}: {type(error).__name__}: {error}")

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    watcher = started(query) if cuda else None
    try:
        for own_stream in (False, True) if cuda else (False,):
            for thread in [started(sample, seed, own_stream) for seed in (0, 2)]:
                thread.join()
    finally:
        done.set()
        if watcher is not None:
            watcher.join()
    assert problems == []
    record_property("queries of CUDA meanwhile", queries)


# That these tests fail where they should


def blind_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fingerprint, "changes", lambda self, other: "")


def restless_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fingerprint, "changes", lambda self, other: "something")


def stale_readback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value arrives one push too late."""
    push = Readback.push

    def late(self: Readback, tensor: Tensor) -> None:
        before = vars(self).setdefault("before", torch.zeros_like(tensor))
        push(self, before)
        vars(self)["before"] = tensor.clone()

    monkeypatch.setattr(Readback, "push", late)


def prompt_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview is waited for in its own row."""
    after_row = Previews.after_row
    monkeypatch.setattr(Previews, "after_row", lambda self, row: [after_row(self, row), self.deliver()])


def empty_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "StandIn", lambda rows: lambda: None)


def empty_graphs_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_graphs(monkeypatch)
    monkeypatch.setattr(programs, "compare", lambda *args: Comparison(True, 1.0, 0.5))


def trusting_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    def choices(self: Any, active: Any, batching: str) -> Any:
        return [programs._Choice(batching, self._eager(active, batching))], ""

    monkeypatch.setattr(programs.Programs, "_choices", choices)


def shared_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are the sampler's own memory."""
    sample = Sampler.sample

    def lend(self: Sampler, *args: Any, **options: Any) -> Tensor:
        sample(self, *args, **options)
        return next(iter(self._cache._kept.values())).buffers.step.x

    monkeypatch.setattr(Sampler, "sample", lend)


def kept_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "nbytes", lambda self: 1000)


def unrecorded(name: str, value: object) -> None:
    """Stands for `record_property`."""


BROKEN: list[tuple[Any, Any, tuple[Any, ...], str]] = [
    (blind_fingerprint, test_changed_weights_act_at_the_next_call, (replaced_data, False), "assert 1 =="),
    (restless_fingerprint, test_changed_weights_act_at_the_next_call, (scaled_in_place, False), "assert 3 =="),
    (restless_fingerprint, test_scales_conditioning_clip_and_seeds_change_without_a_capture, (), "2 == 1"),
    (stale_readback, test_previews_come_one_row_late, (), "preview of row 0"),
    (stale_readback, test_adaptive_guidance_ends_when_branches_agree, (), "assert"),
    (prompt_previews, test_previews_come_one_row_late, (), r"\(0, 1\)"),
    (empty_graphs, test_captured_equals_eager, ("ddim",), "running eagerly"),
    (empty_graphs, test_results_belong_to_the_caller, (), "running eagerly"),
    (empty_graphs_unnoticed, test_captured_equals_eager, ("ddim",), "not equal"),
    (empty_graphs_unnoticed, test_samplers_run_in_threads, (unrecorded,), "not equal"),
    (trusting_examination, test_what_cannot_be_captured_runs_eagerly, (Reading, "t[0].item()"), "0 == 1"),
    (shared_result, test_results_belong_to_the_caller, (), "the first result after the second call"),
    (kept_pool, test_memory_is_steady_and_given_back, (unrecorded,), "1000 == 0"),
]


@pytest.mark.parametrize(("break_it", "test", "arguments", "message"), BROKEN)
def test_a_fault_is_found(
    break_it: Any, test: Any, arguments: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises((AssertionError, UserWarning), match=message):
        test(CPU, *arguments)


FILL = "void at::native::vectorized_elementwise_kernel<2, at::native::FillFunctor<long>>"


@pytest.mark.parametrize(
    ("called", "done", "found"),
    [
        ([], [], {}),
        (["cudaLaunchKernel"] * 2, [FILL] * 2, {}),  # torch's generator
        (["cudaLaunchKernel"] * 2, ["another"] * 2, {"cudaLaunchKernel": 10}),
        (["cudaLaunchKernel"], [FILL], {"cudaLaunchKernel": 5}),
        (["cudaGraphLaunch"], [], {"cudaGraphLaunch": 5}),
        (["cudaStreamSynchronize"], [], {"cudaStreamSynchronize": 5}),
        ([], ["Memcpy DtoH (Device -> Pinned)"], {"Memcpy DtoH (Device -> Pinned)": 5}),
    ],
)
def test_launches_beside_the_graphs_are_found(called: list[str], done: list[str], found: dict[str, int]) -> None:
    """For 5 programs, tests/gpu/test_captured_loop.py counts them."""
    host = Counter(["cudaGraphLaunch", "cudaStreamIsCapturing", *called] * 5)
    device = Counter(["_guided_step_kernel", "Memcpy DtoD (Device -> Device)", *done] * 5)
    assert beside_the_graphs(host, device, 5) == found
