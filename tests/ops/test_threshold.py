"""Dynamic thresholding: torch.quantile's bits, the two operations on both backends, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg import CFG, DynamicThreshold, Sampler, Schedule, StepTable, ops, solvers
from fastcfg.clip import MAX_SIZE
from fastcfg.ops import GuidedStep, QuantileBound, triton_problem
from fastcfg.reference import quantile_bound
from fastcfg.reference.plain import PlainTable
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import DEVICE_COLUMNS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (1, 2, 3, 63, 64, 1000, 12288)
QUANTILES = (0, 0.3, 0.5, 0.9, 0.995, 1)

kernels = pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs a GPU or the Triton interpreter")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit, but for what kind of NaN it is."""
    integers = {4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    different = a.contiguous().view(integers) != b.contiguous().view(integers)
    return a.shape == b.shape and not bool((different & ~(a.isnan() & b.isnan())).any())


def diffusers_threshold_sample(sample: Tensor, ratio: float, sample_max_value: float | None) -> Tensor:
    """What `_threshold_sample` of diffusers' schedulers computes, with its dynamic_thresholding_ratio."""
    batch, channels, *rest = sample.shape
    flat = sample.reshape(batch, channels * math.prod(rest))
    s = torch.quantile(flat.abs(), ratio, dim=1)
    s = torch.clamp(s, min=1, max=sample_max_value).unsqueeze(1)
    return (torch.clamp(flat, -s, s) / s).reshape(sample.shape)


# The place of the quantile.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0, 0.1, 1 / 3, 0.5, 0.9, 0.995, 0.9999999, 1])
def test_the_place_is_torchs(p: float, dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 101, 12288, 3 * 1024**2, MAX_SIZE - 1, MAX_SIZE):
        rank = float(torch.tensor(p, dtype=dtype) * (size - 1))
        place = DynamicThreshold(p).rank(size, dtype)
        assert (place.rank, place.weight) == (int(rank), rank - int(rank))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantile": 1.5}, ValueError, "quantile: got 1.5, expected 0 to 1"),
        ({"quantile": -0.1}, ValueError, "quantile: got -0.1"),
        ({"quantile": math.nan}, ValueError, "quantile: got nan"),
        ({"quantile": "0.9"}, TypeError, "quantile: got '0.9', expected a number"),
        ({"quantile": True}, TypeError, "quantile: got True"),
        ({"floor": 0.0}, ValueError, "floor: got 0.0, expected a positive finite number"),
        ({"floor": math.inf}, ValueError, "floor: got inf"),
        ({"floor": None}, TypeError, "floor: got None, expected a number$"),
        ({"ceiling": 0.5}, ValueError, "ceiling: got 0.5, expected None or at least the floor, 1.0"),
        ({"ceiling": math.nan}, ValueError, "ceiling: got nan"),
        ({"ceiling": "2"}, TypeError, "ceiling: got '2', expected a number or None"),
    ],
)
def test_bad_thresholds_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicThreshold(**arguments)
    with pytest.raises(error, match=message):
        ops.quantile_bound(normal(1, 1, 2), **arguments)


def test_thresholds_of_equal_numbers_are_equal() -> None:
    given = DynamicThreshold(np.float32(0.5), np.int64(1), 2)
    assert given == DynamicThreshold(0.5, 1.0, 2.0)
    assert hash(given) == hash(DynamicThreshold(0.5, 1.0, 2.0))


def test_more_magnitudes_than_float32_can_number_are_refused() -> None:
    huge = torch.zeros(1).expand(1, 1, MAX_SIZE + 1)
    with pytest.raises(ValueError, match=r"got 16777217 elements in a sample, expected at most 2\*\*24"):
        ops.quantile_bound(huge)
    # The buffers of a run: on the meta device, where they take no memory.
    x = torch.zeros((1, 1, MAX_SIZE + 1), device="meta")
    table = torch.zeros((2, len(DEVICE_COLUMNS)), device="meta")
    counter = torch.zeros(2, dtype=torch.int32, device="meta")
    buffers = StepBuffers(x, table, counter, bound=x[0, 0, :1], x0=x)
    with pytest.raises(ValueError, match=r"expected at most 2\*\*24"):
        QuantileBound(DynamicThreshold(), StepSpec(), buffers)
    sampler = Sampler(rational, TABLES["ddim"], clip=DynamicThreshold())
    with pytest.raises(ValueError, match=r"expected at most 2\*\*24"):
        sampler.sample((1, 1, MAX_SIZE + 1), cond={"y": torch.zeros(1)}, seed=0)


# The reference.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", QUANTILES)
@pytest.mark.parametrize("size", SIZES)
def test_the_reference_gives_the_bits_of_torch_quantile(size: int, p: float, dtype: torch.dtype) -> None:
    x = normal(9, size).to(dtype)
    x[1] = x[1].round()
    x[2] = -0.3
    x[3] = 0
    x[4] *= 1e-40
    x[5] *= 1e38
    x[6, size // 2] = -math.inf
    x[7, size // 3] = math.nan
    place = DynamicThreshold(p).rank(size, dtype)._replace(floor=0.0)
    expected = torch.quantile(x.abs(), p, dim=1)
    assert same_bits(quantile_bound(x, place), expected)
    # In any batch.
    assert same_bits(torch.cat([quantile_bound(x[i : i + 1], place) for i in range(9)]), expected)


@pytest.mark.parametrize("ceiling", [None, 1.0, 2.5])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=kernels), "reference"])
def test_the_operation_is_diffusers(ceiling: float | None, backend: str) -> None:
    x0 = torch.cat([normal(1, 3, 5, 7, seed=i, scale=scale) for i, scale in enumerate((0.1, 1.0, 3.0))])
    got = ops.dynamic_threshold(x0, 0.9, ceiling=ceiling, backend=backend)
    assert same_bits(got, diffusers_threshold_sample(x0, 0.9, ceiling))
    assert got.abs().max() <= 1
    # A sample within the floor is left as it is.
    assert torch.equal(got[0], x0[0])


@kernels
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((1, 1, 1), torch.float32, "contiguous"),
        ((2, 3, 63), torch.float16, "contiguous"),
        ((2, 3, 7, 11), torch.bfloat16, "channels-last"),
        ((1, 2, 3, 5, 7), torch.float32, "strided"),
        ((1, 4, 24, 24), torch.float32, "contiguous"),
    ],
)
def test_the_operations_are_the_same_on_both_backends(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x0 = normal(*shape, scale=2.0).to(dtype)
    if layout == "channels-last":
        x0 = x0.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        x0 = torch.stack([x0, x0], dim=-1)[..., 0]
    for operation in (ops.quantile_bound, ops.dynamic_threshold):
        got, want = (operation(x0, 0.7, 0.5, backend=backend) for backend in ("triton", "reference"))
        assert same_bits(got, want)
        assert got.dtype == torch.float32
        assert got.stride() == want.stride()
    assert same_bits(ops.quantile_bound(x0, 1.0, 1e-30), x0.float().flatten(1).abs().amax(1))


# Registration and bad arguments.


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=kernels), "reference"])
def test_the_operations_compile_to_the_same_bits(backend: str) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x0 = 2 * x
        return ops.quantile_bound(x0, 0.9, backend=backend), ops.dynamic_threshold(x0, 0.9, backend=backend)

    x = normal(2, 3, 5, 7).requires_grad_()
    eager = function(x)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert all(map(same_bits, eager, compiled))
    assert not any(result.requires_grad for result in (*eager, *compiled))


@kernels
def test_the_registered_operations_pass_opcheck() -> None:
    from fastcfg.kernels.quantile import SELECTION

    x, counter = normal(2, 3, 4, 4), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    torch.library.opcheck(torch.ops.fastcfg.quantile_bound.default, (x, 3, 0.25, 1.0, math.inf))
    torch.library.opcheck(torch.ops.fastcfg.threshold.default, (x, one))
    selection = torch.zeros((2, SELECTION), dtype=torch.int32, device=DEVICE)
    table, weights = normal(3, len(DEVICE_COLUMNS)), normal(2, 2, 2)
    arguments = (normal(4, 3, 4, 4), x, table, counter, weights, None, one, x.clone(), selection)
    torch.library.opcheck(torch.ops.fastcfg.step_bound.default, (*arguments, 2, 1, True, 3, 0.25, 1.0, math.inf))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.quantile_bound(torch.zeros(2)), r"x0: got shape \(2,\), expected \[B, C"),
        (lambda: ops.dynamic_threshold(torch.zeros(0, 3, 4)), r"x0: got shape \(0, 3, 4\)"),
        (lambda: ops.dynamic_threshold(torch.zeros(2, 3, 4).double()), "x0: got torch.float64, expected one of"),
        (lambda: ops.quantile_bound(torch.zeros(2, 3, 4), backend="cuda"), "backend: got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["bound", "x0", "weights"])
def test_the_bound_of_a_run_needs_its_buffers(name: str) -> None:
    x = normal(2, 3, 4, 4)
    counter = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    buffers = StepBuffers(x, normal(3, len(DEVICE_COLUMNS)), counter, normal(2, 2, 2), bound=normal(2), x0=x.clone())
    spec = StepSpec(branches=2, base=1, clip=True, rescale=True)
    bound = QuantileBound(DynamicThreshold(), spec, buffers)
    with pytest.raises(ValueError, match=r"model output: got shape \(2, 3, 4, 4\), expected \(4, 3, 4, 4\)"):
        bound(normal(2, 3, 4, 4))
    setattr(buffers, name, None)
    with pytest.raises(ValueError, match=f"{name}: got None"):
        QuantileBound(DynamicThreshold(), spec, buffers)


# Runs.

SHAPE = (3, 2, 8, 8)
CONDITIONS = {"cond": {"y": torch.tensor([1.0, -0.5, 0.25])}, "uncond": {"y": torch.zeros(1)}}


def rational(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """A model of one condition y [B]: bounded, and sensitive to all of its inputs."""
    z = (
        0.9 * x
        + 0.5 * y.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        - 0.001 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    )
    return z / (1 + z * z)


def with_variance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    m = rational(x, t, y)
    return torch.cat([m, m * m - 0.5], dim=1)


def schedule(steps: int) -> Schedule:
    return Schedule.named("squaredcos_cap_v2", 100).respace(steps)


def sample(table: StepTable, threshold: Any, shape: tuple[int, ...] = SHAPE, **options: Any) -> Tensor:
    given = {key: options.pop(key) for key in ("x_T", "noise", "callback") if key in options}
    model = with_variance if table.learned_variance else rational
    sampler = Sampler(model, table, clip=threshold, **{"guidance": CFG(7.0), **options})
    conditions = {name: {"y": value["y"][: shape[0]]} for name, value in CONDITIONS.items()}
    return sampler.sample(shape, seed=4, **conditions, **given)


TABLES = {
    "ddim": solvers.ddim(schedule(5)),
    "ddim eta": solvers.ddim(schedule(5), eta=0.7, prediction="v"),
    "ddpm learned": solvers.ddpm(schedule(5), variance="learned_range"),
}
THRESHOLDS = {
    "imagen": DynamicThreshold(),
    "median": DynamicThreshold(0.5, floor=0.3),
    "ceiling": DynamicThreshold(0.95, ceiling=1.5),
}


@pytest.mark.parametrize("guidance", [CFG(7.0), CFG(7.0, interval=(0.2, 0.7)), CFG(7.0, formulation="sum")], ids=str)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", TABLES)
def test_a_run_in_float64_is_the_formula_done_by_hand(name: str, threshold: str, guidance: CFG) -> None:
    table, limits = TABLES[name], THRESHOLDS[threshold]
    noise = normal(len(table), *SHAPE).double()
    x = noise[0].flip(0) * 1.5
    got = sample(table, limits, x_T=x, noise=noise, guidance=guidance, dtype=torch.float64, state_dtype=torch.float64)
    weights = torch.from_numpy(guidance.plan(table, len(x)).weights)
    spec = StepSpec.of(table, guidance, (0, 1), clip=True, rescale=True, noise_source="tensor")
    model = with_variance if table.learned_variance else rational
    divided, plain = 0, PlainTable(table, x)
    for row in range(len(table)):
        t = torch.full((3,), float(table["t"][row]))
        output = torch.cat([model(x, t, CONDITIONS[key]["y"].double()) for key in ("cond", "uncond")])
        made = plain(row, x, output, spec, weights=weights[row], bound=limits, noise=noise[row])
        divided += int((made["bound"] > limits.floor).sum())
        x = made["x"]
    assert divided > 5
    # Measured: 1.5e-14.
    torch.testing.assert_close(got, x, rtol=0, atol=2e-13)
    assert not torch.equal(got, x * 0)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_one_step_is_diffusers_ddim_with_thresholding(threshold: str) -> None:
    table, limits = solvers.ddim(schedule(4)), THRESHOLDS[threshold]
    steps: list[Any] = []
    x = normal(*SHAPE, seed=3, scale=1.5)
    sample(table, limits, x_T=x, callback=steps.append)
    t = torch.full((3,), int(table["t"][0]))
    cond, uncond = (rational(x, t, CONDITIONS[key]["y"]) for key in ("cond", "uncond"))
    m = torch.addcmul(uncond, torch.tensor(7.0), cond - uncond)
    c = dict(zip(DEVICE_COLUMNS, table.on("cpu")[0], strict=True))
    rest = torch.addcmul(c["p_m_rest"] * m, c["p_x_rest"], x)
    x0 = torch.addcmul(torch.addcmul(rest, c["p_m"], m), c["p_x"], x)
    if limits.floor == 1:
        expected = diffusers_threshold_sample(x0, limits.quantile, limits.ceiling)
    else:
        s = torch.quantile(x0.abs().flatten(1), limits.quantile, dim=1).clamp(min=limits.floor).view(3, 1, 1, 1)
        expected = torch.clamp(x0, -s, s) / s
    assert same_bits(steps[0].x0, expected)
    assert all(step.x0.abs().max() <= 1 for step in steps)


@pytest.mark.parametrize("guidance", [CFG(7.0), CFG(7.0, interval=(0.2, 0.7))], ids=["cfg", "interval"])
@pytest.mark.parametrize("name", TABLES)
def test_a_replayed_program_equals_an_eager_one(name: str, guidance: CFG) -> None:
    results = [sample(TABLES[name], DynamicThreshold(0.9), guidance=guidance, graph=graph) for graph in (False, True)]
    assert torch.equal(*results)
    clipped = sample(TABLES[name], 1.0, guidance=guidance)
    assert not torch.equal(results[0], clipped)


@kernels
@pytest.mark.parametrize("watched", [False, True])
def test_the_kernels_run_the_same_loop_as_the_reference(watched: bool) -> None:
    table, seen = solvers.ddim(schedule(2), eta=0.5), []
    options: dict[str, Any] = {"shape": (2, 1, 4, 17)}
    if watched:
        options["callback"] = lambda step: seen.append(step.x0)
    results = [
        sample(table, DynamicThreshold(0.9), backend=backend, graph=graph, **options)
        for backend, graph in (("reference", False), ("triton", False), ("triton", True))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert len(seen) == 6 * watched
    assert all(torch.equal(seen[i], seen[i % 2]) for i in range(len(seen)))


@pytest.mark.parametrize("name", ["ddim", "ddim eta"])
def test_image_i_is_the_same_in_any_batch(name: str) -> None:
    runs = [sample(TABLES[name], DynamicThreshold(0.9), shape=(batch, *SHAPE[1:])) for batch in (1, 2, 3)]
    assert torch.equal(runs[0], runs[2][:1])
    assert torch.equal(runs[1], runs[2][:2])


@pytest.mark.parametrize("graph", [False, True])
def test_a_threshold_changed_between_calls_acts_as_on_a_fresh_sampler(graph: bool) -> None:
    table = TABLES["ddim eta"]
    sampler = Sampler(rational, table, guidance=CFG(7.0), clip=1.0, graph=graph)
    results = []
    for clip in (1.0, DynamicThreshold(0.9), DynamicThreshold(0.9, ceiling=1.1), 1.0, DynamicThreshold(0.9), None):
        sampler.clip = clip
        assert sampler.clip == clip
        results.append(sampler.sample(SHAPE, seed=4, **CONDITIONS))
        assert torch.equal(results[-1], sample(table, clip, graph=graph))
    assert torch.equal(results[1], results[4])
    assert not torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])


def test_a_run_that_diverged_is_nan_and_leaves_nothing_behind() -> None:
    sampler = Sampler(rational, TABLES["ddim"], guidance=CFG(7.0), clip=DynamicThreshold(0.9))
    expected = sampler.sample(SHAPE, seed=4, **CONDITIONS)
    x_T = torch.ones(SHAPE)
    x_T[1, 0, 0, 0] = math.nan
    diverged = sampler.sample(SHAPE, seed=4, x_T=x_T, **CONDITIONS)
    assert diverged[1].isnan().all()
    assert not diverged[[0, 2]].isnan().any()
    assert torch.equal(sampler.sample(SHAPE, seed=4, **CONDITIONS), expected)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=kernels), "reference"])
def test_a_compiled_bound_and_step_give_the_same_bits(backend: str) -> None:
    spec = StepSpec(branches=2, base=1, clip=True, rescale=True)

    def build() -> tuple[StepBuffers, QuantileBound, GuidedStep]:
        x, counter = normal(2, 3, 4, 4), torch.zeros(2, dtype=torch.int32, device=DEVICE)
        table = normal(3, len(DEVICE_COLUMNS))
        buffers = StepBuffers(x, table, counter, normal(2, 2, 2), bound=normal(2), x0=x.clone())
        bound = QuantileBound(DynamicThreshold(0.9), spec, buffers, backend)
        return buffers, bound, GuidedStep(spec, buffers, backend)

    eager, bound, step = build()
    compiled, other_bound, other_step = build()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(output: Tensor) -> None:
        other_bound(output * 2)
        other_step(output * 2)

    for row in range(2):
        output = normal(4, 3, 4, 4, seed=row)
        bound(output * 2)
        step(output * 2)
        program(output)
    for name, want in vars(eager).items():
        assert want is None or torch.equal(getattr(compiled, name), want), name
