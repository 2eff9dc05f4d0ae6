"""Samples of any rank from 2 up: vectors [B, D] give the bits of the same numbers as [B, D, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.captured_cases import GUIDANCES, TABLES
from torch import Tensor

import fastcfg
from benchmarks.suite.foreign import load_k_diffusion
from fastcfg import CFG, DynamicThreshold, Sampler, Schedule, solvers
from fastcfg.frontends import guided_diffusion
from fastcfg.frontends._fused import fall_through
from fastcfg.frontends.diffusers import fuse
from fastcfg.ops.stepper import Stepper

B, D = 3, 7
MODULES = load_k_diffusion()
NAMES = {"cond": [1.0, -0.5, 0.2], "uncond": [0.0, 0.0, 0.0], "image": [0.3, 0.2, 0.1]}


def model(x: Tensor, t: Tensor, y: Tensor | None = None, *, variance: bool = False) -> Tensor:
    """Elementwise, so that shapes do not change its rounding."""
    ones = [1] * (x.ndim - 1)
    z = 0.9 * x - 0.001 * t.to(x.dtype).view(-1, *ones)
    z = z if y is None else z + 0.5 * y.to(x.dtype).view(-1, *ones)
    m = z / (1 + z * z)
    return torch.cat([m, m * m - 0.5], dim=1) if variance else m


def with_variance(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return model(x, t, y, variance=True)


# One each, over tables and guidance in turn.
OPTIONS: list[dict[str, Any]] = [
    {"backend": "reference"},
    {"backend": "triton"},
    {"backend": "reference", "graph": True, "rows_per_graph": 2},
    {"backend": "reference", "dtype": torch.float16},
    {"backend": "triton", "dtype": torch.bfloat16},
    {"backend": "reference", "noise_source": "torch", "batching": "serial"},
    {"backend": "reference", "clip": DynamicThreshold()},
    {"backend": "triton", "clip": DynamicThreshold()},
    {"backend": "reference", "state_dtype": torch.float64},
]
PAIRS = [(table, list(GUIDANCES)[i % len(GUIDANCES)], OPTIONS[i % len(OPTIONS)]) for i, table in enumerate(TABLES)]
PAIRS += [(list(TABLES)[i % 10], name, OPTIONS[(i + 4) % len(OPTIONS)]) for i, name in enumerate(GUIDANCES)]


@pytest.mark.parametrize(("table", "guidance", "options"), PAIRS)
def test_vectors_are_images_of_one_place(table: str, guidance: str, options: dict[str, Any]) -> None:
    steps, spec = TABLES[table], GUIDANCES[guidance]
    if steps.uses_unconditional and (spec is None or "uncond" not in spec.branches or guidance.startswith("adaptive")):
        spec = CFG(2.0)
    if guidance == "sum per sample":
        spec = CFG([0.5, 3.0, 1.0], formulation="sum")
    network = with_variance if steps.learned_variance else model
    sampler = Sampler(network, steps, guidance=spec, **{"clip": 1.0, "graph": False, **options})
    branches = {name: {"y": torch.tensor(NAMES[name])} for name in (("cond",) if spec is None else spec.branches)}
    want = sampler.sample((B, D, 1), branches=branches, seed=5)
    got = sampler.sample((B, D), branches=branches, seed=5)
    assert got.shape == (B, D)
    assert torch.equal(got, want[..., 0])
    state = sampler.start((B, D), branches=branches, seed=5).buffers.step.x
    assert not torch.equal(got, state)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (2, 5, 1, 1), (2, 5, 3), (1, 2, 3, 2, 2, 2)])
def test_any_rank_and_every_kind_of_size(shape: tuple[int, ...]) -> None:
    sampler = Sampler(model, solvers.ddim(Schedule.named("linear").respace(4)), clip=1.0, graph=False)
    want = sampler.sample(shape, seed=0)
    sizes = [torch.Size(shape), [np.int64(size) for size in shape], [torch.tensor(size) for size in shape]]
    for size in (*sizes, np.array(shape), torch.tensor(shape)):
        assert torch.equal(sampler.sample(size, seed=0), want)
    diffusion = guided_diffusion.create_gaussian_diffusion(steps=50, timestep_respacing="5")
    torch.manual_seed(0)
    want = diffusion.p_sample_loop(model, shape, device="cpu", backend="reference")
    for size in (*sizes, torch.Size(shape)):
        torch.manual_seed(0)
        size = size if isinstance(size, torch.Size) else tuple(size)
        assert torch.allclose(diffusion.p_sample_loop(model, size, device="cpu"), want, atol=2e-5, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(3,), (2, 0), (2, 3.0), "ab", 3, (True, 2), [[2, 3]]])
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"shape: got .*, expected"):
        Sampler(model, TABLES["ddim"]).sample(shape)


def test_vectors_on_the_gaussian_loops() -> None:
    for learn_sigma, network in ((False, model), (True, with_variance)):
        diffusion = guided_diffusion.create_gaussian_diffusion(
            steps=50, timestep_respacing="6", learn_sigma=learn_sigma
        )
        arguments: dict[str, Any] = {"device": "cpu", "seed": 1}
        for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
            want = loop(network, (4, 16), backend="reference", **arguments)
            assert torch.allclose(loop(network, (4, 16), **arguments), want, atol=2e-5, rtol=0)
            pairs = {"model_kwargs": {"y": torch.tensor([1.0, 2.0, 0.0, 0.0])}, **arguments}
            guided = fastcfg.ClassifierFree(network, 3.0, channels=16)
            want = loop(guided, (4, 16), backend="reference", **pairs)
            assert torch.allclose(loop(guided, (4, 16), **pairs)[:2], want[:2], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_vectors_through_schedulers_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    original = getattr(diffusers, name)()
    fused = fuse(getattr(diffusers, name)())
    fall_through._logged.clear()
    ends = []
    for scheduler in (original, fused):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 6, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t.expand(3))
            options = {"generator": generator} if name == "DDPMScheduler" else {}
            x = scheduler.step(output, t, x, **options).prev_sample
        ends.append(x)
    assert torch.allclose(*ends, atol=1e-5, rtol=1e-5)
    assert not fall_through._logged


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma[:, None] ** 2)


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_heun"])
def test_vectors_through_samplers_of_k_diffusion(name: str) -> None:
    if MODULES is None:
        pytest.skip("of k-diffusion")
    sampling = MODULES[0]
    fall_through._logged.clear()
    levels = torch.tensor([14.6, 3.2, 0.7, 0.1, 0.0])
    x = 14.6 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    original = getattr(sampling, name)
    assert torch.allclose(
        fastcfg.accelerate(original)(denoise, x, levels, disable=True), original(denoise, x, levels, disable=True),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    assert not fall_through._logged


@pytest.mark.quick
def test_vectors_step_by_step() -> None:
    table = TABLES["ddim eta x0"]
    x, output, noise = (torch.randn(3, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    results = [
        Stepper(table, like=part(x), clip=1.0)(0, output=part(output), sample=part(x), noise=part(noise))
        for part in (lambda v: v, lambda v: v[..., None])
    ]
    for vector, image in zip(*results, strict=True):
        assert torch.equal(vector, image[..., 0])


def wide(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return 0.3 * x.double()


@pytest.mark.quick
@pytest.mark.parametrize("graph", [False, True])
def test_float64_outputs_make_the_original_go_on_in_float64(graph: bool) -> None:
    diffusion = guided_diffusion.create_gaussian_diffusion(steps=50, timestep_respacing="5")
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        torch.manual_seed(0)
        want, state = loop(wide, (2, 3, 4, 4), device="cpu", backend="reference"), torch.get_rng_state()
        torch.manual_seed(0)
        got = loop(wide, (2, 3, 4, 4), device="cpu", graph=graph)
        assert got.dtype == torch.float64
        assert torch.equal(got, want)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(0)
        steps = list(getattr(diffusion, f"{loop.__name__}_progressive")(wide, (2, 3, 4, 4), device="cpu", graph=graph))
        assert torch.equal(steps[-1]["sample"], want)
        with pytest.raises(ValueError, match=r"model output: got torch.float64, wider than the state's"):
            loop(wide, (2, 3, 4, 4), device="cpu", noise_source="philox", graph=graph)
