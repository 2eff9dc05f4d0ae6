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

from fastcfg import APG, CFG, DynamicThreshold, Guidance, Sampler, SamplerConfig, Shared

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
    with pytest.raises(TypeError, match=r"options: got noise \(now noise_source\), step, expected some of "):
        made(noise="philox", step=2)
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
    with pytest.raises(TypeError, match=r"generator: got int, expected a torch\.Generator, a list of them or None"):
        draw(made(), seed=None, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator: got one beside seed=3, expected one of the two"):
        draw(made(), seed=3, generator=torch.Generator())


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("graph", True, AttributeError, r"graph: got True, expected a new sampler\.config"),
        ("guidance", 3.0, TypeError, "guidance: got float, expected a Guidance"),
        ("table", 3, TypeError, "table: got int, expected a StepTable"),
        ("model", 3, TypeError, "model: got int, expected a callable"),
        ("clip", "1", TypeError, "clip: got '1'"),
    ],
)
def test_attributes_are_checked_when_they_are_set(name: str, value: Any, error: type[Exception], message: str) -> None:
    sampler = made()
    before = getattr(sampler, name)
    with pytest.raises(error, match=message):
        setattr(sampler, name, value)
    assert getattr(sampler, name) is before
    sampler.guidance = None  # type: ignore[assignment]
    assert sampler.guidance.branches == ("cond",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "dtype: got 'float32', expected a floating dtype"),
        ({"device": "gpu"}, "device: got 'gpu', expected 'cpu', or a GPU that torch sees"),
        ({"branch_models": [1]}, "branch_models: got list, expected a mapping"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        made(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device: got 'cuda', expected 'cpu', or a GPU that torch sees"):
        made(device="cuda")


def test_bad_observers_are_refused() -> None:
    sampler = made()
    for name in ("callback", "preview"):
        with pytest.raises(TypeError, match=f"{name}: got int, expected a function or None"):
            draw(sampler, **{name: 3})
    with pytest.raises(TypeError, match="iterate: got callback, expected some of cond, uncond"):
        sampler.iterate(SHAPE, callback=print)


def test_scales_and_intervals_share_programs() -> None:
    sampler = made(graph=True)
    guidances = [CFG(3.0, interval=(0.2, 0.6)), CFG(4.0, interval=(0.4, 0.8)), CFG([[1.0], [3.0], [1.0], [2.0], [1.0]])]
    for guidance in guidances:
        got = draw(sampler, guidance=guidance)
        assert torch.equal(got, draw(made(graph=True, guidance=guidance)))
    assert sampler.report()["captures"] == 1


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("mark", [Shared, lambda value: value], ids=["shared", "plain"])
def test_a_list_that_a_caller_changes_does_not_change_another_call(mark: Any, graph: bool) -> None:
    def model(x: Tensor, t: Tensor, gains: list[float]) -> Tensor:
        return gains[0] * torch.tanh(x)

    sampler, gains = Sampler(model, TABLES["ddim"], graph=graph), [0.7]
    first = sampler.sample(SHAPE, cond={"gains": mark(gains)}, seed=0)
    gains[0] = 0.3
    second = sampler.sample(SHAPE, cond={"gains": mark(gains)}, seed=0)
    assert torch.equal(sampler.sample(SHAPE, cond={"gains": mark([0.7])}, seed=0), first)
    assert torch.equal(sampler.sample(SHAPE, cond={"gains": mark([0.3])}, seed=0), second)
    assert not torch.equal(first, second)
