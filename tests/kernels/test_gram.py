"""The Gram kernels under the interpreter, and their reference, within the bound `ops.gram` states, against float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcfg import ops

pytestmark = pytest.mark.quick

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")
BACKENDS = [pytest.param("triton", marks=interpreted), "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = 2.0**-19


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels-last" else tensor


def exact(output: Tensor, branches: int, base: int, channels: int, h: Tensor | None = None) -> tuple[Tensor, ...]:
    """The Gram matrix and the sums in float64, and what their errors are measured by."""
    parts = output[:, :channels].double().chunk(branches)
    vectors = [part if k == base else part - parts[base] for k, part in enumerate(parts)]
    v = torch.stack([*vectors, *([] if h is None else [h.double()])], dim=1).flatten(2)
    return v @ v.mT, v.sum(-1), v.abs() @ v.abs().mT, v.abs().sum(-1)


CASES = [
    # K, base, channels of the output and of the state, momentum of which branch, layout, shape.
    (2, 1, (3, 3), None, "contiguous", (2, 5, 7)),
    (2, 0, (6, 3), 1, "channels-last", (3, 8, 8)),
    (2, 1, (4, 4), 0, "contiguous", (2, 1100)),
    (3, 2, (8, 4), 0, "contiguous", (1, 40, 41)),
    (3, 1, (3, 3), None, "channels-last", (2, 3, 4, 5)),
    (4, 3, (1, 1), 1, "contiguous", (5, 1)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "base", "widths", "conditional", "layout", "shape"), CASES)
@pytest.mark.usefixtures("poison_empty")
def test_products_and_sums_are_those_of_float64(
    k: int,
    base: int,
    widths: tuple[int, int],
    conditional: int | None,
    layout: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> None:
    (wide, channels), (batch, *spatial) = widths, shape
    output = normal(k * batch, wide, *spatial, dtype=dtype, layout=layout)
    output[:batch] += 0.5
    h = None if conditional is None else normal(batch, channels, *spatial, seed=1)
    extra: dict[str, Any] = {"channels": channels, "momentum": h, "decay": -0.75, "conditional": conditional}
    before = None if h is None else h.clone()
    products, sums = ops.gram(output, k, base, **extra, backend=backend)
    if h is not None:
        parts = output[:, :channels].float().chunk(k)
        want = torch.addcmul(parts[conditional] - parts[base], torch.tensor(-0.75), before)  # type: ignore[index]
        assert torch.equal(h, want)
    want_products, want_sums, scale, scale_of_sums = exact(output, k, base, channels, h)
    assert products.shape == want_products.shape == (batch, k + (h is not None), k + (h is not None))
    assert products.dtype == sums.dtype == torch.float64
    assert torch.equal(products, products.mT)
    # Measured: 0.07 of the bound.
    assert ((products - want_products).abs() <= BOUND * scale).all()
    assert ((sums - want_sums).abs() <= BOUND * scale_of_sums).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size", "distance"),
    [(torch.float32, 1.0, 1e-6), (torch.float16, 1.0, 1e-3), (torch.float16, 6e4, 32.0), (torch.float32, 1e16, 1e10)],
)
def test_close_and_huge_branches(dtype: torch.dtype, size: float, distance: float, backend: str) -> None:
    uncond = (normal(2, 3, 9, 9).sign() * size).to(dtype)
    cond = uncond.clone()
    cond[:, :, ::4] += distance
    output = torch.cat([cond, uncond])
    products, _ = ops.gram(output, 2, 1, backend=backend)
    want, _, scale, _ = exact(output, 2, 1, 3)
    assert (want[:, 0, 0] > 0).all()
    # Products of the branches themselves lose the difference between them.
    c, u = output.flatten(1).chunk(2)
    lost = (c * c).sum(1) - 2 * (c * u).sum(1) + (u * u).sum(1)
    assert (lost / want[:, 0, 0] - 1).abs().max() > 1e-3 or distance > 1e-3
    assert ((products - want).abs() <= BOUND * scale).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_nan_stay_in_their_samples(backend: str) -> None:
    output = normal(6, 2, 7)
    output[0], output[3] = 0, 0
    output[1, 0, 0] = float("nan")
    products, sums = ops.gram(output, 2, 1, backend=backend)
    assert not products[0].any()
    assert not sums[0].any()
    assert products[1].isnan().any()
    assert products[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_samples_results_do_not_depend_on_the_batch(backend: str) -> None:
    output = normal(10, 3, 1031)
    many, _ = ops.gram(output, 2, 1, backend=backend)
    for i in (0, 4):
        one, _ = ops.gram(output[[i, 5 + i]], 2, 1, backend=backend)
        assert torch.equal(one[0], many[i])


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (normal(4, 3, 5), {"branches": 1}, "output: got shape .* of K = 1 >= 2"),
        (normal(5, 3, 5), {}, r"output: got shape \(5, 3, 5\), expected \[K\*B, C, ...\] of K = 2"),
        (normal(4, 3, 5).long(), {}, "output: got torch.int64, expected a floating dtype"),
        (normal(4, 3, 5), {"channels": 4}, "channels: got 4, expected 1 to 3"),
        (normal(4, 3, 5), {"base": 2}, "base: got 2, expected a branch index below 2"),
        (normal(4, 3, 5), {"momentum": normal(2, 3, 5)}, "conditional: got None"),
        (normal(4, 3, 5), {"momentum": normal(2, 3, 5), "conditional": 1}, "conditional: got 1, expected .* but 1"),
        (normal(4, 3, 5), {"momentum": normal(2, 3, 4), "conditional": 0}, r"momentum: got torch.float32 \(2, 3, 4\)"),
        (normal(4, 3, 5), {"momentum": normal(2, 3, 5).half(), "conditional": 0}, "momentum: got torch.float16"),
    ],
)
def test_bad_arguments_are_refused(output: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gram(output, **{"branches": 2, "base": 1, **changes})


@interpreted
def test_the_registered_operation_passes_opcheck() -> None:
    for momentum in (None, normal(2, 3, 5)):
        torch.library.opcheck(torch.ops.fastcfg.gram.default, (normal(4, 3, 5), momentum, 2, 1, 3, 0, -0.5))


def test_a_float64_state_is_computed_in_float64() -> None:
    output, h = normal(4, 3, 5).double() / 3, normal(2, 3, 5).double() / 7
    products, _ = ops.gram(output, 2, 1, momentum=h, decay=0.3, conditional=0)
    want, *_ = exact(output, 2, 1, 3, h)
    torch.testing.assert_close(products, want, rtol=1e-14, atol=1e-14)
