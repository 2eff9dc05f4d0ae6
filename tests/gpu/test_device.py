"""What only a GPU can show: the compiled kernels' bits, captured graphs, and loops without a sync."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastcfg import CFG, ByRow, DynamicThreshold, Sampler, Schedule, StepTable, solvers
from fastcfg.engine.noise import torch_source
from fastcfg.ops import GuidedStep, QuantileBound, gram, initial_noise, quantile_bound
from fastcfg.reference.philox import INITIAL_STREAM, philox_normal, sample_seeds
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
SHAPE = (4, 3, 64, 64)
SCHEDULE = Schedule.named("squaredcos_cap_v2").respace(20)
TABLES = {
    "ddpm": solvers.ddpm(SCHEDULE),
    "ddpm-fixed": solvers.ddpm(SCHEDULE, variance="fixed_large"),
    "ddim": solvers.ddim(SCHEDULE),
    "ddim-eta": solvers.ddim(SCHEDULE, eta=0.7),
}
CLIPS = (1.0, DynamicThreshold(0.9))
SPECS = {
    "plain": StepSpec(),
    "cfg": StepSpec(branches=2, base=1, clip=True, noise_source="philox"),
    "learned": StepSpec(branches=2, base=1, clip=True, noise_source="philox", learned_variance=True),
    "momentum": StepSpec(branches=2, base=1, scaled=True, momentum=True, noise_source="philox"),
    "rescale": StepSpec(branches=2, base=1, clip=True, rescale=True, noise_source="philox"),
    "by channel": StepSpec(branches=2, base=1, weights_by="channel", clip=True, noise_source="philox"),
    "by element": StepSpec(branches=3, base=2, weights_by="element", clip=True, noise_source="philox"),
    "history": StepSpec(branches=3, noise_source="tensor", history=3, raw_output=True, unconditional=2, keep_x0=True),
    "states": StepSpec(history=3, saves_states=True, raw_output=True, predict_x0=False, noise_source="tensor"),
}


class Model(torch.nn.Module):
    """A small network whose output depends on everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.conv(x + y.view(-1, 1, 1, 1)) + torch.sin(t.to(x.dtype)).view(-1, 1, 1, 1)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().to(DEVICE).eval()


def conditioning(batch: int = SHAPE[0]) -> dict[str, dict[str, torch.Tensor]]:
    return {"cond": {"y": torch.linspace(0, 1, batch, device=DEVICE)}, "uncond": {"y": torch.zeros(1, device=DEVICE)}}


def random_buffers(spec: StepSpec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[StepBuffers, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    batch, rows = shape[0], 4
    table = normal(rows + 1, len(DEVICE_COLUMNS))
    table[:, COLUMNS.index("slot")] = torch.tensor([0.0, 1, 2, -1, -1])
    places = {"sample": (), "channel": shape[1:2], "element": shape[1:]}[spec.weights_by]
    buffers = StepBuffers(
        x=normal(*shape),
        table=table,
        counter=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        weights=normal(rows, batch, spec.branches + spec.momentum, *places),
        bound=normal(batch).abs(),
        noise=normal(*shape),
        seeds=sample_seeds(2**40, batch).to(DEVICE),
        history=normal(spec.history + 1, *shape) if spec.history else None,
        momentum=normal(*shape) if spec.momentum else None,
        x0=torch.full(shape, torch.nan, device=DEVICE),
        model_input=torch.zeros((spec.branches * batch, *shape[1:]), dtype=dtype, device=DEVICE),
        time=torch.zeros(spec.branches * batch, device=DEVICE),
    )
    return buffers, normal(spec.branches * batch, 2 * shape[1], *shape[2:]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 5, 7), (2, 4, 10000)], ids=str)
def test_the_gram_matrix_is_the_references_within_its_bound(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output = torch.randn((3 * shape[0], *shape[1:]), device=DEVICE).to(dtype)
    h = torch.randn(shape, device=DEVICE)
    found = []
    for backend, momentum in (("triton", h.clone()), ("triton", h.clone()), ("reference", h.clone())):
        extra = {"momentum": momentum, "decay": -0.5, "conditional": 0, "backend": backend}
        found.append((*gram(output, 3, 2, **extra), momentum))
    (products, sums, moved), again, (want, want_sums, want_moved) = found
    assert torch.equal(products, again[0])
    assert torch.equal(moved, want_moved)
    norms = want.diagonal(dim1=1, dim2=2).sqrt()
    assert ((products - want).abs() <= 2.0**-19 * norms[:, :, None] * norms[:, None, :]).all()
    assert ((sums - want_sums).abs() <= 2.0**-19 * norms * output[0].numel() ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 5, 7), (2, 4, 1000)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_kernel_equals_reference(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = SPECS[name]
    expected, output = random_buffers(spec, shape, dtype)
    got = dataclasses.replace(expected, **{k: v.clone() for k, v in vars(expected).items() if v is not None})
    reference, kernel = GuidedStep(spec, expected, "reference"), GuidedStep(spec, got, "triton")
    for _ in range(3):
        reference(output)
        kernel(output)
    for field in ("counter", "time", "x", "model_input", *(["x0"] if spec.keep_x0 else [])):
        a, b = getattr(got, field), getattr(expected, field)
        if spec.learned_variance and field in ("x", "model_input"):
            # exp2 may differ by 2 ulp; three steps of it here.
            rtol = 1e-5 if a.dtype == torch.float32 else 2 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)
        else:
            assert torch.equal(a, b), field
    if spec.history:
        assert torch.equal(got.history[: spec.history], expected.history[: spec.history])


@pytest.mark.parametrize("p", [0.0, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 1000, 12288, 3 * 512**2, 2**24])
def test_quantile_has_torchs_bits(size: int, p: float) -> None:
    """Whatever the order in which programs arrive: sizes of one and of many, values all equal and all different."""
    x = torch.randn((4, 1, size), generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    x[1] = x[1].round()
    x[2] = 0.25
    x[3, 0, size // 2] = torch.nan
    expected = torch.quantile(x.abs().flatten(1), p, dim=1).clamp(min=1e-3)
    for _ in range(10):
        torch.testing.assert_close(quantile_bound(x, p, 1e-3), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 5, 7), (64, 3, 256, 256)], ids=str)
def test_bound_of_a_row_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = SPECS["rescale"]
    expected, output = random_buffers(spec, shape, dtype)
    got = dataclasses.replace(expected, bound=torch.empty_like(expected.bound), x0=torch.empty_like(expected.x0))
    kernel = QuantileBound(DynamicThreshold(0.9), spec, got, "triton")
    QuantileBound(DynamicThreshold(0.9), spec, expected, "reference")(output)
    for _ in range(10):
        kernel(output)
        assert torch.equal(got.x0, expected.x0)
        assert torch.equal(got.bound, expected.bound)


def test_philox_is_the_cpus() -> None:
    seeds = sample_seeds(7, 3)
    got = initial_noise(torch.empty(3, 3, 37, 11, device=DEVICE), seeds.to(DEVICE), "triton")
    assert torch.equal(got.cpu(), philox_normal(seeds, (3, 37, 11), row=0, stream=INITIAL_STREAM))


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_captured_equals_eager(
    name: str, interval: tuple[float, float], clip: float | DynamicThreshold, model: Model
) -> None:
    table = TABLES[name]
    guidance = CFG(3.0, interval=interval)
    eager = Sampler(model, table, guidance=guidance, clip=clip, graph=False)
    captured = Sampler(model, table, guidance=guidance, clip=clip, graph=True)
    for seed in (0, 1, 0):
        want = eager.sample(SHAPE, seed=seed, **conditioning())
        assert torch.equal(captured.sample(SHAPE, seed=seed, **conditioning()), want)
    assert captured.report()["graph"] == "cuda"


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_loop_never_syncs(name: str, clip: float | DynamicThreshold, model: Model) -> None:
    sampler = Sampler(model, TABLES[name], guidance=CFG(3.0), clip=clip)
    sampler.sample(SHAPE, seed=0, **conditioning())
    run = sampler._prepare(SHAPE, **conditioning(), seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in run.rows():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("by", ["channel", "element", "element of one row"])
def test_scales_by_place_are_captured(by: str, model: Model) -> None:
    scale = torch.rand(1, 3, 1, 1) if by == "channel" else torch.rand(SHAPE)
    scale = scale if "one row" in by else scale * torch.linspace(1, 3, 20).view(20, 1, 1, 1, 1)
    results = []
    for backend, graph in (("reference", False), ("triton", False), ("triton", True)):
        sampler = Sampler(model, TABLES["ddim-eta"], guidance=CFG(scale), clip=1.0, backend=backend, graph=graph)
        results.append(sampler.sample(SHAPE, seed=0, **conditioning()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert sampler.report()["graph"] == "cuda"


@pytest.mark.parametrize("rows_per_graph", [1, 4])
def test_prompts_and_models_by_row_are_captured_and_never_sync(rows_per_graph: int, model: Model) -> None:
    torch.manual_seed(1)
    models = ByRow(model, Model().to(DEVICE).eval(), progress=0.3)
    given, other = conditioning(), {"y": torch.linspace(1, 0, SHAPE[0], device=DEVICE)}
    given["cond"] = ByRow(given["cond"], other, progress=0.55)  # type: ignore[assignment]
    eager, captured = (
        Sampler(models, TABLES["ddim-eta"], guidance=CFG(3.0), graph=graph, rows_per_graph=rows_per_graph)
        for graph in (False, True)
    )
    want = eager.sample(SHAPE, seed=0, **given)
    for _ in range(2):
        assert torch.equal(captured.sample(SHAPE, seed=0, **given), want)
    assert {program["graph"] for program in captured.report()["programs"]} == {"cuda"}
    run = captured._prepare(SHAPE, **given, seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in run.rows():
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(run.result, want)


def test_one_launch_beside_the_model(model: Model) -> None:
    table: StepTable = TABLES["ddpm"]
    sampler = Sampler(model, table, guidance=CFG(3.0), clip=1.0, graph=False)
    sampler.sample(SHAPE, seed=0, **conditioning())
    run = sampler._prepare(SHAPE, **conditioning(), seed=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in run.rows():
            pass
        torch.cuda.synchronize()
    ours = [event for event in profile.events() if "guided_step" in event.name]
    assert len(ours) == table.num_rows


def test_image_is_independent_of_the_batch(model: Model) -> None:
    sampler = Sampler(lambda x, t, y: x * y.view(-1, 1, 1, 1), TABLES["ddim-eta"], guidance=CFG(3.0), device=DEVICE)
    batch = sampler.sample(SHAPE, seed=5, **conditioning())
    y = conditioning()["cond"]["y"][2:3]
    alone = sampler.sample((1, *SHAPE[1:]), seed=7, cond={"y": y}, uncond=conditioning()["uncond"])
    assert torch.equal(alone[0], batch[2])


@pytest.mark.parametrize("batch", [1, 8, 64, 100])
def test_half_a_draw_and_the_offset_of_a_whole_one(batch: int) -> None:
    """What the originals' loops draw for 2B samples, of which B are used."""
    shape = (batch, 3, 64, 64)
    whole = torch.Generator(DEVICE).manual_seed(7)
    source = torch_source(7, shape, DEVICE, drawn=2 * batch, every_row=True)
    noise = torch.empty(shape, device=DEVICE)
    assert torch.equal(source.start(), torch.randn((2 * batch, *shape[1:]), generator=whole, device=DEVICE)[:batch])
    for row, buffer in enumerate([noise, None, noise]):
        drawn = torch.randn((2 * batch, *shape[1:]), generator=whole, device=DEVICE)
        source.fill(row, buffer)  # type: ignore[misc]
        if buffer is not None:
            assert torch.equal(buffer, drawn[:batch])


@pytest.mark.parametrize("functions", ["denoised_fn", "cond_fn"])
def test_functions_of_the_users_are_captured(model: Model, functions: str) -> None:
    def cond_fn(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad((-0.5 * (x - y.view(-1, 1, 1, 1)) ** 2).sum(), x)[0]

    options = {"denoised_fn": lambda x0: 0.5 * x0} if functions == "denoised_fn" else {"cond_fn": cond_fn}
    results = []
    for graph in (False, True):
        sampler = Sampler(model, TABLES["ddpm"], guidance=CFG(3.0), clip=1.0, graph=graph, **options)
        results.append(sampler.sample(SHAPE, **conditioning(), seed=3))
        assert sampler.report()["graph"] == ("cuda" if graph else "none")
    assert torch.equal(*results)
