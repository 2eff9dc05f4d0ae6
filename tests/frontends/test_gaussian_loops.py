"""The Gaussian loops on the engine beside the originals' own operations, with what real code does: noise in other
layouts and dtypes, samples changed between steps, attributes edited later, methods overridden."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcfg import ClassifierFree
from fastcfg.frontends import glide, guided_diffusion
from fastcfg.frontends._fused import fall_through

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 6, 5)
GD = guided_diffusion


@pytest.fixture(autouse=True)
def forget_what_was_logged() -> Iterator[None]:
    fall_through._logged.clear()
    yield
    fall_through._logged.clear()


def process(kind: type = GD.SpacedDiffusion, mean: str = "EPSILON", var: str = "FIXED_LARGE", **options: Any) -> Any:
    types = GD.ModelMeanType[mean], GD.ModelVarType[var], GD.LossType.MSE
    named = dict(zip(("model_mean_type", "model_var_type", "loss_type"), types, strict=True))
    steps = {0, 20, 40, 60, 80, 99}
    betas = GD.get_named_beta_schedule("linear", 100)
    return kind(use_timesteps=steps, betas=betas, **named, **options)


def of_glide() -> Any:
    return glide.create_gaussian_diffusion(100, "squaredcos_cap_v2", "6")


def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.tanh(x) / 2 + 0.001 * t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def doubled(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.cat([model(x, t), torch.sin(x)], 1)


PROCESSES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "fixed": lambda: (process(), model),
    "learned": lambda: (process(var="LEARNED_RANGE"), doubled),
    "x0": lambda: (process(mean="START_X"), model),
    "glide": lambda: (of_glide(), doubled),
}
LOOPS = {"p_sample_loop": {}, "ddim_sample_loop": {"eta": 0.7}, "ddim deterministic": {"eta": 0.0}}


def drawn(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


NOISES: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "contiguous": drawn,
    "channels-last": lambda: drawn().contiguous(memory_format=torch.channels_last),
    "permuted": lambda: drawn(shape=(2, 3, 5, 6)).permute(0, 1, 3, 2),
    "expanded": lambda: drawn(shape=(1, *SHAPE[1:])).expand(SHAPE),
    "a part": lambda: drawn(shape=(2, 4, 6, 5))[:, 1:],
    "half of odd size": lambda: drawn(shape=(1, 3, 3, 3), dtype=torch.float16),
    "bfloat16": lambda: drawn(dtype=torch.bfloat16),
    "half, channels-last": lambda: drawn(dtype=torch.float16).contiguous(memory_format=torch.channels_last),
    "float64": lambda: drawn(dtype=torch.float64),
    "float64, permuted": lambda: drawn(shape=(2, 3, 5, 6), dtype=torch.float64).permute(0, 1, 3, 2),
}


def run(diffusion: Any, network: Any, loop: str, noise: Tensor | None, seed: int | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    name = "ddim_sample_loop" if loop.startswith("ddim") else loop
    shape = SHAPE if noise is None else tuple(noise.shape)
    options = {"device": "cpu", "seed": seed, **LOOPS[loop], **options}
    return getattr(diffusion, name)(network, shape, noise=noise, **options), torch.get_rng_state()


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("loop", LOOPS)
def test_draws_are_the_originals_whatever_the_noise_is(loop: str, kind: str, noise: str) -> None:
    diffusion, network = PROCESSES[kind]()
    for seed in (None, 5):
        want, after = run(diffusion, network, loop, NOISES[noise](), seed, backend="reference")
        got, moved = run(diffusion, network, loop, NOISES[noise](), seed)
        assert_close(got, want)
        assert torch.equal(moved, after)


def test_contiguous_noise_stays_on_the_engine(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(GD.SpacedDiffusion, "_loop", lambda *arguments: pytest.fail("ran step by step"))
    for kind in PROCESSES:
        diffusion, network = PROCESSES[kind]()
        for noise in ("none", "contiguous", "float64"):
            for loop in LOOPS:
                run(diffusion, network, loop, NOISES[noise]())
    assert not caplog.records


def test_one_line_says_why_the_engine_does_not_run(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "fastcfg"):
        for _ in range(2):
            run(process(), model, "p_sample_loop", NOISES["permuted"]())
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["p_sample_loop is not fused: noise= is not contiguous, and the original draws in its memory order"]


def turned(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """Computed along other dimensions, and returned as a view."""
    return model(x, t).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def channels_last(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return model(x, t).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", [turned, channels_last])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "PREVIOUS_X"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("graph", ["auto", True])
def test_draws_follow_the_memory_order_of_the_models_outputs(loop: str, mean: str, network: Any, graph: Any) -> None:
    diffusion = process(mean=mean)
    for seed in (None, 4):
        want, after = run(diffusion, network, loop, None, seed, backend="reference")
        for _ in range(2):
            got, moved = run(diffusion, network, loop, None, seed, graph=graph)
            assert_close(got, want)
            assert torch.equal(moved, after)
        steps = progressive(diffusion, network, loop, None, seed=seed, graph=graph)
        assert_close(list(steps)[-1]["sample"], want)


def dropping(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.dropout(model(x, t), 0.3)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("graph", ["auto", True])
def test_a_model_that_draws_draws_before_the_step(loop: str, mean: str, graph: Any) -> None:
    diffusion = process(mean=mean)
    for noise in (None, drawn()):
        want, after = run(diffusion, dropping, loop, noise, backend="reference")
        for _ in range(2):
            got, moved = run(diffusion, dropping, loop, noise, graph=graph)
            assert_close(got, want)
            assert torch.equal(moved, after)
        assert_close(list(progressive(process(mean=mean), dropping, loop, noise, graph=graph))[-1]["sample"], want)


def test_draws_of_the_caller_between_steps_are_none_of_the_models() -> None:
    results = []
    for backend in ("reference", "auto"):
        diffusion = process()
        for out in progressive(diffusion, model, "p_sample_loop", None, backend=backend):
            out["sample"] += 0.1 * torch.randn(SHAPE)
        results.append((out["sample"], torch.get_rng_state()))
    assert_close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


# Samples changed between steps


def progressive(diffusion: Any, network: Any, loop: str, noise: Tensor | None, **options: Any) -> Iterator[Any]:
    torch.manual_seed(3)
    name = ("ddim_sample_loop" if loop.startswith("ddim") else loop) + "_progressive"
    options = {"device": "cpu", **LOOPS[loop], **options}
    return getattr(diffusion, name)(network, SHAPE, noise=noise, **options)


def scale(out: Any, row: int) -> None:
    out["sample"].mul_(0.9)


def mask(out: Any, row: int) -> None:
    if row in (1, 3):
        out["sample"][:, :, :2] = 0.5


def through_numpy(out: Any, row: int) -> None:
    out["sample"].numpy()[..., 0] = -0.25


def through_data(out: Any, row: int) -> None:
    out["sample"].data.clamp_(-0.5, 0.5)


def replaced(out: Any, row: int) -> None:
    out["sample"] = 0.8 * out["sample"]


def preview_changed(out: Any, row: int) -> None:
    out["pred_xstart"].zero_()


def later_float64(out: Any, row: int) -> None:
    if row == 2:
        out["sample"] = out["sample"].double()


def later_smaller(out: Any, row: int) -> None:
    if row == 1:
        out["sample"] = out["sample"][..., :3]


def later_channels_last(out: Any, row: int) -> None:
    if row == 1:
        out["sample"] = out["sample"].contiguous(memory_format=torch.channels_last)


EDITS = [scale, mask, through_numpy, through_data, replaced, preview_changed]
EDITS += [later_float64, later_smaller, later_channels_last]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_sample_changed_between_steps_steers_the_next(loop: str, kind: str, edit: Any, graph: bool) -> None:
    diffusion, network = PROCESSES[kind]()
    results, states = [], []
    for options in ({"backend": "reference"}, {"graph": graph}):
        for seed in (None, 6):
            steps = []
            for row, out in enumerate(progressive(diffusion, network, loop, None, seed=seed, **options)):
                edit(out, row)
                steps.append(out)
            results.append(steps)
            states.append(torch.get_rng_state())
    for want, got in ((results[0], results[2]), (results[1], results[3])):
        assert len(want) == len(got) == 6
        for a, b in zip(want, got, strict=True):
            assert_close(b["sample"], a["sample"])
            assert_close(b["pred_xstart"], a["pred_xstart"])
    assert torch.equal(states[0], states[2])
    assert torch.equal(states[1], states[3])


@pytest.mark.parametrize("graph", [False, True])
def test_samples_that_are_kept_are_not_written_to(graph: bool) -> None:
    diffusion = process()
    kept, copies = [], []
    for out in progressive(diffusion, model, "p_sample_loop", None, graph=graph):
        kept.append(out["sample"])
        copies.append(out["sample"].clone())
        for earlier in kept[:-1]:
            assert earlier.data_ptr() != out["sample"].data_ptr()
    assert all(map(torch.equal, kept, copies))
    kept[0].zero_()  # too late to steer anything
    assert torch.equal(
        copies[-1], list(progressive(diffusion, model, "p_sample_loop", None, graph=graph))[-1]["sample"]
    )


def test_pairs_are_steered_by_their_first_half() -> None:
    def guided_by_y(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([model(x, t) * y.view(-1, 1, 1, 1), x], 1)

    diffusion, results = of_glide(), []
    for backend in ("reference", "auto"):
        arguments = {"model_kwargs": {"y": torch.tensor([1.0, 0.5])}, "device": "cpu", "backend": backend, "seed": 1}
        steps = diffusion.p_sample_loop_progressive(ClassifierFree(guided_by_y, 2.0), SHAPE, **arguments)
        for out in steps:
            out["sample"][:, :, 1] = 0.3
        results.append(out["sample"][:1])
    assert_close(*reversed(results))


# Attributes edited later, methods overridden

EDITED: dict[str, Callable[[Any], Any]] = {
    "in place": lambda d: d.posterior_mean_coef2.__imul__(0.8),
    "one entry": lambda d: d.sqrt_recip_alphas_cumprod.__setitem__(2, 1.5),
    "replaced": lambda d: setattr(d, "posterior_mean_coef1", 0.9 * d.posterior_mean_coef1),
    "another dtype": lambda d: setattr(d, "alphas_cumprod", (0.9 * d.alphas_cumprod).astype(np.float32)),
    "log variance": lambda d: setattr(d, "posterior_log_variance_clipped", d.posterior_log_variance_clipped - 1),
    "betas": lambda d: d.betas.__imul__(0.5),
    "fewer steps": lambda d: setattr(d, "num_timesteps", 4),
    "model's times": lambda d: setattr(d, "timestep_map", [t // 2 for t in d.timestep_map]),
}
TYPES: dict[str, Callable[[Any], Any]] = {
    "variance": lambda d: setattr(d, "model_var_type", GD.ModelVarType.FIXED_SMALL),
    "mean": lambda d: setattr(d, "model_mean_type", GD.ModelMeanType.START_X),
    "times": lambda d: setattr(d, "rescale_timesteps", True),
}


# What no sample depends on, and what one of the solvers does not read.
UNREAD = {("betas", "FIXED_SMALL"), ("log variance", "FIXED_LARGE"), ("variance", "FIXED_SMALL")}
OF_DDPM, OF_DDIM = ("in place", "replaced", "log variance", "betas", "variance"), ("another dtype",)


@pytest.mark.parametrize("name", [*EDITED, *TYPES])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
def test_attributes_edited_later_are_heard(name: str, var: str) -> None:
    """By loops that have run before. What an original does not read changes nothing."""
    if name == "variance" and var == "LEARNED_RANGE":
        pytest.skip("its model has other outputs")
    network = doubled if var == "LEARNED_RANGE" else model
    diffusion = process(var=var)
    for loop in LOOPS:
        plain, _ = run(diffusion, network, loop, None)
        edited = process(var=var)
        assert torch.equal(run(edited, network, loop, None)[0], plain)
        (EDITED | TYPES)[name](edited)
        want, after = run(edited, network, loop, None, backend="reference")
        got, moved = run(edited, network, loop, None)
        assert_close(got, want)
        assert torch.equal(moved, after)
        assert_close(list(progressive(edited, network, loop, None))[-1]["sample"], want)
        unread = OF_DDIM if loop == "p_sample_loop" else OF_DDPM if LOOPS[loop]["eta"] else OF_DDPM + OF_DDIM
        if (name, var) not in UNREAD and name not in unread:
            assert not torch.allclose(got, plain, atol=1e-4)


def test_single_steps_read_the_attributes_as_the_original_does() -> None:
    """Against the formulas, which the original writes with these attributes."""
    diffusion, x, t = process(), drawn(), torch.tensor([3, 3])
    eps = drawn(1)
    for _ in range(2):
        diffusion.sqrt_recip_alphas_cumprod[3] *= 1.5
        diffusion.posterior_mean_coef2 = diffusion.posterior_mean_coef2 * 0.5
        a, b = diffusion.sqrt_recip_alphas_cumprod[3], diffusion.sqrt_recipm1_alphas_cumprod[3]
        x0 = np.float32(a) * x - np.float32(b) * eps
        assert torch.equal(diffusion._predict_xstart_from_eps(x, t, eps), x0)
        p = diffusion.p_mean_variance(lambda x, t: eps, x, t, clip_denoised=False)
        assert torch.equal(p["pred_xstart"], x0)
        c1, c2 = diffusion.posterior_mean_coef1[3], diffusion.posterior_mean_coef2[3]
        assert torch.equal(p["mean"], np.float32(c1) * x0 + np.float32(c2) * x)


class OwnStep(GD.SpacedDiffusion):
    """Noise under a mask, with the original's signature, which knows no noise=."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):  # type: ignore[no-untyped-def, override]
        out = super().p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return out | {"sample": out["sample"] + 0.1 * torch.randn_like(x)}

    def ddim_sample(self, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        out = super().ddim_sample(*args, **kwargs)
        return out | {"sample": 0.9 * out["sample"]}


class OwnMean(GD.SpacedDiffusion):
    def p_mean_variance(self, model, x, t, *, clip_denoised=True, denoised_fn=None, model_kwargs=None):  # type: ignore[no-untyped-def, override]
        p = super().p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return p | {"mean": p["mean"] + 0.05, "pred_xstart": 0.9 * p["pred_xstart"]}


class OwnPosterior(GD.SpacedDiffusion):
    def q_posterior_mean_variance(self, x_start, x_t, t):  # type: ignore[no-untyped-def, override]
        mean, variance, log_variance = super().q_posterior_mean_variance(x_start, x_t, t)
        return mean + 0.05, variance, log_variance

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):  # type: ignore[no-untyped-def, override]
        return 0.9 * super()._predict_eps_from_xstart(x_t, t, pred_xstart)


class OwnInverse(GD.SpacedDiffusion):
    def _predict_xstart_from_eps(self, x_t, t, eps):  # type: ignore[no-untyped-def, override]
        return 0.7 * super()._predict_xstart_from_eps(x_t, t, eps)


class OwnTimes(GD.SpacedDiffusion):
    def _wrap_model(self, model):  # type: ignore[no-untyped-def, override]
        wrapped = super()._wrap_model(model)
        return lambda x, t, **kwargs: wrapped(x, t, **kwargs) + 0.1


class OwnLoop(GD.SpacedDiffusion):
    def p_sample_loop_progressive(self, model, shape, **kwargs):  # type: ignore[no-untyped-def, override]
        for out in super().p_sample_loop_progressive(model, shape, **kwargs):
            out["sample"] += 0.1
            yield out

    def ddim_sample_loop_progressive(self, model, shape, **kwargs):  # type: ignore[no-untyped-def, override]
        for out in super().ddim_sample_loop_progressive(model, shape, **kwargs):
            out["sample"] += 0.1
            yield out


@pytest.mark.parametrize("kind", [OwnStep, OwnMean, OwnPosterior, OwnInverse, OwnTimes, OwnLoop])
@pytest.mark.parametrize("loop", LOOPS)
def test_methods_of_a_subclass_are_run(kind: Any, loop: str, caplog: Any) -> None:
    plain, own = process(), process(kind)
    with caplog.at_level(logging.WARNING, "fastcfg"):
        for seed in (None, 2):
            want, after = run(own, model, loop, None, seed, backend="reference")
            got, moved = run(own, model, loop, None, seed)
            assert_close(got, want)
            assert torch.equal(moved, after)
            assert not torch.allclose(got, run(plain, model, loop, None, seed)[0], atol=1e-3)
            assert_close(list(progressive(own, model, loop, None, seed=seed))[-1]["sample"], want)
    lines = [record.getMessage() for record in caplog.records]
    assert kind is OwnLoop or (len(lines) == 1 and f"is not fused: {kind.__name__} overrides " in lines[0])


def test_a_method_set_on_an_object_is_run() -> None:
    own, plain = process(), process()
    step = own.p_sample
    own.p_sample = lambda *args, **kwargs: step(*args, **kwargs) | {"sample": torch.zeros(SHAPE)}
    assert not run(own, model, "p_sample_loop", None)[0].any()
    assert run(plain, model, "p_sample_loop", None)[0].any()


def test_a_condition_of_a_subclass_is_run() -> None:
    class Conditioned(GD.SpacedDiffusion):
        def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):  # type: ignore[no-untyped-def, override]
            return super().condition_mean(cond_fn, p_mean_var, x, t, model_kwargs) + 0.1

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return -0.1 * x

    options: dict[str, Any] = {"cond_fn": gradient, "model_kwargs": {}}
    want, _ = run(process(Conditioned), model, "p_sample_loop", None, backend="reference", **options)
    got, _ = run(process(Conditioned), model, "p_sample_loop", None, **options)
    assert_close(got, want)
    assert not torch.allclose(got, run(process(), model, "p_sample_loop", None, **options)[0], atol=1e-2)


def test_recorded_noise_needs_steps_that_take_it() -> None:
    with pytest.raises(
        ValueError, match="noise_source: got a function, expected 'torch' for a step that takes no noise="
    ):
        run(process(OwnStep), model, "p_sample_loop", None, noise_source=lambda step, shape: torch.zeros(shape))
    with pytest.raises(ValueError, match="noise_source: got 'philox' for a loop step by step, expected 'torch'"):
        run(process(OwnMean), model, "p_sample_loop", None, noise_source="philox")


# Guidance of some channels


def by_y(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return model(x, t) + 0.2 * y.reshape(-1, 1, 1, 1)


def forward_with_cfg(channels: int, scale: float) -> Any:
    """As DiT's (3 of 4) and point-e's (3 of 6)."""

    def function(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        output = by_y(torch.cat([half, half]), t, y)
        cond, uncond = output[:, :channels].chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), output[:, channels:]], dim=1)

    return function


@pytest.mark.parametrize("total", [4, 6])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_first_channels_alone_are_guided(loop: str, channels: int, total: int) -> None:
    y = torch.tensor([1.0, 0.5, 0.0, 0.0])
    start = drawn(shape=(2, total, 4, 4)).repeat(2, 1, 1, 1)
    options: dict[str, Any] = {"clip_denoised": False, "model_kwargs": {"y": y}}
    want, after = run(process(), forward_with_cfg(channels, 4.0), loop, start, **options)
    got, moved = run(process(), ClassifierFree(by_y, 4.0, channels=channels), loop, start, **options)
    assert_close(got[:2], want[:2])
    assert torch.equal(moved, after)


def test_how_many_channels_are_guided_must_be_said_for_more_than_three() -> None:
    y, x = torch.ones(2), torch.zeros(2, 4, 4, 4)
    message = "channels: got None for a state of 4, expected the number that is guided: 3 as in .*, 4 for all"
    with pytest.raises(ValueError, match=message):
        run(process(), ClassifierFree(by_y, 2.0), "p_sample_loop", x, model_kwargs={"y": y})
    with pytest.raises(ValueError, match=message):
        ClassifierFree(by_y, 2.0)(x, torch.zeros(2), y=y)
    with pytest.raises(ValueError, match="channels: got 5, expected an integer from 1 to 4"):
        run(process(), ClassifierFree(by_y, 2.0, channels=5), "p_sample_loop", x, model_kwargs={"y": y})
    with pytest.raises(ValueError, match="channels: got 0, expected an integer of at least 1"):
        ClassifierFree(by_y, 2.0, channels=0)
    # guidance_scale= says it: all.
    run(process(), by_y, "p_sample_loop", x, guidance_scale=2.0, model_kwargs={"y": y})


# Devices


def test_an_offloaded_model_runs_where_its_hook_says() -> None:
    class Offloaded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="meta"))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return model(x, t)

    network = Offloaded()
    network._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    assert process().p_sample_loop(network, SHAPE).device.type == "cpu"
    del network._hf_hook
    with pytest.raises(ValueError, match="model: got weights on the meta device"):
        process().p_sample_loop(network, SHAPE)


@pytest.mark.parametrize(("loop", "options"), [("ddim_sample_loop", {"eta": 0.7}), ("p_sample_loop", {})])
def test_conditioned_states_keep_their_own_memory_order(loop: str, options: dict[str, Any]) -> None:
    def turned(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t).transpose(-1, -2).contiguous().transpose(-1, -2)

    found = []
    for backend in ("reference", "auto"):
        options |= {"device": "cpu", "cond_fn": lambda x, t: 0.1 * torch.sin(x), "model_kwargs": {}, "backend": backend}
        torch.manual_seed(0)
        samples = getattr(process(mean="START_X"), loop)(turned, SHAPE, **options)
        found.append((samples, torch.rand(1)))
    assert torch.allclose(found[1][0], found[0][0], atol=2e-5, rtol=0)
    assert torch.equal(found[1][1], found[0][1])
