"""Loops that begin from an image beside the forks' loop, written here over single steps, which are the originals'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg import ClassifierFree
from fastcfg.frontends import glide, guided_diffusion

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 6, 5)
GD = guided_diffusion
IMAGE = torch.linspace(-1, 1, 180).view(SHAPE)


def learned(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    m = torch.tanh(x) / 2 + 0.001 * t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.cat([m, torch.sin(x)], 1)


def fixed(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    m = learned(x, t)[:, : x.shape[1]]
    return m if y is None else m * y.view(-1, 1, 1, 1)


def dropping(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return fixed(x, t) * torch.rand_like(x)


PROCESSES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "fixed": lambda: (GD.create_gaussian_diffusion(steps=100, timestep_respacing="6"), fixed),
    "learned": lambda: (GD.create_gaussian_diffusion(steps=100, timestep_respacing="6", learn_sigma=True), learned),
    "x0": lambda: (GD.create_gaussian_diffusion(steps=100, timestep_respacing="6", predict_xstart=True), fixed),
    "glide": lambda: (glide.create_gaussian_diffusion(100, "squaredcos_cap_v2", "6"), learned),
    "drawing": lambda: (GD.create_gaussian_diffusion(steps=100, timestep_respacing="6"), dropping),
}
LOOPS: dict[str, dict[str, Any]] = {"p_sample": {}, "ddim_sample": {"eta": 0.7}}


def of_a_fork(
    diffusion: Any, network: Any, step: str, noise: Tensor | None, skip: int, image: Tensor | None, **options: Any
) -> list[dict[str, Tensor]]:
    x = torch.randn(*SHAPE) if noise is None else noise
    image = torch.zeros_like(x) if skip and image is None else image
    left = range(diffusion.num_timesteps - skip)
    if image is not None:
        x = diffusion.q_sample(image, torch.full((len(x),), left[-1]), x)
    steps = []
    for index in reversed(left):
        out = getattr(diffusion, step)(network, x, torch.full((len(x),), index), **options)
        x = out["sample"]
        steps.append(out)
    return steps


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("step", LOOPS)
@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_samples_and_draws_are_the_forks(kind: str, step: str, skip: int, with_image: bool, backend: str) -> None:
    image = IMAGE if with_image else None
    torch.manual_seed(3)
    want = of_a_fork(*PROCESSES[kind](), step, None, skip, image, **LOOPS[step])
    state = torch.get_rng_state()
    arguments = {"device": "cpu", "skip_timesteps": skip, "init_image": image, "backend": backend, **LOOPS[step]}

    diffusion, network = PROCESSES[kind]()
    torch.manual_seed(3)
    got = getattr(diffusion, f"{step}_loop")(network, SHAPE, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(got, want[-1]["sample"], backend)

    torch.manual_seed(3)
    steps = list(getattr(diffusion, f"{step}_loop_progressive")(network, SHAPE, **arguments))
    assert len(steps) == 6 - skip
    for ours, theirs in zip(steps, want, strict=True):
        assert_close(ours["sample"], theirs["sample"], backend)
        assert_close(ours["pred_xstart"], theirs["pred_xstart"], backend)


def assert_close(got: Tensor, want: Tensor, backend: str) -> None:
    if backend == "reference":
        assert torch.equal(got, want)
    else:
        assert torch.allclose(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_noise_of_ones_own_and_a_seed(backend: str) -> None:
    diffusion, network = PROCESSES["learned"]()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
    torch.manual_seed(4)
    want = of_a_fork(diffusion, network, "p_sample", noise, 2, IMAGE)[-1]["sample"]
    arguments = {"device": "cpu", "skip_timesteps": np.int64(2), "init_image": IMAGE, "backend": backend}
    got = diffusion.p_sample_loop(network, SHAPE, noise=noise, seed=4, **arguments)
    assert_close(got, want, backend)
    torch.manual_seed(4)
    want = of_a_fork(diffusion, network, "p_sample", None, 2, IMAGE)[-1]["sample"]
    assert_close(diffusion.p_sample_loop(network, SHAPE, seed=4, **arguments), want, backend)


def test_pairs_begin_from_pairs_of_images() -> None:
    diffusion, _ = PROCESSES["fixed"]()
    guided = ClassifierFree(fixed, 3.0)
    arguments = {"model_kwargs": {"y": torch.tensor([1.0, 0.0])}, "device": "cpu", "skip_timesteps": 2, "seed": 1}
    pair = IMAGE[:1].repeat(2, 1, 1, 1)
    want = diffusion.p_sample_loop(guided, SHAPE, init_image=pair, backend="reference", **arguments)
    got = diffusion.p_sample_loop(guided, SHAPE, init_image=pair, **arguments)
    assert torch.allclose(got[0], want[0], atol=2e-5, rtol=0)
    assert torch.equal(got[0], got[1])


def test_philox_noise_is_each_samples_own() -> None:
    diffusion, network = PROCESSES["learned"]()
    arguments = {"device": "cpu", "skip_timesteps": 2, "noise_source": "philox"}
    both = diffusion.p_sample_loop(network, SHAPE, init_image=IMAGE, seed=[7, 9], **arguments)
    alone = diffusion.p_sample_loop(network, (1, *SHAPE[1:]), init_image=IMAGE[1:], seed=[9], **arguments)
    assert torch.allclose(both[1:], alone, atol=1e-6)


@pytest.mark.parametrize("name", ["p_sample_loop", "p_sample_loop_progressive"])
def test_a_subclass_that_overrides_a_method_begins_from_the_image_too(name: str) -> None:
    class Mine(GD.SpacedDiffusion):
        def p_sample(self, *args: Any, **options: Any) -> Any:
            out = super().p_sample(*args, **options)
            return {**out, "sample": 0.5 * out["sample"]}

    def mine() -> Any:
        given, _ = PROCESSES["fixed"]()
        types = {name: getattr(given, name) for name in ("model_mean_type", "model_var_type", "loss_type")}
        return Mine(use_timesteps=range(6), betas=given.betas, **types)

    torch.manual_seed(3)
    want = of_a_fork(mine(), fixed, "p_sample", None, 2, IMAGE)[-1]["sample"]
    torch.manual_seed(3)
    got = getattr(mine(), name)(fixed, SHAPE, device="cpu", skip_timesteps=2, init_image=IMAGE)
    assert torch.equal(got if isinstance(got, Tensor) else list(got)[-1]["sample"], want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_timesteps": 6}, "skip_timesteps: got 6, expected an integer from 0 to 5"),
        ({"skip_timesteps": -1}, "skip_timesteps: got -1"),
        ({"skip_timesteps": 1.0}, "skip_timesteps: got 1.0"),
        ({"init_image": IMAGE[:1]}, r"init_image: got shape \(1, 3, 6, 5\), expected \(2, 3, 6, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    diffusion, network = PROCESSES["fixed"]()
    with pytest.raises(ValueError, match=message):
        diffusion.p_sample_loop(network, SHAPE, device="cpu", **arguments)
    with pytest.raises(ValueError, match="for the reverse ODE"):
        diffusion.ddim_reverse_sample_loop(network, IMAGE, skip_timesteps=2)
