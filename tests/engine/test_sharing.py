"""Samplers shared by threads, copied, pickled, and given other options for one call."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.captured_cases import SHAPE, TABLES, Model, conditioning, gradient, halve
from torch import Tensor

from fastcfg import APG, CFG, DynamicThreshold, Guidance, Sampler, SamplerConfig

CALLS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance": CFG(5.0)},
    "no guidance": {"guidance": None},
    "method of the outputs": {"guidance": APG(4.0)},
    "clip": {"clip": 0.5},
    "no clip": {"clip": None},
    "threshold": {"clip": DynamicThreshold(0.8)},
    "denoised_fn": {"denoised_fn": halve},
    "cond_fn": {"cond_fn": gradient},
}


def made(graph: bool | str = "auto", **options: Any) -> Sampler:
    table = TABLES["ddpm learned_range"]
    return Sampler(Model(True), table, graph=graph, **{"guidance": CFG(3.0), "clip": 1.0, **options})


def draw(sampler: Sampler, seed: int = 1, **options: Any) -> Tensor:
    guidance: Guidance | None = options.get("guidance", sampler.guidance)
    branches = conditioning(None if guidance is None or guidance.branches == ("cond",) else guidance)
    return sampler.sample(SHAPE, branches=branches, seed=seed, **options)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_an_option_of_one_call_acts_as_on_a_sampler_made_with_it(name: str, graph: bool) -> None:
    sampler, given = made(graph), CALLS[name]
    before = draw(sampler)
    assert torch.equal(draw(sampler, **given), draw(made(graph, **given)))
    assert torch.equal(draw(sampler), before)  # of that call alone
    *_, last = sampler.iterate(SHAPE, branches=conditioning(given.get("guidance", CFG(1.0))), seed=1, **given)
    assert torch.equal(last.x, draw(sampler, **given))


@pytest.mark.parametrize("graph", [False, True])
def test_threads_share_a_sampler_with_options_of_their_own(graph: bool) -> None:
    sampler = made(graph)
    names = ("guidance", "no guidance", "clip", "denoised_fn", "cond_fn")
    jobs = [(CALLS[name], seed) for seed in (0, 1) for name in names]
    alone = [draw(made(graph), seed, **given) for given, seed in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: draw(sampler, job[1], **job[0]), jobs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("given", [{"guidance": 3.0}, {"clip": "1"}, {"denoised_fn": 1}, {"cond_fn": "y"}])
def test_bad_options_of_a_call_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))}: got"):
        made().sample(SHAPE, branches=conditioning(CFG(1.0)), **given)


def through_file(sampler: Sampler) -> Any:
    file = io.BytesIO()
    torch.save(sampler, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), through_file])
@pytest.mark.parametrize("graph", [False, True])
def test_copies_start_empty_and_sample_alike(copied: Any, graph: bool) -> None:
    sampler = made(graph)
    before = copied(sampler)
    samples = draw(sampler)
    after = copied(sampler)
    for other in (before, after):
        assert other.memory() == 0
        assert other.report() == {}
        assert other.config == sampler.config
        assert torch.equal(draw(other), samples)
    assert torch.equal(draw(sampler), samples)


def test_one_config_serves_several_samplers() -> None:
    config = SamplerConfig(graph=True, noise_source="torch")
    first, second = made(config=config, graph=True), made(config=config, graph=False)
    assert first.config.graph is True
    assert second.config.graph is False
    assert second.noise_source == "torch"
    assert config.device is None  # resolved in the samplers, not in place
    assert torch.equal(draw(first), draw(second))


def test_options_are_named_in_errors_and_repr() -> None:
    with pytest.raises(TypeError, match="options: got noise, step_per_graph, expected some of noise_source, backend"):
        made(noise="philox", step_per_graph=2)
    with pytest.raises(TypeError, match="config: got dict, expected a SamplerConfig or None"):
        made(config={})
    with pytest.raises(AttributeError, match="'Sampler' object has no attribute 'noises'"):
        _ = made().noises
    shown = repr(made())
    assert shown.startswith("Sampler(")
    assert "CFG(" in shown
    assert len(shown) < 300


@pytest.mark.parametrize("source", ["philox", "torch"])
def test_a_generator_stands_in_for_torchs_global_one(source: str) -> None:
    sampler = made(noise_source=source)
    torch.manual_seed(7)
    want = draw(sampler, seed=None)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    got = draw(sampler, seed=None, generator=generator)  # type: ignore[arg-type]
    assert torch.equal(got, want)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(sampler, seed=None, generator=generator), want)  # type: ignore[arg-type]


def test_bad_generators_are_refused() -> None:
    with pytest.raises(TypeError, match=r"generator: got int, expected a torch\.Generator or None"):
        draw(made(), seed=None, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator: got one beside seed=3, expected one of the two"):
        draw(made(), seed=3, generator=torch.Generator())
