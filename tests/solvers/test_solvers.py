"""Solver tables: in float64 against formulas from the papers, in float32 against the originals' recorded steps."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import PREDICTIONS, cases, error, schedule_of, tensor
from torch import Tensor

from fastcfg import Sampler, Schedule, StepTable, solvers
from fastcfg.reference import table_step
from fastcfg.step import StepSpec
from fastcfg.table import DEVICE_COLUMNS

pytestmark = pytest.mark.quick

SCHEDULES = {
    "linear": Schedule.named("linear", 1000).respace("10"),
    "cosine": Schedule.named("cosine", 1000).respace("ddim10"),
    "whole": Schedule.named("scaled_linear", 8),
}


def run_row(table: StepTable, row: int, x: Tensor, output: Tensor, noise: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """The next x and x0 of one row, in x's dtype; `output` may have variance channels."""
    channels = x.shape[1]
    spec = StepSpec.of(table, clip=clip, keep_x0=True, noise_source="tensor" if table.uses_noise else "none")
    coefficients = dict(zip(DEVICE_COLUMNS, table.on("cpu", x.dtype)[row].unbind(), strict=True))
    y, x0, _ = table_step(
        coefficients,
        x,
        [output[:, :channels]],
        spec,
        variance=output[:, channels:] if table.learned_variance else None,
        bound=torch.ones(len(x), dtype=x.dtype),
        noise=noise,
    )
    return y, x0


def random_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a model output with variance channels (beyond [-1, 1] at places), and noise, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, eps, v, z = torch.randn(4, 2, 3, 4, 5, dtype=torch.float64, generator=generator).unbind()
    return x, torch.cat([eps, 0.8 * v], dim=1), z


class Paper:
    """One timestep of Ho et al. 2020 in float64 scalars, from the betas alone."""

    def __init__(self, betas: np.ndarray, t: int) -> None:
        self.t, self.β, self.α = t, float(betas[t]), float(1 - betas[t])
        self.ᾱ = float(np.prod(1 - betas[: t + 1]))
        self.ᾱ_prev = float(np.prod(1 - betas[:t]))
        self.ᾱ_next = float(np.prod(1 - betas[: t + 2])) if t + 1 < len(betas) else 0.0
        self.β̃ = (1 - self.ᾱ_prev) / (1 - self.ᾱ) * self.β

    def x0(self, prediction: str, x: Tensor, m: Tensor) -> Tensor:
        if prediction == "epsilon":
            return (x - (1 - self.ᾱ) ** 0.5 * m) / self.ᾱ**0.5
        if prediction == "x0":
            return m
        if prediction == "v":
            return self.ᾱ**0.5 * x - (1 - self.ᾱ) ** 0.5 * m
        # The mean of x_{t-1} is m: equation 7 solved for x0.
        return (m - self.α**0.5 * (1 - self.ᾱ_prev) / (1 - self.ᾱ) * x) * (1 - self.ᾱ) / (self.ᾱ_prev**0.5 * self.β)

    def posterior_mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """Equation 7."""
        from_x0 = self.ᾱ_prev**0.5 * self.β / (1 - self.ᾱ) * x0
        return from_x0 + self.α**0.5 * (1 - self.ᾱ_prev) / (1 - self.ᾱ) * x

    def σ(self, variance: str, v: Tensor) -> Tensor | float:
        if variance == "fixed_small":
            return self.β̃**0.5
        if variance == "fixed_large":
            return self.β**0.5
        if variance == "learned":
            return torch.exp(v) ** 0.5
        return self.β ** ((v + 1) / 4) * self.β̃ ** ((1 - v) / 4)

    def ddim(self, x0: Tensor, x: Tensor, z: Tensor, η: float) -> Tensor:
        """Equations 12 and 16 of Song et al. 2020."""
        eps = (x - self.ᾱ**0.5 * x0) / (1 - self.ᾱ) ** 0.5
        σ = η * ((1 - self.ᾱ_prev) / (1 - self.ᾱ)) ** 0.5 * (1 - self.ᾱ / self.ᾱ_prev) ** 0.5
        direction = max(1 - self.ᾱ_prev - σ**2, 0) ** 0.5
        return self.ᾱ_prev**0.5 * x0 + direction * eps + σ * z

    def ddim_reverse(self, x0: Tensor, x: Tensor) -> Tensor:
        eps = (x - self.ᾱ**0.5 * x0) / (1 - self.ᾱ) ** 0.5
        return self.ᾱ_next**0.5 * x0 + (1 - self.ᾱ_next) ** 0.5 * eps


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_is_the_papers(name: str, prediction: str, variance: str, clip: bool) -> None:
    schedule = SCHEDULES[name]
    table = solvers.ddpm(schedule, prediction=prediction, variance=variance)
    assert table.learned_variance == variance.startswith("learned")
    for row in range(len(table)):
        x, output, z = random_inputs(row)
        m, v = output.chunk(2, dim=1)
        t = schedule.num_timesteps - 1 - row
        paper = Paper(schedule.betas, t)
        x0 = paper.x0(prediction, x, m)
        x0 = x0.clamp(-1, 1) if clip else x0
        want = m if prediction == "previous_x" else paper.posterior_mean(x0, x)
        if t > 0:
            want = want + paper.σ(variance, v) * z
        y, got_x0 = run_row(table, row, x, output, z, clip)
        # Measured: 1.1e-14.
        assert error(got_x0, x0) < 1e-12
        assert error(y, want) < 1e-12


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_the_papers(name: str, prediction: str, eta: float, clip: bool) -> None:
    schedule = SCHEDULES[name]
    table = solvers.ddim(schedule, eta=eta, prediction=prediction)
    assert table.uses_noise == (eta > 0)
    for row in range(len(table)):
        x, output, z = random_inputs(row)
        paper = Paper(schedule.betas, schedule.num_timesteps - 1 - row)
        x0 = paper.x0(prediction, x, output[:, :3])
        x0 = x0.clamp(-1, 1) if clip else x0
        y, got_x0 = run_row(table, row, x, output, z, clip)
        # Measured: 1.1e-14.
        assert error(got_x0, x0) < 1e-12
        assert error(y, paper.ddim(x0, x, z, eta)) < 1e-12


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_ddim_is_the_papers(name: str, prediction: str, clip: bool) -> None:
    schedule = SCHEDULES[name]
    table = solvers.ddim_reverse(schedule, prediction=prediction)
    assert not table.uses_noise
    for t in range(len(table)):
        x, output, z = random_inputs(t)
        paper = Paper(schedule.betas, t)
        x0 = paper.x0(prediction, x, output[:, :3])
        x0 = x0.clamp(-1, 1) if clip else x0
        y, got_x0 = run_row(table, t, x, output, z, clip)
        # Measured: 2.2e-13, from 1 - ᾱ at the first steps.
        assert error(got_x0, x0) < 1e-12
        assert error(y, paper.ddim_reverse(x0, x)) < 1e-12


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "previous_x"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_extrapolated_ddim_is_its_formula(name: str, prediction: str, clip: float | None) -> None:
    schedule, outputs = SCHEDULES[name], [random_inputs(t)[1][:, :3] for t in range(SCHEDULES[name].num_timesteps)]
    x, remaining = random_inputs(99)[0], iter(outputs)
    table = solvers.ddim_extrapolated(schedule, prediction=prediction)
    dtype = {"dtype": torch.float64, "state_dtype": torch.float64}
    sampler = Sampler(lambda x, t: next(remaining), table, clip=clip, backend="reference", **dtype)
    last = None
    for step, m in zip(sampler.iterate(x.shape, x_T=x), outputs, strict=True):
        paper = Paper(schedule.betas, schedule.num_timesteps - 1 - step.row)
        x0 = paper.x0(prediction, x, m).clamp(-(clip or np.inf), clip or np.inf)
        eps = (x - paper.ᾱ**0.5 * x0) / (1 - paper.ᾱ) ** 0.5
        x = paper.ᾱ_prev**0.5 * x0 + (1 - paper.ᾱ_prev) ** 0.5 * (eps if last is None else 1.5 * eps - 0.5 * last)
        last = eps
        # Measured: 2.1e-14.
        assert error(step.x, x) < 1e-11


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance() -> None:
    schedule = SCHEDULES["linear"]
    ddim, ddpm = solvers.ddim(schedule, eta=1.0), solvers.ddpm(schedule, variance="fixed_small")
    for column in ("a_x", "a_0", "s"):
        np.testing.assert_allclose(ddim[column], ddpm[column], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_reverse_ddim_undoes_ddim_for_a_constant_epsilon(name: str) -> None:
    schedule = SCHEDULES[name]
    backward, forward = solvers.ddim_reverse(schedule), solvers.ddim(schedule)
    start, output, z = random_inputs(0)
    x = start
    # Row t leads from level t to t + 1, so the last row of each table has no counterpart in the other.
    for t in range(schedule.num_timesteps - 1):
        x, _ = run_row(backward, t, x, output, z, clip=False)
    for row in range(schedule.num_timesteps - 1):
        x, _ = run_row(forward, row, x, output, z, clip=False)
    # Measured: 2.9e-13.
    assert error(x, start) < 1e-11


@pytest.mark.parametrize(
    "build", [solvers.ddpm, solvers.ddim, solvers.ddim_extrapolated, solvers.ddim_reverse, solvers.plms]
)
@pytest.mark.parametrize("rescale", [False, True])
def test_the_model_is_called_with_the_original_timesteps(build: Any, rescale: bool) -> None:
    schedule = Schedule.named("linear", 500).respace("10")
    table = build(schedule, rescale_timesteps=rescale)
    steps = np.sort(schedule.timestep_map) * (2.0 if rescale else 1.0)
    assert table["t"].tolist() == (steps if build is solvers.ddim_reverse else steps[::-1]).tolist()
    assert table.integer_time == (not rescale)
    assert table.name == build.__name__


@pytest.mark.parametrize(
    "table", [solvers.ddpm(Schedule(np.array([0.3]))), solvers.ddim(Schedule(np.array([0.3])), eta=1.0)]
)
def test_a_run_of_one_step_returns_x0(table: StepTable) -> None:
    x, output, z = random_inputs(0)
    y, x0 = run_row(table, 0, x, output, z, clip=True)
    assert len(table) == 1
    assert error(y, x0) < 1e-15


@pytest.mark.parametrize("build", [solvers.ddpm, solvers.ddim])
def test_a_process_that_ends_in_pure_noise_needs_v_prediction(build: Any) -> None:
    # The linear schedule of 20 steps ends with β = 1.
    schedule = Schedule.named("linear", 20)
    assert schedule.alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match=r"alphas_cumprod reaches 0, .* use v-prediction"):
        build(schedule)
    x, output, z = random_inputs(0)
    _, x0 = run_row(build(schedule, prediction="v"), 0, x, output, z, clip=False)
    assert torch.equal(x0, -output[:, :3])


def recorded_steps(*stems: str) -> list[Any]:
    functions = ("p_sample", "ddim_sample", "ddim_reverse_sample")
    return [
        pytest.param(stem, case, id=f"{case['impl']}-{case['id']}")
        for stem in stems
        for case in cases(stem)
        if case["fn"] in functions and not case["cond_fn"]
    ]


@pytest.mark.parametrize(("stem", "case"), recorded_steps("single_steps_gd", "single_steps_glide"))
def test_tables_take_the_originals_steps(stem: str, case: dict[str, Any]) -> None:
    def given(name: str) -> Tensor:
        # Half-precision inputs are rounded as recorded; the state of a run is float32.
        return tensor(stem, f"{case['inputs']}/{name}", getattr(torch, case["x_dtype"])).float()

    schedule = schedule_of(case)
    options = {"prediction": PREDICTIONS[case["mean_type"]], "rescale_timesteps": case["rescale_timesteps"]}
    if case["fn"] == "p_sample":
        table = solvers.ddpm(schedule, variance=case["var_type"].lower(), **options)
    elif case["fn"] == "ddim_sample":
        table = solvers.ddim(schedule, eta=case["eta"], **options)
    else:
        table = solvers.ddim_reverse(schedule, **options)

    x, output, noise = given("x"), given("model_output"), given("noise")
    steps = []
    for i, t in enumerate(tensor(stem, f"{case['inputs']}/t").tolist()):
        row = t if case["fn"] == "ddim_reverse_sample" else schedule.num_timesteps - 1 - t
        assert table["t"][row] == case["model_timesteps"][i]
        one = slice(i, i + 1)
        steps.append(run_row(table, row, x[one], output[one], noise[one], case["clip_denoised"]))
    sample, x0 = (torch.cat(parts) for parts in zip(*steps, strict=True))

    # Measured: 8.2e-7 for p_sample; 3.5e-4 from a float16 model, whose (v + 1)/2 the originals round to float16; 6.9e-5
    # for DDIM, whose coefficients they derive in float32; 1.9e-6 for x0.
    tolerance = 2e-5 if case["fn"] == "p_sample" and case["x_dtype"] != "float16" else 5e-4
    assert error(sample, tensor(stem, f"{case['id']}/sample")) < tolerance
    assert error(x0, tensor(stem, f"{case['id']}/pred_xstart")) < 2e-5


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (solvers.ddpm, {"prediction": "eps"}, "prediction: got 'eps', expected one of epsilon, x0, v, previous_x"),
        (solvers.ddim, {"prediction": "flow"}, "prediction: got 'flow', expected one of"),
        (solvers.ddim_reverse, {"prediction": "flow"}, "prediction: got 'flow', expected one of"),
        (solvers.ddpm, {"variance": "small"}, "variance: got 'small', expected one of fixed_small, fixed_large, "),
        (solvers.ddim, {"eta": -0.1}, "eta: got -0.1, expected a finite value of at least 0"),
        (solvers.ddim, {"eta": float("nan")}, "eta: got nan, expected a finite value"),
        (solvers.ddim, {"eta": 1.5}, "eta: got 1.5, expected less: sigma exceeds the noise that is left at"),
    ],
)
def test_bad_options_are_refused(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SCHEDULES["linear"], **options)


@pytest.mark.parametrize("name", sorted(set(solvers.__all__) - {"Denoiser"}))
def test_what_is_no_schedule_and_no_levels_is_refused(name: str) -> None:
    build: Any = getattr(solvers, name)
    parameters = inspect.signature(build).parameters
    for wrong in (50, None, "linear", SCHEDULES["linear"]):
        arguments: dict[str, Any] = {
            "timestep": 3,
            "num_steps": 2,
            "timesteps": [9, 4],
            "predictor": solvers.ddim(SCHEDULES["linear"]),
        }
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        if "schedule" in parameters:
            if wrong is SCHEDULES["linear"]:
                continue
            expected = rf"schedule: got {type(wrong).__name__}, expected a Schedule \(see Schedule.named\)"
            arguments["schedule"] = wrong
        else:
            expected = r"sigmas: got .*\(see fastcfg.sigmas\)"
            arguments["sigmas"] = wrong
        with pytest.raises((TypeError, ValueError), match=expected) as caught:
            build(**arguments)
        assert isinstance(caught.value, TypeError) or wrong in (50, None)
