"""Our drop-ins beside the originals themselves, where a checkout of them can be imported: the same bits on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden_data import guided, toy, toy_eps, toy_gradient, toy_x0
from torch import Tensor

from fastcfg import ClassifierFree, accelerate
from fastcfg.frontends import glide, guided_diffusion

pytestmark = pytest.mark.quick

SHAPE = (4, 3, 8, 8)
Y = torch.tensor([1.0, 2.5, 0.0, 0.0])


def original_gd() -> Any:
    return pytest.importorskip("guided_diffusion.script_util", reason="guided-diffusion is not on the path")


def original_glide() -> Any:
    return pytest.importorskip("glide_text2im.model_creation", reason="glide-text2im is not on the path")


GD_OPTIONS = {
    "learned range": {"learn_sigma": True, "timestep_respacing": "10"},
    "rescaled": {"learn_sigma": True, "rescale_learned_sigmas": True, "rescale_timesteps": True},
    "small": {"sigma_small": True, "steps": 60, "noise_schedule": "cosine"},
    "x0, kl": {"predict_xstart": True, "use_kl": True, "timestep_respacing": "ddim20"},
}


def model_for(options: dict[str, Any]) -> Any:
    if options.get("learn_sigma"):
        return toy
    return toy_x0 if options.get("predict_xstart") else toy_eps


@pytest.mark.parametrize("options", GD_OPTIONS.values(), ids=GD_OPTIONS)
def test_training_losses_and_the_bound(options: dict[str, Any]) -> None:
    theirs = original_gd().create_gaussian_diffusion(**options)
    ours = guided_diffusion.create_gaussian_diffusion(**options)
    model = model_for(options)
    torch.manual_seed(0)
    x_start = torch.rand(SHAPE) * 2 - 1
    x_start[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    t = torch.tensor([0, 1, theirs.num_timesteps // 2, theirs.num_timesteps - 1])
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(1)
        losses = diffusion.training_losses(model, x_start, t, model_kwargs={"y": Y})
        results.append({**losses, **diffusion.calc_bpd_loop(model, x_start, model_kwargs={"y": Y})})
    assert set(results[0]) == set(results[1])
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


def test_gradients_of_the_losses() -> None:
    options = GD_OPTIONS["rescaled"]
    gradients = []
    for diffusion in (
        original_gd().create_gaussian_diffusion(**options),
        guided_diffusion.create_gaussian_diffusion(**options),
    ):
        torch.manual_seed(0)
        weight = torch.ones(1, 6, 1, 1, requires_grad=True)
        x_start = torch.rand(SHAPE) * 2 - 1
        losses = diffusion.training_losses(
            lambda x, t, w=weight: toy(x, t, Y) * w, x_start, torch.tensor([0, 1, 9, 99])
        )
        gradients.append(torch.autograd.grad(losses["loss"].mean(), weight)[0])
    # Backward adds the terms in another order. Measured: 3e-8 of the largest.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=float(2e-6 * gradients[0].abs().max()))


def pairs() -> list[Any]:
    return [
        pytest.param(
            lambda: original_gd().create_gaussian_diffusion(learn_sigma=True, timestep_respacing="12"), id="gd"
        ),
        pytest.param(
            lambda: original_gd().create_gaussian_diffusion(learn_sigma=True, steps=30, rescale_timesteps=True),
            id="gd-rescaled",
        ),
        pytest.param(lambda: original_glide().create_gaussian_diffusion(1000, "squaredcos_cap_v2", "12"), id="glide"),
    ]


@pytest.mark.parametrize("make", pairs())
@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("cond_fn", [None, toy_gradient], ids=["plain", "classifier"])
def test_an_accelerated_object_samples_the_same(make: Any, method: str, cond_fn: Any) -> None:
    theirs = make()
    ours = accelerate(theirs)
    for name in ("betas", "posterior_log_variance_clipped", "sqrt_recipm1_alphas_cumprod"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()
    assert getattr(ours, "timestep_map", None) == getattr(theirs, "timestep_map", None)
    arguments: dict[str, Any] = {"cond_fn": cond_fn, "model_kwargs": {"y": Y}, "device": "cpu"}

    def sample(diffusion: Any, model: Any, **options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return getattr(diffusion, method)(model, SHAPE, **arguments, **options), torch.rand(4)

    want, probe = sample(theirs, guided(toy, 2.0))
    got, got_probe = sample(ours, guided(toy, 2.0), backend="reference")
    assert torch.equal(got, want)
    assert torch.equal(got_probe, probe)
    for model in (guided(toy, 2.0), ClassifierFree(toy, 2.0)):
        got, got_probe = sample(ours, model)
        # Measured: 3.3e-5 for DDIM with a classifier, 2e-6 otherwise.
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=1e-4)
        assert torch.equal(got_probe, probe)


@pytest.mark.parametrize("make", pairs())
def test_the_reverse_ode(make: Any) -> None:
    theirs = make()
    ours = accelerate(theirs)
    x = torch.linspace(-1, 1, 4 * 3 * 64).view(SHAPE)
    want = x
    for step in range(theirs.num_timesteps):
        t = torch.full((4,), step)
        want = theirs.ddim_reverse_sample(toy, want, t, model_kwargs={"y": Y})["sample"]
    got = ours.ddim_reverse_sample_loop(toy, x, model_kwargs={"y": Y}, backend="reference")
    assert torch.equal(got, want)
    # Measured: 3e-6.
    torch.testing.assert_close(ours.ddim_reverse_sample_loop(toy, x, model_kwargs={"y": Y}), want, rtol=0, atol=5e-5)


def test_our_own_classes_are_what_they_are() -> None:
    ours = glide.create_gaussian_diffusion(100, "linear", "10")
    assert accelerate(ours) is ours
