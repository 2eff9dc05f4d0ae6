"""k-diffusion's sampling functions on the engine, beside themselves."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_k_diffusion
from fastcfg.frontends import k_diffusion as fused
from fastcfg.frontends._fused import fall_through as _fall_through
from fastcfg.frontends.k_diffusion import fuse

modules = load_k_diffusion()
sampling: Any = modules and modules[0]
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(modules is None, reason="k-diffusion is not installed"),
    pytest.mark.filterwarnings("ignore:Should have tb<=t1", "ignore:Should have ta>=t0"),
]

CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_noise": 1.01}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sample_euler", {}),
    ("sample_euler", CHURN),
    ("sample_euler_ancestral", {"eta": 0.8}),
    ("sample_heun", CHURN),
    ("sample_dpm_2", CHURN),
    ("sample_dpm_2_ancestral", {}),
    ("sample_lms", {"order": 3}),
    ("sample_dpmpp_2s_ancestral", {}),
    ("sample_dpmpp_sde", {}),
    ("sample_dpmpp_2m", {}),
    ("sample_dpmpp_2m_sde", {"solver_type": "heun"}),
    ("sample_dpmpp_3m_sde", {}),
]
SHAPE = (2, 3, 6, 5)


def denoise(x: Tensor, sigma: Tensor, strength: float = 1.0, shift: Tensor | None = None) -> Tensor:
    s = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    result = strength * torch.tanh(x / (s**2 + 1).sqrt()) + 0.1 * x / (s + 1)
    return result if shift is None else result + shift.view(-1, 1, 1, 1)


def levels() -> Tensor:
    return sampling.get_sigmas_karras(7, 0.1, 8.0)


def run(function: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor]:
    """The samples, and what the global generator draws next."""
    torch.manual_seed(3)
    x = (torch.randn(SHAPE) * 8).to(dtype)
    return function(denoise, x, levels(), disable=True, **options), torch.randn(4)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_samples_are_the_original_s_for_the_same_seeds(name: str, options: dict[str, Any]) -> None:
    _fall_through._logged.clear()
    want, drawn = run(getattr(sampling, name), **options)
    ours = getattr(fused, name)
    got, then = run(ours, **options)
    # Measured: 4e-7 of the largest value.
    assert float((got - want).abs().max()) < 4e-6 * float(want.abs().max())
    assert torch.equal(then, drawn)  # the generator is left alike
    assert not _fall_through._logged & {(name, reason) for _, reason in _fall_through._logged}
    # A second call, with a captured program if there is one, is the first.
    assert torch.equal(run(ours, **options)[0], got)
    assert inspect.signature(ours) == inspect.signature(getattr(sampling, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sample_heun", "sample_dpmpp_2m"])
def test_half_precision_is_no_farther_from_the_truth(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(SHAPE, generator=torch.manual_seed(3)) * 8).to(dtype)
    truth = getattr(sampling, name)(denoise, x.double(), levels().double(), disable=True)
    theirs, ours = (getattr(module, name)(denoise, x, levels(), disable=True) for module in (sampling, fused))
    assert ours.dtype == theirs.dtype
    error, allowed = (float((value.double() - truth).abs().max()) for value in (ours, theirs))
    # The model computes in half precision, and its error is the same for both.
    assert error <= 2 * allowed


class Replayed:
    """A noise sampler that draws the same for everybody, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        self.asked.append((float(sigma), float(sigma_next)))
        generator = torch.Generator().manual_seed(len(self.asked))
        return torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("name", ["sample_euler_ancestral", "sample_dpmpp_sde", "sample_dpmpp_3m_sde"])
def test_a_noise_sampler_is_asked_as_the_original_asks_it(name: str) -> None:
    theirs, ours = Replayed(), Replayed()
    want = run(getattr(sampling, name), noise_sampler=theirs)[0]
    got = run(getattr(fused, name), noise_sampler=ours)[0]
    assert ours.asked == theirs.asked
    assert float((got - want).abs().max()) < 4e-6 * float(want.abs().max())


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_dpmpp_2s_ancestral"])
def test_callbacks_get_the_original_s_dictionaries(name: str) -> None:
    told: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    options = CHURN if name in ("sample_euler", "sample_heun") else {}
    run(getattr(sampling, name), callback=told["theirs"].append, **options)
    run(getattr(fused, name), callback=told["ours"].append, **options)
    assert len(told["ours"]) == len(told["theirs"]) == 7
    for ours, theirs in zip(told["ours"], told["theirs"], strict=True):
        assert list(ours) == list(theirs)
        assert ours["i"] == theirs["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5)


def test_arguments_of_the_model_are_passed_on() -> None:
    extra = {"strength": 0.5, "shift": torch.tensor([0.2, -0.3])}
    want, got = (run(module.sample_heun, extra_args=extra)[0] for module in (sampling, fused))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, run(fused.sample_heun)[0])


def own(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """A user's own Euler sampler."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def test_a_function_of_one_s_own() -> None:
    x = torch.randn(SHAPE, generator=torch.manual_seed(0)) * 8
    want, got = own(denoise, x, levels()), fuse(own)(denoise, x, levels())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_compiled_runs_as_it_did_and_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def curved(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x + 0.01 * model(x, sigmas[:1].expand(len(x))) ** 2

    x = torch.ones(SHAPE)
    _fall_through._logged.clear()
    with caplog.at_level(logging.WARNING, logger="fastcfg"):
        for _ in range(2):
            assert torch.equal(fuse(curved)(denoise, x, levels()), curved(denoise, x, levels()))
        got = fused.sample_dpm_adaptive(denoise, x, 0.1, 8.0, disable=True)
    assert torch.equal(got, sampling.sample_dpm_adaptive(denoise, x, 0.1, 8.0, disable=True))
    lines = [record.getMessage() for record in caplog.records if record.name == "fastcfg"]
    assert len(lines) == 2
    assert "curved is not fused" in lines[0]
    assert "coefficients" in lines[0]
    assert "sample_dpm_adaptive is not fused: sample_fn: got sample_dpm_adaptive with model calls that" in lines[1]


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="sample_fn: got int"):
        fuse(3)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="sample_nothing"):
        fused.sample_nothing  # noqa: B018
    assert {"fuse", "sample_heun"} <= set(dir(fused))


def test_names_are_listed_where_k_diffusion_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    assert dir(fused) == ["fuse"]


def test_another_thread_is_not_touched_while_a_function_is_compiled() -> None:
    x, levels_ = torch.randn(SHAPE, generator=torch.manual_seed(0)) * 8, levels()
    asked, answered, compiled = (threading.Event() for _ in range(3))

    def observe() -> tuple[Any, ...]:
        torch.manual_seed(3)  # of the tree: the other thread waits
        samples = sampling.sample_dpmpp_sde(denoise, x, levels_, disable=True)
        tree = sampling.BrownianTreeNoiseSampler(x, 0.1, 8.0, seed=7)(torch.tensor(8.0), torch.tensor(4.0))
        wide = torch.full((1, 1, 1, 2), 1 / 3, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        narrowed = wide.to(torch.float32), wide.float(), wide.type(torch.float16)
        return samples, tree, torch.randn(3, generator=generator), *narrowed

    def slow(model: Any, x: Tensor, sigmas: Tensor, disable: Any = None) -> Tensor:
        if not compiled.is_set():
            asked.set()
            assert answered.wait(20)
            answered.clear()
        result: Tensor = sampling.sample_dpmpp_sde(model, x, sigmas, disable=True)
        return result

    slow.__module__ = sampling.__name__  # where the tree is replaced
    want, seen = observe(), []

    def watch() -> None:
        while asked.wait(20) and not compiled.is_set():
            asked.clear()
            seen.append(observe())
            answered.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fuse(slow)(denoise, x, levels_, disable=True)
    finally:
        compiled.set()
        asked.set()
        watcher.join()
    assert len(seen) >= 3  # the rehearsal, and the runs on basis vectors and random inputs
    for got in seen:
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
