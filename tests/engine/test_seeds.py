"""Seeds and generators: one for each sample gives it the noise that it has alone, from torch as from Philox."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg import Sampler, Schedule, solvers
from fastcfg.frontends import guided_diffusion

SHAPE = (3, 2, 5, 3)
SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(5)
TABLES = {
    "ddpm": solvers.ddpm(SCHEDULE, variance="fixed_small"),
    "ddim": solvers.ddim(SCHEDULE),
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde([8.0, 3.0, 1.0, 0.3, 0.0]),
}


def model(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + x * x)


def sampler(table: str, source: str, **options: Any) -> Sampler:
    return Sampler(model, TABLES[table], noise_source=source, **{"graph": False, **options})


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.quick
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("source", ["torch", "philox"])
@pytest.mark.parametrize("options", [{}, {"graph": True, "rows_per_graph": 2}], ids=["eager", "captured"])
def test_the_noise_of_an_image_is_that_of_the_image_alone(table: str, source: str, options: dict[str, Any]) -> None:
    one, seeds = sampler(table, source, **options), [7, 2**64 - 1, -3]
    both = one.sample(SHAPE, seed=seeds)
    drawn = one.sample(SHAPE, generator=generators(*seeds))
    for i, seed in enumerate(seeds):
        assert torch.equal(one.sample((1, *SHAPE[1:]), seed=[seed])[0], both[i])
        assert torch.equal(one.sample((1, *SHAPE[1:]), generator=generators(seed))[0], drawn[i])
    assert torch.equal(both, drawn) == (source == "torch")
    for kind in (tuple, np.array, torch.tensor):
        small = kind([7, 8, 9])
        assert torch.equal(one.sample(SHAPE, seed=small), one.sample(SHAPE, seed=[7, 8, 9]))
    assert len({tuple(image.flatten().tolist()) for image in both}) == 3


@pytest.mark.quick
def test_lists_of_generators_draw_as_diffusers_draws() -> None:
    """The start and every step's noise are `randn_tensor`'s, and the generators end where it leaves them."""
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    theirs, ours = generators(1, 2, 3), generators(1, 2, 3)
    table = TABLES["ddpm"]
    noise = torch.stack([randn_tensor(SHAPE, generator=theirs) for _ in range(len(table) + 1)])
    want = sampler("ddpm", "philox").sample(SHAPE, x_T=noise[0], noise=noise[1:])
    assert torch.equal(sampler("ddpm", "torch").sample(SHAPE, generator=ours), want)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.quick
def test_one_generator_draws_the_whole_batch_and_goes_on() -> None:
    (one,) = generators(4)
    first = sampler("ddpm", "torch").sample(SHAPE, generator=one)
    assert torch.equal(first, sampler("ddpm", "torch").sample(SHAPE, seed=4))
    second = sampler("ddpm", "torch").sample(SHAPE, generator=one)
    assert not torch.equal(first, second)


@pytest.mark.quick
def test_no_seed_is_a_random_one() -> None:
    for source in ("torch", "philox"):
        one = sampler("ddim", source)
        assert not torch.equal(one.sample(SHAPE), one.sample(SHAPE))
        assert not torch.equal(one.sample(SHAPE)[0], one.sample(SHAPE)[1])


@pytest.mark.quick
@pytest.mark.parametrize("source", ["torch", "philox"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected -2"),
        ({"seed": -(2**63) - 1}, "seed: got -9223372036854775809"),
        ({"seed": [1, 2**64, 3]}, "seed: got 18446744073709551616"),
        ({"seed": [1, 2]}, r"seed: got 2 seeds, expected one per sample \(3\)"),
        ({"seed": 1.0}, "seed: got 1.0, expected an integer"),
        ({"seed": [1, 2, 3.0]}, "seed: got .* expected an integer"),
        ({"seed": torch.Generator()}, "seed: got"),
        ({"generator": generators(1, 2)}, r"generator: got 2 generators, expected one, or one per sample \(3\)"),
        ({"generator": [1, 2, 3]}, "generator: got list, expected a torch.Generator, a list"),
        ({"generator": 3}, "generator: got int"),
        ({"generator": generators(1), "seed": 3}, "generator: got"),
    ],
)
def test_other_seeds_are_refused_before_any_work(source: str, arguments: dict[str, Any], message: str) -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises((TypeError, ValueError), match=message):
        Sampler(never, TABLES["ddpm"], noise_source=source, graph=False).sample(SHAPE, **arguments)


@pytest.mark.quick
def test_seeds_beyond_64_bits_are_refused_by_the_drop_ins() -> None:
    diffusion = guided_diffusion.create_gaussian_diffusion(steps=50, timestep_respacing="5")
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="seed: got 18446744073709551616, expected"):
            diffusion.p_sample_loop(lambda x, t: x, SHAPE, device="cpu", seed=2**64, backend=backend)
