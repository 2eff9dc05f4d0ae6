"""Solvers in noise-level space: against k-diffusion's samplers in float64, and against exact flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import error
from torch import Tensor

from benchmarks.suite.foreign import load_diffusers, load_k_diffusion
from fastcfg import Sampler, Schedule, StepTable, sigmas, solvers
from fastcfg.schedule import consistency_timesteps
from fastcfg.solvers import Denoiser

SHAPE = (2, 3, 4, 4)
LEVELS = sigmas.karras(5, 0.1, 10.0)
PROCESS = Schedule.named("scaled_linear")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

diffusers: Any = load_diffusers()
needs_diffusers = pytest.mark.skipif(diffusers is None, reason="diffusers is not installed")
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")]
# k-diffusion's name, ours, and the options of both.
ANCESTRAL = [("euler_ancestral", "euler_ancestral"), ("dpm_2_ancestral", "dpm2_ancestral")]
ANCESTRAL += [("dpmpp_2s_ancestral", "dpmpp_2s_ancestral")]
NOISES = ({"eta": 0.0}, {"eta": 0.5, "s_noise": 0.9}, {"eta": 1.0})
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("euler", "euler", {}),
    ("heun", "heun", {}),
    ("dpm_2", "dpm2", {}),
    ("dpmpp_2m", "dpmpp_2m", {}),
    *[("lms", "lms", {"order": order}) for order in (1, 2, 3, 4)],
    *[(theirs, ours, noise) for theirs, ours in ANCESTRAL for noise in NOISES],
    *[("dpmpp_2m_sde", "dpmpp_2m_sde", {**n, "solver_type": kind}) for kind in ("midpoint", "heun") for n in NOISES],
    *[("dpmpp_3m_sde", "dpmpp_3m_sde", noise) for noise in NOISES],
]

WHOLE = {"lower_order_final": False}

Model = Callable[[Tensor, Tensor], Tensor]


def k_diffusion() -> tuple[Any, Any]:
    modules = load_k_diffusion()
    if modules is None:
        pytest.skip("k-diffusion cannot be imported")
    return modules


def smooth(x: Tensor, t: Tensor) -> Tensor:
    """A model without structure: bounded, nonlinear in x, and different at every time."""
    time = t.view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + 0.1 * time.abs())) + 0.5 * torch.sin(x.flip(1) + torch.log1p(time.abs()))


def normals(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(table: StepTable, model: Model, x_T: Tensor, clip: float | None = None) -> Tensor:
    """Our result in float64, where step i's noise is normals(i). The sampler's times are float32; the model is given
    the table's."""
    times = iter(table["t"])

    def exact_time(x: Tensor, t: Tensor) -> Tensor:
        exact = torch.full((len(x),), next(times), dtype=torch.float64)
        assert torch.equal(exact.float(), t)
        return model(x, exact)

    options: dict[str, Any] = {"dtype": torch.float64, "state_dtype": torch.float64, "graph": False}
    sampler = Sampler(exact_time, table, clip=clip, backend="reference", **options)
    return sampler.sample(x_T.shape, x_T=x_T, noise=lambda row, shape: normals(int(table.steps[row])))


def theirs(name: str, denoiser: Model, x_T: Tensor, levels: np.ndarray, options: dict[str, Any]) -> Tensor:
    """k-diffusion's result in float64, with the same noise."""
    sampling, _ = k_diffusion()
    σ = torch.from_numpy(levels)
    if "eta" in options:
        options = options | {"noise_sampler": lambda now, after: normals(σ.tolist().index(float(now)))}
    return getattr(sampling, f"sample_{name}")(denoiser, x_T, σ, disable=True, **options)


@pytest.mark.parametrize(("end", "clip"), [(0.0, None), (0.05, 0.6)])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(("name", "ours", "options"), METHODS)
def test_tables_are_k_diffusions_samplers(
    name: str, ours: str, options: dict[str, Any], steps: int, end: float, clip: float | None
) -> None:
    levels = np.append(sigmas.karras(steps, 0.3, 14.6)[:-1], end)
    x_T = 14.6 * normals(99)
    table = getattr(solvers, ours)(levels, **options)
    got = run(table, smooth, x_T, clip)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return smooth(x, t).clamp(-(clip or np.inf), clip or np.inf)

    if steps == 1 and end == 0 and "sde" in name:
        k_diffusion()
        want = denoiser(x_T, torch.full((2,), 14.6, dtype=torch.float64))  # where theirs raises UnboundLocalError
    else:
        want = theirs(name, denoiser, x_T, levels, options)
    assert table.num_steps == steps
    assert table.uses_noise == (options.get("eta", 0) > 0 and (steps > 1 or end > 0))
    # Measured: 2.3e-12, from the difference of squares in k-diffusion's sigma_down.
    assert error(got, want) < 1e-10


@pytest.mark.parametrize("kind", ["epsilon", "v", "edm"])
@pytest.mark.parametrize(("name", "ours"), [("heun", "heun"), ("dpm_2", "dpm2"), ("dpmpp_2m", "dpmpp_2m")])
def test_models_are_read_as_k_diffusion_reads_them(name: str, ours: str, kind: str) -> None:
    external = k_diffusion()[1]
    # From above the process's noisiest level, where the time is clamped, to between its last two.
    levels = np.append(sigmas.karras(7, 0.035, 20.0)[:-1], 0.0)
    x_T = 20 * normals(7)
    if kind == "edm":
        described = Denoiser("edm", sigma_data=0.7)

        def denoiser(x: Tensor, σ: Tensor) -> Tensor:
            σ = σ.view(-1, 1, 1, 1)
            total = σ**2 + 0.7**2
            return 0.49 / total * x + 0.7 * σ / total**0.5 * smooth(x / total**0.5, σ.log() / 4)
    else:
        described = Denoiser(kind, schedule=PROCESS)
        wrapper = external.DiscreteEpsDDPMDenoiser if kind == "epsilon" else external.DiscreteVDDPMDenoiser
        denoiser = wrapper(smooth, torch.from_numpy(PROCESS.alphas_cumprod), quantize=False)
    got = run(getattr(solvers, ours)(levels, denoiser=described), smooth, x_T)
    # Measured: 4.6e-15.
    assert error(got, theirs(name, denoiser, x_T, levels, {})) < 1e-11


def test_a_respaced_process_gives_the_model_its_own_times() -> None:
    levels, timesteps = sigmas.from_schedule(PROCESS.respace(10), 10)
    table = solvers.euler(levels, denoiser=Denoiser("epsilon", schedule=PROCESS.respace(10)))
    np.testing.assert_allclose(table["t"], timesteps, rtol=1e-12)
    assert timesteps.tolist() == sorted(PROCESS.respace(10).timestep_map.tolist(), reverse=True)


def slope(build: Callable[..., StepTable], options: dict[str, Any]) -> float:
    """The order at which the error of data N(0.3, 0.5²) vanishes, whose denoiser and flow are known: from 64 and 128
    steps."""
    mean, std = 0.3, 0.5

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        σ = t.view(-1, 1, 1, 1)
        return (std**2 * x + σ**2 * mean) / (std**2 + σ**2)

    errors = []
    for steps in (64, 128):
        levels = sigmas.karras(steps + 1, 0.2, 10.0)[:-1]
        x_T = torch.full((1, 1, 1, 1), 20.0, dtype=torch.float64)
        exact = mean + (x_T - mean) * ((std**2 + levels[-1] ** 2) / (std**2 + levels[0] ** 2)) ** 0.5
        errors.append(float((run(build(levels, **options), denoiser, x_T) - exact).abs()))
    return float(np.log2(errors[0] / errors[1]))


@pytest.mark.parametrize(
    ("build", "options", "order"),
    [
        (solvers.euler, {}, 1),  # measured: 0.99
        (solvers.euler_ancestral, {"eta": 0.0}, 1),  # 0.99
        (solvers.heun, {}, 2),  # 2.01
        (solvers.dpm2, {}, 2),  # 2.01
        (solvers.dpm2_ancestral, {"eta": 0.0}, 2),  # 2.01
        (solvers.dpmpp_2s_ancestral, {"eta": 0.0}, 2),  # 1.99
        (solvers.dpmpp_2m, {}, 2),  # 1.92
        (solvers.dpmpp_2m_sde, {"eta": 0.0}, 2),  # 1.92
        (solvers.dpmpp_2m_sde, {"eta": 0.0, "solver_type": "heun"}, 2),  # 1.97
        (solvers.dpmpp_3m_sde, {"eta": 0.0}, 2),  # 2.19: not third order, see its docstring
        (solvers.lms, {"order": 1}, 1),  # 0.99
        (solvers.lms, {"order": 2}, 2),  # 1.96
        (solvers.lms, {"order": 3}, 3),  # 2.91
        *[(solvers.deis, {"order": order, **WHOLE}, order) for order in (1, 2, 3)],  # 0.99, 2.01, 3.12
        # The corrector adds an order; with three x0 the first steps, of lower order, show.
        *[(solvers.unipc, {"order": p, "variant": v, **WHOLE}, p + 1) for p in (1, 2) for v in ("bh1", "bh2")],
        (solvers.unipc, {"order": 3, **WHOLE}, 3.6),  # 3.63; those above: 2.03, 2.00, 3.02, 2.98
        (solvers.unipc, {"order": 3}, 2),  # 2.02: what last steps of lower order cost, whatever the order
        (solvers.deis, {"order": 3}, 2),  # 1.99
        *[(solvers.sa_solver, {"predictor_order": 2, "tau": 0, "corrector_order": q, **WHOLE}, q) for q in (1, 2, 3)],
    ],
)
def test_errors_vanish_with_the_methods_order(
    build: Callable[..., StepTable], options: dict[str, Any], order: float
) -> None:
    assert abs(slope(build, options) - order) < 0.25


def test_a_run_starts_at_the_noisiest_level_and_counts_steps() -> None:
    for table in (solvers.euler(LEVELS), solvers.heun(LEVELS), solvers.lms(LEVELS)):
        assert table.initial_scale == LEVELS[0]
        assert not table.integer_time
        assert table.num_steps == 5
    assert solvers.heun(LEVELS).steps.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert solvers.heun(LEVELS[:-1]).steps.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("n", [1, 2, 700])
def test_noise_levels_are_k_diffusions(n: int) -> None:
    sampling, external = k_diffusion()
    ramp, spread = (n, 0.03, 14.6), {"rtol": 1e-5, "atol": 0.0}  # theirs are float32; measured: 1.8e-6
    np.testing.assert_allclose(sigmas.karras(*ramp), sampling.get_sigmas_karras(*ramp), **spread)
    np.testing.assert_allclose(sigmas.karras(*ramp, rho=3.0), sampling.get_sigmas_karras(*ramp, rho=3.0), **spread)
    np.testing.assert_allclose(sigmas.exponential(*ramp), sampling.get_sigmas_exponential(*ramp), **spread)
    want = sampling.get_sigmas_polyexponential(*ramp, rho=2.0)
    np.testing.assert_allclose(sigmas.polyexponential(*ramp, rho=2.0), want, **spread)
    process = external.DiscreteSchedule(torch.from_numpy(PROCESS.sqrt_recipm1_alphas_cumprod), quantize=False)
    levels, timesteps = sigmas.from_schedule(PROCESS, n)
    np.testing.assert_allclose(levels, process.get_sigmas(n), **spread)
    np.testing.assert_allclose(timesteps, process.sigma_to_t(process.get_sigmas(n)[:-1]), **spread | {"atol": 1e-3})


@needs_diffusers
@pytest.mark.parametrize("n", [1, 7, 20, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_spacings_are_diffusers(spacing: str, n: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    levels, timesteps = sigmas.from_schedule(PROCESS, n, spacing)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    # Measured: 1.3e-5, from betas in float32.
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=1e-4)


@needs_diffusers
def test_beta_is_scipys_and_diffusers() -> None:
    stats = pytest.importorskip("scipy.stats")
    for shape in ((0.6, 0.6), (1.0, 1.0), (0.5, 0.9), (2.0, 3.0), (10.0, 0.3), (0.05, 8.0)):
        want = stats.beta.ppf(1 - np.linspace(0, 1, 301), *shape)
        np.testing.assert_allclose(sigmas._beta_quantiles(1 - np.linspace(0, 1, 301), *shape), want, rtol=0, atol=1e-12)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_beta_sigmas=True)
    scheduler.set_timesteps(20)
    # Theirs are float32; measured: 1.4e-5, of betas in it.
    ends = sigmas.discrete_sigmas(PROCESS)[[0, -1]]
    np.testing.assert_allclose(sigmas.beta(20, *ends), scheduler.sigmas.numpy(), rtol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 20, 1000])
def test_spacings_are_comfys(n: int) -> None:
    known = sigmas.discrete_sigmas(PROCESS)
    levels, _ = sigmas.from_schedule(PROCESS, n, "simple")
    np.testing.assert_allclose(levels[:-1], [known[-(1 + int(i * (1000 / n)))] for i in range(n)], rtol=1e-12)
    levels, steps = sigmas.from_schedule(PROCESS, n, "sgm_uniform")
    np.testing.assert_allclose(steps, np.linspace(999, 0, n + 1)[:-1])
    np.testing.assert_allclose(levels[:-1], np.exp(np.interp(steps, np.arange(1000), np.log(known))), rtol=1e-12)
    stats = pytest.importorskip("scipy.stats")
    places = np.rint(stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6) * 999).tolist()
    levels, steps = sigmas.from_schedule(PROCESS, n, "beta")
    assert steps.tolist() == list(dict.fromkeys(places))  # each once
    np.testing.assert_allclose(levels[:-1], known[steps.astype(int)], rtol=1e-12)


@needs_diffusers
@pytest.mark.parametrize(("model", "name"), [("sd15", ""), ("sdxl", "XL"), ("svd", "Video")])
def test_align_your_steps(model: str, name: str) -> None:
    from diffusers.schedulers import AysSchedules

    published = AysSchedules[f"StableDiffusion{name}Sigmas"]
    np.testing.assert_allclose(sigmas.align_your_steps(10, model), published, rtol=1e-12)
    known = np.array(sigmas.ALIGN_YOUR_STEPS[model])[::-1]
    for n in (1, 7, 25):
        want = np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), np.log(known)))[::-1]
        np.testing.assert_allclose(sigmas.align_your_steps(n, model), np.append(want[:-1], 0.0), rtol=1e-12)


@needs_diffusers
@pytest.mark.parametrize("n", [1, 4, 28])
def test_flow_shifts_are_diffusers(n: int) -> None:
    even = np.linspace(1.0, 1 / n, n)
    mu = sigmas.flow_mu(1024)
    assert mu == pytest.approx(1024 * (m := (1.15 - 0.5) / (4096 - 256)) + 0.5 - m * 256)
    dynamic = {"use_dynamic_shifting": True}
    cases = [
        ({"shift": 3.0}, None, 3.0),
        (dynamic, mu, math.exp(mu)),
        (dynamic | {"time_shift_type": "linear"}, mu, mu),
    ]
    for config, given, shift in cases:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(sigmas=even, mu=given)
        # Theirs are float32; measured: 6.8e-8.
        np.testing.assert_allclose(sigmas.flow(n, shift), scheduler.sigmas.numpy(), rtol=1e-6)


@needs_diffusers
def test_zero_terminal_snr_is_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    rescaled = PROCESS.zero_terminal_snr()
    want = rescale_zero_terminal_snr(torch.from_numpy(PROCESS.betas.copy())).numpy()
    np.testing.assert_allclose(rescaled.betas, want, rtol=1e-9)  # measured: 3e-12
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(PROCESS.alphas_cumprod[0], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: solvers.euler([1.0]), ValueError, r"sigmas: got shape \(1,\), expected \[N \+ 1\] with N >= 1"),
        (lambda: solvers.heun([1.0, 1.0, 0.0]), ValueError, r"sigmas: got \[1.0, 1.0, 0.0\], expected finite values"),
        (lambda: solvers.lms([1.0, -1.0]), ValueError, "sigmas: got .*, the last at least 0"),
        (lambda: solvers.dpm2([np.inf, 1.0]), ValueError, r"sigmas: got \[inf, 1.0\]"),
        (lambda: solvers.dpmpp_2m(LEVELS, denoiser="v"), TypeError, "denoiser: got str, expected a Denoiser"),
        (lambda: solvers.euler_ancestral(LEVELS, eta=1.1), ValueError, "eta: got 1.1, expected 0 to 1"),
        (
            lambda: solvers.dpm2_ancestral(LEVELS, eta=-1),
            ValueError,
            "eta: got -1, expected a finite value of",
        ),
        (lambda: solvers.dpmpp_2m_sde(LEVELS, s_noise=-1), ValueError, "s_noise: got -1, expected a finite value"),
        (lambda: solvers.dpmpp_3m_sde(LEVELS, eta=np.nan), ValueError, "eta: got nan, expected a finite value"),
        (
            lambda: solvers.dpmpp_2m_sde(LEVELS, solver_type="x"),
            ValueError,
            "solver_type: got 'x', expected one of",
        ),
        (lambda: solvers.lms(LEVELS, order=5), ValueError, "order: got 5, expected 1, 2, 3 or 4"),
        (lambda: Denoiser("eps"), ValueError, "prediction: got 'eps', expected one of x0, epsilon, v, edm"),
        (lambda: Denoiser("v"), TypeError, "schedule: got NoneType, expected a Schedule"),
        (lambda: Denoiser("x0", PROCESS), ValueError, "schedule: got one, expected None with prediction 'x0'"),
        (lambda: Denoiser("v", Schedule.named("linear", 20)), ValueError, "schedule: alphas_cumprod reaches 0"),
        (lambda: Denoiser("edm", sigma_data=0), ValueError, "sigma_data: got 0, expected a finite value above 0"),
        (lambda: sigmas.karras(0, 0.1, 1.0), ValueError, "n: got 0, expected an integer of at least 1"),
        (
            lambda: sigmas.exponential(5, 2.0, 1.0),
            ValueError,
            "sigma_min, sigma_max: got 2.0, 1.0, expected 0 < ",
        ),
        (lambda: sigmas.polyexponential(5, 0.1, 1.0, 0), ValueError, "rho: got 0, expected a finite value above 0"),
        (lambda: sigmas.from_schedule(PROCESS, 1001), ValueError, "n: got 1001, expected an integer from 1 to 1000"),
        (
            lambda: sigmas.from_schedule(PROCESS, 5, "even"),
            ValueError,
            "spacing: got 'even', expected one of lin",
        ),
        (lambda: sigmas.beta(5, 0.1, 1.0, alpha=0), ValueError, r"alpha, beta: got 0, 0.6, expected values in \(0, 10"),
        (lambda: sigmas.align_your_steps(5, "sd3"), ValueError, "model: got 'sd3', expected one of sd15, sdxl, svd"),
        (lambda: sigmas.flow(5, shift=0), ValueError, "shift: got 0, expected a finite value above 0"),
        (lambda: Schedule(np.array([0.3])).zero_terminal_snr(), ValueError, "betas: got one timestep, expected at"),
        (lambda: consistency_timesteps(51), ValueError, "n: got 51, expected 1 <= n <= original_steps 50 <= 1000"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
