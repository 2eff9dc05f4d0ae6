"""Captures on a pretend GPU: unmodified models, with everything that would cross between host and device forbidden, as
while a stream is captured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.pretend_gpu import CAN_PRETEND, TO_DEVICE, PretendGpu
from support.small_networks import TOKENS, embed_as_the_originals, text_unet, unet
from torch import Tensor, nn

from fastcfg import CFG, AdaptiveCFG, Sampler, Schedule, solvers
from fastcfg.engine import config, programs
from fastcfg.engine.graphs import CaptureError, Comparison, StandIn, compare, examine

pytestmark = pytest.mark.skipif(not CAN_PRETEND, reason="there is a real GPU, or torch is too old to pretend one")

SHAPE = (2, 3, 8, 8)
SCHEDULE = Schedule.named("squaredcos_cap_v2").respace(3)
# Without noise, which would be most of a row's operations.
TABLE = solvers.ddim(SCHEDULE)


class Stream:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = wait_stream


class Event:
    def __init__(self, **options: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    synchronize = record


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """A pretend GPU whose graphs are recorded as a GPU's are: nothing may cross meanwhile."""
    with PretendGpu() as pretend:

        def capture(rows: Any, examined: Any, pool: Any) -> StandIn:
            def strict() -> None:
                with examined.reused() as constants:
                    for program in rows:
                        constants.restart()
                        program()

            pretend.capturing = True
            try:
                return StandIn([strict])
            except RuntimeError as error:
                raise error if isinstance(error, CaptureError) else CaptureError(str(error)) from error
            finally:
                pretend.capturing = False

        def replay_only(*args: Any) -> Comparison:
            compared = compare(*args)
            return Comparison(compared.same, 1.0, 0.5)

        stream, empty = Stream(), torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr("fastcfg.engine.graphs.comparison._timed", lambda run, device: run() or 1.0)
        monkeypatch.setattr(programs, "CudaGraph", capture)
        monkeypatch.setattr(programs, "compare", replay_only)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
        yield pretend


class Upstream(nn.Module):
    """As the originals write a network: its frequencies are made on the CPU and copied in every call."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.time = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(8, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = self.time(embed_as_the_originals(t, 8)) + y[:, None]
        return self.conv(torch.tanh(x + emb[:, :, None, None]))


class Listing(Upstream):
    """Makes small tensors of numbers on the device."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        mean = torch.tensor([0.1, 0.2, 0.3], device=x.device).view(1, 3, 1, 1)
        return super().forward(x - mean, t, y) * torch.as_tensor(0.5, device=x.device)


class Writing(Upstream):
    """Writes to what it has copied."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + torch.arange(8.0).to(x.device).add_(y[0]).sin_(), t, y)


class Indexing(Upstream):
    """Chooses by numbers of the host's."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x[:, [2, 0, 1]], t, y)


def run(
    gpu: PretendGpu, model: nn.Module, graph: bool | str, **options: Any
) -> tuple[list[Tensor], Sampler, list[int]]:
    """Two runs' samples, and the crossings of the second's rows."""
    guidance = options.pop("guidance", CFG(2.0))
    table = options.pop("table", TABLE)
    made = Sampler(model, table, guidance=guidance, clip=1.0, backend="reference", graph=graph, **options)
    results: list[Tensor] = []
    crossings: Any = []
    for seed in (0, 1):
        conditions = {name: {"y": gpu.tensor(torch.tensor(value))} for name, value in CONDITIONS.items()}
        before = len(gpu.crossings)
        prepared = made._prepare(SHAPE, **conditions, seed=seed)
        start = len(gpu.crossings)
        assert start > before  # seeds and weights
        for _ in prepared.rows():
            pass
        crossings = gpu.crossings[start:]
        results.append(gpu.host(prepared.result))
    return results, made, crossings


CONDITIONS = {"cond": [0.5, -1.0], "uncond": [0.0, 0.0]}


@pytest.mark.parametrize("kind", [Upstream, Listing, Writing, Indexing])
@pytest.mark.parametrize("batching", ["batched", "serial"])
def test_unmodified_models_are_captured(kind: Callable[[], nn.Module], batching: str, gpu: PretendGpu) -> None:
    model = gpu.module(kind())
    eager, _, crossings = run(gpu, model, False, batching=batching)
    per_call = {Upstream: 1, Listing: 3, Writing: 2, Indexing: 2}[kind] * (2 if batching == "serial" else 1)
    assert len(crossings) == TABLE.num_rows * per_call
    assert {crossing.kind for crossing in crossings} == {TO_DEVICE}
    captured, made, crossings = run(gpu, model, True, batching=batching)
    assert crossings == []
    assert all(map(torch.equal, captured, eager))
    (decision,) = made.report()["programs"]
    assert decision["graph"] == "cuda"
    assert decision["constants"] == per_call


def test_without_the_constants_the_capture_fails(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "examine", lambda *args: type(examine(*args))())
    with pytest.warns(UserWarning, match="copies from the host what it did not copy before"):
        _, made, _ = run(gpu, gpu.module(Upstream()), True)
    assert made.report()["graph"] == "none"


class Reading(Upstream):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * (1.0 if t[0] > 500 else 0.5)


class Listed(Upstream):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) / math.sqrt(1 + sum(t.tolist()))


class Fetching(Upstream):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) + torch.sin(t.cpu().float()).to(x.device)[:, None, None, None]


class Drawing(Upstream):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + torch.randn(8).to(x.device), t, y)


@pytest.mark.parametrize("kind", [Reading, Listed, Fetching, Drawing])
def test_what_varies_ends_in_eager_runs(kind: Callable[[], nn.Module], gpu: PretendGpu) -> None:
    model = gpu.module(kind())
    torch.manual_seed(0)
    eager, _, _ = run(gpu, model, False)
    with pytest.warns(UserWarning, match=r"cannot be captured: .* \(\w+.py:\d+ in \w+: `.*`\)") as caught:
        captured, made, _ = run(gpu, model, True)
    assert len(caught) == 1
    assert made.report()["graph"] == "none"
    if kind is not Drawing:
        assert all(map(torch.equal, captured, eager))


@pytest.mark.parametrize(
    "guidance", [CFG(2.0, interval=(0.0, 0.5)), AdaptiveCFG(2.0, threshold=0.5)], ids=["interval", "adaptive"]
)
@pytest.mark.parametrize("table", [solvers.ddpm(SCHEDULE), TABLE], ids=["ddpm", "ddim"])
def test_all_branch_sets_are_captured(guidance: Any, table: Any, gpu: PretendGpu) -> None:
    model = gpu.module(Upstream())
    eager, _, _ = run(gpu, model, False, guidance=guidance, table=table)
    captured, made, crossings = run(gpu, model, "auto", guidance=guidance, table=table)
    assert [decision["graph"] for decision in made.report()["programs"]] == ["cuda", "cuda"]
    assert all(map(torch.equal, captured, eager))
    # Adaptive guidance reads its decision, on a stream of its own.
    assert {crossing.op for crossing in crossings} <= ({"copy_"} if isinstance(guidance, AdaptiveCFG) else set())


def test_graphs_are_timed_on_a_gpu(gpu: PretendGpu) -> None:
    assert config.times_graphs(torch.device("cuda"))
    _, made, _ = run(gpu, gpu.module(Upstream()), "auto")
    assert set(made.report()["programs"][0]["milliseconds"]) == {"eager batched", "graph batched"}


# The originals


def check_captured(gpu: PretendGpu, model: nn.Module, **conditioning: Tensor) -> None:
    moved = gpu.module(model)
    conditions = {name: gpu.tensor(value) for name, value in conditioning.items()}
    results = []
    for graph in (False, True):
        made = Sampler(moved, TABLE, clip=1.0, backend="reference", graph=graph)
        results.append(gpu.host(made.sample(SHAPE, cond=conditions, seed=0)))
    assert torch.equal(*results)
    (decision,) = made.report()["programs"]
    assert (decision["graph"], decision["constants"]) == ("cuda", 1)


@pytest.mark.parametrize("options", [{"num_classes": 3}, {"resblock_updown": True}], ids=["classes", "updown"])
def test_guided_diffusions_networks_are_captured(options: Any, gpu: PretendGpu) -> None:
    module = pytest.importorskip("guided_diffusion.unet", reason="guided-diffusion is not on the path")
    labels = {"y": torch.tensor([0, 2])} if "num_classes" in options else {}
    check_captured(gpu, unet(module.UNetModel, **{"out_channels": 6, **options}), **labels)


@pytest.mark.parametrize("kind", ["Text2ImUNet", "SuperResText2ImUNet", "InpaintText2ImUNet"])
def test_glides_networks_are_captured(kind: str, gpu: PretendGpu) -> None:
    module = pytest.importorskip("glide_text2im.text2im_model", reason="glide-text2im is not on the path")
    more: dict[str, Tensor] = dict(TOKENS)
    if kind.startswith("Super"):
        more["low_res"] = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 4, 4)
    if kind.startswith("Inpaint"):
        more |= {"inpaint_image": torch.zeros(SHAPE), "inpaint_mask": torch.ones(2, 1, 8, 8)}
    check_captured(gpu, text_unet(getattr(module, kind)), **more)
