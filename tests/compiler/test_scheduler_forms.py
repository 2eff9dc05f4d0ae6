"""Schedulers as projects write them: without config, in place, with results, counts and timesteps of other types."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg import DynamicThreshold, Sampler
from fastcfg.compiler import compile_scheduler, scheduler_clip
from fastcfg.compiler.patching import in_float64
from fastcfg.compiler.protocol import ORIGINAL
from fastcfg.frontends import diffusers as drop_ins
from fastcfg.frontends._fused import subclass
from fastcfg.frontends.diffusers import fuse

diffusers: Any = load_diffusers()
with_diffusers = pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]


def denoise(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.8 * x + torch.sin(0.01 * t.double()).view(-1, 1, 1, 1).to(x)) + 0.1 * x


def with_variance(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([denoise(x, t), torch.cos(x)], dim=1)


def normal(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 6, 5, generator=torch.manual_seed(0), dtype=torch.float64)


def original(scheduler: Any, model: Any = denoise) -> Tensor:
    """The samples of a scheduler with timesteps set, as a user's loop makes them."""
    x = normal() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(model(given, torch.as_tensor(t).expand(len(x))), t, x)
        if hasattr(result, "prev_sample"):
            x = result.prev_sample
        else:
            x = result if isinstance(result, Tensor) else result["prev_sample" if isinstance(result, dict) else 0]
    return x


def compiled(scheduler: Any, *count: Any, model: Any = denoise, **options: Any) -> Tensor:
    table = compile_scheduler(scheduler, *count, **options)
    wide: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "backend": "reference"}
    sampler = Sampler(model, table, clip=scheduler_clip(scheduler), graph=False, **wide)
    return sampler.sample((2, 3, 6, 5), x_T=normal() * table.initial_scale)


def assert_compiles(scheduler: Any, count: int = 9, model: Any = denoise) -> None:
    prepared = copy.deepcopy(scheduler)
    prepared.set_timesteps(count)
    with in_float64():
        want = original(prepared, model)
    torch.testing.assert_close(compiled(scheduler, count, model=model), want, rtol=1e-11, atol=1e-11)


class Flow:
    """A scheduler of flow matching without config, which returns the next sample itself."""

    shift = 3.0

    def set_timesteps(self, num_inference_steps: int = 50) -> None:
        levels = torch.linspace(1, 0, num_inference_steps + 1)[:-1].double()
        self.levels = [*(self.shift * levels / (1 + (self.shift - 1) * levels)).tolist(), 0.0]
        self.timesteps: Any = torch.tensor(self.levels[:-1]) * 1000
        self.index = 0

    def interval(self) -> float:
        self.index += 1
        return self.levels[self.index] - self.levels[self.index - 1]

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return sample + model_output * self.interval()


class Returns(Flow):
    def __init__(self, reply: Any) -> None:
        self.reply = reply

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return self.reply(super().step(model_output, timestep, sample))


class OfArrays(Flow):
    def set_timesteps(self, num_inference_steps: int = 50) -> None:
        super().set_timesteps(num_inference_steps)
        self.timesteps = self.timesteps.numpy()


class WithNamespace(Flow):
    def __init__(self, **options: Any) -> None:
        self.config = type("Config", (), options)()

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        denoised = sample - model_output * self.levels[self.index]
        if self.config.clip_sample:
            denoised = denoised.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        now, _ = self.levels[self.index], self.interval()
        following = {"prev_sample": denoised + (sample - denoised) * (self.levels[self.index] / now)}
        return type("Output", (), {**following, "pred_original_sample": denoised})()


class InPlaceEuler(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        sample += model_output * self.interval()
        return sample


class InPlaceTwoStep(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        earlier = model_output if self.index == 0 else self.saved
        self.saved = model_output.clone()
        sample += (1.5 * model_output - 0.5 * earlier) * self.interval()
        return sample


class SavesWhatItChanges(Flow):
    """Its saved sample is the tensor that it writes into, and that the loop hands back."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        before = sample.clone() if self.index == 0 else self.saved.clone()
        sample += model_output * self.interval() + 0.1 * before
        self.saved = sample
        return sample


class ChangesTheOutput(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        model_output *= self.interval()
        model_output += sample
        return model_output


class ScalesInPlace(Flow):
    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        sample *= 0.9
        return sample


@pytest.mark.parametrize(
    "scheduler",
    [
        Flow(),
        Returns(lambda x: (x,)),
        Returns(lambda x: [x, 2 * x]),
        Returns(lambda x: {"prev_sample": x}),
        OfArrays(),
        WithNamespace(clip_sample=False),
        WithNamespace(clip_sample=True, clip_sample_range=0.7),
    ],
    ids=["tensor", "tuple", "list", "mapping", "timesteps in an array", "config of attributes", "its clip"],
)
def test_other_forms_of_a_scheduler(scheduler: Any) -> None:
    assert_compiles(scheduler)


@pytest.mark.parametrize("reply", [lambda x: None, lambda x: (), lambda x: {"sample": x}, lambda x: 3.0])
def test_a_step_that_returns_no_sample_is_refused(reply: Any) -> None:
    with pytest.raises(ValueError, match=r"scheduler: got a step that returns .*, expected a tensor, a tuple"):
        compile_scheduler(Returns(reply), 3)


@pytest.mark.parametrize("kind", [InPlaceEuler, InPlaceTwoStep, SavesWhatItChanges, ChangesTheOutput, ScalesInPlace])
def test_steps_that_work_in_place(kind: Any) -> None:
    assert_compiles(kind())


@with_diffusers
def test_a_class_of_diffusers_that_writes_into_its_sample() -> None:
    class InPlace(diffusers.DPMSolverMultistepScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            result = super().step(model_output, timestep, sample.clone(), **options)
            sample.copy_(result.prev_sample)
            result.prev_sample = sample
            model_output.zero_()
            return result

    got, want = (compile_scheduler(kind(), 12) for kind in (InPlace, diffusers.DPMSolverMultistepScheduler))
    np.testing.assert_array_equal(got.rows, want.rows)


# Numbers of steps and timesteps


@with_diffusers
@pytest.mark.parametrize("count", [np.int64(7), np.uint8(7), torch.tensor(7)], ids=repr)
def test_counts_of_any_integer_type(count: Any) -> None:
    np.testing.assert_array_equal(
        compile_scheduler(diffusers.DDIMScheduler(), count).rows, compile_scheduler(diffusers.DDIMScheduler(), 7).rows
    )


OWN = [
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 850, 545, 124]}),
    ("DDPMScheduler", {}, {"timesteps": [900, 500, 100]}),
    ("LCMScheduler", {}, {"timesteps": [999, 499, 259]}),
    ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 100]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [900, 400, 10]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.6, 3.2, 0.7, 0.0]}),
    ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [1.0, 0.6, 0.2]}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.6, 0.2], "mu": 0.5}),
]


@with_diffusers
@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "array"])
@pytest.mark.parametrize(("name", "config", "given"), OWN, ids=lambda value: str(value).replace(" ", ""))
def test_timesteps_or_sigmas_of_one_s_own(name: str, config: dict[str, Any], given: dict[str, Any], kind: Any) -> None:
    own, values = next(iter(given.items()))
    options = given | {own: kind(values)}
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(**options)
    for count in ((), (None,), (len(values),), (np.int64(len(values)),)):
        table = compile_scheduler(getattr(diffusers, name)(**config), *count, **options)
        np.testing.assert_array_equal(table["t"], scheduler.timesteps.double())
    with pytest.raises(ValueError, match=f"num_inference_steps: got 9 and {len(values)} {own}, expected their number"):
        compile_scheduler(getattr(diffusers, name)(**config), 9, **options)


def test_sigmas_of_a_scheduler_that_wants_their_number_too() -> None:
    class Given(Flow):
        def set_timesteps(self, num_inference_steps: int, sigmas: Any = None) -> None:  # type: ignore[override]
            super().set_timesteps(num_inference_steps)
            self.levels = [*sigmas, 0.0]
            self.timesteps = torch.tensor(sigmas) * 1000

    for count in ((), (3,)):
        assert compile_scheduler(Given(), *count, sigmas=[1.0, 0.6, 0.2])["t"].round(3).tolist() == [1000, 600, 200]


@with_diffusers
def test_what_set_timesteps_refuses_is_refused_in_its_words() -> None:
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match=r"Cannot use `timesteps` with `config\.use_karras_sigmas = True`"):
        compile_scheduler(karras, 3, timesteps=[900, 500, 100])
    with pytest.raises(ValueError, match=r"whose set_timesteps fails .*unexpected keyword argument 'sigma'"):
        compile_scheduler(diffusers.DDIMScheduler(), 3, sigma=3)
    with pytest.raises(ValueError, match="timesteps: got 5, expected a sequence"):
        compile_scheduler(diffusers.DDPMScheduler(), timesteps=5)


# Variance channels, limits, drop-ins


@with_diffusers
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_solvers_that_leave_the_variance_channels_alone(name: str, variance: str) -> None:
    scheduler = getattr(diffusers, name)(variance_type=variance)
    assert compile_scheduler(scheduler, 9).learned_variance
    assert_compiles(scheduler, model=with_variance)
    noisy = getattr(diffusers, name)(variance_type=variance, algorithm_type="sde-dpmsolver++")
    plain = getattr(diffusers, name)(algorithm_type="sde-dpmsolver++")
    got, want = compile_scheduler(noisy, 9), compile_scheduler(plain, 9)
    np.testing.assert_allclose(np.exp2(got["l_0"]), want["s"], atol=1e-14)
    assert not got["l_v"].any()


@with_diffusers
def test_a_threshold_whose_ceiling_is_below_its_floor() -> None:
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, name)(thresholding=True, sample_max_value=0.5)
        assert scheduler_clip(scheduler) == DynamicThreshold(0.995, 0.5, 0.5)
        assert_compiles(scheduler)


@with_diffusers
@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_of_a_drop_in_the_original_is_compiled(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert ORIGINAL == subclass.ORIGINAL
    want = compile_scheduler(getattr(diffusers, name)(), 11)
    fused = fuse(getattr(diffusers, name)())
    before = dict(vars(fused))
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="fastcfg"):
        np.testing.assert_array_equal(compile_scheduler(fused, 11).rows, want.rows)
    assert caplog.records == []
    assert vars(fused) == before
    with pytest.raises(ValueError, match="scheduler: got PNDMScheduler that needs 4 saved tensors"):
        compile_scheduler(fuse(diffusers.PNDMScheduler()), 11)


@with_diffusers
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_class_derived_from_a_drop_in_keeps_its_changes(name: str) -> None:
    def doubled(base: Any) -> Any:
        class Doubled(base):  # type: ignore[misc]
            def step(self, *args: Any, **kwargs: Any) -> Any:
                result = super().step(*args, **kwargs)
                result.prev_sample = result.prev_sample * 2
                return result

        return Doubled(**({"clip_sample": False} if name == "DDIMScheduler" else {}))

    got, want = (compiled(doubled(getattr(module, name)), 7) for module in (drop_ins, diffusers))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# Messages


class DrawsByItself(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return sample + model_output * self.interval() + 0.1 * torch.empty_like(sample).normal_()


class Normalises(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        following = sample + model_output * self.interval()
        return following / following.std()


class LimitsTheSample(WithNamespace):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return super().step(model_output, timestep, sample).prev_sample.clamp(-0.9, 0.9)


class CountsTheBatch(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return sample + model_output * (self.interval() / len(sample))


class DrawsInFloat64(Flow):
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any:
        noise = torch.randn(sample.shape, dtype=torch.float64)
        return (sample.double() + model_output * self.interval() + 0.1 * noise).to(sample.dtype)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DrawsByItself(), "it draws noise by other means than torch.randn"),
        (Normalises(), "its steps are not linear"),
        (LimitsTheSample(clip_sample=True, clip_sample_range=1.0), "it limits other values than x0"),
        (CountsTheBatch(), "its steps depend on the samples' shape"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_says_what_is_the_matter(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"scheduler: got {type(scheduler).__name__}.*{message}"):
        compile_scheduler(scheduler, 6)


def test_draws_in_float64_compile() -> None:
    np.testing.assert_allclose(compile_scheduler(DrawsInFloat64(), 6)["s"], 0.1, rtol=1e-12)
