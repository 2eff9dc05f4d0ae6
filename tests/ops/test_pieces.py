"""The pieces of the step: kernels against the reference bit for bit, the reference against float64, both compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg import Schedule, ops
from fastcfg.ops.backend import triton_problem
from fastcfg.reference import originals, pieces
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One element; odd sizes of every rank; several programs per sample, of a size that 16-byte accesses divide.
SHAPES = ((1, 1, 1), (2, 3, 63), (3, 3, 7, 11), (2, 4, 24, 24), (2, 2, 3, 5, 7))
LAYOUTS = ("contiguous", "channels_last", "strided")

kernels = pytest.mark.skipif(bool(triton_problem(DEVICE)), reason="needs a GPU or the Triton interpreter")
poisoned = pytest.mark.usefixtures("poison_empty")


def normal(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([values, values], dim=-1)[..., 0] if layout == "strided" else values


def uniform(batch: int, low: float, high: float, seed: int) -> Tensor:
    return (torch.rand(batch, generator=torch.Generator().manual_seed(seed)) * (high - low) + low).to(DEVICE)


def equal(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit, in layout too."""
    return a.stride() == b.stride() and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance of positive float32 values, in representable numbers."""
    return int((a.contiguous().view(torch.int32).long() - b.contiguous().view(torch.int32)).abs().max())


def posterior_arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch = shape[0]
    return {
        "x0": normal(*shape, dtype=dtype, seed=1).clamp(-1, 1),
        "x": normal(*shape, dtype=dtype, seed=2),
        "coef_x0": uniform(batch, 0, 1, 3),
        "coef_x": uniform(batch, 0, 1, 4),
        "min_log": uniform(batch, -20, -10, 5),
        "max_log": uniform(batch, -10, -1, 6),
    }


# Kernel = reference.


@kernels
@poisoned
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_split_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    output = normal(shape[0], 2 * shape[1], *shape[2:], dtype=dtype, layout=layout)
    got = ops.split_model_output(output, shape[1], backend="triton")
    want = ops.split_model_output(output, shape[1], backend="reference")
    for part, other, source in zip(got, want, output.float().chunk(2, dim=1), strict=True):
        assert equal(part, other)
        assert part.is_contiguous()
        assert torch.equal(part, source)


@kernels
@poisoned
@pytest.mark.parametrize(("branches", "base"), [(2, None), (2, 0), (2, 1), (3, None), (3, 1), (5, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, (*DTYPES, *DTYPES), strict=False)))
def test_blend_kernel_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, branches: int, base: int | None
) -> None:
    output = normal(branches * shape[0], *shape[1:], dtype=dtype, layout=layout)
    weights = normal(shape[0], branches, seed=1)
    got, want = (ops.guidance_blend(output, weights, base=base, backend=b) for b in ("triton", "reference"))
    assert equal(got, want)
    assert got.shape == shape
    assert got.is_contiguous()

    weights, momentum = normal(shape[0], branches + 1, seed=1), normal(*shape, seed=2)
    extra: dict[str, Any] = {"base": base, "scaled": base is not None, "momentum": momentum}
    got, want = (ops.guidance_blend(output, weights, **extra, backend=b) for b in ("triton", "reference"))
    assert equal(got, want)
    w = weights.double().view(*weights.shape, *[1] * (len(shape) - 1)).unbind(1)
    m = output.double().chunk(branches)
    exact = sum(w[k] * (m[k] - (0 if base in (None, k) else m[base])) for k in range(branches)) + w[-1] * momentum
    # Measured: 1e-6.
    assert (got - exact).abs().max() < 1e-5


@kernels
@poisoned
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_x0_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str, clip: bool) -> None:
    # The state is as often in another layout and dtype as not.
    x = normal(*shape, dtype=DTYPES[DTYPES.index(dtype) - 1], layout=LAYOUTS[LAYOUTS.index(layout) - 1], seed=1)
    output = normal(*shape, dtype=dtype, layout=layout, seed=2)
    coefficients = uniform(shape[0], 1, 3, 3), -uniform(shape[0], 0, 3, 4)
    bound = uniform(shape[0], 0.5, 2, 5) if clip else None
    for rest in (None, (uniform(shape[0], -1, 1, 6), uniform(shape[0], -1, 1, 7))):
        both = (ops.predict_x0(x, output, *coefficients, bound, rest=rest, backend=b) for b in ("triton", "reference"))
        got, want = both
        assert equal(got, want)
        assert got.is_contiguous()
    if bound is not None:
        assert (got.flatten(1).abs().amax(1) <= bound).all()


@kernels
@poisoned
@pytest.mark.parametrize("layout", [*LAYOUTS, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str | None) -> None:
    arguments = posterior_arguments(shape, dtype)
    channels = None if layout is None else normal(*shape, dtype=dtype, layout=layout, seed=7)
    got, want = (
        ops.posterior_mean_variance(**arguments, variance=channels, backend=b) for b in ("triton", "reference")
    )
    assert equal(got[0], want[0])
    assert equal(got[2], want[2])
    assert [part.shape for part in got] == [torch.Size(shape)] * 3
    # Measured: 1 ulp.
    assert ulps(got[1], want[1]) <= 2
    if channels is None:
        assert torch.equal(got[2], arguments["min_log"].view(-1, *[1] * (len(shape) - 1)).expand(shape))


@kernels
@pytest.mark.parametrize("learned", [False, True])
def test_posterior_kernel_has_an_accurate_exponential(learned: bool) -> None:
    logs = torch.linspace(-46, 2, 1000 if learned else 200, device=DEVICE)
    batch = 1 if learned else len(logs)
    x = torch.zeros(batch, 1, len(logs) // batch, device=DEVICE)
    one = torch.ones(batch, device=DEVICE)
    # (v + 1)/2 * 1 + ... * 0: the channels are the log variance.
    channels = (2 * logs - 1).view(x.shape) if learned else None
    low = 0 * one if learned else logs
    _, variance, log_variance = ops.posterior_mean_variance(x, x, one, one, low, one, channels, backend="triton")
    truth = np.exp(log_variance.cpu().numpy().astype(np.float64))
    # Measured: 0.81. Through exp2(x * log2(e)) it would be 54.
    assert (np.abs(variance.cpu().numpy() - truth) / np.spacing(truth.astype(np.float32))).max() < 1


@kernels
@pytest.mark.filterwarnings("ignore:(invalid|overflow).*:RuntimeWarning")  # the interpreter's numpy
def test_posterior_kernel_at_the_ends_of_the_exponential() -> None:
    logs = torch.tensor([-np.inf, -104.0, -95.0, -87.5, 0.0, 88.5, 90.0, np.inf, np.nan], device=DEVICE)
    x = torch.zeros(len(logs), 1, 1, device=DEVICE)
    one = torch.ones(len(logs), device=DEVICE)
    _, variance, _ = ops.posterior_mean_variance(x, x, one, one, logs, one, backend="triton")
    torch.testing.assert_close(variance.flatten(), torch.exp(logs), rtol=2e-7, atol=2e-45, equal_nan=True)
    assert variance.flatten()[2] > 0


@kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_x0_propagates_nan(backend: str) -> None:
    x, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    x[0, 1, 2, 3] = output[1, 0, 0, 0] = float("nan")
    one = torch.ones(2, device=DEVICE)
    x0 = ops.predict_x0(x, output, one, one, one, backend=backend)
    assert torch.equal(x0.isnan(), x.isnan() | output.isnan())


@kernels
@pytest.mark.parametrize("base", [None, 1])
def test_pieces_in_turn_are_the_guided_step(base: int | None) -> None:
    shape, row = (2, 3, 5, 7), {"p_x": 1.2, "p_m": -0.7, "a_x": 0.9, "a_0": 0.3}
    table = torch.zeros(2, len(DEVICE_COLUMNS), device=DEVICE)
    for name, value in row.items():
        table[0, COLUMNS.index(name)] = value
    output = normal(4, 6, *shape[2:], dtype=torch.bfloat16, layout="channels_last")
    weights, bound = normal(1, 2, 2, seed=1), torch.tensor([0.5, 1.0], device=DEVICE)
    x, x0 = normal(*shape, seed=2), torch.zeros(shape, device=DEVICE)

    coefficient = {name: torch.full((2,), value, device=DEVICE) for name, value in row.items()}
    mean, variance = ops.split_model_output(output, 3, backend="triton")
    blended = ops.guidance_blend(mean, weights[0], base=base, backend="triton")
    predicted = ops.predict_x0(x, blended, coefficient["p_x"], coefficient["p_m"], bound, backend="triton")
    zero = torch.zeros(2, device=DEVICE)
    next_x, _, _ = ops.posterior_mean_variance(
        predicted, x, coefficient["a_0"], coefficient["a_x"], zero, zero, variance[:2], backend="triton"
    )

    counter = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    buffers = StepBuffers(x, table, counter, weights=weights, bound=bound, x0=x0)
    ops.guided_step(output, StepSpec(branches=2, base=base, clip=True, keep_x0=True), buffers, backend="triton")
    assert equal(x0, predicted)
    assert equal(x, next_x)


# The reference against float64, and against the originals' formulas.


def worst(got: Tensor, terms: list[Tensor]) -> float:
    """The largest error in units of 2**-24 of the sum of the terms' magnitudes: rounding errors scale with it."""
    error = (got.double() - torch.stack(torch.broadcast_tensors(*terms)).sum(0)).abs()
    return float((error / torch.stack(torch.broadcast_tensors(*terms)).abs().sum(0)).max() * 2**24)


def test_reference_blend_is_close_to_float64() -> None:
    output, weights = normal(3 * 4, 3, 32, 32), normal(4, 3, seed=1)
    m, w = output.double().unflatten(0, (3, 4)), weights.double()[..., None, None, None].unbind(1)
    # Measured: 2.1 and 2.1.
    assert worst(pieces.guidance_blend(output, weights), [w[k] * m[k] for k in range(3)]) < 3
    difference = [m[1], w[0] * m[0], -w[0] * m[1], w[2] * m[2], -w[2] * m[1]]
    assert worst(pieces.guidance_blend(output, weights, base=1), difference) < 3


def test_reference_x0_and_mean_are_close_to_float64() -> None:
    x, output = normal(4, 3, 32, 32), normal(4, 3, 32, 32, seed=1)
    a, b = uniform(4, 1, 3, 2), uniform(4, -3, 0, 3)
    terms = [a.double().view(4, 1, 1, 1) * x.double(), b.double().view(4, 1, 1, 1) * output.double()]
    # Measured: 1.75.
    assert worst(pieces.predict_x0(x, output, a, b), terms) < 2
    assert worst(pieces.posterior_mean_variance(x, output, a, b, a, b)[0], terms) < 2


def test_reference_variance_is_close_to_float64() -> None:
    arguments = posterior_arguments((4, 3, 32, 32))
    channels = normal(4, 3, 32, 32, seed=7)
    _, variance, log_variance = pieces.posterior_mean_variance(**arguments, variance=channels)
    low, high = (arguments[name].double().view(4, 1, 1, 1) for name in ("min_log", "max_log"))
    fraction = (channels.double() + 1) / 2
    # Measured: 2.1.
    assert worst(log_variance, [low, fraction * high, -fraction * low]) < 4
    torch.testing.assert_close(variance.double(), log_variance.double().exp(), rtol=1.2e-7, atol=0)


def test_reference_computes_in_float64_where_given_float64() -> None:
    arguments = {name: value.double() for name, value in posterior_arguments((2, 3, 4, 4)).items()}
    for part in pieces.posterior_mean_variance(**arguments, variance=normal(2, 3, 4, 4).double()):
        assert part.dtype == torch.float64
    assert pieces.split_model_output(normal(2, 6, 4).double(), 3)[0].dtype == torch.float64


def test_pieces_agree_with_guided_diffusion() -> None:
    schedule, t = Schedule.named("linear", 1000).respace(50), torch.tensor([0, 1, 20, 49])
    x, output = normal(4, 3, 8, 8).cpu(), normal(4, 6, 8, 8, seed=1).cpu()
    theirs = originals.p_mean_variance(schedule, output, x, t, variance="learned_range")

    def at_t(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)[t]

    mean, channels = ops.split_model_output(output, 3)
    to_x0 = at_t(schedule.sqrt_recip_alphas_cumprod), -at_t(schedule.sqrt_recipm1_alphas_cumprod)
    x0 = ops.predict_x0(x, mean, *to_x0, torch.ones(4))
    ours = ops.posterior_mean_variance(
        x0,
        x,
        at_t(schedule.posterior_mean_coef1),
        at_t(schedule.posterior_mean_coef2),
        at_t(schedule.posterior_log_variance_clipped),
        at_t(np.log(schedule.betas)),
        channels,
    )
    # Rounding only: measured 1.2e-7 for x0 and the mean, 1.1e-6 of the variance, 4.2e-7 of its logarithm.
    torch.testing.assert_close(x0, theirs["pred_xstart"], rtol=0, atol=2.5e-7)
    torch.testing.assert_close(ours[0], theirs["mean"], rtol=0, atol=2.5e-7)
    torch.testing.assert_close(ours[1], theirs["variance"], rtol=2.5e-6, atol=0)
    torch.testing.assert_close(ours[2], theirs["log_variance"], rtol=1e-6, atol=0)


# Registration.


def compute_all(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    def function(x: Tensor, output: Tensor, weights: Tensor, coefficient: Tensor) -> tuple[Tensor, ...]:
        mean, variance = ops.split_model_output(output, 3, backend=backend)
        blended = ops.guidance_blend(mean, weights, base=1, backend=backend)
        x0 = ops.predict_x0(x, blended, coefficient, -coefficient, coefficient, backend=backend)
        logs = -10 * coefficient, -coefficient
        learned = ops.posterior_mean_variance(x0, x, coefficient, coefficient, *logs, variance[:2], backend=backend)
        fixed = ops.posterior_mean_variance(x0, x, coefficient, coefficient, *logs, backend=backend)
        return mean, variance, blended, x0, *learned, *fixed

    return function


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=kernels), "reference"])
def test_pieces_compile_to_the_same_bits(backend: str) -> None:
    arguments = (
        normal(2, 3, 5, 7),
        normal(4, 6, 5, 7, dtype=torch.float16, seed=1),
        normal(2, 2, seed=2),
        uniform(2, 0.5, 1, 3),
    )
    eager = compute_all(backend)(*arguments)
    compiled = torch.compile(compute_all(backend), backend="aot_eager", fullgraph=True)(*arguments)
    for got, want in zip(compiled, eager, strict=True):
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


x, wide, coefficient = normal(2, 3, 4, 4), normal(2, 6, 4, 4, dtype=torch.float16), uniform(2, 0.5, 1, 0)


@kernels
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("split_model_output", (wide, 3)),
        ("split_model_output", (normal(2, 6, 4, 4, layout="channels_last"), 3)),
        ("guidance_blend", (wide, uniform(1, 0, 1, 0).repeat(1, 2), -1, False, None)),
        ("predict_x0", (x, x, coefficient, coefficient, None, None, None)),
        ("predict_x0", (x, x, coefficient, coefficient, coefficient, coefficient, coefficient)),
        ("posterior_mean_variance", (x, x, *[coefficient] * 4, None)),
        ("posterior_mean_variance", (x, x, *[coefficient] * 4, x)),
    ],
)
def test_registered_ops_pass_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fastcfg, name).default, arguments)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=kernels), "reference"])
def test_pieces_carry_no_gradient(backend: str) -> None:
    arguments = (
        normal(2, 3, 4, 4).requires_grad_(),
        normal(4, 6, 4, 4, seed=1).requires_grad_(),
        normal(2, 2, seed=2),
        uniform(2, 0.5, 1, 3),
    )
    assert not any(result.requires_grad for result in compute_all(backend)(*arguments))


# Bad arguments.

W = torch.ones(1, 2)
ONE = torch.ones(2)
X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.split_model_output(torch.zeros(2), 3), r"output: got shape \(2,\), expected \[B, C"),
        (lambda: ops.split_model_output(torch.zeros(0, 6, 4), 3), r"output: got shape \(0, 6, 4\)"),
        (lambda: ops.split_model_output(torch.zeros(2, 6, 4), 2), r"output: got 6 channels, expected 2\*2"),
        (lambda: ops.split_model_output(torch.zeros(2, 6, 4).double(), 3), "output: got torch.float64, expected one"),
        (lambda: ops.split_model_output(torch.zeros(2, 6, 4), 3, backend="cuda"), "backend: got 'cuda'"),
        (lambda: ops.guidance_blend(X, ONE), r"weights: got shape \(2,\), expected \[B, K\]"),
        (lambda: ops.guidance_blend(X, torch.ones(2, 1)), r"weights: got shape \(2, 1\)"),
        (lambda: ops.guidance_blend(X, torch.ones(0, 2)), r"weights: got shape \(0, 2\)"),
        (lambda: ops.guidance_blend(X, W.double()), "weights: got torch.float64"),
        (lambda: ops.guidance_blend(X, W.to("meta")), "weights: got .* on meta, expected .* on cpu"),
        (lambda: ops.guidance_blend(X, torch.ones(2, 2)), r"output: got 2 samples, expected 4 \(2 x 2\)"),
        (lambda: ops.guidance_blend(X, W, base=2), "base: got 2, expected a branch index below 2"),
        (lambda: ops.guidance_blend(X, W, base=-1), "base: got -1"),
        (lambda: ops.guidance_blend(X[:0], W), "output: got shape"),
        (lambda: ops.predict_x0(X.long(), X, ONE, ONE), "x: got torch.int64, expected one of"),
        (lambda: ops.predict_x0(X, X[:, :2], ONE, ONE), r"output: got shape \(2, 2, 4, 4\) on cpu, expected \(2, 3"),
        (lambda: ops.predict_x0(X, X.to("meta"), ONE, ONE), "output: got shape .* on meta"),
        (lambda: ops.predict_x0(X, X, torch.ones(3), ONE), r"p_x: got torch.float32 \(3,\)"),
        (lambda: ops.predict_x0(X, X, ONE, torch.ones(4)[::2]), "p_m: got non-contiguous"),
        (lambda: ops.predict_x0(X, X, ONE, ONE, ONE.half()), "bound: got torch.float16"),
        (lambda: ops.posterior_mean_variance(X[0, 0, 0], X, *[ONE] * 4), r"x0: got shape \(4,\)"),
        (lambda: ops.posterior_mean_variance(X, X[:1], *[ONE] * 4), r"x: got shape \(1, 3, 4, 4\)"),
        (lambda: ops.posterior_mean_variance(X, X, ONE, ONE, ONE, ONE[:1]), r"max_log: got torch.float32 \(1,\)"),
        (lambda: ops.posterior_mean_variance(X, X, *[ONE] * 4, X[..., :2]), "variance: got shape"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
