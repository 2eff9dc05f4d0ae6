"""diffusers' schedulers with the fused step, beside themselves without it."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
from functools import reduce
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import schedulers
from benchmarks.suite.foreign import load_diffusers
from fastcfg.cli.parser import UsageError
from fastcfg.frontends import diffusers as fused
from fastcfg.frontends._fused import fall_through as _fall_through
from fastcfg.frontends._fused import steps
from fastcfg.frontends._fused.program import drawn, is_torch_s
from fastcfg.frontends._fused.steps import UNKNOWN
from fastcfg.frontends._fused.subclass import STATE
from fastcfg.frontends.diffusers import fuse
from fastcfg.ops.combine import Combine

diffusers: Any = load_diffusers()
pytestmark = [
    pytest.mark.skipif(diffusers is None, reason="diffusers is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The `scale_model_input`"),
]

V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
# One configuration of every class that compiles, two where a clip, thresholding or variances make it another thing.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0, "clip_sample": False}),
    ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 0.5}),  # below the least bound
    ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
    ("PNDMScheduler", {}),
    ("DDIMInverseScheduler", {}),
    ("DDIMParallelScheduler", {}),
    ("CogVideoXDDIMScheduler", V),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"variance_type": "learned_range"}),
    ("DDPMParallelScheduler", {}),
    ("UnCLIPScheduler", {"variance_type": "learned_range"}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("EulerDiscreteScheduler", {**KARRAS, **V}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", KARRAS),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **KARRAS}),
    ("DPMSolverMultistepInverseScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("FlowMapEulerDiscreteScheduler", {}),
    ("LTXEulerAncestralRFScheduler", {}),
    ("MiniMaxH3Scheduler", {}),
]
STEPS = 8
# Of a step in float32 between the fused and the original one, in shares of the largest value, beside the original's own
# error (the inverse of DPM-Solver: 3e-6). Measured: at most 1.3e-6.
FLOAT32 = 2e-6
# The fused sample's distance from the table in float64: in the original's, or in the dtype's spacing. Measured in
# float32: at most 1.21 of theirs; in half precision never more than theirs, only the result's own rounding is left.
FACTOR = {torch.float32: 1.5, torch.float16: 1.01, torch.bfloat16: 1.01}
SPACINGS = {torch.float32: 1.0, torch.float16: 0.5, torch.bfloat16: 0.5}


_made: dict[str, Any] = {}


def make(name: str, config: dict[str, Any]) -> Any:
    # KDPM2's constructor takes 1.3 s.
    key = f"{name}{config}"
    if key not in _made:
        _made[key] = getattr(diffusers, name)(**config)
    return copy.deepcopy(_made[key])


def denoise(x: Tensor, t: Tensor, learned: bool) -> Tensor:
    wide = x.float()
    output = torch.tanh(0.8 * wide + torch.sin(0.01 * t.float())) + 0.1 * wide
    return (torch.cat([output, torch.cos(wide)], dim=1) if learned else output).to(x.dtype)


def start(scheduler: Any, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, 3, 12, 10, generator=torch.manual_seed(0))
    return (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def is_fused(scheduler: Any) -> bool:
    """Whether the last step was."""
    return getattr(scheduler, STATE).last is not None


def copied_list(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def generator_of(scheduler: Any, seed: int = 1) -> dict[str, Any]:
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": torch.Generator().manual_seed(seed)} if takes else {}


def sample(scheduler: Any, dtype: torch.dtype = torch.float32, first: int = 0, **options: Any) -> Tensor:
    """The loop of a pipeline."""
    scheduler.set_timesteps(STEPS)
    x, options = start(scheduler, dtype), {**generator_of(scheduler), **options}
    for t in scheduler.timesteps[first:]:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        learned = "learned" in str(scheduler.config.get("variance_type"))
        x = scheduler.step(denoise(given, t, learned), t, x, **options, return_dict=False)[0]
    return x


# Every step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("begin", [0, 3], ids=["from noise", "from a picture"])
@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_every_step_is_the_original_s(name: str, config: dict[str, Any], begin: int, dtype: torch.dtype) -> None:
    original, ours = make(name, config), fuse(make(name, config))
    for scheduler in (original, ours):
        scheduler.set_timesteps(STEPS)
    first = begin * getattr(original, "order", 1)
    if begin and hasattr(original, "set_begin_index"):
        original.set_begin_index(first)
        ours.set_begin_index(first)
    theirs_draw, ours_draw = generator_of(original), generator_of(ours)
    x, learned = start(original, dtype), "learned" in str(config.get("variance_type"))
    redrawn = torch.Generator().manual_seed(1)
    farthest = largest_error = allowed = theirs = 0.0
    for t, own_t in zip(original.timesteps[first:], ours.timesteps[first:], strict=True):
        given = x
        if hasattr(original, "scale_model_input"):
            given, scaled = original.scale_model_input(x, t), ours.scale_model_input(x, own_t)
            torch.testing.assert_close(scaled, given, rtol=2 * torch.finfo(dtype).eps, atol=0)
        output = denoise(given, t, learned)
        before = {key: copied_list(value) for key, value in vars(ours).items()}
        want, got = original.step(output, t, x, **theirs_draw), ours.step(output, own_t, x, **ours_draw)
        assert type(got) is type(want)
        assert list(got) == list(want)
        assert [value.dtype for value in got.values()] == [value.dtype for value in want.values()]
        assert [value.shape for value in got.values()] == [value.shape for value in want.values()]
        # The same sums in float64.
        step = getattr(ours, STATE).last
        noises = [drawn(draw, x, {"generator": redrawn}) for draw in step.form.draws]
        places = {"sample": x, "output": output, "state": before, "draw": noises}
        inputs = [reduce(getitem, keys, places[kind]).double() for kind, *keys in step.form.sources]
        exact = Combine(step.combine.combination, "cpu", torch.float64)(inputs, [torch.float64] * len(step.form.dtypes))
        for i, (a, b, c) in enumerate(zip(got.values(), want.values(), exact, strict=False)):
            a, b = a.double(), b.double()
            size = max(1.0, float(b.abs().max()))
            farthest = max(farthest, float((a - b).abs().max()) / size)
            if i == 0:
                largest_error = max(largest_error, float((a - c).abs().max()) / size)
                allowed = max(allowed, float((b - c).abs().max()) / size)
            if i < 2:
                theirs = max(theirs, float((b - c).abs().max()) / size)
        x = want.prev_sample
    assert is_fused(ours)
    assert farthest < (FLOAT32 + theirs if dtype == torch.float32 else 0.2)
    assert largest_error <= max(FACTOR[dtype] * allowed, SPACINGS[dtype] * torch.finfo(dtype).eps)
    if theirs_draw:
        states = [draw["generator"].get_state() for draw in (theirs_draw, ours_draw)]
        assert torch.equal(*states)  # consumed alike
    assert getattr(ours, "step_index", None) == getattr(original, "step_index", None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"eta": 0.6}),
        ("DDIMScheduler", {"eta": 1.0, "use_clipped_model_output": True}),
        ("TCDScheduler", {"eta": 0.7}),
        ("EulerDiscreteScheduler", {"s_noise": 1.01}),
        ("LMSDiscreteScheduler", {"order": 2}),
    ],
    ids=str,
)
def test_arguments_of_the_steps(name: str, options: dict[str, Any]) -> None:
    want, ours = sample(make(name, {}), **options), fuse(make(name, {}))
    torch.testing.assert_close(sample(ours, **options), want, rtol=2e-5, atol=2e-5)
    assert is_fused(ours)


def test_nothing_is_warned_of_that_the_user_did_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("EulerDiscreteScheduler", {})
    said: list[str] = []
    monkeypatch.setattr(inspect.getmodule(type(scheduler)).logger, "warning", said.append)  # type: ignore[union-attr]
    sample(fuse(scheduler))
    assert said == []


def test_a_later_run_uses_what_an_earlier_one_traced() -> None:
    ours = fuse(make("DPMSolverMultistepScheduler", {}))
    want = sample(ours)
    # One that is given up in the middle leaves nothing behind.
    ours.set_timesteps(STEPS)
    x = start(ours, torch.float32)
    for t in ours.timesteps[:3]:
        x = ours.step(100 * torch.ones_like(x), t, x).prev_sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "trace_step", None)
        assert torch.equal(sample(ours), want)


def test_the_benchmark_times_both_in_turns(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schedulers.json"
    options = ["--turns", "2", "--shape", "1", "1", "2", "2", "--scheduler", "DDIMScheduler", "DDPMScheduler"]
    assert schedulers.main([*options, "--device", "cpu", "--json", str(file)]) == 0
    report, said = json.loads(file.read_text()), capsys.readouterr().out
    assert list(report["schedulers"]) == options[-2:]
    for name, row in report["schedulers"].items():
        assert name in said
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
        assert min(row["original_s"], row["fused_s"], report["copy_s"]) > 0
    with pytest.raises(UsageError, match="--turns: got '1'"):
        schedulers.main(["--turns", "1"])


def test_given_noise_takes_the_place_of_a_draw() -> None:
    noise = torch.randn(2, 3, 12, 10, generator=torch.manual_seed(5))
    results = []
    for scheduler in (make("DDIMScheduler", {}), fuse(make("DDIMScheduler", {}))):
        results.append(sample(scheduler, eta=1.0, variance_noise=noise, generator=None))
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_noise_is_drawn_in_the_original_s_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = inspect.getmodule(getattr(diffusers, name))
    draw, dtypes = module.randn_tensor, []  # type: ignore[union-attr]
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: (dtypes.append(k["dtype"]), draw(*a, **k))[1])
    sample(make(name, {}), torch.float16)
    theirs, dtypes[:] = list(dtypes), []
    sample(fuse(make(name, {})), torch.float16)
    assert dtypes == theirs
    assert theirs


def test_two_draws_a_step_are_drawn_twice() -> None:
    class Twice(diffusers.DDIMScheduler):  # type: ignore[misc, name-defined]
        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **options: Any
        ) -> Any:
            result = super().step(model_output, timestep, sample, **options)
            for weight in (-0.3, 0.4):
                drawn = torch.randn(sample.shape, generator=generator, dtype=sample.dtype)
                result.prev_sample = result.prev_sample + weight * drawn
            return result if options.get("return_dict", True) else result.to_tuple()

    def run(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(4)
        x, generator = start(scheduler, torch.float32), torch.Generator().manual_seed(2)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x, generator=generator).prev_sample
        return x

    ours = fuse(Twice(clip_sample=False))
    torch.testing.assert_close(run(ours), run(Twice(clip_sample=False)), rtol=1e-5, atol=1e-5)
    assert is_fused(ours)


def test_a_run_that_began_with_the_original_goes_on_fused() -> None:
    results = []
    for scheduler in (make("LMSDiscreteScheduler", {}), fuse(make("LMSDiscreteScheduler", {}))):
        scheduler.set_timesteps(STEPS)
        x = start(scheduler, torch.float32).requires_grad_()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x).prev_sample.detach()  # gradients in the first step only
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert is_fused(scheduler)  # again


def test_one_generator_for_every_sample() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    want = sample(make("DDPMScheduler", {}), generator=generators())
    got = sample(fuse(make("DDPMScheduler", {})), generator=generators())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_only_diffusers_own_draws_are_torch_s() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    assert is_torch_s(randn_tensor)
    assert not is_torch_s(lambda *args, **options: randn_tensor(*args, **options))

    def other(*args: Any, **options: Any) -> torch.Tensor:
        return 2 * randn_tensor(*args, **options)

    other.__module__, other.__qualname__ = randn_tensor.__module__, randn_tensor.__qualname__
    assert not is_torch_s(other)


def test_a_second_run_is_the_first() -> None:
    scheduler = fuse(make("DPMSolverMultistepScheduler", {}))
    first = sample(scheduler)
    assert torch.equal(sample(scheduler), first)
    # And after a run that ended early.
    scheduler.set_timesteps(STEPS)
    scheduler.step(first, scheduler.timesteps[0], first * torch.inf)
    assert torch.equal(sample(scheduler), first)


def test_samples_of_any_rank() -> None:
    for shape in ((5,), (2, 7), (2, 3, 7), (1, 2, 3, 4, 5)):
        results = []
        for scheduler in (make("DPMSolverMultistepScheduler", {}), fuse(make("DPMSolverMultistepScheduler", {}))):
            scheduler.set_timesteps(3)
            x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
            for t in scheduler.timesteps:
                x = scheduler.step(torch.sin(x), t, x).prev_sample
            results.append(x)
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a number is read back from the device, or tensors are made from the host's. Levels that a scheduler
    keeps in the host's memory, one in a tensor, may be read."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy", "lift_fresh", "arange")
        if name == "_local_scalar_dense" and args[0].is_cpu:
            assert any(args[0] is value for value in vars(self.scheduler).values())
        else:
            assert not name.startswith(forbidden), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_a_step_reads_nothing_back_and_copies_nothing_from_the_host(name: str, config: dict[str, Any]) -> None:
    scheduler = fuse(make(name, config))
    scheduler.set_timesteps(STEPS)
    x, learned = start(scheduler, torch.float32), "learned" in str(config.get("variance_type"))
    output = denoise(x, torch.zeros(()), learned)

    def run() -> None:
        nonlocal x
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False)[0]
            assert is_fused(scheduler)

    # They trace: the second, where the first left attributes that `set_timesteps` does not reset (UniPC, Heun).
    run()
    scheduler.set_timesteps(STEPS)
    run()
    scheduler.set_timesteps(STEPS)
    with NothingFromTheHost(scheduler):
        run()


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("begin", [0, 3, 11])
def test_a_run_begins_where_the_original_s_does(name: str, config: dict[str, Any], begin: int) -> None:
    original, ours = make(name, config), fuse(make(name, config))
    if not hasattr(original, "scale_model_input"):
        return
    for scheduler in (original, ours):
        scheduler.set_timesteps(STEPS)
        if begin == 11:  # Heun's and others' timesteps occur twice
            scheduler.timesteps[4] = scheduler.timesteps[5]
    x = start(original, torch.float32)
    want, got = (s.scale_model_input(x, s.timesteps[min(begin, 5)]) for s in (original, ours))
    assert torch.equal(got, want)
    assert getattr(ours, "_step_index", None) == getattr(original, "_step_index", None)
    assert getattr(ours, "is_scale_input_called", None) == getattr(original, "is_scale_input_called", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}], ids=str)
def test_an_infinite_output_is_limited_only_where_the_original_limits_it(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    original, ours = make("DDIMScheduler", options), fuse(make("DDIMScheduler", options))
    x, output = (
        torch.linspace(-2, 2, 96, dtype=dtype).view(2, 3, 4, 4),
        torch.full((2, 3, 4, 4), torch.inf, dtype=dtype),
    )
    output[..., :2], output[..., 0, :] = -torch.inf, 1.0
    for scheduler in (original, ours):
        scheduler.set_timesteps(STEPS)
    # In the last step the limited x0 is finite, and the noise is multiplied by 0.
    for t in original.timesteps:
        want, got = original.step(output, t, x), ours.step(output, t, x)
        assert is_fused(ours)
        torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=2e-3, atol=2e-3, equal_nan=True)
        torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample, rtol=2e-3, atol=2e-3)
    assert want.prev_sample.isnan().any()


# What stays the original's


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_it_is_the_original_s_class_with_its_signatures_and_files(name: str, tmp_path: Any) -> None:
    cls, theirs = getattr(fused, name), getattr(diffusers, name)
    assert cls is getattr(fused, name)
    scheduler = cls.from_config(theirs().config)
    assert isinstance(scheduler, theirs)
    assert (cls.__name__, cls.__module__, cls.order) == (theirs.__name__, theirs.__module__, theirs.order)
    for method in ("__init__", "step", "set_timesteps"):
        assert inspect.signature(getattr(cls, method)) == inspect.signature(getattr(theirs, method))
    assert hasattr(cls, "scale_model_input") == hasattr(theirs, "scale_model_input")
    assert dict(scheduler.config) == dict(theirs().config)
    scheduler.save_pretrained(tmp_path)
    assert dict(theirs.from_pretrained(tmp_path).config) == dict(cls.from_pretrained(tmp_path).config)
    assert [c.__name__ for c in scheduler.compatibles] == [c.__name__ for c in theirs().compatibles]
    want = sample(theirs())
    for other in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), copy.copy(scheduler)):
        torch.testing.assert_close(sample(other), want, rtol=1e-5, atol=1e-5)
        assert is_fused(other)


def test_noise_is_added_as_ever() -> None:
    x, noise = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        original, ours = make(name, {}), fuse(make(name, {}))
        for scheduler in (original, ours):
            scheduler.set_timesteps(STEPS)
        args = (x, noise, original.timesteps[2:3])
        assert torch.equal(ours.add_noise(*args), original.add_noise(*args))
    assert len(ours) == len(original)


def test_fusing_leaves_the_original_alone_and_is_done_once() -> None:
    original = make("EulerDiscreteScheduler", {})
    original.set_timesteps(STEPS)
    ours = fuse(original)
    assert fuse(ours) is ours
    assert type(original) is diffusers.EulerDiscreteScheduler
    x = torch.ones(1, 3, 4, 4)
    # Its timesteps were set before.
    got = ours.step(x, ours.timesteps[0], x).prev_sample
    assert original.step_index is None
    torch.testing.assert_close(got, original.step(x, original.timesteps[0], x).prev_sample, rtol=1e-6, atol=1e-6)
    assert is_fused(ours)


def test_an_x0_that_is_part_of_the_output_is_a_view_of_it() -> None:
    options = {"variance_type": "learned_range", "prediction_type": "sample", "clip_sample": False}
    original, ours = make("DDPMScheduler", options), fuse(make("DDPMScheduler", options))
    for scheduler in (original, ours):
        scheduler.set_timesteps(STEPS)
        x = start(scheduler, torch.float32)
        output = denoise(x, torch.zeros(()), True)
        x0 = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample
        assert x0.data_ptr() == output.data_ptr()
        assert x0.stride() == output.stride()
    assert is_fused(ours)


def test_a_scheduler_fused_in_mid_run_leaves_its_original_s_past_alone() -> None:
    original = make("DPMSolverMultistepScheduler", {})
    original.set_timesteps(STEPS)
    x = start(original, torch.float32)
    for t in original.timesteps[:3]:
        x = original.step(torch.sin(x), t, x).prev_sample
    ours, untouched = fuse(original), copy.deepcopy(original)
    y = z = x
    for t in ours.timesteps[3:]:
        y = ours.step(torch.sin(y), t, y).prev_sample
    for t in untouched.timesteps[3:]:
        x, z = (s.step(torch.sin(v), t, v).prev_sample for s, v in ((original, x), (untouched, z)))
    assert torch.equal(x, z)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_what_a_callback_keeps_is_not_overwritten_and_what_it_changes_counts() -> None:
    scheduler = fuse(make("DDIMScheduler", {"clip_sample": False}))
    scheduler.set_timesteps(3)
    x, kept = start(scheduler, torch.float32), []
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
        kept.append((x, x.clone()))
        x = x * 0.5
    for now, then in kept:
        assert torch.equal(now, then)


# What falls through


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("CMStochasticIterativeScheduler", {}, "its steps are not linear"),
        ("DEISMultistepScheduler", {"thresholding": True}, "what limits its x0 cannot be told"),
    ],
)
def test_what_cannot_be_traced_runs_as_it_did_and_one_line_says_why(
    name: str, config: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    want = sample(make(name, config))
    _fall_through._logged.clear()
    with caplog.at_level(logging.WARNING, logger="fastcfg"):
        ours = fuse(make(name, config))
        assert torch.equal(sample(ours), want)
        assert torch.equal(sample(ours), want)
    lines = [record.getMessage() for record in caplog.records if record.name == "fastcfg"]
    assert len(lines) == 1
    assert name in lines[0]
    assert reason in lines[0]


def test_gradients_come_through_the_original() -> None:
    scheduler, original = fuse(make("DDIMScheduler", {})), make("DDIMScheduler", {})
    for s in (scheduler, original):
        s.set_timesteps(STEPS)
    x = torch.ones(1, 3, 4, 4, requires_grad=True)
    got, want = (s.step(x * 0.3, s.timesteps[0], x).prev_sample for s in (scheduler, original))
    assert torch.equal(got, want)
    got.sum().backward()
    assert x.grad is not None


def test_the_original_says_what_is_wrong() -> None:
    scheduler = fuse(make("DDIMScheduler", {}))
    x = torch.ones(1, 3, 4, 4)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        scheduler.step(x, 5, x)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        scheduler.step(x, scheduler.timesteps[0], x, nonsense=1)
    scheduler = fuse(make("DDPMScheduler", {}))
    scheduler.set_timesteps(STEPS)
    with pytest.raises(RuntimeError, match="must match the size"):
        scheduler.step(x[:, :2], scheduler.timesteps[0], x)


@pytest.mark.parametrize("what", [3, "DDIMScheduler", torch.nn.Identity(), object])
def test_what_is_no_scheduler_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match="component: got"):
        fuse(what)


def test_names_that_are_no_schedulers_are_not_found() -> None:
    for name in ("UNet2DModel", "NoSuchScheduler"):
        with pytest.raises(AttributeError, match=name):
            getattr(fused, name)
    assert {"fuse", "DDIMScheduler"} <= set(dir(fused))


def test_a_limited_x0_is_told_from_a_result_that_is_nearly_it(caplog: pytest.LogCaptureFixture) -> None:
    # LCM's `denoised` is x0 and the sample in a small share, 3e-9 to 6e-6 of it.
    original, ours = make("LCMScheduler", {"clip_sample": True}), fuse(make("LCMScheduler", {"clip_sample": True}))
    x, output = start(original, torch.float32), 0.5 * start(original, torch.float32).roll(1, -1)
    for scheduler in (original, ours):
        scheduler.set_timesteps(timesteps=[900, 600, 300, 20])
    for t in original.timesteps:
        results = []
        for scheduler in (original, ours):
            torch.manual_seed(0)
            results.append(scheduler.step(output, t, x))
        for name in ("denoised", "prev_sample"):
            # Measured: 2.4e-7.
            torch.testing.assert_close(results[1][name], results[0][name], rtol=0, atol=1e-6)
    assert not [record for record in caplog.records if record.name == "fastcfg"]


def test_generators_whose_draws_cannot_be_put_together_are_drawn_from_once() -> None:
    states = []
    for scheduler in (make("TCDScheduler", {}), fuse(make("TCDScheduler", {}))):
        scheduler.set_timesteps(STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        x = torch.linspace(-1, 1, 12, dtype=torch.float16).view(2, 6)
        # autocast has no common dtype for half-precision tensors on a CPU.
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast"):
            scheduler.step(x / 2, scheduler.timesteps[0], x, generator=generators)
        states.append([generator.get_state() for generator in generators])
    assert all(map(torch.equal, *states))


SCALING = ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler"]


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scaled_samples_have_the_original_s_bits(name: str, dtype: torch.dtype) -> None:
    """Also where levels change in place, or the index does, between two calls that are like earlier ones."""
    original, ours = make(name, {}), fuse(make(name, {}))
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for run in range(5):
        for scheduler in (original, ours):
            scheduler.set_timesteps(6)
        for number, t in enumerate(original.timesteps):
            if run == 4 and number == 3:
                for scheduler in (original, ours):
                    scheduler.sigmas.mul_(1.25)
            if run == 4 and number == 4:
                original._step_index, ours._step_index = 1, 1
            want, got = (s.scale_model_input(x, s.timesteps[number]) for s in (original, ours))
            assert torch.equal(got, want)
            assert got.dtype == dtype
            assert got.data_ptr() != x.data_ptr()
            assert list(vars(original)) == list(vars(ours))
            assert vars(original).get("is_scale_input_called") == vars(ours).get("is_scale_input_called")
            assert original._step_index == ours._step_index
            for scheduler in (original, ours):
                scheduler.step(want, t, x)
    assert getattr(ours, STATE).scaling._failures == 0
    assert getattr(ours, STATE).scaling.last is not None


def test_what_does_not_scale_is_the_original_s_soon() -> None:
    ours, x = fuse(make("DDIMScheduler", {})), torch.randn(2, 3, 5, 5)
    ours.set_timesteps(3)
    assert ours.scale_model_input(x, ours.timesteps[0]) is x
    assert getattr(ours, STATE).scaling.scale(ours, x, ours.timesteps[0]) is UNKNOWN


def test_another_scaling_of_the_class_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, x = diffusers.EulerDiscreteScheduler, torch.randn(2, 3, 5, 5)
    ours = fuse(kind())
    for _ in range(3):
        ours.set_timesteps(3)
        ours.scale_model_input(x, ours.timesteps[0])
    ours.set_timesteps(3)
    monkeypatch.setattr(kind, "scale_model_input", lambda self, sample, timestep: 3 * sample)
    assert torch.equal(ours.scale_model_input(x, ours.timesteps[0]), 3 * x)
