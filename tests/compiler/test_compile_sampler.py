"""k-diffusion's sampling functions compiled, and functions of a user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.sampler_cases import CASES, denoise
from torch import Tensor

from benchmarks.suite.foreign import load_k_diffusion
from fastcfg import Sampler
from fastcfg.compiler import Compiled, compile_sampler, trace_sampler
from fastcfg.compiler.patching import drawing
from fastcfg.compiler.stand_ins import DrawMode

pytestmark = pytest.mark.quick

loaded: Any = load_k_diffusion()
sampling: Any = loaded and loaded[0]
needs_k_diffusion = pytest.mark.skipif(sampling is None, reason="k-diffusion is not installed")


def check(function: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any]) -> Compiled:
    """The compiled function's samples are the original's, of the original's draws."""
    compiled = trace_sampler(function, sigmas, **options)
    table = compiled.table
    x = torch.randn(2, 3, 6, 5, generator=torch.manual_seed(0), dtype=torch.float64) * sigmas[0]
    generator, drawn, seen = torch.manual_seed(1), list[list[Tensor]]([[]]), list[Tensor]()

    def model(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
        drawn.append([])
        return denoise(x, sigma, **given)

    def draw(*_: Any) -> Tensor:
        drawn[-1].append(torch.empty_like(x).normal_(generator=generator))
        return drawn[-1][-1]

    filled = {"disable": True, "callback": lambda state: seen.append(state["x"]), "noise_sampler": draw}
    known = inspect.signature(function).parameters
    given = {name: value for name, value in filled.items() if name in known} | options
    with drawing(function, draw):
        want = function(model, x, sigmas, **given)
    x_T, *noise = (
        sum((c * z for c, z in zip(coefficients, values, strict=True)), torch.zeros_like(x))
        for coefficients, values in zip([compiled.start_draws, *compiled.draws], drawn, strict=True)
    )
    x_T = compiled.start * x + x_T
    unit = torch.stack(noise) / torch.from_numpy(np.where(table["s"] > 0, table["s"], 1.0)).view(-1, 1, 1, 1, 1)
    sampler = Sampler(denoise, table, backend="reference", graph=False, dtype=torch.float64, state_dtype=torch.float64)
    steps = list(sampler.iterate(tuple(x.shape), x_T=x_T, noise=unit if table.uses_noise else None))
    # Measured: 2.2e-14; the saved tensors stand for others.
    torch.testing.assert_close(steps[-1].x, want, rtol=1e-12, atol=1e-12)
    assert table.num_steps == len(sigmas) - 1
    assert len(seen) in (0, table.num_steps)
    return compiled


@needs_k_diffusion
@pytest.mark.parametrize("count", [1, 2, 7, 25])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_compiled_function_is_the_original(name: str, options: dict[str, Any], count: int) -> None:
    if count == 1 and name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        pytest.skip("the original does not run")
    sigmas = sampling.get_sigmas_karras(count, 0.03, 14.6).double()
    compiled = check(getattr(sampling, name), sigmas, options)
    if "s_churn" not in options:
        assert compiled.table.initial_scale == sigmas[0]


@needs_k_diffusion
def test_sigmas_need_not_end_at_zero_nor_be_tensors() -> None:
    check(sampling.sample_heun, torch.tensor([5.0, 2.0, 0.7, 0.3], dtype=torch.float64), {})
    assert len(compile_sampler(sampling.sample_euler, [5.0, 2.0, 0.0])) == 2


@needs_k_diffusion
def test_saved_tensors_are_as_few_as_the_method_needs() -> None:
    want = {"euler": 0, "euler_ancestral": 0, "heun": 1, "dpmpp_2m": 1, "dpmpp_sde": 1, "dpmpp_3m_sde": 2, "lms": 3}
    sigmas = sampling.get_sigmas_karras(12, 0.03, 14.6)
    got = {name: compile_sampler(getattr(sampling, f"sample_{name}"), sigmas).num_history for name in want}
    assert got == want


@needs_k_diffusion
def test_draws_are_told_with_those_whose_value_is_not_used() -> None:
    sigmas = [4.0, 2.0, 1.0, 0.0]
    plain, churned = (trace_sampler(sampling.sample_euler, sigmas, s_churn=churn) for churn in (0.0, 0.3))
    assert (plain.start, plain.start_draws, plain.draws) == (1.0, (0.0,), ((0.0,), (0.0,), ()))
    want = [sigma * math.sqrt(1.1**2 - 1) for sigma in sigmas]
    assert churned.start_draws == pytest.approx(want[:1])
    assert churned.draws[0] == pytest.approx(want[1:2])
    assert churned.table.initial_scale == pytest.approx(4.4)
    assert churned.table["t"].tolist() == pytest.approx([4.4, 2.2, 1.1])


@needs_k_diffusion
def test_dpm_fast_is_taken_through_a_function_of_sigmas() -> None:
    def dpm_fast(model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        return sampling.sample_dpm_fast(model, x, sigmas[-1], sigmas[0], 9, disable=True)

    table = compile_sampler(dpm_fast, [14.6, 0.03])
    assert (len(table), table.num_history) == (9, 2)


@needs_k_diffusion
def test_the_worked_example_of_the_reduction() -> None:
    table = compile_sampler(sampling.sample_dpmpp_2m, [4.0, 2.0, 1.0])
    assert table.num_history == 1
    first, second = ({name: float(table[name][row]) for name in ("a_x", "a_0", "a_h0")} for row in (0, 1))
    assert first == pytest.approx({"a_x": 0.5, "a_0": 0.5, "a_h0": 0.0})
    ways = {"outputs": {"a_x": 0.5, "a_0": 0.75, "a_h0": -0.25}, "states": {"a_x": 0.0, "a_0": 0.75, "a_h0": 0.25}}
    assert second == pytest.approx(ways["states" if table["k_x"][0] else "outputs"])


# What is no table


def euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """A sampler of one's own."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def squared(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) + 1e-3 * x**2


def halving(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    while x.abs().max() > 0.4:
        x = 0.25 * model(x, sigmas[:1].expand(len(x)))
    return x


def branching(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) * (1.5 if len(x) > 1 else 1.0)


def restless(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, 0.5 * x + torch.randn_like(x) - 2 * torch.randn_like(x), sigmas)


def anchored(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return euler(model, x + noise, sigmas) + 0.1 * noise


def forgetless(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    kept = []
    for i, sigma in enumerate(sigmas[:-1]):
        kept.append(model(x, sigma.expand(len(x))))
        x = x + sum(m / (1 + (i + j) ** 2) for j, m in enumerate(kept[-6:]))
    return x


def mixed(saved: int) -> Callable[..., Tensor]:
    """A function that saves sums of state and output in proportions of its own, and adds the last few."""

    def function(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
        kept: list[Tensor] = []
        for i, sigma in enumerate(sigmas[:-1]):
            m = model(x, sigma.expand(len(x)))
            callback({"x": x})
            past, share = kept[max(0, i - saved) :], 0.3 + 0.1 * i % 0.7
            kept.append(share * x + (1 - share) * m)
            x = (0.9 - 0.05 * (i % 3)) * x - 0.2 * m + sum(h * 0.3 / (2 + j + i % 2) for j, h in enumerate(past))
        return x

    return function


@pytest.mark.parametrize("count", [4, 7, 24])
@pytest.mark.parametrize("saved", [1, 2, 3])
def test_saved_tensors_of_any_proportions_are_found(saved: int, count: int) -> None:
    levels = torch.linspace(5.0, 0.0, count + 1, dtype=torch.float64)
    check(mixed(saved), levels, {})
    if count > 5:
        assert compile_sampler(mixed(saved), levels).num_history == saved


def test_a_function_of_ones_own_is_a_table() -> None:
    table = compile_sampler(euler, [4.0, 2.0, 1.0, 0.0])
    assert table.name == "euler"
    assert table["t"].tolist() == [4.0, 2.0, 1.0]
    assert table["a_0"].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert table["a_x"].tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_what_is_added_before_the_first_model_call_is_the_start() -> None:
    compiled = check(restless, torch.linspace(4.0, 0.0, 6, dtype=torch.float64), {})
    assert (compiled.start, compiled.start_draws) == (0.5, (1.0, -2.0))
    assert compiled.table.initial_scale == pytest.approx(3.0)  # of 2, 1 and 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (squared, "step 11 has coefficients"),
        (halving, "with model calls that depend on the samples"),
        (branching, "its table differs by .* in row 11"),
        (anchored, "reuses the noise drawn before its first model call"),
        (lambda model, x, sigmas: euler(model, 0 * x, sigmas), "first model input that lacks x"),
        (forgetless, "needs 5 saved tensors, expected at most 3"),
        (lambda model, x: x, "does not run on basis vectors"),
    ],
    ids=["a square", "a loop", "a branch", "early noise again", "no start", "five saved tensors", "another form"],
)
def test_what_is_no_table_is_refused_and_why(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_sampler(function, torch.linspace(10, 0, 13))


@needs_k_diffusion
def test_adaptive_steps_are_refused() -> None:
    def adaptive(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return sampling.sample_dpm_adaptive(model, x, sigmas[-1], sigmas[0], disable=True)

    with pytest.raises(ValueError, match="sample_fn: got"):
        compile_sampler(adaptive, [14.6, 0.03])


@pytest.mark.parametrize("sigmas", [[1.0], [[1.0, 0.5]], [1.0, -0.5, 0.0], []])
def test_bad_sigmas(sigmas: Any) -> None:
    with pytest.raises(ValueError, match="sigmas: got"):
        compile_sampler(euler, sigmas)


@pytest.mark.parametrize("sigmas", ["ab", None])
def test_what_is_no_sigmas(sigmas: Any) -> None:
    with pytest.raises(TypeError, match=r"sigmas: got .*, expected numbers"):
        compile_sampler(euler, sigmas)


def test_a_function_without_model_calls() -> None:
    def idle(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match="sample_fn: got idle, which calls no model, expected linear steps"):
        compile_sampler(idle, [1.0, 0.0])


def test_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="sample_fn: got str, expected a function"):
        compile_sampler("euler", [1.0, 0.0])  # type: ignore[arg-type]


# What real functions do


def pairs(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(pairwise(sigmas))


def euler_in_place(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    x = x.clone()
    for sigma, following in pairs(sigmas):
        x += (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def two_steps_in_place(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    x, old = x.clone(), None
    for sigma, following in pairs(sigmas):
        d = (x - model(x, sigma.expand(len(x)))) / sigma
        x += (d if old is None else 1.5 * d - 0.5 * old) * (following - sigma)
        old = d
    return x


def on_the_given_x(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        x.add_((x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma))
    return x


def on_the_output(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        x = model(x, sigma.expand(len(x)))
        if following > 0:
            x += following * torch.randn_like(x)
    return x


def second_stage_in_place(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        d = x.sub(model(x, sigma.expand(len(x)))).div_(sigma)
        x = x.add(d * (following - sigma))
        if following > 0:
            x.sub_(0.5 * (following - sigma) * d)
            d2 = model(x + 0.5 * (following - sigma) * d, following.expand(len(x))).neg_().add_(x)
            x.add_(d2.mul_(0.5 * (following - sigma) / following))
    return x


def with_gradients(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = model(x, sigma.expand(len(x)))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x.detach()


def in_single_precision(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    x = x.double()
    for sigma, following in pairs(sigmas):
        denoised = model(x.float(), sigma.float().expand(len(x))).double()
        x = x + (x - denoised) / sigma * (following - sigma)
    return x.float()


def with_noise_of_every_kind(model: Any, x: Tensor, sigmas: Tensor, like: Any = torch.randn_like) -> Tensor:
    own = torch.Generator().manual_seed(3)
    for sigma, following in pairs(sigmas):
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (0.9 * following - sigma)
        x = x + 0.1 * following * (like(x) + torch.empty_like(x).normal_() + torch.randn(x.shape, generator=own))
        x = x + 0.1 * following * torch.normal(0.0, 2.0, x.shape)
    return x


IN_PLACE = [euler_in_place, two_steps_in_place, on_the_given_x, on_the_output, second_stage_in_place]


@pytest.mark.parametrize("function", [*IN_PLACE, with_gradients, in_single_precision, with_noise_of_every_kind])
def test_functions_that_work_in_place_or_convert_are_read_right(function: Any) -> None:
    levels = torch.tensor([14.6, 5.0, 2.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    compiled = trace_sampler(function, levels)
    noise, rows = np.random.default_rng(0), compiled.table.num_rows
    start = torch.from_numpy(noise.standard_normal((2, 3, 4, 5)) * 14.6)
    draws = [[torch.from_numpy(noise.standard_normal(start.shape)) for _ in row] for row in compiled.draws]
    ahead = iter([z for row in draws for z in row])
    with DrawMode(lambda like, generator: next(ahead), wide_ndim=4), torch.no_grad():
        want = function(denoise, start.clone(), levels)
    unit = torch.stack([compiled.noise(iter(row).__next__, i) if compiled.table["s"][i] else 0 * start
                        for i, row in enumerate(draws)])  # fmt: skip
    sampler = Sampler(denoise, compiled.table, backend="reference", graph=False, **DOUBLE)
    got = sampler.sample(tuple(start.shape), x_T=start, noise=unit if compiled.table.uses_noise else None)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert rows in (5, 9)


DOUBLE: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64}


def test_two_in_place_samplers_are_not_one_another() -> None:
    """A recording of the tensors themselves would prove any function that changes them."""
    levels = torch.tensor([8.0, 3.0, 1.0, 0.0])
    one, two = (compile_sampler(f, levels) for f in (euler_in_place, two_steps_in_place))
    assert (one.num_history, two.num_history) == (0, 1)
    assert np.array_equal(one.rows, compile_sampler(euler, levels).rows)


def by_timesteps(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """DDIM whose sigmas are timesteps, by which it looks alphas up; the model predicts noise."""
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t, following in pairs(sigmas):
        eps = model(x, t.expand(len(x)))
        a, b = alphas[t], alphas[following] if following > 0 else torch.ones(())
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integer_times_stay_integers(dtype: torch.dtype) -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return torch.linspace(0, 1, 1000)[t].view(-1, 1, 1, 1) * x

    steps = torch.arange(900, -1, -100, dtype=dtype)
    table = compile_sampler(by_timesteps, steps)
    assert table.integer_time
    assert table.initial_scale == 1.0
    assert table["t"].tolist() == list(range(900, 0, -100))
    x = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    got = Sampler(network, table).sample((2, 3, 4, 4), x_T=x)
    assert set(seen) == {torch.int64}
    torch.testing.assert_close(got, by_timesteps(network, x, steps), rtol=1e-4, atol=1e-5)


def test_lists_of_integers_are_levels() -> None:
    assert not compile_sampler(euler, [4, 2, 1, 0]).integer_time


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("where", ["before", "after the first call", "end", "several"])
def test_callbacks_may_come_anywhere(where: str, stages: int) -> None:
    def function(model: Any, x: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
        for sigma, following in pairs(sigmas):
            if where in ("before", "several"):
                callback({"x": x})
            m = model(x, sigma.expand(len(x)))
            if where == "after the first call":
                callback({"x": x, "denoised": m})
            x = x + (x - m) / sigma * (following - sigma)
            if stages == 2:
                x = x + 0.1 * model(x, sigma.expand(len(x)))
            if where in ("end", "several"):
                callback({"x": x})
        return x

    table = compile_sampler(function, [4.0, 2.0, 1.0, 0.0])
    assert table.steps.tolist() == [step for step in range(3) for _ in range(stages)]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("prediction", ["denoised", "v", "epsilon", "flow"])
def test_clip_limits_x0_whatever_the_model_predicts(prediction: str, given: bool, clip: float | None) -> None:
    levels = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)[:-1] * (0.99 if prediction == "epsilon" else 1.0)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - t, t) if prediction == "flow" else (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2))

    def function(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        for i, t in enumerate(sigmas):
            (alpha, sigma), m = scales(t), model(x, t.expand(len(x)))
            # The first alpha of a flow is 0.
            epsilon = (x - sigma * m) / alpha.clamp(min=1e-9)
            x0 = {"denoised": m, "v": alpha * x - sigma * m, "epsilon": epsilon, "flow": x - sigma * m}[prediction]
            x0 = x0 if limit is None else x0.clamp(-limit, limit)
            if i + 1 < len(sigmas):
                a, s = scales(sigmas[i + 1])
                x = a * x0 + s * (x - alpha * x0) / sigma
        return x0

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 1.5 * torch.tanh(x) + 0.1 * t.view(-1, 1, 1, 1)

    limit = None
    table = compile_sampler(function, levels, prediction=prediction if given else None)
    limit = clip
    x = 2 * torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    want = function(lambda x, t: network(x, t.float().double()), x, levels)
    sampler = Sampler(lambda x, t: network(x, t.double()), table, clip=clip, backend="reference", **DOUBLE)
    steps = list(sampler.iterate(tuple(x.shape), x_T=x))
    torch.testing.assert_close(steps[-1].x, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(steps[-1].x0, want, rtol=1e-6, atol=1e-6)


def test_predictions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction: got 'v', expected one that the function's coefficients fit"):
        compile_sampler(euler, [4.0, 2.0, 1.0, 0.0], prediction="v")
    with pytest.raises(ValueError, match="prediction: got 'x', expected one of denoised"):
        compile_sampler(euler, [4.0, 2.0, 1.0, 0.0], prediction="x")


def test_attributes_are_the_given_model_s() -> None:
    class Inner:
        scale = 0.5

    class Model:
        inner = Inner()

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            raise AssertionError("the model is not called")

    def asking(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        assert isinstance(model, Model) or model.inner
        return euler(model, x, sigmas) * model.inner.scale

    with pytest.raises(ValueError, match=r"model: got a function that reads model\.inner, expected the model too"):
        compile_sampler(asking, [4.0, 0.0])
    assert float(compile_sampler(asking, [4.0, 0.0], model=Model())["a_0"][0]) == 0.5


def doubles(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        cond, uncond = model(torch.cat([x, x]), sigma.expand(2 * len(x))).chunk(2)
        x = x + (x - uncond - 3 * (cond - uncond)) / sigma * (following - sigma)
    return x


def keeps_pairs(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, torch.cat([x, x]), sigmas)[: len(x)]


def calls_twice(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairs(sigmas):
        cond, uncond = (model(x, sigma.expand(len(x)), cond=which) for which in (True, False))
        x = x + (x - uncond - 3 * (cond - uncond)) / sigma * (following - sigma)
    return x


def by_keywords(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return x + model(img=x, timesteps=sigmas[:1])


def yields(model: Any, x: Tensor, sigmas: Tensor) -> Any:
    yield euler(model, x, sigmas)


def draws_uniforms(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas) + torch.rand_like(x)


def sets_an_attribute(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    model.step = 0
    return euler(model, x, sigmas)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (doubles, "a batch of 2 for 1 samples, expected one without guidance .* guidance=CFG"),
        (keeps_pairs, "a batch of 2 for 1 samples, expected one without guidance .* guidance=CFG"),
        (calls_twice, "with arguments of its own, expected one without guidance .* guidance=CFG"),
        (by_keywords, r"calls its model as model\(img=, timesteps=\), expected model\(x, sigma"),
        (yields, "returns generator, expected a tensor"),
        (draws_uniforms, "draws by torch's rand_like, expected normal noise"),
        (sets_an_attribute, r"sets model\.step, expected one that leaves its model alone"),
    ],
)
def test_other_forms_are_refused_by_what_they_do(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_sampler(function, [4.0, 2.0, 0.0])


def test_plain_further_arguments_of_the_model_are_left_to_the_sampler() -> None:
    def labelled(model: Any, x: Tensor, sigmas: Tensor, labels: Any = None) -> Tensor:
        return euler(lambda x, sigma: model(x, sigma, labels, force=True), x, sigmas)

    assert len(compile_sampler(labelled, [4.0, 2.0, 0.0])) == 2


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    compile_sampler(with_noise_of_every_kind, [4.0, 2.0, 0.0])
    assert torch.equal(torch.get_rng_state(), before)
