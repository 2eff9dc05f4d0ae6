"""Schedules: every recorded array of the originals, respacing in every spelling, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.golden_data import arrays, cases, schedule_of

from fastcfg.schedule import Schedule, betas_for_alpha_bar, legacy_betas, named_betas, space_timesteps

pytestmark = pytest.mark.quick

ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "exp(-5*t)": lambda t: math.exp(-5 * t),
    "1-t**2 (hits max_beta)": lambda t: 1 - t**2,
}


def recorded_schedule(case: dict[str, Any]) -> Schedule:
    if case["kind"] == "alpha_bar":
        return Schedule(betas_for_alpha_bar(case["T"], ALPHA_BARS[case["alpha_bar"]], case["max_beta"]))
    if case["kind"] == "legacy":
        options = {key: case[key] for key in ("beta_start", "beta_end")}
        return Schedule(legacy_betas(case["schedule"], num_timesteps=case["T"], **options))
    schedule = Schedule.named(case["schedule"], case["T"])
    if case["kind"] == "named":
        return schedule
    respacing = case["respacing"]
    return schedule.respace(respacing if isinstance(respacing, str) else space_timesteps(case["T"], respacing))


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in cases("schedules")])
def test_arrays_are_the_originals(case: dict[str, Any]) -> None:
    schedule = recorded_schedule(case)
    for name in case["arrays"]:
        got, want = getattr(schedule, name), arrays("schedules")[f"{case['id']}/{name}"]
        assert got.dtype == want.dtype
        if name.startswith(("log_", "posterior_log_")):
            # numpy's float64 log differs by 1 ulp between AVX-512 and AVX2 in up to 3 entries of an array.
            assert (np.abs(got - want) <= 2 * np.spacing(np.abs(want))).all(), name
            assert (got.astype(np.float32) == want.astype(np.float32)).all(), name
        else:
            assert np.array_equal(got, want), name


def test_the_recorded_tables_include_every_array() -> None:
    seen = {name for case in cases("schedules") for name in case["arrays"]}
    public = {name for name in dir(Schedule) if name.split("_")[0] in ("alphas", "sqrt", "log", "posterior")}
    assert public <= seen


@pytest.mark.parametrize("stem", ["p_mean_variance_gd", "p_mean_variance_glide"])
def test_model_timesteps_are_the_originals(stem: str) -> None:
    for case in cases(stem):
        steps = schedule_of(case).model_timesteps(case["rescale_timesteps"])
        assert steps.dtype == np.float64
        assert steps[case["t"]].tolist() == case["model_timesteps"]


@pytest.mark.parametrize("row", cases("schedule_errors"), ids=lambda row: f"{row['schedule']}-{row['T']}")
def test_what_the_originals_refuse(row: dict[str, Any]) -> None:
    def build() -> Schedule:
        schedule = Schedule.named(row["schedule"], row["T"])
        return schedule.respace(row["respacing"]) if row["respacing"] else schedule

    if row["ok"]:
        schedule = build()
        assert [name for name in row["non_finite_tables"] if np.isfinite(getattr(schedule, name)).all()] == []
    elif row["error"] == "IndexError":
        # The originals cannot clip the log variance of a process of one step; here it is β_0.
        schedule = build()
        assert schedule.posterior_log_variance_clipped == np.log(schedule.betas)
        assert schedule.fixed_large_variance == schedule.betas
    elif row["schedule"] in ("cosine", "squaredcos_cap_v2"):
        # Each of the originals knows only one of the two names of this schedule.
        assert np.array_equal(build().betas, named_betas("cosine", row["T"]))
    else:
        with pytest.raises(ValueError, match=r"num_timesteps: .* at least 20|name: unknown beta schedule 'nosuch'"):
            build()


@pytest.mark.parametrize(
    "row", cases("space_timesteps"), ids=lambda row: f"{row['num_timesteps']}-{row['section_counts']}"
)
def test_space_timesteps_is_the_originals(row: dict[str, Any]) -> None:
    want = row.get("both", row.get("glide"))
    if isinstance(want, dict):
        with pytest.raises(ValueError, match="section_counts"):
            space_timesteps(row["num_timesteps"], row["section_counts"])
    else:
        kept = space_timesteps(row["num_timesteps"], row["section_counts"])
        assert isinstance(kept, set)
        assert sorted(kept) == want


def test_posterior_is_the_product_of_likelihood_and_prior() -> None:
    schedule = Schedule.named("linear", 100)
    β, ᾱ_prev = schedule.betas[1:], schedule.alphas_cumprod[:-1]
    precision = (1 - β) / β + 1 / (1 - ᾱ_prev)
    for got, want in (
        (schedule.posterior_variance, 1 / precision),
        (schedule.posterior_mean_coef1, np.sqrt(ᾱ_prev) / (1 - ᾱ_prev) / precision),
        (schedule.posterior_mean_coef2, np.sqrt(1 - β) / β / precision),
    ):
        # Measured: 3e-15.
        np.testing.assert_allclose(got[1:], want, rtol=1e-13)
    assert (schedule.posterior_variance[0], schedule.posterior_mean_coef2[0]) == (0, 0)
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1, rel=1e-14)


def test_fixed_large_variance_is_beta_but_for_the_last_step() -> None:
    schedule = Schedule.named("linear", 100)
    assert schedule.fixed_large_variance[0] == schedule.posterior_variance[1]
    assert np.array_equal(schedule.fixed_large_variance[1:], schedule.betas[1:])


def test_scaled_linear_spans_stable_diffusions_noise_levels() -> None:
    schedule = Schedule.named("scaled_linear", 1000)
    sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1)
    assert schedule.betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    # sigma_min and sigma_max of Stable Diffusion 1 as samplers in sigma space quote them.
    assert sigmas[[0, -1]] == pytest.approx([0.0292, 14.6146], abs=1e-4)


def test_respacing_keeps_alphas_cumprod() -> None:
    schedule = Schedule.named("squaredcos_cap_v2", 1000)
    short = schedule.respace("10,15,20")
    assert short.num_timesteps == 45
    assert short.original_num_timesteps == 1000
    # Measured: 1.1e-19.
    np.testing.assert_allclose(short.alphas_cumprod, schedule.alphas_cumprod[short.timestep_map], rtol=0, atol=1e-16)


def test_respacing_twice_refers_to_the_original_process() -> None:
    twice = Schedule.named("linear", 1000).respace("100").respace("ddim10")
    once = Schedule.named("linear", 1000).respace(sorted(space_timesteps(1000, "100"))[::10])
    assert np.array_equal(twice.timestep_map, once.timestep_map)
    assert twice.original_num_timesteps == 1000
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-14)
    assert twice.model_timesteps(rescale=True).tolist() == once.timestep_map.tolist()


def test_respacing_takes_counts_and_collections() -> None:
    schedule = Schedule.named("linear", 200)
    assert np.array_equal(schedule.respace(50).timestep_map, schedule.respace("50").timestep_map)
    assert schedule.respace({7, 3, 199}).timestep_map.tolist() == [3, 7, 199]
    assert np.array_equal(schedule.respace(range(200)).timestep_map, schedule.timestep_map)


@pytest.mark.parametrize("timesteps", ["0", [], {-1, 5}, [100]])
def test_respacing_to_nothing_or_outside_is_refused(timesteps: Any) -> None:
    with pytest.raises(ValueError, match=r"timesteps: got .*, expected at least one in 0 \.\.\. 99"):
        Schedule.named("linear", 100).respace(timesteps)


def test_model_timesteps_rescale_to_a_thousand() -> None:
    schedule = Schedule.named("linear", 50).respace([0, 10, 49])
    assert schedule.model_timesteps().tolist() == [0, 10, 49]
    assert schedule.model_timesteps(rescale=True).tolist() == [0, 200, 980]


def test_a_schedule_owns_its_betas() -> None:
    betas = np.full(4, 0.1)
    schedule = Schedule(betas)
    betas[:] = 0.5
    assert schedule.betas.tolist() == [0.1] * 4


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], r"betas: got shape \(0,\)"),
        ([[0.1]], r"betas: got shape \(1, 1\)"),
        ([0.1, 0.0], r"betas: got values in \[0, 0.1\], expected \(0, 1\]"),
        ([0.1, 1.5], r"betas: got values in \[0.1, 1.5\], expected \(0, 1\]"),
        ([0.1, math.nan], r"betas: got values in \[nan, nan\]"),
    ],
)
def test_bad_betas_are_refused(betas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(np.array(betas))


def test_a_timestep_map_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timestep_map: got shape \(3,\), expected \(2,\)"):
        Schedule(np.array([0.1, 0.2]), np.arange(3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: named_betas("linear", 0),
        lambda: betas_for_alpha_bar(0, lambda t: 1 - t),
        lambda: legacy_betas("quad", beta_start=0.1, beta_end=0.2, num_timesteps=-1),
    ],
)
def test_no_timesteps_are_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"num_timesteps: got .*, expected an integer of at least 1"):
        build()


def test_an_unknown_legacy_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="name: unknown beta schedule 'cosine', expected one of quad, linear"):
        legacy_betas("cosine", beta_start=0.1, beta_end=0.2, num_timesteps=4)


def test_the_repr_is_short() -> None:
    assert repr(Schedule.named("linear").respace(50)) == "Schedule(50 of 1000 timesteps, betas 0.0001 to 0.33)"
