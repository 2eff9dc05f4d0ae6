"""Numbers of numpy and 0-d tensors are taken wherever a number is, and are the same as Python's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastcfg
from fastcfg import (
    APG,
    CFG,
    ByRow,
    DynamicThreshold,
    Sampler,
    SamplerConfig,
    Schedule,
    StepTable,
    guidance,
    schedule,
    sigmas,
    solvers,
)
from fastcfg.guidance import Guidance
from fastcfg.guidance.places import plan_for
from fastcfg.solvers import Denoiser, by_name
from fastcfg.solvers.ddim import ddim
from fastcfg.utils.identity import Alike

pytestmark = pytest.mark.quick

SCHEDULE = Schedule.named("linear", 100).respace(8)
LEVELS = sigmas.karras(6, 0.1, 8.0)

# Every number is exact in each of these types.
KINDS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda value: np.float32(value) if isinstance(value, float) else np.int64(value),
    "small numpy": lambda value: np.float16(value) if isinstance(value, float) else np.int16(value),
    "array": np.array,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64),
}

# Values other than the defaults, by parameter.
NUMBERS: dict[str, int | float] = {
    "eta": 0.5,
    "s_churn": 1.5,
    "s_tmin": 0.25,
    "s_tmax": 4.0,
    "s_noise": 0.75,
    "order": 2,
    "gamma": 0.5,
    "tau": 0.5,
    "predictor_order": 2,
    "corrector_order": 1,
    "timestep_scaling": 8.0,
    "step_size": 0.25,
    "steps_per_level": 2,
    "timestep": 3,
    "num_steps": 4,
    "corrector_steps": 2,
    "sigma_data": 0.75,
    "scale": 2.5,
    "rescale": 0.25,
    "momentum": -0.5,
    "norm_threshold": 2.5,
    "threshold": 0.75,
    "quantile": 0.75,
    "floor": 1.5,
    "ceiling": 2.5,
}


def solver_cases() -> list[tuple[str, str]]:
    return [
        (name, parameter)
        for name in solvers.__all__
        for parameter in inspect.signature(getattr(solvers, name)).parameters
        if parameter in NUMBERS and name != "Denoiser"
    ]


def table(name: str, **options: Any) -> StepTable:
    build = getattr(solvers, name)
    first = next(iter(inspect.signature(build).parameters))
    given = {"sigmas": LEVELS, "schedule": SCHEDULE}.get(first)
    if name == "predictor_corrector":
        return build(ddim(SCHEDULE), SCHEDULE, **options)
    if name == "tcd":
        return build(SCHEDULE, [7, 4, 2], **options)
    if name == "sgld":
        options = {"timestep": 2, "num_steps": 3, **options}
    return build(given, **options)


@pytest.mark.parametrize(("name", "parameter"), solver_cases())
def test_solvers(name: str, parameter: str) -> None:
    value = NUMBERS[parameter]
    want = table(name, **{parameter: value})
    for kind, convert in KINDS.items():
        got = table(name, **{parameter: convert(value)})
        assert (got.rows == want.rows).all(), kind
        assert (got.levels == want.levels).all()
        assert got.initial_scale == want.initial_scale


def spec_cases() -> list[tuple[str, str]]:
    found = []
    for name in sorted({*guidance.__all__} - {"GramGuidance"}):
        spec = getattr(guidance, name)
        if isinstance(spec, type) and issubclass(spec, Guidance) and "scale" in inspect.signature(spec).parameters:
            found += [
                (name, parameter)
                for parameter in inspect.signature(spec).parameters
                if parameter in NUMBERS.keys() - {"order"}
            ]
    return found


@pytest.mark.parametrize(("name", "parameter"), spec_cases())
def test_guidance(name: str, parameter: str) -> None:
    build, value = getattr(guidance, name), NUMBERS[parameter]
    want = build(**{parameter: value})
    steps = ddim(SCHEDULE)
    for convert in KINDS.values():
        got = build(**{parameter: convert(value)})
        if parameter != "scale":
            assert getattr(got, parameter) == getattr(want, parameter)
            assert type(getattr(got, parameter)) in (int, float)
        assert (got.plan(steps, 2).weights == want.plan(steps, 2).weights).all()
        assert Alike(got.mixer()) == Alike(want.mixer())


def test_intervals() -> None:
    for convert in KINDS.values():
        spec = CFG(2.0, interval=(convert(0.25), convert(0.75)))
        assert spec.interval == (0.25, 0.75)
    assert CFG(2.0, interval=np.array([0.25, 0.75])).interval == (0.25, 0.75)
    for bad in (np.nan, "0.5", None, True):
        with pytest.raises(ValueError, match="interval: got"):
            CFG(2.0, interval=(0.0, bad))
    for bad in (True, "1", None, np.nan, torch.tensor([0.5, 0.5]), 0.5j):
        with pytest.raises(ValueError, match="rescale: got"):
            APG(2.0, rescale=bad)


@pytest.mark.parametrize(
    "value",
    [
        lambda n: Schedule.named("cosine", n(10)).betas,
        lambda n: SCHEDULE.respace(n(4)).betas,
        lambda n: SCHEDULE.respace([n(0), n(4), n(7)]).betas,
        lambda n: Schedule.named("linear", 100).respace({3, 50}).betas,
        lambda n: schedule.betas_for_alpha_bar(n(5), lambda t: 1 - t / 2, n(0.5)),
        lambda n: sorted(schedule.space_timesteps(n(100), [n(2), n(3)])),
        lambda n: schedule.consistency_timesteps(n(4), n(1000), n(50)),
        lambda n: schedule.legacy_betas("quad", beta_start=n(0.25), beta_end=n(0.5), num_timesteps=n(4)),
        lambda n: sigmas.karras(n(4), n(0.5), n(8.0), n(3.0)),
        lambda n: sigmas.exponential(n(4), n(0.5), n(8.0)),
        lambda n: sigmas.polyexponential(n(4), n(0.5), n(8.0), n(2.0)),
        lambda n: sigmas.beta(n(4), n(0.5), n(8.0), n(0.5), n(0.75)),
        lambda n: sigmas.flow(n(4), n(3.0)),
        lambda n: sigmas.align_your_steps(n(4)),
        lambda n: sigmas.from_schedule(SCHEDULE, n(4), "trailing")[0],
        lambda n: solvers.euler([n(4.0), n(2.0), n(0.5)]).rows,
        lambda n: solvers.tcd(SCHEDULE, [n(7), n(2)]).rows,
        lambda n: solvers.heun(LEVELS, denoiser=Denoiser("edm", sigma_data=n(0.75))).rows,
        lambda n: by_name.solver_table("dpmpp_2m", Schedule.named("linear", 100), n(5)).rows,
        lambda n: by_name.solver_table("ddim", Schedule.named("linear", 100), n(5), eta=n(0.5)).rows,
        lambda n: by_name.solver_table("prk", Schedule.named("linear", 100), n(5)).rows,
        lambda n: StepTable.from_columns(t=[n(3), n(1)], a_0=n(0.5), initial_scale=n(2.0)).rows,
        lambda n: StepTable.from_columns(t=[n(3), n(1)], a_0=n(0.5), initial_scale=n(2.0)).initial_scale,
        lambda n: DynamicThreshold(n(0.75), n(1.5), n(2.5)).rank(n(100)),
        lambda n: fastcfg.ClassifierFree(abs, n(2.5), n(3)).guidance_scale,
        lambda n: SamplerConfig(rows_per_graph=n(2)).rows_per_graph,
    ],
)  # fmt: skip
def test_everything_else(value: Callable[..., Any]) -> None:
    want = value(lambda number: number)
    for convert in KINDS.values():
        assert np.array_equal(np.asarray(value(convert)), np.asarray(want))


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 * x


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_a_run(kind: str) -> None:
    n, seen = KINDS[kind], []
    one = Sampler(model, ddim(SCHEDULE, eta=0.5), clip=1.0, graph=False)
    image = torch.ones(2, 3, 4, 4)
    want = one.sample((2, 3, 4, 4), init=image, strength=0.5, seed=3, stop=7)
    got = one.sample(
        (n(2), n(3), n(4), n(4)), init=image, strength=n(0.5), seed=n(3), stop=n(7), clip=n(1.0),
        preview=seen.append, preview_every=n(2),
    )  # fmt: skip
    assert torch.equal(got, want)
    assert [preview.row for preview in seen] == [4, 6]
    assert torch.equal(one.sample((2, 3, 4, 4), init=image, start=n(4), stop=n(7), seed=[n(3), n(4)]), want)
    assert torch.equal(one.sample((2, 3, 4, 4), init=image, start=4, stop=7, seed=3, clip=[n(1.0), n(1.0)]), want)
    diffusion = fastcfg.frontends.guided_diffusion.create_gaussian_diffusion(steps=50, timestep_respacing="6")
    arguments = {"device": "cpu", "seed": 1}
    want = diffusion.ddim_sample_loop(model, (2, 3, 4, 4), eta=0.5, skip_timesteps=2, **arguments)
    got = diffusion.ddim_sample_loop(model, (2, 3, 4, 4), eta=n(0.5), skip_timesteps=n(2), device="cpu", seed=n(1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [np.float32, np.float16, lambda value: torch.tensor(value, dtype=torch.float32)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.7, 0.9])
def test_shares_of_the_steps_are_the_same_in_any_precision(share: float, kind: Any) -> None:
    table, image = solvers.ddim(Schedule.named("linear", 100).respace(10)), torch.zeros(1, 1, 4, 4)
    given = kind(share)
    assert ByRow(0, 1, progress=given).indices(table) == ByRow(0, 1, progress=share).indices(table)
    assert CFG(2.0, interval=(0.0, given)) == CFG(2.0, interval=(0.0, share))
    sampler = Sampler(lambda x, t: x, table, graph=False)
    began = [sampler.export(image.shape, stop=10, seed=0, init=image, strength=one).began for one in (share, given)]
    assert began[0] == began[1]


def test_scales_are_taken_in_bfloat16() -> None:
    table = solvers.ddim(Schedule.named("linear", 100).respace(3))
    scales = torch.tensor([2.0, 3.5])
    for given in (scales, scales[0], scales.view(2, 1, 1)):
        narrow, wide = (
            plan_for(CFG(one), table, (2, 2, 4)).weights for one in (given.bfloat16().requires_grad_(), given)
        )
        assert np.array_equal(narrow, wide)
