"""What the originals do that surprises: the rows of docs/behaviours.md, each held by the function of its name, which
runs the original and the drop-in beside it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers, load_k_diffusion
from fastcfg import accelerate

diffusers: Any = load_diffusers()
guiders: Any = pytest.importorskip("diffusers.guiders")
modules = load_k_diffusion()
pytestmark = [
    pytest.mark.skipif(modules is None, reason="k-diffusion is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
sampling: Any = modules and modules[0]

SHAPE = (2, 3, 8, 8)
ROWS: dict[str, Callable[[], None]] = {}


def row(test: Callable[[], None]) -> Callable[[], None]:
    """A row of the page."""
    ROWS[test.__name__] = test
    return test


# Runs.


def predict(x: Tensor) -> Tensor:
    """A model, smooth and not linear."""
    return 0.3 * x + 0.05 * torch.sin(3 * x)


def walk(scheduler: Any, n: int | list[int], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A run's samples after every step, and how many noises of the samples' shape every step drew."""
    shape = options.pop("shape", SHAPE)
    generator, twin = (torch.Generator().manual_seed(1) for _ in range(2))
    if isinstance(n, int):
        scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(timesteps=n)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * float(
        getattr(scheduler, "init_noise_sigma", 1)
    )
    samples, draws = [x.to(dtype)], []
    for t in scheduler.timesteps:
        x = samples[-1]
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        taken = options | ({"generator": generator} if "generator" in step_parameters(scheduler) else {})
        samples.append(scheduler.step(predict(scaled), t, x, **taken)[0])
        count = 0
        while not torch.equal(generator.get_state(), twin.get_state()):
            torch.randn(shape, generator=twin, dtype=dtype)
            count += 1
            assert count < 5
        draws.append(count)
    return SimpleNamespace(samples=torch.stack(samples), draws=draws, last=samples[-1])


def step_parameters(scheduler: Any) -> tuple[str, ...]:
    code = getattr(type(scheduler), "_fastcfg_original", type(scheduler)).step.__code__
    return code.co_varnames[: code.co_argcount]  # type: ignore[no-any-return]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of finite numbers, relative to the largest; infinite where one alone is not finite.
    (Whether a difference divided by 0 is NaN or infinite depends on its last bit.)"""
    finite = other.isfinite()
    if not torch.equal(one.isfinite(), finite):
        return float("inf")
    one, other = (value.double().where(finite, 0) for value in (one, other))
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def both(
    name: str, n: int | list[int], options: dict[str, Any] | None = None, least: float = 2e-6, **given: Any
) -> Any:
    """The run of a scheduler, which the drop-in's equals in samples, draws, timesteps and sigmas."""
    kind = getattr(diffusers, name)
    theirs, ours = kind(**(options or {})), accelerate(kind(**(options or {})))
    original, drop_in = (walk(scheduler, n, **given) for scheduler in (theirs, ours))
    assert distance(drop_in.samples, original.samples) <= least
    assert drop_in.draws == original.draws
    assert torch.equal(theirs.timesteps, ours.timesteps)
    original.timesteps, original.sigmas = theirs.timesteps.tolist(), getattr(theirs, "sigmas", None)
    return original


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser of N(0, 1) data."""
    return x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2)


def both_functions(name: str, sigmas: Tensor, x: Tensor | None = None, **options: Any) -> Any:
    """The run of a function of k-diffusion, which the drop-in's equals in samples, calls and the generator's state."""
    function = getattr(sampling, name)
    runs = []
    for sample in (function, accelerate(function)):
        calls: list[float] = []

        def model(x: Tensor, sigma: Tensor, calls: list[float] = calls) -> Tensor:
            calls.append(float(sigma[0]))
            return denoise(x, sigma)

        torch.manual_seed(5)
        start = 10 * torch.randn(SHAPE) if x is None else x
        before, outcome = torch.get_rng_state(), None
        try:
            outcome = sample(model, start, sigmas, disable=True, **options)
        except Exception as raised:
            outcome = type(raised)
        runs.append(SimpleNamespace(outcome=outcome, calls=calls, draws=count_draws(before, start)))
    original, drop_in = runs
    if isinstance(original.outcome, type):
        assert drop_in.outcome is original.outcome
    else:
        assert distance(drop_in.outcome, original.outcome) <= 2e-6
        assert len(drop_in.calls) == len(original.calls)
        assert drop_in.draws == original.draws
    return original


def count_draws(before: Tensor, like: Tensor) -> int | None:
    """How many noises like a tensor torch's generator drew since a state; None for something else."""
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    for count in range(30):
        if torch.equal(torch.get_rng_state(), after):
            return count
        torch.randn_like(like)
    torch.set_rng_state(after)
    return None


SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.5, 0.1, 0.0])


def guided(name: str, options: dict[str, Any], step: int, steps: int = 8, **predictions: Tensor) -> tuple[Any, Any]:
    """The outputs of an original guider and of the drop-in."""
    kind = getattr(guiders, name)
    outputs = []
    for guider in (kind(**options), accelerate(kind(**options))):
        guider.set_state(step, steps, None)
        guider.prepare_inputs({})
        try:
            outputs.append(guider.forward(**predictions))
        except Exception as raised:
            outputs.append(type(raised))
    return outputs[0], outputs[1]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Draws of noise.


@row
def euler_ancestral_draws_in_its_last_step() -> None:
    assert both("EulerAncestralDiscreteScheduler", 5).draws == [1] * 5
    # The last noise is multiplied by 0.
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(5)
    last, x = scheduler.timesteps[-1], normals(*SHAPE)
    results = []
    for seed in (0, 1):
        scheduler._step_index = 4
        scheduler.is_scale_input_called = True
        results.append(scheduler.step(predict(x), last, x, generator=torch.Generator().manual_seed(seed)).prev_sample)
    assert torch.equal(*results)


@row
def dpm_solver_sde_and_sa_solver_draw_in_the_last_step() -> None:
    assert both("DPMSolverMultistepScheduler", 5, {"algorithm_type": "sde-dpmsolver++"}).draws == [1] * 5
    assert both("SASolverScheduler", 4).draws == [1] * 4
    assert both("DPMSolverMultistepScheduler", 5).draws == [0] * 5


@row
def ddim_with_eta_draws_in_its_last_step() -> None:
    assert both("DDIMScheduler", 5, eta=1.0).draws == [1] * 5
    assert both("DDIMScheduler", 5).draws == [0] * 5


@row
def ddpm_lcm_and_tcd_draw_none_in_the_last_step() -> None:
    for name in ("DDPMScheduler", "UnCLIPScheduler", "LCMScheduler", "TCDScheduler"):
        assert both(name, 4).draws == [1, 1, 1, 0], name
    assert inspect.signature(diffusers.TCDScheduler.step).parameters["eta"].default == 0.3


@row
def kdpm2_ancestral_draws_in_second_stages_only() -> None:
    run = both("KDPM2AncestralDiscreteScheduler", 4)
    assert run.draws == [0, 1, 0, 1, 0, 1, 0]


@row
def flow_euler_draws_in_its_last_step() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = both("FlowMatchEulerDiscreteScheduler", 4, {"stochastic_sampling": True})
    assert run.draws == [1] * 4
    assert torch.equal(torch.get_rng_state(), before)  # the given generator is used, not the global one
    assert both("FlowMatchEulerDiscreteScheduler", 4).draws == [0] * 4


@row
def cogvideox_ddim_ignores_eta() -> None:
    runs = [both("CogVideoXDDIMScheduler", 4, eta=eta) for eta in (0.0, 1.0)]
    assert runs[1].draws == [0] * 4
    assert torch.equal(runs[0].samples, runs[1].samples)


@row
def an_image_depends_on_its_batch() -> None:
    """A generator's draws fill the batch in one go; a list of generators gives each image its own."""
    results: dict[str, Any] = {}
    for name, wrap in (("original", lambda one: one), ("drop-in", accelerate)):
        for batch in (1, 2):
            for listed in (False, True):
                scheduler = wrap(diffusers.DDPMScheduler())
                scheduler.set_timesteps(3)
                x = normals(*SHAPE)[2 - batch :]
                made = [torch.Generator().manual_seed(seed) for seed in range(2 - batch, 2)]
                for t in scheduler.timesteps:
                    x = scheduler.step(predict(x), t, x, generator=made if listed else made[-1])[0]
                results[name, batch, listed] = x[-1]
    for name in ("original", "drop-in"):
        assert distance(results[name, 1, True], results[name, 2, True]) < 1e-6
        assert distance(results[name, 1, False], results[name, 2, False]) > 0.1
    for listed in (False, True):
        assert distance(results["drop-in", 2, listed], results["original", 2, listed]) <= 2e-6


@row
def half_precision_noise_is_float32s_but_for_the_last_sixteen() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for count, same in ((75, 59), (80, 80)):
            half, single = (
                torch.randn(count, dtype=kind, generator=torch.Generator().manual_seed(0))
                for kind in (dtype, torch.float32)
            )
            assert torch.equal(half[:same], single.to(dtype)[:same])
            assert same == count or not torch.equal(half[same:], single.to(dtype)[same:])
        run = both(
            "EulerAncestralDiscreteScheduler", 4, least=4 * torch.finfo(dtype).eps, dtype=dtype, shape=(1, 3, 5, 5)
        )
        assert run.draws == [1] * 4


@row
def channels_last_noise_is_other_noise() -> None:
    x = normals(*SHAPE).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    plain = torch.randn(SHAPE)
    torch.manual_seed(0)
    assert not torch.isin(torch.randn_like(x), plain).any()
    assert both_functions("sample_euler_ancestral", SIGMAS, 10 * x).draws == 4
    assert diffusers.utils.torch_utils.randn_tensor(SHAPE, torch.Generator()).is_contiguous()


@row
def k_diffusion_euler_heun_and_dpm_2_draw_what_they_do_not_use() -> None:
    for name in ("sample_euler", "sample_heun", "sample_dpm_2"):
        assert both_functions(name, SIGMAS).draws == 5, name
    assert both_functions("sample_dpmpp_2m", SIGMAS).draws == 0


@row
def k_diffusion_ancestral_samplers_draw_none_in_the_last_step() -> None:
    for name in ("sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"):
        assert both_functions(name, SIGMAS).draws == 4, name


@row
def brownian_noise_is_one_path_whatever_the_steps() -> None:
    noise = sampling.BrownianTreeNoiseSampler(torch.zeros(SHAPE), 0.1, 10.0, seed=1)
    a, b, c = (torch.tensor(sigma) for sigma in (8.0, 3.0, 1.0))
    parts = (noise(a, b) * 5**0.5 + noise(b, c) * 2**0.5) / 7**0.5
    assert distance(parts, noise(a, c)) < 1e-5
    assert torch.equal(noise(b, a), -noise(a, b))
    for name in ("sample_dpmpp_sde", "sample_dpmpp_2m_sde"):
        both_functions(name, SIGMAS, noise_sampler=noise)


@row
def k_diffusion_sde_samplers_take_their_seed_from_the_global_generator() -> None:
    function = sampling.sample_dpmpp_2m_sde
    x, images = 10 * normals(*SHAPE), []
    for sample in (function, accelerate(function)):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            images.append(sample(lambda x, sigma: denoise(x, sigma), x, SIGMAS, disable=True))
    assert torch.equal(images[0], images[1])
    assert distance(images[2], images[0]) > 0.01
    for original, drop_in in zip(images[:3], images[3:], strict=True):
        assert distance(drop_in, original) <= 2e-6


# Numbers of steps, and the last ones.


@row
def heun_calls_the_model_one_time_less_than_twice() -> None:
    assert both("HeunDiscreteScheduler", 4).timesteps == [999.0, 666.0, 666.0, 333.0, 333.0, 0.0, 0.0]
    assert len(both_functions("sample_heun", SIGMAS).calls) == 9


@row
def kdpm2_second_stages_are_at_fractions_of_timesteps() -> None:
    timesteps = both("KDPM2DiscreteScheduler", 4).timesteps
    assert timesteps[::2] == [999.0, 666.0, 333.0, 0.0]
    assert all(t % 1 for t in timesteps[1::2])
    assert sorted(timesteps, reverse=True) == timesteps


@row
def pndm_repeats_its_second_timestep() -> None:
    assert both("PNDMScheduler", 5, {"skip_prk_steps": True}).timesteps == [800, 600, 600, 400, 200, 0]


@row
def pndm_fails_below_four_steps() -> None:
    for wrap in (lambda one: one, accelerate):
        with pytest.raises(ValueError, match="broadcast"):
            wrap(diffusers.PNDMScheduler()).set_timesteps(3)


@row
def sa_solver_leaves_noise() -> None:
    scheduler = diffusers.SASolverScheduler()
    run = both("SASolverScheduler", 4)
    sigma = float(((1 - scheduler.alphas_cumprod[0]) / scheduler.alphas_cumprod[0]) ** 0.5)
    assert float(run.sigmas[-1]) == pytest.approx(sigma)
    assert float(both("DPMSolverMultistepScheduler", 4).sigmas[-1]) == 0


@row
def euler_to_the_smallest_sigma_ends_with_an_idle_step() -> None:
    run = both("EulerDiscreteScheduler", 4, {"final_sigmas_type": "sigma_min"})
    assert run.sigmas[-1] == run.sigmas[-2] > 0
    assert distance(run.samples[-1], run.samples[-2]) < 1e-6


@row
def ddim_linspace_lands_beside_its_timesteps() -> None:
    """Its step goes 1000 // n down, the timesteps' distance is another."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(10)
    first, following = scheduler.timesteps[5:7].tolist()
    assert (first, following) == (444, 333)
    x0, noise, alphas = normals(*SHAPE), normals(*SHAPE, seed=1), scheduler.alphas_cumprod
    x = alphas[first].sqrt() * x0 + (1 - alphas[first]).sqrt() * noise
    for one in (scheduler, accelerate(scheduler)):
        one.set_timesteps(10)
        landed = one.step(noise, first, x).prev_sample
        at = {t: alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * noise for t in (following, first - 100)}
        assert distance(landed, at[first - 100]) < 1e-5
        assert distance(landed, at[following]) > 0.01


@row
def ddpm_goes_to_the_next_of_its_timesteps() -> None:
    """Where they are given; DDIM cannot be given any."""
    timesteps = [900, 500, 40]
    run = both("DDPMScheduler", timesteps, {"clip_sample": False})
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    assert [int(scheduler.previous_timestep(t)) for t in timesteps] == [500, 40, -1]
    assert run.draws == [1, 1, 1]
    with pytest.raises(TypeError):
        diffusers.DDIMScheduler().set_timesteps(timesteps=timesteps)


@row
def inverse_dpm_solver_ends_before_the_last_timestep() -> None:
    run = both("DPMSolverMultistepInverseScheduler", 10, least=4e-6)  # the original's own rounding is 3e-6
    assert run.timesteps[-1] == 899
    alpha = diffusers.DPMSolverMultistepInverseScheduler().alphas_cumprod[-1]
    assert float(run.sigmas[-1]) == pytest.approx(float(((1 - alpha) / alpha) ** 0.5), rel=1e-3)
    assert both("DDIMInverseScheduler", 10).timesteps[-1] == 900


@row
def runs_of_fewer_than_15_steps_end_with_a_lower_order() -> None:
    """With a final sigma of 0 all runs do."""
    for n in (14, 15):
        runs = [
            both("DPMSolverMultistepScheduler", n, {"lower_order_final": flag, "final_sigmas_type": "sigma_min"})
            for flag in (True, False)
        ]
        assert torch.equal(runs[0].samples[:-1], runs[1].samples[:-1])
        assert torch.equal(runs[0].last, runs[1].last) == (n == 15)


# Runs of one step.


@row
def one_step_of_euler_starts_at_timestep_0() -> None:
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"):
        run = both(name, 1)
        assert run.timesteps == [0.0], name
        assert float(run.sigmas[0]) < 0.03, name
        # Hardly anything is denoised.
        assert distance(run.last, run.samples[0]) < 0.05, name


@row
def one_step_of_ddim_and_ddpm_is_at_timestep_0() -> None:
    for name in ("DDIMScheduler", "DDPMScheduler"):
        run = both(name, 1, {"clip_sample": False})
        assert run.timesteps == [0], name
        assert distance(run.last, run.samples[0]) < 0.05, name
    assert both("DDIMScheduler", 1, {"timestep_spacing": "trailing"}).timesteps == [999]


@row
def one_step_of_k_diffusion_sde_samplers_fails() -> None:
    for name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        assert both_functions(name, torch.tensor([10.0, 0.0])).outcome is UnboundLocalError, name


# Timesteps that occur twice.


@row
def as_many_steps_as_trained_give_nan_from_the_middle() -> None:
    for name in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler"):
        run = both(name, 8, {"num_train_timesteps": 8})
        assert len(set(run.timesteps)) < 8, name
        finite = run.samples[1:].isfinite().flatten(1).all(1).tolist()
        assert finite == [True] * 4 + [False] * 4, name
    for name in ("UniPCMultistepScheduler", "SASolverScheduler"):
        assert not walk(getattr(diffusers, name)(num_train_timesteps=8), 8).last.isfinite().any(), name


@row
def a_timestep_that_occurs_twice_is_its_second_row() -> None:
    timesteps = [999, 500, 500, 100]
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=timesteps)
    scheduler.scale_model_input(normals(*SHAPE), scheduler.timesteps[1])
    assert scheduler.step_index == 2  # where a run begins there
    run = both("EulerDiscreteScheduler", timesteps)
    assert distance(run.samples[2], run.samples[1]) < 1e-6  # from one sigma to the same


# NaN and infinity.


@row
def zero_snr_ddim_without_clipping_is_infinite() -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    run = both("DDIMScheduler", 4, options)
    assert not run.samples[1].isfinite().any()
    assert both("DDIMScheduler", 4, options | {"clip_sample": True}).samples.isfinite().all()
    assert both("DDIMScheduler", 4, options | {"prediction_type": "v_prediction"}).samples.isfinite().all()


@row
def half_precision_overflows_inside_a_step() -> None:
    theirs = diffusers.DDIMScheduler(clip_sample=False)
    ours = accelerate(theirs)
    x = torch.full(SHAPE, 6000.0, dtype=torch.float16)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
        scheduler.timesteps[0] = 999
    want, got = (scheduler.step(x / 2, scheduler.timesteps[0], x).prev_sample for scheduler in (theirs, ours))
    assert want.isinf().all()
    assert distance(got, theirs.step(x.double() / 2, theirs.timesteps[0], x.double()).prev_sample) < 1e-3


@row
def inverse_sde_dpm_solver_is_nan_from_its_first_step() -> None:
    run = both("DPMSolverMultistepInverseScheduler", 4, {"algorithm_type": "sde-dpmsolver++"})
    assert run.samples[1:].isnan().all()


@row
def zero_star_with_rescale_is_nan_in_its_first_steps() -> None:
    given = {"pred_cond": normals(*SHAPE), "pred_uncond": normals(*SHAPE, seed=1)}
    theirs, ours = guided("ClassifierFreeZeroStarGuidance", {"guidance_rescale": 0.7}, 0, **given)
    assert theirs.pred.isnan().all()
    assert not ours.pred.any()
    theirs, ours = guided("ClassifierFreeZeroStarGuidance", {"guidance_rescale": 0.7}, 1, **given)
    assert distance(ours.pred, theirs.pred) <= 2e-6


@row
def rescale_of_a_prediction_that_does_not_vary_is_nan() -> None:
    given = {"pred_cond": torch.full(SHAPE, 2.0), "pred_uncond": torch.ones(SHAPE)}
    theirs, ours = guided("ClassifierFreeGuidance", {"guidance_rescale": 0.7, "guidance_scale": 3.0}, 0, **given)
    assert theirs.pred.isnan().all()
    assert torch.equal(ours.pred, torch.full(SHAPE, 4.0))


@row
def magnitude_aware_guidance_fails_for_images() -> None:
    for shape in ((2, 4, 8, 8), (2, 4, 3, 8, 8)):
        given = {"pred_cond": normals(*shape), "pred_uncond": normals(*shape, seed=1)}
        theirs, ours = guided("MagnitudeAwareGuidance", {}, 0, **given)
        assert theirs is RuntimeError
        tokens = {key: value.flatten(2) for key, value in given.items()}
        assert distance(ours.pred.flatten(2), guided("MagnitudeAwareGuidance", {}, 0, **tokens)[0].pred) <= 2e-6


# Guiders, clipping, formats.


@row
def zero_star_returns_its_multiple_of_pred_uncond() -> None:
    given = {"pred_cond": normals(*SHAPE), "pred_uncond": normals(*SHAPE, seed=1)}
    theirs, ours = guided("ClassifierFreeZeroStarGuidance", {}, 3, **given)
    assert distance(theirs.pred_uncond, given["pred_uncond"]) > 0.1
    assert distance(ours.pred_uncond, theirs.pred_uncond) <= 2e-6


@row
def momentum_of_guiders_begins_again_in_prepare_inputs() -> None:
    options = {"adaptive_projected_guidance_momentum": -0.5}
    for wrap in (lambda one: one, accelerate):
        guider = wrap(guiders.AdaptiveProjectedGuidance(**options))
        given = [normals(*SHAPE), normals(*SHAPE, seed=1)]
        averages = []
        for prepared in (True, False, True):
            guider.set_state(0, 8, None)
            if prepared:
                guider.prepare_inputs({})
            guider.adaptive_projected_guidance_momentum = 0.9  # heard by the next prepare_inputs
            guider.forward(*given)
            averages.append(guider.momentum_buffer.running_average)
        difference = given[0] - given[1]
        assert distance(averages[0], difference) < 1e-6
        assert distance(averages[1], 0.5 * difference) < 1e-6
        assert distance(averages[2], difference) < 1e-6
        assert guider.momentum_buffer.momentum == 0.9


@row
def skipped_layers_take_no_part_in_the_first_step() -> None:
    options = {"skip_layer_guidance_layers": 1, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    names = ("pred_cond", "pred_uncond", "pred_cond_skip")
    given = {name: normals(*SHAPE, seed=seed) for seed, name in enumerate(names)}
    for step in (0, 1):
        theirs, ours = guided("SkipLayerGuidance", options, step, **given)
        plain, _ = guided("ClassifierFreeGuidance", {}, step, **{name: given[name] for name in names[:2]})
        assert distance(ours.pred, theirs.pred) <= 2e-6
        assert (distance(theirs.pred, plain.pred) < 1e-6) == (step == 0)


@row
def tangential_guidance_of_float64_is_computed_in_float32() -> None:
    given = {"pred_cond": normals(*SHAPE).double(), "pred_uncond": normals(*SHAPE, seed=1).double()}
    theirs, ours = guided("TangentialClassifierFreeGuidance", {}, 0, **given)
    assert torch.equal(ours.pred, theirs.pred)
    single = {name: value.float() for name, value in given.items()}
    assert distance(theirs.pred, guided("TangentialClassifierFreeGuidance", {}, 0, **single)[0].pred) > 1e-9


@row
def a_guiders_output_has_no_fields_inside_torch_compile() -> None:
    given = [normals(*SHAPE), normals(*SHAPE, seed=1)]
    for wrap in (lambda one: one, accelerate):
        guider = wrap(guiders.ClassifierFreeGuidance(guidance_scale=3.0))
        guider.set_state(0, 8, None)
        want = guider.forward(*given).pred
        by_key = torch.compile(lambda *given, one=guider: one.forward(*given)["pred"], backend="eager")
        by_field = torch.compile(lambda *given, one=guider: one.forward(*given).pred, backend="eager")
        assert distance(by_key(*given), want) <= 2e-6
        with pytest.raises(AttributeError, match="pred"):
            by_field(*given)


@row
def thresholding_takes_torchs_quantile_not_numpys() -> None:
    options = {"thresholding": True, "clip_sample": False, "sample_max_value": 5.0}
    both("DDIMScheduler", 4, options)
    x = normals(41, 997).abs()
    by_torch, by_numpy = torch.quantile(x, 0.995, dim=1).numpy(), np.quantile(x.numpy(), 0.995, axis=1)
    assert (by_torch != by_numpy.astype(np.float32)).any()  # the rank is rounded to float32
    assert np.allclose(by_torch, by_numpy, rtol=1e-3)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    ROWS[name]()


def page_rows() -> list[list[str]]:
    """The page's rows: name, what happens, where."""
    page = (ROOT / "docs/behaviours.md").read_text(encoding="utf-8")
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in page.splitlines()
        if re.match(r"\| `\w+` \|", line)
    ]


@pytest.mark.quick
def test_the_page_has_these_rows() -> None:
    rows = page_rows()
    assert [name.strip("`") for name, _, _ in rows] == list(ROWS)
    assert all(len(text) > 40 for _, text, _ in rows)


@pytest.mark.quick
@pytest.mark.parametrize("where", sorted({name for row in page_rows() for name in re.findall(r"`([\w.]+)`", row[2])}))
def test_the_page_names_what_exists(where: str) -> None:
    package, *names = where.split(".")
    found: Any = {"diffusers": diffusers, "torch": torch, "k_diffusion": SimpleNamespace(sampling=sampling)}[package]
    for name in names:
        found = getattr(found, name)
    assert found is not None
