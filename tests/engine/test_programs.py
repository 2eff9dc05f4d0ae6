"""How a sampler chooses between graph and eager, what it says when a model cannot be captured, and what goes on beside
a run: previews, progress, adaptive guidance, threads, failures."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from support.captured_cases import GUIDANCES, SHAPE, TABLES, Model, build, conditioning, draw
from torch import Tensor

from fastcfg import CFG, AdaptiveCFG, Guidance, Sampler, Schedule, solvers
from fastcfg.engine import config, programs
from fastcfg.engine.graphs import CaptureError, Comparison
from fastcfg.engine.graphs.trace import DispatchMode
from fastcfg.engine.readback import Pace, Readback
from fastcfg.reference.philox import INITIAL_STREAM, philox_normal, sample_seeds

# Graph or eager, batched or serial


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, int], tuple[float, float]]]:
    """Seconds (eager, graph) that a row seems to take, by batching and the number of branches."""
    seconds: dict[tuple[str, int], tuple[float, float]] = {}
    compare, trying = programs.compare, []

    def choose(self: Any, kind: Any, batching: str) -> Any:
        trying.append((batching, len(kind.active)))
        return choices(self, kind, batching)

    choices = programs.Programs._choices
    monkeypatch.setattr(programs.Programs, "_choices", choose)
    monkeypatch.setattr(
        programs, "compare", lambda *args: Comparison(compare(*args).same, *seconds.get(trying[-1], (1.0, 0.5)))
    )
    monkeypatch.setattr(config, "times_graphs", lambda device: True)
    return seconds


CHOICES = {
    # (eager, graph) batched, (eager, graph) serial, and what is chosen.
    "launch-bound": ((10.0, 3.0), None, ("stand-in", "batched")),
    "compute-bound": ((10.0, 10.0), (10.5, 10.5), ("none", "batched")),
    "graph slower": ((10.0, 10.3), (11.0, 11.0), ("none", "batched")),
    "graph a little faster": ((10.0, 9.5), (10.0, 9.9), ("stand-in", "batched")),
    "serial faster": ((10.0, 10.0), (9.0, 9.0), ("none", "serial")),
    "serial graph fastest": ((10.0, 9.6), (9.5, 9.0), ("stand-in", "serial")),
    "not worth it": ((10.0, 9.9), (9.85, 9.85), ("none", "batched")),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_fastest_way_is_chosen(name: str, timings: dict[Any, Any]) -> None:
    batched, serial, chosen = CHOICES[name]
    timings["batched", 2] = batched
    if serial:
        timings["serial", 2] = serial
    auto, _ = build(graph="auto")
    result = draw(auto)
    (decision,) = auto.report()["programs"]
    assert (decision["graph"], decision["batching"]) == chosen
    assert decision["reason"] == ("" if chosen[0] == "stand-in" else "eager is as fast")
    expected = {"eager batched": batched[0] * 1e3, "graph batched": batched[1] * 1e3}
    if serial:
        expected |= {"eager serial": serial[0] * 1e3, "graph serial": serial[1] * 1e3}
    assert decision["milliseconds"] == expected
    eager, _ = build(graph=False, batching=chosen[1])
    assert torch.equal(result, draw(eager))


def test_a_second_way_that_cannot_be_captured_is_not_taken(
    timings: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timings["batched", 2] = (10.0, 9.5)
    tried: list[Any] = []
    examine = programs.examine

    def refuse_the_second(*arguments: Any) -> Any:
        tried.append(arguments)
        if len(tried) == 2:
            raise CaptureError("no")
        return examine(*arguments)

    monkeypatch.setattr(programs, "examine", refuse_the_second)
    auto, _ = build(graph="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(auto)
    (decision,) = auto.report()["programs"]
    assert (decision["graph"], decision["batching"], decision["reason"]) == ("stand-in", "batched", "")
    assert len(tried) == 2


def test_every_set_of_branches_is_decided_by_itself(timings: dict[Any, Any]) -> None:
    timings["batched", 2] = timings["serial", 2] = (10.0, 10.0)
    timings["batched", 1] = (10.0, 2.0)
    auto, _ = build(CFG(3.0, interval=(0.2, 0.7)), graph="auto")
    draw(auto)
    assert {p["branches"]: p["graph"] for p in auto.report()["programs"]} == {
        ("cond", "uncond"): "none",
        ("cond",): "stand-in",
    }
    assert (auto.report()["graph"], auto.report()["graph_reason"]) == ("stand-in", "eager is as fast")


def test_the_largest_graph_is_captured_first() -> None:
    """Smaller ones fit into its memory."""
    captured, model = build(CFG(3.0, interval=(0.5, 1.0)))
    draw(captured)
    assert captured.report()["branches"][0] == 1
    assert [p["branches"] for p in captured.report()["programs"]] == [("cond", "uncond"), ("cond",)]
    sizes = [size for i, size in enumerate(model.log.sizes) if i == 0 or size != model.log.sizes[i - 1]]
    assert sizes[:2] == [4, 2]


def test_asking_for_a_graph_overrides_the_timing(timings: dict[Any, Any]) -> None:
    timings["batched", 2] = timings["serial", 2] = (1.0, 99.0)
    always, _ = build(graph=True)
    draw(always)
    assert always.report()["graph"] == "stand-in"
    assert always.report()["programs"][0]["milliseconds"] == {}
    never, model = build(graph=False)
    draw(never)
    assert never.report()["graph"] == "none"
    assert model.log.calls == 5


def test_a_batching_asked_for_is_kept(timings: dict[Any, Any]) -> None:
    timings["batched", 2], timings["serial", 2] = (10.0, 10.0), (1.0, 1.0)
    batched, _ = build(graph="auto", batching="batched")
    draw(batched)
    assert set(batched.report()["programs"][0]["milliseconds"]) == {"eager batched", "graph batched"}
    serial, _ = build(graph="auto", batching="serial")
    draw(serial)
    assert serial.report()["programs"][0]["batching"] == "serial"


def test_real_timings_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "times_graphs", lambda device: True)
    auto, _ = build(graph="auto")
    draw(auto)
    assert all(value > 0 for value in auto.report()["programs"][0]["milliseconds"].values())


# Models that cannot be captured


class Reading(Model):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * (0.5 if t[0].item() > 50 else 0.25)


class Counting(Model):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * (1 + 0.01 * self.log.calls)


@pytest.mark.parametrize("graph", [True, "auto"])
@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Reading(), r"_local_scalar_dense\S* \(test_programs.py:\d+ in forward: `return .*item\(\).*`\) reads"),
        (Counting(), r"steps are not alike: aten.mul.Tensor \(test_programs.py:\d+ in forward: `return .*calls\)`\)"),
    ],
    ids=["reading", "counting"],
)
def test_a_model_that_cannot_be_captured_runs_eagerly_with_one_warning(
    model: Model, line: str, graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "times_graphs", lambda device: True)
    guidance = CFG(3.0, interval=(0.0, 0.5))
    captured = Sampler(model, TABLES["ddim"], guidance=guidance, graph=graph)
    with pytest.warns(UserWarning, match=f"running eagerly: the model cannot be captured: .*{line}") as caught:
        draw(captured)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured.sample((1, *SHAPE[1:]), cond={"y": torch.ones(1)}, uncond={"y": torch.zeros(1)}, seed=0)
    report = captured.report()
    assert report["graph"] == "none"
    assert "cannot be captured" in report["graph_reason"]
    model.log.calls = 0
    result = draw(captured)
    model.log.calls = 0
    assert torch.equal(result, draw(Sampler(model, TABLES["ddim"], guidance=guidance, graph=False)))


def test_a_replay_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "StandIn", lambda rows: lambda: None)
    captured, _ = build()
    with pytest.warns(UserWarning, match="a replay gives other numbers than the model"):
        result = draw(captured)
    eager, _ = build(graph=False)
    assert torch.equal(result, draw(eager))


def test_random_numbers_of_the_models_own_do_not_prevent_a_capture() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x + torch.randn_like(x) + y.view(-1, 1, 1, 1)

    captured = Sampler(model, TABLES["ddim"], guidance=CFG(3.0), graph=True)
    torch.manual_seed(3)
    first = draw(captured)
    assert captured.report()["graph"] == "stand-in"
    torch.manual_seed(3)
    again = draw(captured)
    assert torch.equal(again, draw_after(captured, 3))
    assert not torch.equal(again, draw(captured))
    assert torch.equal(first, again)


def draw_after(used: Sampler, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return draw(used)


def test_rows_that_do_not_fit_into_a_graph_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = programs.StandIn

    def small(rows: Any) -> Any:
        if len(rows) > 1:
            raise CaptureError("out of memory")
        return stand_in(rows)

    monkeypatch.setattr(programs, "StandIn", small)
    several, _ = build(rows_per_graph=3)
    result = draw(several)
    assert torch.equal(result, draw(build()[0]))
    assert several.report()["graph"] == "stand-in"
    assert several.report()["graph_reason"] == "one row in a graph: out of memory"


# Compiled models


class Plain(Model):
    """Without the counters, on which compiled code would depend."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + y.view(-1, 1, 1, 1)) - 0.002 * t.to(x.dtype).view(-1, 1, 1, 1)


def plain(model: Any = None, **options: Any) -> Sampler:
    return Sampler(Plain() if model is None else model, TABLES["ddim"], guidance=CFG(3.0), clip=1.0, **options)


@pytest.mark.parametrize("how", ["the user", "compile"])
@pytest.mark.parametrize("graph", [False, True])
def test_compiled_models_compose(how: str, graph: bool) -> None:
    want = draw(plain(graph=False))
    compiled = plain(compile="default", graph=graph) if how == "compile" else plain(torch.compile(Plain()), graph=graph)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="running eagerly")
        results = [draw(compiled, seed) for seed in (1, 2, 1)]
    torch.testing.assert_close(results[0], want, rtol=0, atol=5e-6)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert compiled.report()["graph"] == ("stand-in" if graph else "none")
    if graph:
        eager = plain(compiled._callables()[0], graph=False)
        assert torch.equal(draw(eager), results[0])


def test_a_compiled_models_weights_are_followed() -> None:
    model = Plain()
    compiled = plain(model, compile="default", graph=True)
    first = draw(compiled)
    with torch.no_grad():
        model.conv.weight.mul_(0.5)
    second = draw(compiled)
    assert not torch.equal(second, first)
    assert compiled.report()["captures"] == 1
    model.conv.weight.data = model.conv.weight.data * 2
    assert torch.equal(draw(compiled), first)
    assert compiled.report()["captures"] == 2


def test_compiling_leaves_inductors_graphs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda model, **given: options.update(given) or model)
    sampler_, _ = build(compile="max-autotune")
    draw(sampler_)
    assert options == {"mode": "max-autotune-no-cudagraphs", "dynamic": False}


# Previews


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("every", [1, 2, 9])
def test_previews_come_one_row_late_and_complete(every: int, graph: bool) -> None:
    sampler_, _ = build(graph=graph)
    steps = list(sampler_.iterate(SHAPE, branches=conditioning(CFG()), seed=1))
    seen: list[Any] = []
    enqueued: list[int] = []
    result = draw(
        sampler_,
        callback=lambda step: enqueued.append(step.row),
        preview=lambda preview: seen.append((preview, len(enqueued))),
        preview_every=every,
    )
    rows = [row for row in range(5) if row % every == 0 or row == 4]
    assert [preview.row for preview, _ in seen] == rows
    # A row's preview is delivered when the next row has been enqueued, the last one's at the end.
    assert [after for _, after in seen] == [min(row + 2, 5) for row in rows]
    for preview, _ in seen:
        assert torch.equal(preview.x0, steps[preview.row].x0)
        assert (preview.rows, preview.step, preview.t) == (5, preview.row, steps[preview.row].t)
        assert preview.x0.device.type == "cpu"
    assert torch.equal(result, draw(sampler_))


def test_previews_are_the_callers_own() -> None:
    sampler_, _ = build()
    seen: list[Tensor] = []
    draw(sampler_, preview=lambda preview: seen.append(preview.x0))
    kept = [x0.clone() for x0 in seen]
    draw(sampler_, seed=2, preview=lambda preview: preview.x0.zero_())
    assert all(map(torch.equal, seen, kept))


@pytest.mark.parametrize("every", [0, 1.5, "2"])
def test_a_bad_interval_of_previews_is_an_error(every: Any) -> None:
    sampler_, _ = build()
    with pytest.raises(ValueError, match=r"preview_every: got .* expected an integer of at least 1"):
        draw(sampler_, preview=print, preview_every=every)


class FakeEvent:
    """Notes, with a stream's name, what happens to it."""

    log: ClassVar[list[str]] = []

    def __init__(self, **options: Any) -> None:
        assert options == {"blocking": True}

    def record(self, stream: Any) -> None:
        self.log.append(f"record {id(self)}")

    def synchronize(self) -> None:
        self.log.append(f"wait {id(self)}")


def test_the_host_is_never_more_than_a_row_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the row before last's event, never for the one just recorded."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    FakeEvent.log = []
    pace = Pace(torch.device("cuda"))
    for _ in range(4):
        pace.after_row()
    a, b = dict.fromkeys(entry.split()[1] for entry in FakeEvent.log)
    assert FakeEvent.log == [
        *(f"record {a}", f"record {b}", f"wait {a}"),
        *(f"record {a}", f"wait {b}", f"record {b}", f"wait {a}"),
    ]


def test_a_value_read_back_is_the_one_pushed() -> None:
    tensor = torch.arange(3.0)
    readback = Readback(tensor)
    readback.push(tensor)
    tensor.zero_()
    taken = readback.take()
    readback.push(tensor)
    assert taken.tolist() == [0, 1, 2]
    assert readback.take().tolist() == [0, 0, 0]


# Adaptive guidance


LONG = solvers.ddim(Schedule.named("squaredcos_cap_v2", 100).respace(12))
# Values y that come to agree at different rows, and the threshold.
AGREEING = ([1.6, 1.0], 0.93)


class Converging(Model):
    """Branches that come together sample by sample: their cosine depends on t and on the sample's own y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.log.sizes.append(len(x))
        ones = [1] * (x.ndim - 1)
        base = torch.tanh(x)
        turned = base.flip(1) * (y * t.to(x.dtype) / 100).view(-1, *ones)
        return base + turned


def adaptive(y: list[float], threshold: float, graph: bool, guidance: Guidance | None = None) -> tuple[Any, ...]:
    model = Converging()
    guidance = AdaptiveCFG(2.0, threshold=threshold) if guidance is None else guidance
    sampler_ = Sampler(model, LONG, guidance=guidance, graph=graph)
    conditions = {"cond": {"y": torch.tensor(y)}, "uncond": {"y": torch.zeros(len(y))}}
    steps = list(sampler_.iterate((len(y), *SHAPE[1:]), branches=conditions, seed=0))
    return torch.stack([step.x for step in steps]), sampler_.report()["branches"], sampler_


def agreed_at(y: list[float], threshold: float, states: Tensor) -> list[int]:
    """The row of each sample at which its branches agree first, by direct computation along the states of a run."""
    table = LONG
    x = philox_normal(sample_seeds(0, len(y)), SHAPE[1:], row=0, stream=INITIAL_STREAM)
    first = [len(table)] * len(y)
    for row, t in enumerate(table["t"]):
        for i, value in enumerate(y):
            base = torch.tanh(x[i].double())
            cond = base + base.flip(0) * (value * t / 100)
            if torch.cosine_similarity(cond.flatten(), base.flatten(), dim=0) >= threshold:
                first[i] = min(first[i], row)
        x = states[row]
    return first


@pytest.mark.parametrize("graph", [False, True])
def test_adaptive_guidance_is_guidance_until_the_branches_agree(graph: bool) -> None:
    y, threshold = AGREEING
    states, branches, _ = adaptive(y, threshold, graph)
    guided, _, _ = adaptive(y, threshold, graph, CFG(2.0))
    first = agreed_at(y, threshold, states)
    # Not all at once, not at the first row, and before the end.
    assert 0 < first[1] < first[0] < 9, first
    assert states.isfinite().all()
    for i, row in enumerate(first):
        assert torch.equal(states[: row + 2, i], guided[: row + 2, i])
        assert not torch.equal(states[row + 2, i], guided[row + 2, i])
    # From two rows after the last sample's agreement on, one branch is left.
    assert branches == [2] * (first[0] + 2) + [1] * (12 - first[0] - 2)


@pytest.mark.parametrize("graph", [False, True])
def test_a_sample_stops_by_itself_whatever_the_batch(graph: bool) -> None:
    together, _, _ = adaptive(*AGREEING, graph)
    model = Converging()
    single = Sampler(model, LONG, guidance=AdaptiveCFG(2.0, threshold=AGREEING[1]), graph=graph)
    conditions = {"cond": {"y": torch.tensor(AGREEING[0][1:])}, "uncond": {"y": torch.zeros(1)}}
    steps = list(single.iterate((1, *SHAPE[1:]), branches=conditions, seed=1))
    for row, step in enumerate(steps):
        torch.testing.assert_close(step.x[0], together[row, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("graph", [False, True])
def test_adaptive_guidance_starts_anew_with_every_run(graph: bool) -> None:
    _, branches, sampler_ = adaptive(*AGREEING, graph)
    conditions = {"cond": {"y": torch.tensor(AGREEING[0])}, "uncond": {"y": torch.zeros(2)}}
    first = sampler_.sample(SHAPE, branches=conditions, seed=0)
    again = sampler_.sample(SHAPE, branches=conditions, seed=0)
    assert torch.equal(first, again)
    assert sampler_.report()["branches"] == branches
    # Branches that never agree keep their guidance.
    conditions["cond"] = {"y": torch.tensor([-40.0, 60.0])}
    sampler_.sample(SHAPE, branches=conditions, seed=0)
    assert sampler_.report()["branches"] == [2] * 12


def test_equal_branches_agree_at_once_and_empty_ones_never() -> None:
    _, branches, _ = adaptive([0.0, 0.0], 0.9999, True)
    assert branches == [2, 2] + [1] * 10
    zero = Sampler(lambda x, t, y: 0 * x, LONG, guidance=AdaptiveCFG(2.0, threshold=0.5))
    draw(zero)
    assert zero.report()["branches"] == [2] * 12


def test_adaptive_guidance_within_an_interval() -> None:
    guidance = AdaptiveCFG(2.0, interval=(0.25, 1.0), threshold=-1.0)
    _, branches, _ = adaptive([1.0, 0.6], 0, True, guidance)
    assert branches == [1] * 3 + [2] * 2 + [1] * 7


@pytest.mark.parametrize("threshold", [1.5, -2.0, float("nan"), "0.9"])
def test_a_threshold_that_is_no_cosine_is_an_error(threshold: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold: got .* expected a cosine"):
        AdaptiveCFG(2.0, threshold=threshold)


def test_a_table_that_needs_both_branches_is_an_error() -> None:
    history, _ = build(AdaptiveCFG(2.0), table="history")
    with pytest.raises(ValueError, match=r"guidance: got AdaptiveCFG with the table .* expected CFG"):
        draw(history)


# Progress


@pytest.mark.parametrize("rows_per_graph", [1, 2])
def test_progress_counts_rows(rows_per_graph: int, capsys: pytest.CaptureFixture[str]) -> None:
    sampler_, _ = build(rows_per_graph=rows_per_graph)
    quiet = draw(sampler_)
    assert torch.equal(draw(sampler_, progress=True), quiet)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(("progress", "shown"), [(1, True), (0, False), (None, False)])
def test_progress_may_be_anything_true_or_false(progress: Any, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    draw(build()[0], progress=progress)
    assert ("5/5" in capsys.readouterr().err) == shown


def test_a_bar_of_the_callers_is_updated_and_left_open() -> None:
    class Bar:
        updates: ClassVar[list[int]] = []

        def update(self, count: int) -> None:
            self.updates.append(count)

    draw(build(rows_per_graph=2)[0], progress=Bar())
    assert Bar.updates == [2, 2, 1]


# Threads


@pytest.mark.parametrize("graph", [False, True])
def test_samplers_in_threads(graph: bool) -> None:
    want = [draw(build(graph=graph)[0], seed) for seed in range(4)]
    results: dict[int, list[Tensor]] = {}
    shared, _ = build(graph=graph)
    draw(shared)

    def work(seed: int, own: Sampler) -> None:
        results[seed] = [draw(own, seed) for _ in range(5)]

    for make in (lambda: build(graph=graph)[0], lambda: shared):
        threads = [threading.Thread(target=work, args=(seed, make())) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, want[seed]) for seed in range(4) for result in results.pop(seed))


# Failures: of the model's calls in tests/engine/graphs/test_captured_loop.py, and those that a run's user brings about


@pytest.mark.parametrize("where", ["callback", "preview", "noise"])
@pytest.mark.parametrize("graph", [False, True])
def test_an_interrupt_in_mid_loop_leaves_the_sampler_usable(where: str, graph: bool) -> None:
    def interrupt(*args: Any) -> Tensor:
        interrupt.count += 1  # type: ignore[attr-defined]
        if interrupt.count == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return torch.zeros(SHAPE)

    interrupt.count = 0  # type: ignore[attr-defined]
    sampler_, _ = build(graph=graph)
    want = draw(sampler_)
    with pytest.raises(KeyboardInterrupt):
        draw(sampler_, **{where: interrupt})
    assert torch.equal(draw(sampler_), want)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


# Memory and the host's work


def live_tensors() -> int:
    gc.collect()
    return sum(type(item) is Tensor for item in gc.get_objects())


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("guidance", ["cfg", "interval", "adaptive"])
def test_hundreds_of_calls_keep_no_tensors(guidance: str, graph: bool) -> None:
    sampler_, _ = build(GUIDANCES[guidance], table="ddim", graph=graph)

    def call(seed: int) -> None:
        sampler_.sample((1, 3, 2, 2), seed=seed, cond={"y": torch.ones(1)}, uncond={"y": torch.zeros(1)})

    call(0)
    call(1)
    before, nbytes = live_tensors(), sampler_.memory()
    for seed in range(300 if guidance == "cfg" else 100):
        call(seed)
    assert live_tensors() <= before
    assert sampler_.memory() == nbytes


class OperationLog(DispatchMode):
    """The operations that are dispatched, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


def calls_by_row(run: Callable[[], Iterator[int]]) -> list[list[str]]:
    """The Python functions and built-in ones called for each row of a run, without those of the first and last."""
    log: list[list[str]] = [[]]

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            log[-1].append(frame.f_code.co_name)
        elif event == "c_call":
            log[-1].append(argument.__name__)

    rows = run()
    sys.setprofile(profile)
    try:
        for _ in rows:
            log.append([])
    finally:
        sys.setprofile(None)
    return [calls[:-1] for calls in log[1:-1]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"noise_source": "philox"}, {"rows", "replay"}),
        ({"noise_source": "philox", "rows_per_graph": 2}, {"rows", "replay"}),
        ({"noise_source": "torch"}, {"rows", "replay", "_draw", "normal_"}),
    ],
    ids=["philox", "two rows", "torch"],
)
def test_a_replayed_row_is_hardly_any_python(options: dict[str, Any], expected: set[str]) -> None:
    """Beside the replay: the loop's own generator, and what draws torch's noise."""
    sampler_, _ = build(table="ddpm fixed_small", **options)
    draw(sampler_)

    def replay() -> None:
        pass

    kept = next(iter(sampler_._cache._kept.values()))
    for programs_ in (kept.programs._single, kept.programs._repeated):
        programs_.update(dict.fromkeys(programs_, replay))
    run = sampler_._prepare(SHAPE, branches=conditioning(CFG()), seed=1)
    log = OperationLog()
    with log:
        list(run.rows())
    # The result's copy comes last.
    assert log.operations == ["aten.normal_.default"] * 5 * (options["noise_source"] == "torch") + [
        "aten.clone.default"
    ]
    run = sampler_._prepare(SHAPE, branches=conditioning(CFG()), seed=1)
    rows = calls_by_row(run.rows)
    assert len(rows) >= 2
    for calls in rows:
        assert expected <= set(calls)
        assert len(calls) <= (2 if options["noise_source"] == "philox" else 18), calls
