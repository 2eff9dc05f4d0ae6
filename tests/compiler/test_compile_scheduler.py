"""Schedulers of diffusers compiled: every class, with the configurations that change its numbers, or why not."""

from __future__ import annotations

import copy
import math
import re
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from support.scheduler_cases import CASES, NO_CLIP
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers
from fastcfg import DynamicThreshold, Sampler, StepTable
from fastcfg.compiler import compile_scheduler, compile_timesteps, scheduler_clip
from fastcfg.compiler.patching import drawing, in_float64

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """A smooth model without weights, bounded, float64."""
    shift = torch.sin(0.01 * t.double()).view(-1, 1, 1, 1)
    return torch.tanh(0.8 * x + shift) + 0.1 * x


def with_variance(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([denoise(x, t), torch.cos(x)], dim=1)


def original(scheduler: Any, model: Any, start: Tensor, noise: Tensor, **options: Any) -> list[Tensor]:
    """The scheduler's own samples after every step, in float64."""
    scheduler, x, states, row = copy.deepcopy(scheduler), start, [], 0
    with drawing(scheduler, lambda like: noise[row]), in_float64():
        for row, t in enumerate(scheduler.timesteps):  # noqa: B007 - read by the draws
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = model(given.double(), t.expand(len(x)))
            x = scheduler.step(output, t, x, **options).prev_sample.double()
            states.append(x)
    return states


def run(table: StepTable, scheduler: Any, model: Any, start: Tensor, noise: Tensor) -> list[Tensor]:
    sampler = Sampler(
        model,
        table,
        clip=scheduler_clip(scheduler),
        backend="reference",
        graph=False,
        dtype=torch.float64,
        state_dtype=torch.float64,
    )
    steps = sampler.iterate(tuple(start.shape), x_T=start, noise=noise if table.uses_noise else None)
    return [step.x for step in steps]


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_compiled_scheduler_is_the_original(name: str, config: dict[str, Any], count: int) -> None:
    scheduler = getattr(diffusers, name)(**config)
    before = getattr(scheduler, "num_inference_steps", None)
    try:
        fresh = copy.deepcopy(scheduler)
        fresh.set_timesteps(count)
        noise = torch.randn(len(fresh.timesteps), 2, 3, 6, 5, generator=torch.manual_seed(0), dtype=torch.float64)
        model = with_variance if "learned" in str(config.get("variance_type")) else denoise
        start = torch.randn(2, 3, 6, 5, generator=torch.manual_seed(1), dtype=torch.float64)
        start *= float(getattr(fresh, "init_noise_sigma", 1.0))
        want = original(fresh, model, start, noise)
    except (IndexError, ZeroDivisionError, ValueError) as error:
        pytest.skip(f"the original does not run: {type(error).__name__}")
    if not all(torch.isfinite(state).all() for state in want):
        pytest.skip("the original's samples are not finite")
    table = compile_scheduler(scheduler, count)
    assert len(table) == len(want)
    assert table.num_history <= 3
    for row, (got, state) in enumerate(zip(run(table, fresh, model, start, noise), want, strict=True)):
        # Measured: 6.7e-12 of the largest value; 7.6e-9 of FlowMapEuler, whose times are float32 in the sampler.
        distance = float((got - state).abs().max()) / max(1.0, float(state.abs().max()))
        assert distance < (2e-8 if name.startswith("FlowMap") else 2e-11), f"row {row}: {distance:.1e}"
    assert getattr(scheduler, "num_inference_steps", None) == before  # as it was


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"eta": 0.5}),
        ("DDIMScheduler", {"eta": 1.0, "use_clipped_model_output": True}),
        ("TCDScheduler", {"eta": 0.7}),
        ("EulerDiscreteScheduler", {"s_churn": 3.0, "s_tmax": 5.0, "s_noise": 1.01}),
        ("LMSDiscreteScheduler", {"order": 2}),
    ],
    ids=str,
)
def test_arguments_of_the_steps_are_compiled_in(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)()
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(9)
    noise = torch.randn(9, 2, 3, 6, 5, generator=torch.manual_seed(0), dtype=torch.float64)
    start = torch.randn(2, 3, 6, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    start *= float(fresh.init_noise_sigma)
    want = original(fresh, denoise, start, noise, **options)
    table = compile_scheduler(scheduler, 9, step_options=options)
    got = run(table, fresh, denoise, start, noise)
    assert float((got[-1] - want[-1]).abs().max()) < 1e-11 * max(1.0, float(want[-1].abs().max()))
    plain = compile_scheduler(scheduler, 9)
    assert not np.allclose(table.rows, plain.rows)


def test_saved_tensors_are_as_few_as_the_method_needs() -> None:
    want = {
        "DDIMScheduler": 0,
        "EulerDiscreteScheduler": 0,
        "HeunDiscreteScheduler": 1,
        "DPMSolverMultistepScheduler": 1,
        "UniPCMultistepScheduler": 2,
        "SASolverScheduler": 2,
        "LMSDiscreteScheduler": 3,
    }
    got = {name: compile_scheduler(getattr(diffusers, name)(), 12).num_history for name in want}
    assert got == want


def test_x0_is_the_clipped_one_beside_which_ddim_keeps_the_raw_output() -> None:
    clipped = compile_scheduler(diffusers.DDIMScheduler(), 10)
    assert clipped.uses_raw_output
    assert clipped.uses_x0
    assert np.abs(clipped["p_m"]).min() > 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_clip_beside_a_scheduler_without_one_is_compiled_for(name: str) -> None:
    scheduler = getattr(diffusers, name)(**(NO_CLIP if name == "DDIMScheduler" else {}))
    scheduler.set_timesteps(8)
    plain, clipped = (compile_scheduler(scheduler, 8, clipped=clipped) for clipped in (False, True))
    assert clipped.uses_x0
    assert plain.uses_x0 == (name == "DPMSolverMultistepScheduler")  # x0 is what it keeps
    noise, start = torch.zeros(8, 2, 3, 6, 5), torch.randn(2, 3, 6, 5, generator=torch.manual_seed(1)).double()
    first, second = (run(table, scheduler, denoise, start, noise)[-1] for table in (plain, clipped))
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-13)  # measured: 1.4e-14 of 77
    wide: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "backend": "reference"}
    free, held = (Sampler(denoise, clipped, clip=clip, graph=False, **wide) for clip in (None, 0.1))
    assert not torch.equal(free.sample(start.shape, x_T=start), held.sample(start.shape, x_T=start))


def test_the_clip_of_a_scheduler() -> None:
    assert scheduler_clip(diffusers.DDIMScheduler()) == 1.0
    assert scheduler_clip(diffusers.DDIMScheduler(clip_sample_range=2.0)) == 2.0
    assert scheduler_clip(diffusers.EulerDiscreteScheduler()) is None
    threshold = scheduler_clip(diffusers.DDPMScheduler(thresholding=True, sample_max_value=3.0))
    assert threshold == DynamicThreshold(0.995, 1.0, 3.0)


# Precision


@pytest.mark.parametrize(
    "narrowed",
    [lambda x: torch.from_numpy(x.numpy().astype(np.float32)).double(), lambda x: x.flatten().float().view(x.shape)],
    ids=["by numpy", "flat"],
)
def test_a_scheduler_that_rounds_by_ways_of_its_own_is_compiled_as_far_as_that_allows(narrowed: Any) -> None:
    exact, rounding = changed(lambda s, x, m, sample: x), changed(lambda s, x, m, sample: narrowed(x))
    apart = np.abs(compile_scheduler(rounding, 12).rows - compile_scheduler(exact, 12).rows).max()
    assert 0 < apart < 2e-7  # measured: 6.5e-8


def test_other_threads_draw_and_convert_as_ever_while_a_scheduler_is_run() -> None:
    seen, started, done = [], Event(), Event()

    def other() -> None:
        started.wait(60)
        wide = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        seen.extend(
            [torch.randn(2).shape, wide.float().dtype, wide.to(torch.float16).dtype, wide.to(torch.int64).dtype]
        )
        done.set()

    def step(scheduler: Any, x: Tensor, output: Tensor, sample: Tensor) -> Tensor:
        started.set()
        assert done.wait(60)
        assert x.float().dtype == x.to(torch.float16).dtype == torch.float64
        return x

    thread = Thread(target=other)
    thread.start()
    compile_scheduler(changed(step), 2)
    thread.join()
    assert seen == [(2,), torch.float32, torch.float16, torch.int64]
    assert torch.ones(1, 1, 1, 1, dtype=torch.float64).float().dtype == torch.float32
    assert "to" not in vars(Tensor)


# What is no table


def changed(step: Any) -> Any:
    """DDIM with another step."""

    class Changed(diffusers.DDIMScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
            result = super().step(model_output, timestep, sample, **options)
            result.prev_sample = step(self, result.prev_sample, model_output, sample)
            return result

    return Changed(clip_sample=False)


def keep_five(scheduler: Any, x: Tensor, output: Tensor, sample: Tensor) -> Tensor:
    kept = scheduler.__dict__.setdefault("kept", [])
    kept.append(output)
    return x + sum(math.cos(len(kept) * j) * m for j, m in enumerate(kept[-6:]))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s, x, m, sample: x + 0.01 * x**2, "step 0 has coefficients that depend on the sample"),
        (lambda s, x, m, sample: x * 1.5 if sample.abs().max() > 0.7 else x, "step 0 has coefficients"),
        (lambda s, x, m, sample: x * 1.5 if len(sample) > 1 else x, "its table differs by .* in row 0"),
        (keep_five, "needs 5 saved tensors, expected at most 3"),
    ],
    ids=["a square", "a branch", "a branch that basis vectors do not take", "five saved tensors"],
)
def test_what_is_no_table_is_refused_and_why(step: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_scheduler(changed(step), 12)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("PNDMScheduler", {}, "needs 4 saved tensors"),  # its Runge-Kutta warm-up
        ("UniPCMultistepScheduler", {"solver_type": "bh1", "predict_x0": False}, "with samples that are not finite"),
        ("DPMSolverSDEScheduler", {}, "with a Brownian tree"),
        ("CogVideoXDPMScheduler", {}, "missing 2 required positional arguments"),
        ("DDPMWuerstchenScheduler", {}, "does not run on basis vectors"),
        ("RePaintScheduler", {}, "missing 2 required positional arguments"),
        ("ScoreSdeVeScheduler", {}, "without step"),
        ("CMStochasticIterativeScheduler", {}, "its table differs"),  # clips what is not x0
        ("CosineDPMSolverMultistepScheduler", {}, "with a Brownian tree"),
        ("DiscreteDDIMScheduler", {}, "does not run on basis vectors"),
        ("HeliosScheduler", {}, "does not run on basis vectors"),
    ],
)
def test_the_schedulers_that_fall_through(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_scheduler(getattr(diffusers, name)(**config), 12)


@pytest.mark.parametrize("count", [0, 2.5, None])
def test_bad_numbers_of_steps(count: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps: got"):
        compile_scheduler(diffusers.DDIMScheduler(), count)


def test_what_was_compiled_is_kept_for_the_same_numbers_alone() -> None:
    def prepared(count: int, **config: Any) -> Any:
        scheduler = diffusers.DDIMScheduler(**config)
        scheduler.set_timesteps(count)
        return scheduler

    count = 9
    first = compile_timesteps(prepared(count), step_options={"eta": 0.3})
    assert compile_timesteps(prepared(9), step_options={"eta": 0.3}) is first
    others = [
        compile_timesteps(prepared(8), step_options={"eta": 0.3}),
        compile_timesteps(prepared(9, steps_offset=1), step_options={"eta": 0.3}),
        compile_timesteps(prepared(9), step_options={"eta": 0.4}),
        compile_timesteps(prepared(9), first=1, step_options={"eta": 0.3}),
    ]
    assert all(other is not first for other in others)
    changed = prepared(9)
    changed.alphas_cumprod = changed.alphas_cumprod * 0.99
    assert compile_timesteps(changed, step_options={"eta": 0.3}) is not first
    # A function of its arguments is compared by what it does (SASolver's tau), another one is not.
    functions = [eval(text) for text in ("lambda t: 3 * t", "lambda t: 3 * t", "lambda t: 4 * t")]
    kept = []
    for changed.further in functions:
        kept.append(compile_timesteps(changed))
    assert kept[0] is kept[1] is not kept[2]
    # An object without a value to compare is compiled again.
    for changed.further in (object(), lambda t: t + count, lambda t: math.sin(t), lambda t: [math.e for _ in t]):
        assert compile_timesteps(changed) is not compile_timesteps(changed)


def test_a_table_from_a_later_timestep_has_no_past() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(10)
    whole, later = (compile_timesteps(scheduler, first).table for first in (0, 4))
    assert len(later) == 6
    assert whole["a_h0"][4] != 0
    assert later["a_h0"][0] == 0
    with pytest.raises(ValueError, match="first: got 10, expected 0 to 9"):
        compile_timesteps(scheduler, 10)


def test_the_docs_say_of_every_class_whether_it_compiles() -> None:
    text = (ROOT / "docs/compiler.md").read_text(encoding="utf-8")
    compiles, falls = text.split("| class | saved tensors |")[1].split("| falls through | why |")
    falls = falls.split("## k-diffusion")[0]
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        listed = rf"(?m)^\|[^|]*\b{name.removesuffix('Scheduler')}\b[^|]*\| (.*) \|$"
        saved, reason = re.search(listed, compiles), re.search(listed, falls)
        assert saved or reason, name
        config = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        if saved:
            assert compile_scheduler(getattr(diffusers, name)(**config), 12).num_history == int(saved[1]), name
        else:
            with pytest.raises((ValueError, TypeError)):  # or its constructor wants arguments
                compile_scheduler(getattr(diffusers, name)(), 12)
