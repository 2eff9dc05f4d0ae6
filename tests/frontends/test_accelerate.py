"""One verb for every object that samples, and what its results do when they are copied."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcfg
from benchmarks.suite.foreign import load_diffusers
from fastcfg import ClassifierFree
from fastcfg.frontends import diffusers as fused
from fastcfg.frontends import glide, guided_diffusion, k_diffusion

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]
diffusers: Any = load_diffusers()
SHAPE = (2, 3, 6, 4)


def euler(model: Any, x: Tensor, sigmas: Tensor, strength: float = 1.0) -> Tensor:
    for now, then in pairwise(sigmas):
        x = x + strength * (x - model(x, now.expand(len(x)))) / now * (then - now)
    return x


def network(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.cat([torch.tanh(x), torch.cos(x)], dim=1)


def diffusion(module: Any) -> Any:
    if module is glide:
        return glide.create_gaussian_diffusion(1000, "squaredcos_cap_v2", "5")
    return guided_diffusion.create_gaussian_diffusion(learn_sigma=True, timestep_respacing="5")


def sample_diffusion(owner: Any) -> Tensor:
    result: Tensor = owner.p_sample_loop(network, SHAPE, device="cpu", seed=3)
    return result


def sample_scheduler(scheduler: Any) -> Tensor:
    scheduler.set_timesteps(5)
    x = torch.linspace(-1, 1, 144).view(SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x).prev_sample
    return x


def sample_guider(guider: Any) -> Tensor:
    x = torch.linspace(-1, 1, 144).view(SHAPE)
    for step in range(3):
        guider.set_state(step, 3, None)
        x = guider.forward(pred_cond=torch.sin(x), pred_uncond=torch.cos(x)).pred
    return x


def drop_ins() -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {
        "guided-diffusion": (diffusion(guided_diffusion), sample_diffusion),
        "glide": (diffusion(glide), sample_diffusion),
    }
    if diffusers is not None:
        found["scheduler"] = fastcfg.accelerate(diffusers.DPMSolverMultistepScheduler()), sample_scheduler
        apg = diffusers.AdaptiveProjectedGuidance(7.5, adaptive_projected_guidance_momentum=-0.5)
        found["guider"] = fastcfg.accelerate(apg), sample_guider
    return found


@pytest.mark.parametrize("name", drop_ins())
def test_drop_ins_are_copied_before_and_after_sampling(name: str) -> None:
    ours, sample = drop_ins()[name]
    want = None
    for _ in ("before", "after"):
        file = io.BytesIO()
        torch.save({"drop-in": ours}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)["drop-in"]
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
            assert type(other) is type(ours)
            got = sample(other)
            want = sample(ours) if want is None else want
            assert torch.equal(got, want)


def test_caches_are_not_copied() -> None:
    ours = diffusion(glide)
    sample_diffusion(ours)
    other = copy.deepcopy(ours)
    assert len(ours._runner._samplers) == 1
    assert len(other._runner._samplers) == len(other._tables) == len(other._times) == 0


@pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
def test_fused_classes_are_pickled() -> None:
    class_ = fused.EulerDiscreteScheduler
    assert pickle.loads(pickle.dumps(class_)) is class_
    assert pickle.loads(pickle.dumps(diffusers.EulerDiscreteScheduler)) is diffusers.EulerDiscreteScheduler
    assert copy.deepcopy(class_) is class_
    assert pickle.loads(pickle.dumps(DerivedScheduler)) is DerivedScheduler
    for derived in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        assert type(derived(DerivedScheduler())) is DerivedScheduler


if diffusers is not None:

    class DerivedScheduler(fused.DDIMScheduler):  # type: ignore[misc, name-defined]
        """A user's subclass of a fused class."""


def test_every_kind_of_object_is_accelerated() -> None:
    ours = diffusion(glide)
    assert fastcfg.accelerate(ours) is ours
    fast = fastcfg.accelerate(euler, graph=False)
    assert fast is k_diffusion.fuse(euler, graph=False)
    x, levels = torch.linspace(-3, 3, 144).view(SHAPE), torch.tensor([3.0, 1.0, 0.2])
    want = euler(lambda x, s: torch.tanh(x), x, levels)
    torch.testing.assert_close(fast(lambda x, s: torch.tanh(x), x, levels), want, rtol=1e-5, atol=1e-5)
    if diffusers is not None:
        scheduler = fastcfg.accelerate(diffusers.DDIMScheduler())
        assert type(scheduler) is fused.DDIMScheduler
        assert fastcfg.accelerate(scheduler) is scheduler
        assert isinstance(fastcfg.accelerate(diffusers.ClassifierFreeGuidance()), diffusers.ClassifierFreeGuidance)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 3), (False, 6)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_models_with_other_channels_than_the_variance_needs_are_refused(
    loop: str, learn_sigma: bool, channels: int, backend: str
) -> None:
    ours = guided_diffusion.create_gaussian_diffusion(learn_sigma=learn_sigma, timestep_respacing="5")

    def model(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)[:, :channels]

    for function in (model, ClassifierFree(model, 2)):
        with pytest.raises(ValueError, match=r"model.output: got .*expected"):
            getattr(ours, loop)(function, SHAPE, device="cpu", backend=backend)


def test_is_fused_tells_a_drop_in_from_an_original() -> None:
    for ours in (diffusion(glide), glide.SpacedDiffusion, fastcfg.accelerate(euler)):
        assert fastcfg.is_fused(ours)
    for other in (3, euler, network, ScoreSde(), ScoreSde):
        assert not fastcfg.is_fused(other)
    if diffusers is not None:
        for kind in (diffusers.DDIMScheduler, diffusers.ClassifierFreeGuidance):
            assert [fastcfg.is_fused(one) for one in (kind, kind())] == [False, False]
            assert fastcfg.is_fused(fastcfg.accelerate(kind()))
            assert fastcfg.is_fused(getattr(fused, kind.__name__))
        assert fastcfg.is_fused(DerivedScheduler)


class ScoreSde:
    """A scheduler of another protocol: it has `step_pred` and `step_correct`."""

    config = None

    def set_timesteps(self, steps: int) -> None:
        """Nothing."""


@pytest.mark.parametrize("obj", [3, ScoreSde(), torch.nn.Linear(2, 2), network, ClassifierFree(network, 2.0), object])
def test_other_objects_are_refused(obj: Any) -> None:
    with pytest.raises(TypeError, match=r"obj: got \w+, expected a diffusion .* scheduler .* sampling function"):
        fastcfg.accelerate(obj)


def test_options_are_those_of_the_object() -> None:
    with pytest.raises(TypeError, match="options: got graph for a SpacedDiffusion, expected none"):
        fastcfg.accelerate(diffusion(glide), graph=False)
    with pytest.raises(TypeError, match="options: got clip for a function, expected backend or graph"):
        fastcfg.accelerate(euler, clip=1.0)


def through_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def steps_of(scheduler: Any, x: torch.Tensor, timesteps: Any) -> torch.Tensor:
    for t in timesteps:
        x = scheduler.step(0.3 * x.roll(1, -1), t, x, return_dict=False)[0]
    return x


@pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), through_file])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_a_scheduler_copied_in_the_middle_of_a_run_continues(name: str, copied: Any, caplog: Any) -> None:
    def run(scheduler: Any) -> list[Tensor]:
        scheduler.set_timesteps(12)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        half = steps_of(scheduler, x, scheduler.timesteps[:5])
        other = copied(scheduler)  # copy.copy shares its lists
        again = copied(other)
        results = [steps_of(one, half, one.timesteps[5:]) for one in (scheduler, other, again)]
        other.set_timesteps(12)
        return [*results, steps_of(other, x, other.timesteps)]

    original = getattr(diffusers, name)()
    for got, want in zip(run(fastcfg.accelerate(original)), run(original), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert not caplog.records  # fused, all of them


@pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_guider_copied_in_the_middle_of_a_run_continues(copied: Any) -> None:
    guider = fastcfg.accelerate(diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5))
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)) for _ in range(4)
    ]

    def blend(guider: Any, steps: Any) -> list[torch.Tensor]:
        results = []
        for step in steps:
            guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(500))
            results.append(guider.forward(*pairs[step]).pred)
        return results

    blend(guider, range(2))
    other = copied(guider)
    want = blend(guider, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(blend(other, range(2, 4)), want, strict=True))
