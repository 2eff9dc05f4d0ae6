"""Fused sampling functions in calls as ComfyUI, the web UIs and scripts make them, beside the originals."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.suite.foreign import load_k_diffusion
from fastcfg.compiler import sampler_rehearsal
from fastcfg.frontends._fused import fall_through
from fastcfg.frontends._fused.sampler import fused

pytestmark = pytest.mark.quick

modules = load_k_diffusion()
sampling: Any = modules and modules[0]
needs_k_diffusion = pytest.mark.skipif(modules is None, reason="k-diffusion is not installed")
LEVELS = torch.tensor([14.6, 5.0, 2.0, 0.7, 0.2, 0.0])


def start() -> Tensor:
    return 14.6 * torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    s = sigma.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x / (s**2 + 1).sqrt()) + 0.1 * x / (s + 1)


def fuse(function: Callable[..., Any]) -> Any:
    return fused(function, "auto", "auto")


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]  # noqa: NPY002


def both(function: Callable[..., Any], ours: Any, call: Callable[[Any], Any]) -> None:
    """The same result, and generators left alike."""
    found = []
    for each in (function, ours):
        torch.manual_seed(3)
        np.random.seed(4)  # noqa: NPY002
        random.seed(5)
        with torch.no_grad():
            found.append((call(each), states()))
    (want, after), (got, moved) = found
    assert got.dtype == want.dtype
    assert float((got - want).abs().max()) <= 4e-6 * float(want.abs().max())
    assert moved == after


# Draws


def with_draw(draw: Callable[..., Tensor], model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (0.9 * following - sigma)
        x = x + 0.3 * following * draw(x, **options)
    return x


def made(draw: Callable[..., Tensor], *names: str) -> Callable[..., Tensor]:
    def sample(model: Any, x: Tensor, sigmas: Tensor, generator: Any = None) -> Tensor:
        return with_draw(draw, model, x, sigmas, **({"generator": generator} if names else {}))

    return sample


def fixed_seed(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


FUSED_DRAWS: dict[str, Callable[..., Tensor]] = {
    "of another name": torch.randn_like,
    "in place": lambda x: torch.empty_like(x).normal_(),
    "of another deviation": lambda x: torch.normal(0.0, 1.7, x.shape),
    "in float64": lambda x: torch.randn(x.shape, dtype=torch.float64),
    "in half": lambda x: torch.randn(x.shape, dtype=torch.float16).to(x.dtype),
    "shared by the batch": lambda x: torch.randn(1, *x.shape[1:]),
    "one a channel": lambda x: torch.randn(*x.shape[:2], 1, 1),
    "unused": lambda x: 0.0 * torch.randn_like(x) + torch.randn_like(x),
    "from a generator of its own": fixed_seed,
    "of channels last": lambda x: torch.randn_like(x.contiguous(memory_format=torch.channels_last)),
}
OTHER_DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": torch.rand_like,
    "with a mean": lambda x: torch.empty_like(x).normal_(0.5, 1.0),
    "by numpy": lambda x: torch.from_numpy(np.random.standard_normal(x.shape)).to(x.dtype),  # noqa: NPY002
    "by Python": lambda x: torch.full_like(x, random.gauss(0, 1)),
    "permuted": lambda x: torch.randn(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1),
    "before seeding": lambda x: (torch.randn_like(x), torch.manual_seed(7))[0],
    "after seeding": lambda x: (torch.manual_seed(7), torch.randn_like(x))[1],
}


@pytest.mark.parametrize("kind", FUSED_DRAWS)
def test_noise_is_drawn_as_the_original_draws_it(kind: str) -> None:
    function = made(FUSED_DRAWS[kind])
    ours = fuse(function)
    for _ in range(2):
        both(function, ours, lambda each: each(denoise, start(), LEVELS))
        assert ours.report()["run"] in ("stepped", "engine")


@pytest.mark.parametrize("kind", OTHER_DRAWS)
def test_what_draws_otherwise_falls_through_with_the_same_image(kind: str) -> None:
    function = made(OTHER_DRAWS[kind])
    ours = fuse(function)
    for _ in range(2):
        both(function, ours, lambda each: each(denoise, start(), LEVELS))
        assert ours.report()["run"] == "the original"


def test_a_given_generator_is_drawn_from() -> None:
    function = made(lambda x, generator: torch.randn(x.shape, generator=generator), "generator")
    ours = fuse(function)
    for seed in (1, 2):
        both(function, ours, lambda each, s=seed: each(denoise, start(), LEVELS, torch.Generator().manual_seed(s)))
    assert ours.report()["run"] == "engine"


def test_draws_before_the_first_call_and_of_a_doubled_stage() -> None:
    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        x = x + 0.5 * torch.randn_like(x)
        for sigma, following in pairwise(sigmas):
            z = torch.randn_like(x)
            between = x + 0.2 * sigma * z
            m = model(between, sigma.expand(len(x)))
            x = following / sigma * x + (1 - following / sigma) * m + 0.1 * following * z
        return x

    both(function, fuse(function), lambda each: each(denoise, start(), LEVELS))


# Seeds, attributes and hooks, as ComfyUI has them


class Process:
    """What ComfyUI calls a model's sampling."""

    def __init__(self, flow: bool) -> None:
        self.flow = flow

    def noise_scaling(self, sigma: Tensor, noise: Tensor, image: Tensor) -> Tensor:
        return sigma * noise + (1 - sigma) * image if self.flow else sigma * noise + image


class Inner:
    def __init__(self, process: Process) -> None:
        self.process = process


class Guided:
    """A model with a second prediction, which it tells hooks, and a mask."""

    def __init__(self, process: Process, guidance: float = 3.0) -> None:
        self.inner_model, self.guidance, self.calls = Inner(process), guidance, 0

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Any = None, model_options: Any = None, seed: Any = None
    ) -> Tensor:
        self.calls += 1
        cond, uncond = denoise(x, sigma), 0.8 * denoise(x + 0.3, sigma)
        result = uncond + self.guidance * (cond - uncond)
        for hook in (model_options or {}).get("sampler_post_cfg_function", []):
            result = hook({"denoised": result, "uncond_denoised": uncond, "cond_denoised": cond, "sigma": sigma})
        return result if denoise_mask is None else result * denoise_mask


def seeded_noise(x: Tensor, seed: int | None) -> Callable[..., Tensor]:
    generator = None if seed is None else torch.Generator(device=x.device).manual_seed(seed)
    return lambda *_: torch.randn(x.size(), dtype=x.dtype, layout=x.layout, device=x.device, generator=generator)


@torch.no_grad()
def ancestral(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    extra_args = extra_args or {}
    noise = seeded_noise(x, extra_args.get("seed"))
    process = model.inner_model.process
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = model(x, sigma * x.new_ones([len(x)]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised
        if following > 0:
            x = process.noise_scaling(following, noise(sigma, following), x)
    return x


def with_hook(saves_uncond: bool, stages: int = 1, ancestral: bool = False) -> Callable[..., Tensor]:
    """A CFG++ sampler: it learns the unconditional prediction through a hook."""

    @torch.no_grad()
    def sample(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        extra_args, told, old = extra_args or {}, [0], None
        noise = seeded_noise(x, extra_args.get("seed"))

        def hook(args: dict[str, Any]) -> Any:
            told[0] = args["uncond_denoised"]
            return args["denoised"]

        options = extra_args.get("model_options", {}).copy()
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), hook]
        options["disable_cfg1_optimization"] = True
        extra_args["model_options"] = options
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            denoised = model(x, sigma * x.new_ones([len(x)]), **extra_args)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            kept = told[0] if saves_uncond else denoised
            if stages == 2 and following > 0:
                between = denoised + (x - told[0]) * 0.7 * following / sigma
                second = model(between, 0.7 * following * x.new_ones([len(x)]), **extra_args)
                x = following / sigma * (x + denoised - told[0]) + (1 - following / sigma) * second
            else:
                x = denoised + (x - told[0]) / sigma * following
            if old is not None:
                x = x + 0.1 * following * (kept - old)
            if ancestral and following > 0:
                x = x + 0.2 * following * noise(sigma, following)
            old = kept if stages == 1 else None
        return x

    return sample


COMFY = {
    "ancestral": ancestral,
    "euler, hooked": with_hook(True),
    "saves the denoised, hooked": with_hook(False),
    "two stages, hooked": with_hook(False, stages=2),
    "ancestral, hooked": with_hook(True, ancestral=True),
}


def as_ksampler(each: Any, model: Guided, seed: int, mask: Tensor | None, told: list[Any] | None) -> Tensor:
    """A call as ComfyUI's KSampler makes it."""
    post: list[Any] = [lambda args: args["denoised"] * 0.9]
    options = {"transformer_options": {"sample_sigmas": LEVELS}, "sampler_post_cfg_function": post}
    extra_args = {"model_options": options, "seed": seed, "denoise_mask": mask}
    callback = (
        None if told is None else lambda info: told.append((info["i"], info["x"].clone(), info["denoised"].clone()))
    )
    return each(model, start() / 14.6, LEVELS / 14.6, extra_args=extra_args, callback=callback, disable=True)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("name", COMFY)
def test_functions_are_called_as_comfyui_calls_them(name: str, flow: bool, inference: bool) -> None:
    function, process = COMFY[name], Process(flow)
    ours = fuse(function)
    mask = (torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for seed, m, observed in ((1, None, True), (2, None, True), (3, mask, True), (1, None, False)):
        told: list[list[Any]] = []
        models: list[Guided] = []

        def call(each: Any, mask: Any, seed: int, told: Any, models: Any, observed: bool) -> Any:
            told.append([])
            models.append(Guided(process))
            with torch.inference_mode(inference):
                return as_ksampler(each, models[-1], seed, mask, told[-1] if observed else None).clone()

        both(function, ours, partial(call, mask=m, seed=seed, told=told, models=models, observed=observed))
        assert ours.report()["run"] == "stepped", ours.report()
        assert models[0].calls == models[1].calls
        for got, want in zip(told[1], told[0], strict=True):
            assert got[0] == want[0]
            torch.testing.assert_close(got[1:], want[1:], rtol=1e-5, atol=1e-5)


def test_another_seed_or_process_is_another_image() -> None:
    """What a function reads in one call is not taken for the next."""
    ours = fuse(ancestral)
    for flow in (False, True, False):
        for seed in (1, 2):
            process = Process(flow)
            both(ancestral, ours, lambda each, p=process, s=seed: as_ksampler(each, Guided(p), s, None, []))
    process = Process(False)
    for flow in (False, True):
        process.flow = flow
        both(ancestral, ours, lambda each: as_ksampler(each, Guided(process), 1, None, []))


@pytest.mark.parametrize("name", ["ancestral", "ancestral, hooked"])
def test_generators_of_a_function_s_own_are_handed_over(name: str) -> None:
    function = COMFY[name]
    ours = fuse(function)

    def call(each: Any) -> Tensor:
        def callback(info: dict[str, Any]) -> None:
            if info["i"] == 2:
                info["x"].mul_(0.5)

        extra_args = {"seed": 3, "model_options": {}}
        result: Tensor = each(Guided(Process(False)), start(), LEVELS, extra_args=extra_args, callback=callback)
        return result

    both(function, ours, call)
    assert ours.report()["run"] == "stepped, then the original"


@pytest.mark.parametrize("habit", ["bare hook", "tensor", "changes the prediction", "takes out"])
def test_models_told_otherwise_fall_through(habit: str) -> None:
    def function(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
        told, args = [0], dict(extra_args or {})
        options = dict(args["model_options"])
        if habit == "bare hook":
            options["post_cfg"] = lambda u: told.__setitem__(0, u)
        if habit == "tensor":
            options["last"] = x
        if habit == "changes the prediction":
            options["sampler_post_cfg_function"] = [lambda args: 2 * args["denoised"]]
        if habit == "takes out":
            del options["scale"]
        for sigma, following in pairwise(sigmas):
            m = model(x, sigma.expand(len(x)), **{**args, "model_options": options})
            x = following / sigma * (x + 0.1 * m - 0.1 * told[0]) + (1 - following / sigma) * m
        return x

    def model(x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
        m = model_options.get("scale", 0.5) * denoise(x, sigma) + 0.01 * model_options.get("last", 0)
        model_options.get("post_cfg", lambda u: None)(0.1 * x)
        for hook in model_options.get("sampler_post_cfg_function", []):
            m = hook({"denoised": m, "uncond_denoised": 0.1 * x})
        return m

    ours = fuse(function)
    both(function, ours, lambda each: each(model, start(), LEVELS, extra_args={"model_options": {"scale": 0.9}}))
    assert ours.report()["run"] == "the original"


@pytest.mark.parametrize("calls", [0, 2])
def test_a_hook_that_is_called_otherwise_hands_over(calls: int) -> None:
    class Model(Guided):
        def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, **_: Any) -> Tensor:
            self.calls += 1
            hook = model_options["sampler_post_cfg_function"][-1]
            for n in range(calls if self.calls == 3 else 1):
                hook({"denoised": x, "uncond_denoised": (0.3 + n) * x})
            return denoise(x, sigma)

    function = COMFY["euler, hooked"]
    ours = fuse(function)
    both(function, ours, lambda each: each(Model(Process(False)), start(), LEVELS, extra_args={"model_options": {}}))
    assert ours.report()["run"] == "stepped, then the original"


# Callbacks


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "x": lambda info: info["x"][..., :2].fill_(0.5),
    "denoised": lambda info: info["denoised"].clamp_(-0.3, 0.3),
    "x, by data": lambda info: info["x"].data.mul_(0.5),
    "x, by numpy": lambda info: info["x"].numpy().__imul__(0.5),
    "both": lambda info: (info["x"].mul_(0.9), info["denoised"].add_(0.1)),
    "sigma_hat": lambda info: info["sigma_hat"].mul_(1.1) if info["sigma_hat"] is not info["sigma"] else None,
}


@needs_k_diffusion
@pytest.mark.parametrize("when", [0, 2, 4])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name", ["euler", "heun", "dpmpp_2m", "lms", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_3m_sde"]
)
def test_what_callbacks_write_is_heard(name: str, edit: str, when: int) -> None:
    function, calls = getattr(sampling, f"sample_{name}"), list[int]()
    ours = fuse(function)

    def call(each: Any) -> Tensor:
        evaluated, told = [0], [0]

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            evaluated[0] += 1
            return denoise(x, sigma)

        def callback(info: dict[str, Any]) -> None:
            told[0] += 1
            if info["i"] == when:
                EDITS[edit](info)

        options = {"noise_sampler": lambda *_: torch.randn(2, 4, 6, 5)} if "3m" in name else {}
        result: Tensor = each(model, start(), LEVELS.clone(), callback=callback, disable=True, **options)
        calls.append(100 * evaluated[0] + told[0])
        return result

    both(function, ours, call)
    assert calls[0] == calls[1]
    assert ours.report()["run"].startswith("stepped")


@needs_k_diffusion
def test_a_callback_that_only_looks_costs_capture_alone() -> None:
    ours = fuse(sampling.sample_dpmpp_2m)
    both(
        sampling.sample_dpmpp_2m,
        ours,
        lambda each: each(denoise, start(), LEVELS, callback=lambda info: 3, disable=True),
    )
    assert ours.report() == {"run": "stepped", "reason": "its callback is given what the model is, as it runs"}


@needs_k_diffusion
def test_exceptions_of_callbacks_end_the_run_where_they_end_the_original() -> None:
    def call(each: Any) -> Tensor:
        def callback(info: dict[str, Any]) -> None:
            if info["i"] == 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            each(denoise, start(), LEVELS, callback=callback, disable=True)
        return torch.ones(())

    both(sampling.sample_euler_ancestral, fuse(sampling.sample_euler_ancestral), call)


def anywhere(where: str) -> Callable[..., Tensor]:
    def sample(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
        if where == "before all" and callback:
            callback({"x": x})
        for sigma, following in pairwise(sigmas):
            m = model(x, sigma.expand(len(x)))
            if where == "twice" and callback:
                callback({"x": x, "m": m})
            x = x + (x - m) / sigma * (following - sigma)
            if where in ("end", "twice") and callback:
                callback({"x": x, "m": m})
        return x

    return sample


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("where", ["before all", "end", "twice"])
def test_callbacks_come_when_the_original_s_come(where: str, edits: bool) -> None:
    function = anywhere(where)
    ours, told = fuse(function), list[list[Tensor]]()

    def call(each: Any) -> Tensor:
        told.append([])

        def callback(info: dict[str, Any]) -> None:
            told[-1].append(info["x"].clone())
            if edits and len(told[-1]) == 3:
                info["x"].mul_(0.5)

        result: Tensor = each(denoise, start(), LEVELS, callback=callback)
        return result

    both(function, ours, call)
    torch.testing.assert_close(told[1], told[0], rtol=1e-5, atol=1e-5)
    assert ours.report()["run"].startswith("stepped")


# Models


class Habit:
    """A model that does something in its third call."""

    def __init__(self, does: Callable[[Tensor, Tensor], Any]) -> None:
        self.does, self.calls = does, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        self.calls += 1
        return self.does(x, denoise(x, sigma)) if self.calls == 3 else denoise(x, sigma)


HABITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "another dtype": lambda x, m: m.double(),
    "changes its input": lambda x, m: m + 0 * x.mul_(0.9),
    "channels last": lambda x, m: m.contiguous(memory_format=torch.channels_last),
    "one image for all": lambda x, m: m[:1],
}


@pytest.mark.parametrize("habit", HABITS)
def test_outputs_unlike_the_others_hand_over_to_the_original(habit: str) -> None:
    function = made(torch.randn_like)
    ours, models = fuse(function), [Habit(HABITS[habit]) for _ in range(2)]
    both(function, ours, lambda each: each(models[each is ours], start(), LEVELS))
    assert ours.report()["run"] == "stepped, then the original"
    assert models[0].calls == models[1].calls == 5
    # With this model it will happen again.
    both(function, ours, lambda each: each(models[each is ours], start(), LEVELS))
    assert ours.report()["run"] == "the original"


def test_gradients_are_the_original_s() -> None:
    weight, function = torch.ones(4, 1, 1, requires_grad=True), made(torch.zeros_like)
    ours = fuse(function)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma) * weight

    want, got = (torch.autograd.grad(each(model, start(), LEVELS).sum(), weight)[0] for each in (function, ours))
    torch.testing.assert_close(got, want)
    assert ours.report()["reason"].startswith("gradients are wanted")
    both(function, ours, lambda each: each(model, start(), LEVELS))
    assert ours.report()["run"] in ("stepped", "engine")


def test_a_model_that_draws_is_not_captured() -> None:
    function = made(torch.randn_like)
    ours = fuse(function)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, sigma) + 0.1 * torch.randn_like(x)

    for _ in range(3):
        both(function, ours, lambda each: each(model, start(), LEVELS))
    assert ours.report() == {"run": "stepped", "reason": "the model draws random numbers itself"}


def test_x_that_is_changed_and_returned_is_the_caller_s() -> None:
    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        for sigma, following in pairwise(sigmas):
            x += (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
        return x

    ours, x, y = fuse(function), start(), start()
    with torch.no_grad():
        assert ours(denoise, x, LEVELS) is x
        torch.testing.assert_close(x, function(denoise, y, LEVELS), rtol=1e-5, atol=1e-5)
    assert ours.report()["run"] == "stepped"


# Falling through


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, AttributeError, AssertionError, StopIteration])
def test_whatever_a_trial_raises_the_original_runs_and_what_failed_is_remembered(error: type[Exception]) -> None:
    runs = []

    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        runs.append(len(x))
        torch.randn(1)
        if type(model) is not Real:
            raise error("no stand-ins")
        return x + torch.randn_like(x)

    class Real:
        def __call__(self, *_: Any) -> Any: ...

    ours, model = fuse(function), Real()
    both(function, ours, lambda each: each(model, start(), LEVELS))
    tried = len(runs)
    for _ in range(3):
        both(function, ours, lambda each: each(model, start(), LEVELS))
    assert len(runs) == tried + 6  # no further trial


def test_a_function_that_never_fuses_is_not_tried_for_ever() -> None:
    runs = []

    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        runs.append(1)
        return x**2 + model(x, sigmas[:1].expand(len(x)))

    ours = fuse(function)
    for n in range(20):
        ours(denoise, start(), LEVELS + n)
    assert len(runs) < 20 + 4 * sampler_rehearsal._MOST_FAILURES
    assert ours.report()["run"] == "the original"


def test_a_function_that_keeps_settings_elsewhere_is_heard() -> None:
    settings = {"eta": 0.5}

    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return with_draw(lambda x: settings["eta"] * torch.randn_like(x), model, x, sigmas)

    ours = fuse(function)
    for eta in (0.5, 0.5, 0.1, 0.0):
        settings["eta"] = eta
        both(function, ours, lambda each: each(denoise, start(), LEVELS))
        assert ours.report()["run"] in ("stepped", "engine")


HALF = 0.5


def of_a_global(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return HALF * with_draw(torch.zeros_like, model, x, sigmas)


def test_a_changed_global_is_heard_and_unchanged_ones_cost_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fuse(of_a_global)
    both(of_a_global, ours, lambda each: each(denoise, start(), LEVELS))
    trials: list[Any] = []
    run = sampler_rehearsal.Trial.run
    monkeypatch.setattr(sampler_rehearsal.Trial, "run", lambda *args: trials.append(1) or run(*args))
    both(of_a_global, ours, lambda each: each(denoise, start(), LEVELS))
    assert not trials
    monkeypatch.setitem(globals(), "HALF", 0.25)
    both(of_a_global, ours, lambda each: each(denoise, start(), LEVELS))
    assert trials


def test_a_method_of_an_object_follows_its_attributes() -> None:
    class Euler:
        scale = 0.5

        def sample(self, model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
            return self.scale * with_draw(torch.zeros_like, model, x, sigmas)

    sampler = Euler()
    ours = fuse(sampler.sample)
    for scale in (0.5, 0.5, 0.1):
        sampler.scale = scale
        both(sampler.sample, ours, lambda each: each(denoise, start(), LEVELS))


def test_x_of_another_name_partials_and_shapes(caplog: pytest.LogCaptureFixture) -> None:
    def function(model: Any, noise: Tensor, sigmas: Tensor, eta: float = 0.1) -> Tensor:
        return with_draw(lambda x: eta * torch.randn_like(x), model, noise, sigmas)

    for each in (function, partial(function, eta=0.2)):
        ours = fuse(each)
        for shape in ((2, 3, 4, 5), (1, 4, 6), (2, 4, 3, 4, 4)):
            x = 14.6 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
            both(each, ours, lambda f, x=x: f(denoise, x, LEVELS))
            assert ours.report()["run"] in ("stepped", "engine")


def test_one_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    fall_through._logged.clear()

    def shifts(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x + model(torch.cat([x, x + 1]), sigmas[:1].expand(2 * len(x))).chunk(2)[0]

    ours = fuse(shifts)
    with caplog.at_level(logging.WARNING, logger="fastcfg"):
        for _ in range(2):
            both(shifts, ours, lambda each: each(denoise, start(), LEVELS))
    lines = [record.getMessage() for record in caplog.records if record.name == "fastcfg"]
    assert len(lines) == 1
    assert "shifts is not fused" in lines[0]
    assert "guidance=CFG(scale)" in lines[0]
