"""Written solvers and compiled ones check each other: the same outputs and noise, the same model inputs and samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import error
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers, load_k_diffusion
from fastcfg import CFG, Sampler, Schedule, StepTable, sigmas, solvers
from fastcfg.compiler import compile_sampler, compile_scheduler
from fastcfg.compiler.patching import drawing
from fastcfg.schedule import consistency_timesteps
from fastcfg.solvers import Denoiser
from fastcfg.table import COLUMNS

diffusers: Any = load_diffusers()
needs_diffusers = pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (2, 3, 4, 5)
LEVELS = sigmas.karras(7, 0.1, 10.0)
PROCESS = Schedule.named("scaled_linear")
EPSILON = Denoiser("epsilon", schedule=PROCESS)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def normals(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator))


def run(table: StepTable, model: Any, x_T: Tensor, **options: Any) -> Tensor:
    given: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "graph": False}
    branches = {name: {"y": torch.zeros(2)} for name in options["guidance"].branches} if "guidance" in options else None
    noise = options.pop("noise", normals(len(table), 2))
    sampler = Sampler(model, table, backend="reference", **given, **options)
    return sampler.sample(SHAPE, x_T=x_T, branches=branches, noise=lambda row, shape: noise[row])


def play(table: StepTable, **options: Any) -> list[Tensor]:
    """What the model is given in every row, and the last sample, for random outputs and noise."""
    inputs: list[Tensor] = []

    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        inputs.append(x[:2].clone())
        return torch.cat(normals(2, 10 + len(inputs)))[: len(x)]

    inputs.append(run(table, model, normals(1, 3)[0] / table["c_in"][0], **options))
    return inputs


def distance(one: StepTable, other: StepTable, scale: float = 1.0, **options: Any) -> float:
    """The largest difference of two runs; `scale` takes the last sample of the first to the other's space."""
    got, want = play(one, **options), play(other, **options)
    got[-1] = got[-1] * scale
    assert one.steps.tolist() == other.steps.tolist()
    return max(map(error, got, want))


def exact(name: str, **config: Any) -> Any:
    """A scheduler of diffusers whose coefficients are float64: its sigmas are."""

    class Exact(getattr(diffusers, name)):
        def set_timesteps(self, *arguments: Any, **options: Any) -> None:
            super().set_timesteps(*arguments, **options)
            self.sigmas = self.sigmas.double()

    return Exact(**config)


def tau(t: float) -> float:
    return 0.6 if 300 <= t <= 800 else 0.0


def multistep_cases() -> Iterator[tuple[str, dict[str, Any], Any, dict[str, Any]]]:
    """diffusers' name and configuration, ours and its options."""
    for p, low in itertools.product((1, 2, 3), (True, False)):
        last = {"lower_order_final": low}
        yield "DEISMultistep", {"solver_order": p, **last}, solvers.deis, {"order": p, **last}
        for kind, end in (("bh1", "sigma_min"), ("bh2", "sigma_min"), ("bh2", "zero")):
            if end == "sigma_min" or low or p == 1:  # theirs divides infinities otherwise, and with bh1
                config = {"solver_order": p, "solver_type": kind, "final_sigmas_type": end, **last}
                yield "UniPCMultistep", config, solvers.unipc, {"order": p, "variant": kind, **last}
        for q in (p, 4):
            options = {"predictor_order": p, "corrector_order": q, **last}
            yield "SASolver", {"tau_func": tau, **options}, solvers.sa_solver, options


@needs_diffusers
@pytest.mark.parametrize(("name", "config", "build", "options"), list(multistep_cases()))
def test_multistep_tables_are_diffusers(name: str, config: Any, build: Any, options: dict[str, Any]) -> None:
    for n in (1, 3, 12):
        scheduler = exact(f"{name}Scheduler", **BETAS, **config)
        scheduler.set_timesteps(n)
        levels, given = scheduler.sigmas.numpy(), dict(options)
        if build is solvers.sa_solver:
            given["tau"] = [tau(float(t)) for t in scheduler.timesteps]
        table, compiled = build(levels, denoiser=EPSILON, **given), compile_scheduler(scheduler, n)
        # Measured: 3.5e-12, from third-order weights of theirs.
        assert distance(table, compiled, float(1 / np.sqrt(1 + levels[-1] ** 2))) < 1e-10
    assert table.num_history == compiled.num_history


@pytest.mark.parametrize("build", [solvers.unipc, solvers.deis, solvers.sa_solver])
def test_a_step_to_0_returns_x0(build: Any) -> None:
    table = build(LEVELS, lower_order_final=False)
    last = [table[name][-1] for name in ("a_x", "a_0", "a_h0", "a_h1", "s")]
    assert last == pytest.approx([0, 1, 0, 0, 0], abs=1e-12)


@needs_diffusers
@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")])
def test_consistency_samplers_are_diffusers(theirs: str, ours: str, n: int) -> None:
    steps = consistency_timesteps(n)
    config = {**BETAS, "prediction_type": theirs}
    lcm = solvers.lcm(PROCESS.respace(steps), prediction=ours)
    pairs = [(lcm, compile_scheduler(diffusers.LCMScheduler(**config), n))]
    for gamma in (0.0, 0.3, 1.0):
        tcd = solvers.tcd(PROCESS, steps, gamma=gamma, prediction=ours)
        pairs.append((tcd, compile_scheduler(diffusers.TCDScheduler(**config), n, step_options={"eta": gamma})))
    for table, compiled in pairs:
        assert table["t"].tolist() == compiled["t"].tolist() == steps
        assert distance(table, compiled) < 1e-5  # theirs are float32; measured: 2.0e-6


@needs_diffusers
@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("name", ["EDMEuler", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_euler_and_heun_are_diffusers_for_edm_and_flow(name: str, n: int) -> None:
    kind, config = ("edm", {}) if name == "EDMEuler" else ("flow", {"shift": 3.0})
    scheduler = exact(f"{name}Scheduler", **config)
    scheduler.set_timesteps(n)
    build = solvers.heun if "Heun" in name else solvers.euler
    table = build(np.unique(scheduler.sigmas)[::-1], denoiser=Denoiser(kind))
    compiled = compile_scheduler(scheduler, n)
    assert distance(table, compiled) < 1e-6  # measured: 3.2e-8, of float32 states
    np.testing.assert_allclose(table["t"], compiled["t"], rtol=1e-6)


def flow_error(build: Any, steps: int, options: dict[str, Any]) -> float:
    """Of the end at σ = 0.2, for data N(0.3, 0.5²)."""
    table = build(1 - 0.8 * np.linspace(0, 1, steps + 1), denoiser=Denoiser("flow"), **options)
    levels = iter(table["t"] / 1000)  # the sampler's times are float32

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        σ = next(levels)
        slope = (1 - σ) * 0.25 / ((1 - σ) ** 2 * 0.25 + σ**2)
        return (x - 0.3 - slope * (x - (1 - σ) * 0.3)) / σ

    end = run(table, velocity, torch.full(SHAPE, 1.7, dtype=torch.float64))
    return float((end - 0.8 * 0.3 - 1.7 * math.sqrt(0.8**2 * 0.25 + 0.2**2)).abs().max())


def test_any_solver_without_noise_follows_a_flow() -> None:
    cases = [(solvers.euler, {}, 1), (solvers.heun, {}, 2), (solvers.dpmpp_2m, {}, 2)]  # measured: 1.00, 2.00, 2.00
    for build, options, order in [*cases, (solvers.unipc, {"order": 2, "lower_order_final": False}, 3)]:  # 2.94
        assert abs(math.log2(flow_error(build, 64, options) / flow_error(build, 128, options)) - order) < 0.25


@pytest.mark.parametrize("end", [0.0, 0.05])
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_is_k_diffusions(name: str, end: float) -> None:
    if (modules := load_k_diffusion()) is None:
        pytest.skip("k-diffusion cannot be imported")
    function, build = getattr(modules[0], f"sample_{name}"), getattr(solvers, name.replace("_", ""))
    levels, churn = np.append(LEVELS[:-1], end), {"s_churn": 2.0, "s_noise": 1.1, "s_tmin": 0.2}
    # Without churn in the first step the compiler takes it.
    assert distance(build(levels, s_tmax=9.0, **churn), compile_sampler(function, levels, s_tmax=9.0, **churn)) < 1e-10
    # With it the start holds what it adds.
    table, noise, drawn = build(levels, **churn), normals(8, 5), iter(normals(8, 5))
    added, z = 1.1 * levels[0] * math.sqrt((1 + 2 / 7) ** 2 - 1), normals(1, 6)[0] * levels[0]
    assert table.initial_scale == pytest.approx(math.hypot(levels[0], added))
    later = [noise[1 + step] for step in table.steps]
    got = run(table, lambda x, t: torch.tanh(x), z + added * noise[0], noise=later)
    with drawing(function, lambda _: next(drawn)):
        want = function(lambda x, t: torch.tanh(x), z, torch.from_numpy(levels), disable=True, **churn)
    assert error(got, want) < 1e-10  # measured: 4e-15


def spread(table: StepTable) -> float:
    """The standard deviation of the samples, when the data's are N(0, 0.5²) and the model is perfect: covariances."""
    covariance = np.diag([table.initial_scale**2, 0, 0, 0])
    for row in range(len(table)):
        c = {name: float(table[name][row]) for name in COLUMNS}
        x0, move = 0.25 / (0.25 + c["t"] ** 2), np.eye(4)
        move[0] = [c["a_x"] + c["a_0"] * x0, c["a_h0"], c["a_h1"], c["a_h2"]]
        if (slot := int(c["slot"])) >= 0:
            move[1 + slot] = [c["k_x"] + c["k_0"] * x0, 0, 0, 0]
        covariance = move @ covariance @ move.T
        covariance[0, 0] += c["s"] ** 2
    return float(np.sqrt(covariance[0, 0]))


def test_noise_keeps_the_distribution() -> None:
    levels, churn = sigmas.karras(400, 0.01, 30.0), {"s_churn": 30.0}
    assert abs(spread(solvers.euler(levels, **churn)) - 0.5) < 0.015  # measured: 0.0119; 0.0226 of 200 steps
    third = solvers.sa_solver(levels, tau=0.5, predictor_order=3, corrector_order=4)
    for table in (solvers.heun(levels, **churn), solvers.sa_solver(levels, tau=1.0), third):
        assert abs(spread(table) - 0.5) < 3e-4  # 1.2e-4: the last level


@pytest.mark.parametrize(("kind", "eta"), [("x0", 0.0), ("x0", 0.7), ("epsilon", 0.7), ("flow", 0.0)])
def test_euler_cfg_pp_is_comfys(kind: str, eta: float) -> None:
    denoiser = EPSILON if kind == "epsilon" else Denoiser(kind)
    levels = sigmas.flow(5, 3.0) if kind == "flow" else LEVELS
    table = solvers.euler_cfg_pp(levels, denoiser=denoiser)
    if eta:
        table = solvers.euler_ancestral_cfg_pp(levels, eta=eta, s_noise=0.9, denoiser=denoiser)
    inputs = play(table, guidance=CFG(0.6))
    states = [x / c for x, c in zip(inputs, [*table["c_in"], 1.0], strict=True)]
    for row, (x, z) in enumerate(zip(states[:-1], normals(len(table), 2), strict=True)):
        cond, uncond = normals(2, 11 + row)
        σ, σ_to = levels[row : row + 2]
        α, α_to = (1 - σ, 1 - σ_to) if kind == "flow" else (1.0, 1.0)
        guided = uncond + 0.6 * (cond - uncond)
        x0, u0 = (output if kind == "x0" else x - σ * output for output in (guided, uncond))
        up = eta * σ_to * math.sqrt(1 - (σ_to / σ) ** 2)
        want = α_to * x0 + math.sqrt(σ_to**2 - up**2) * (x - α * u0) / σ + 0.9 * up * z
        assert error(states[row + 1], want) < 1e-12  # measured: 6e-15


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_cfg_pp_is_eulers(prediction: str, eta: float) -> None:
    schedule = PROCESS.respace(6)
    levels = np.append(schedule.sqrt_recipm1_alphas_cumprod[::-1], 0.0)
    one = solvers.ddim_cfg_pp(schedule, eta=eta, prediction=prediction)
    other = solvers.euler_ancestral_cfg_pp(levels, eta=eta, denoiser=Denoiser(prediction, schedule=schedule))
    assert distance(one, other, guidance=CFG(0.6)) < 1e-11  # measured: 3e-14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solvers.unipc(LEVELS, order=4), "order: got 4, expected 1, 2 or 3"),
        (lambda: solvers.unipc(LEVELS, variant="vary"), "variant: got 'vary', expected one of bh1, bh2"),
        (lambda: solvers.sa_solver(LEVELS, predictor_order=4), "predictor_order, corrector_order: got 4, 2, expected"),
        (lambda: solvers.sa_solver(LEVELS, tau=[1.0, 1.0]), r"tau: got \[1. 1.\], expected one finite value of .* 7"),
        (lambda: solvers.lcm(PROCESS.respace(4), timestep_scaling=0), "timestep_scaling: got 0, expected"),
        (lambda: solvers.tcd(PROCESS, [999], gamma=1.5), "gamma: got 1.5, expected 0 to 1"),
        (lambda: solvers.tcd(PROCESS, [499, 999]), r"timesteps: got \[499, 999\], expected falling ones from 999 to 0"),
        (lambda: solvers.heun(LEVELS, s_tmin=2, s_tmax=1), "s_tmax: got 1, expected at least s_tmin 2"),
        (lambda: solvers.euler(LEVELS, denoiser=Denoiser("flow")), "sigmas: got up to 10, expected at most 1 with"),
        (lambda: solvers.euler_ancestral(sigmas.flow(4), denoiser=Denoiser("flow")), "'flow' for steps that add noise"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
