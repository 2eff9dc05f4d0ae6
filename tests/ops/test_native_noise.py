"""The starting noise and Brownian noise in C: the reference's bits on every instruction set of this CPU."""

from __future__ import annotations

import math

import pytest
import torch
from support.native import Watching, built, chosen, every_set
from torch import Tensor

from fastcfg.ops import brownian_noise, initial_noise, native_problem, noise
from fastcfg.ops.extension import native_module
from fastcfg.ops.native_pieces import native_brownian
from fastcfg.reference.brownian import brownian_normal
from fastcfg.reference.philox import STEP_STREAM, philox_normal, sample_seeds

MARGIN = 64


def path(terms: int) -> tuple[Tensor, Tensor]:
    """Nodes and factors, some of them padding."""
    generator = torch.Generator().manual_seed(terms)
    nodes = torch.randint(2**31, (terms + 2,), generator=generator)
    return nodes, torch.randn(terms + 2, generator=generator)


@built
@every_set
@pytest.mark.parametrize(("size", "terms"), [(1, 3), (7, 1), (30, 0), (511, 2), (513, 2), (1543, 5)])
def test_brownian_noise_has_the_bits_of_the_reference(size: int, terms: int, instructions: str) -> None:
    seeds, (nodes, factors) = sample_seeds([2**63, -1, 3], 3), path(terms)
    memory = torch.full((3 * size + 2 * MARGIN,), math.nan)
    out = memory[MARGIN:-MARGIN].view(3, size)
    native_brownian(out, seeds, nodes, factors, terms, instructions)
    want = brownian_normal(seeds, nodes, factors, terms, torch.empty(3, size))
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    assert memory[:MARGIN].isnan().all()
    assert memory[-MARGIN:].isnan().all()


@built
@pytest.mark.parametrize("backend", ["auto", "native", "inductor"])
def test_noise_on_a_cpu_is_drawn_in_c(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, (nodes, factors) = sample_seeds(1, 2), path(3)
    want = [
        initial_noise(torch.empty(2, 3, 5), seeds, "reference"),
        brownian_noise(torch.empty(2, 3, 5), seeds, nodes, factors, 3, "reference"),
    ]
    monkeypatch.setattr(noise, "philox_normal", None)
    monkeypatch.setattr(noise, "brownian_normal", None)
    assert torch.equal(initial_noise(torch.empty(2, 3, 5), seeds, backend), want[0])
    assert torch.equal(brownian_noise(torch.empty(2, 3, 5), seeds, nodes, factors, 3, backend), want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_steps_noise_is_that_of_its_row(dtype: torch.dtype) -> None:
    seeds, row = sample_seeds(4, 2), torch.tensor(7, dtype=torch.int32)
    want = philox_normal(seeds, (3, 5), row=7, stream=STEP_STREAM).to(dtype)
    assert torch.equal(noise.step_noise(torch.empty(2, 3, 5, dtype=dtype), seeds, row), want)


def test_without_the_extension_the_reference_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcfg.ops.extension.instruction_sets", tuple)
    seeds = sample_seeds(0, 2)
    assert torch.equal(initial_noise(torch.empty(2, 9), seeds), philox_normal(seeds, (9,), stream=0))
    assert native_problem(torch.device("cpu")) != ""
    with pytest.raises(ValueError, match="'native' cannot run here"):
        initial_noise(torch.empty(2, 9), seeds, "native")


@chosen
def test_who_watches_torchs_operations_sees_those_of_the_reference(backend: str) -> None:
    seeds = sample_seeds(0, 2)
    with Watching() as watching:
        got = initial_noise(torch.empty(2, 9), seeds, backend)
    assert len(watching.seen) > 10
    assert torch.equal(got, initial_noise(torch.empty(2, 9), seeds, backend))


@built
def test_under_torch_compile_the_reference_draws() -> None:
    seeds, (nodes, factors) = sample_seeds(0, 2), path(2)

    @torch.compile(backend="eager", fullgraph=True)
    def draw(seeds: Tensor) -> Tensor:
        return initial_noise(torch.empty(2, 9), seeds, "native") + brownian_noise(
            torch.empty(2, 9), seeds, nodes, factors, 2, "native"
        )

    want = initial_noise(torch.empty(2, 9), seeds) + brownian_noise(torch.empty(2, 9), seeds, nodes, factors, 2)
    assert torch.equal(draw(seeds), want)


@built
def test_arguments_that_cannot_be_are_refused() -> None:
    brownian = native_module().brownian
    with pytest.raises(TypeError, match="got 1 arguments, expected 3"):
        brownian(0)
    with pytest.raises(ValueError, match="instruction set: got 9"):
        brownian(9, 0, b"")
    with pytest.raises(TypeError):
        brownian(0, "1", bytes(64))
