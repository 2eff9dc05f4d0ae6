"""Log-probabilities of a run's draws and their recomputation: against torch.distributions on the same numbers, against
the formulas of DDPO and Flow-GRPO, by backend, captured and eager; and that noise is a function of seed and row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.captured_cases import SCHEDULE, SHAPE, TABLES, Model, build, conditioning, draw
from support.pairwise import pairwise
from torch import Tensor
from torch.distributions import Normal

import fastcfg
from fastcfg import CFG, DynamicThreshold, Sampler, StepTable, Trajectory, solvers
from fastcfg.ops import triton_problem
from fastcfg.reference.log_prob import stochastic_rows
from fastcfg.reference.philox import philox_normal, sample_seeds
from fastcfg.table import NO_NOISE

INTERPRETED = not triton_problem(torch.device("cpu"))
COUNT = 3 * 4 * 4
HEUN = solvers.heun([14.6, 4.0, 1.2, 0.0], s_churn=1.0)
SDE = solvers.dpmpp_2m_sde([14.6, 4.0, 1.2, 0.4, 0.0])
TABLES = TABLES | {"heun": HEUN, "dpmpp_2m_sde": SDE}


def sampler_of(name: str, **options: Any) -> Sampler:
    table = TABLES[name]
    given: dict[str, Any] = {"guidance": CFG(3.0), "clip": 1.0, "graph": False, **options}
    return Sampler(Model(table.learned_variance, given.get("dtype", torch.float32)), table, **given)


def draws(sampler: Sampler, **options: Any) -> Trajectory:
    found: Any = draw(sampler, log_prob=True, **options)
    assert isinstance(found, Trajectory)
    return found


def outputs_of(sampler: Sampler, states: Tensor) -> list[Tensor]:
    """The guided outputs at a run's states, with the conditional branch's variance channels."""
    branches = conditioning(sampler.guidance)
    found = []
    for row, x in enumerate(states[:-1]):
        t = torch.full((len(x),), float(sampler.table["t"][row])).to(
            torch.int64 if sampler.table.integer_time else x.dtype
        )
        model_x = x * float(sampler.table["c_in"][row])
        cond, uncond = (sampler.model(model_x, t, **branches[name]) for name in ("cond", "uncond"))
        m = uncond[:, :3] + 3.0 * (cond[:, :3] - uncond[:, :3])
        found.append(torch.cat([m, cond[:, 3:]], dim=1))
    return found


def mean_and_std(table: StepTable, row: int, x: Tensor, output: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """By the table's equation, in float64."""
    c = {name: float(table[name][row]) for name in fastcfg.table.COLUMNS}
    x, m, v = x.double(), output[:, :3].double(), output[:, 3:].double()
    x0 = (c["p_x"] * x + c["p_m"] * m).clamp(-clip, clip)
    std = torch.exp2(c["l_0"] + c["l_v"] * v) if table.learned_variance else torch.full_like(x, c["s"])
    return c["a_x"] * x + c["a_0"] * x0 + c["a_m"] * m, std


CASES = pairwise(
    {
        "table": ["ddpm learned_range", "ddpm learned", "ddpm fixed_small", "ddim eta x0", "sgld", "heun"],
        "backend": ["reference", "triton"] if INTERPRETED else ["reference"],
        "noise_source": ["philox", "torch"],
        "graph": [False, True],
        "dtype": [torch.float32, torch.float16],
        "rows_per_graph": [1, 2],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(str(value) for value in case.values()))
def test_a_runs_are_those_of_its_normals(case: dict[str, Any]) -> None:
    options = {name: value for name, value in case.items() if name != "table"}
    sampler = sampler_of(case["table"], **options)
    table, found = sampler.table, draws(sampler)
    assert torch.equal(found.samples, draw(sampler))
    noisy = np.flatnonzero(table["l_0"] > NO_NOISE) if table.learned_variance else np.flatnonzero(table["s"])
    assert found.rows == tuple(noisy)
    assert found.log_prob is not None
    assert found.log_prob.shape == (len(noisy), 2)
    assert found.log_prob.dtype == torch.float64
    # The normals again, and the variance channels as the model gave them.
    seen: list[Tensor] = []

    def spying(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(sampler.model(x, t, y))
        return seen[-1]

    again = Sampler(spying, table, **{"guidance": CFG(3.0), "clip": 1.0, **options, "graph": False})
    draw(again)
    generator = torch.Generator().manual_seed(1)
    torch.randn(SHAPE, generator=generator)
    for row in range(len(table)):
        z = philox_normal(sample_seeds(1, 2), SHAPE[1:], row=row)
        if case["noise_source"] == "torch":
            z = torch.randn(SHAPE, generator=generator)
        if row not in found.rows:
            continue
        std = torch.tensor(table["s"][row])
        if table.learned_variance:
            v = seen[-len(table) :][row][:2, 3:].double()
            std = torch.exp2(table["l_0"][row] + table["l_v"][row] * v)
        want = Normal(0.0, std.expand(SHAPE)).log_prob(std * z.double()).flatten(1).sum(1)
        got = found.log_prob[found.rows.index(row)]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # 2.4e-6 at most


@pytest.mark.parametrize("table", ["ddpm learned_range", "ddpm fixed_large v", "ddim eta x0"])
def test_states_and_outputs_give_them_again(table: str) -> None:
    sampler = sampler_of(table, state_dtype=torch.float64, dtype=torch.float64)
    sampler.model.double()
    found = draws(sampler, trajectory=True, branches=conditioning(sampler.guidance, torch.float64))
    assert found.states is not None
    assert found.log_prob is not None
    assert found.states.shape == (len(sampler.table) + 1, *SHAPE)
    assert torch.equal(found.states[-1], found.samples)
    outputs = outputs_of(sampler, found.states)
    for place, row in enumerate(found.rows):
        x, x_next = found.states[row], found.states[row + 1]
        again = fastcfg.log_prob(sampler.table, row, x, outputs[row], x_next, clip=1.0)
        mean, std = mean_and_std(sampler.table, row, x, outputs[row], 1.0)
        want = Normal(mean, std).log_prob(x_next).flatten(1).sum(1)
        torch.testing.assert_close(again, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.log_prob[place], want, rtol=1e-12, atol=1e-12)


def test_float32_states_and_outputs_give_them_again() -> None:
    for table in ("ddpm fixed_small", "ddpm learned_range"):
        sampler = sampler_of(table)
        found = draws(sampler, trajectory=True)
        assert found.states is not None
        assert found.log_prob is not None
        for place, row in enumerate(found.rows):
            output = outputs_of(sampler, found.states)[row]
            again = fastcfg.log_prob(sampler.table, row, found.states[row], output, found.states[row + 1], clip=1.0)
            # States are rounded to 6e-8 of their size, and z by that over the std. Measured: 6e-7.
            torch.testing.assert_close(again, found.log_prob[place], rtol=0, atol=2e-6 * COUNT)


def test_a_row_for_every_sample() -> None:
    table, rows = TABLES["ddpm learned_range"], [3, 1]
    x, output, x_next = torch.randn(SHAPE), torch.randn(2, 6, 4, 4), torch.randn(SHAPE)
    together = fastcfg.log_prob(table, torch.tensor(rows), x, output, x_next, clip=torch.tensor([0.5, 1.0]))
    alone = [
        fastcfg.log_prob(table, row, x[i : i + 1], output[i : i + 1], x_next[i : i + 1], clip=(0.5, 1.0)[i])
        for i, row in enumerate(rows)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ddpm learned_range", "ddim eta x0"])
def test_the_gradient_is_that_of_torchs_distributions(name: str) -> None:
    table = TABLES[name]
    generator = torch.Generator().manual_seed(0)
    channels = 6 if table.learned_variance else 3
    x, x_next = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    output = 0.3 * torch.randn(2, channels, 4, 4, generator=generator, dtype=torch.float64)
    gradients = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_(True) for tensor in (x, output, x_next)]
        if ours:
            value = fastcfg.log_prob(table, 1, leaves[0], leaves[1], leaves[2], clip=1.0)
        else:
            mean, std = mean_and_std(table, 1, leaves[0], leaves[1], 1.0)
            value = Normal(mean, std).log_prob(leaves[2]).flatten(1).sum(1)
        gradients.append(torch.autograd.grad(value.sum(), leaves))
    for got, want in zip(*gradients, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda m: fastcfg.log_prob(table, 1, x, m, x_next), output.requires_grad_(True))


def test_it_is_ddpos() -> None:
    """`ddim_step_with_logprob`, which takes the mean over a sample, for ε of diffusers' DDIM with eta 1."""
    table, row = solvers.ddim(SCHEDULE, eta=1.0), 2
    x, m, x_next = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    ᾱ, ᾱ_prev = SCHEDULE.alphas_cumprod[::-1][row], SCHEDULE.alphas_cumprod_prev[::-1][row]
    std = math.sqrt((1 - ᾱ_prev) / (1 - ᾱ) * (1 - ᾱ / ᾱ_prev))
    mean = math.sqrt(ᾱ_prev) * (x - math.sqrt(1 - ᾱ) * m) / math.sqrt(ᾱ) + math.sqrt(1 - ᾱ_prev - std**2) * m
    want = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    got = fastcfg.log_prob(table, row, x, m, x_next) / COUNT
    torch.testing.assert_close(got, want.mean(dim=(1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_it_is_flow_grpos() -> None:
    """`sde_step_with_logprob` of flow matching, as a table of four columns."""
    σ, level = np.array([0.95, 0.7, 0.4, 0.15, 0.0]), 0.7
    dt, at = np.diff(σ), σ[:-1]
    spread = np.sqrt(at / (1 - at)) * level
    pull = spread**2 / (2 * at)
    table = StepTable.from_columns(
        t=1000 * at, p_x=1, p_m=-at, a_x=1 + pull * dt, a_m=(1 + pull * (1 - at)) * dt, s=spread * np.sqrt(-dt),
        integer_time=False, name="flow_sde",
    )  # fmt: skip
    sampler = Sampler(lambda x, t: torch.tanh(x) * t.view(-1, 1, 1, 1) / 1000, table)
    found: Any = sampler.sample(SHAPE, cond={}, seed=5, log_prob=True, trajectory=True)
    assert found.rows == (0, 1, 2, 3)
    for row in found.rows:
        x, x_next = found.states[row].double(), found.states[row + 1].double()
        v = torch.tanh(x) * σ[row]
        std = spread[row]
        mean = x * (1 + std**2 / (2 * σ[row]) * dt[row]) + v * (1 + std**2 * (1 - σ[row]) / (2 * σ[row])) * dt[row]
        deviation = std * math.sqrt(-dt[row])
        want = -((x_next - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi))
        got = fastcfg.log_prob(table, row, found.states[row], v, found.states[row + 1]) / COUNT
        torch.testing.assert_close(got, want.mean(dim=(1, 2, 3)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.log_prob[row] / COUNT, got, rtol=0, atol=2e-6)


def test_saved_tensors_and_thresholds_are_taken() -> None:
    row = next(row for row in stochastic_rows(SDE) if SDE["a_h0"][row])
    x, m, h, x_next = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(4))
    c = {name: float(SDE[name][row]) for name in fastcfg.table.COLUMNS}
    x0 = c["p_x"] * x + c["p_m"] * m
    bound = x0.abs().flatten(1).quantile(0.9, dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
    x0 = x0.clamp(-bound, bound) / bound
    want = Normal(c["a_x"] * x + c["a_0"] * x0 + c["a_h0"] * h, c["s"]).log_prob(x_next).flatten(1).sum(1)
    got = fastcfg.log_prob(SDE, int(row), x, m, x_next, history=[h], clip=DynamicThreshold(0.9))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="history: got 0 tensors, expected the 1 of dpmpp_2m_sde"):
        fastcfg.log_prob(SDE, int(row), x, m, x_next)


def test_noise_is_a_function_of_seed_and_row() -> None:
    """The draw of a row, read off its states, in a batch and alone."""
    sampler = sampler_of("ddpm fixed_small", state_dtype=torch.float64, dtype=torch.float64)
    sampler.model.double()
    conditions = conditioning(sampler.guidance, torch.float64)
    found: Any = draw(sampler, seed=11, branches=conditions, trajectory=True)
    assert found.log_prob is None
    outputs = outputs_of(sampler, found.states)
    for row in found.rows:
        mean, std = mean_and_std(sampler.table, row, found.states[row], outputs[row], 1.0)
        z = (found.states[row + 1] - mean) / std
        torch.testing.assert_close(z.float(), philox_normal(sample_seeds(11, 2), SHAPE[1:], row=row), rtol=0, atol=1e-5)
    second = {name: {"y": value["y"][1:]} for name, value in conditions.items()}
    alone: Any = sampler.sample((1, *SHAPE[1:]), branches=second, seed=12, log_prob=True)
    both: Any = draw(sampler, seed=11, branches=conditions, log_prob=True)
    assert torch.equal(alone.log_prob[:, 0], both.log_prob[:, 1])


def test_functions_guidance_and_replay_agree() -> None:
    options: dict[str, Any] = {"denoised_fn": lambda x0: 0.5 * x0, "guidance": CFG(3.0, rescale=0.7)}
    for name in ("ddpm learned_range", "ddpm fixed_large v"):
        eager, captured = (draws(sampler_of(name, graph=graph, **options), trajectory=True) for graph in (False, True))
        for part in ("samples", "log_prob", "states"):
            assert torch.equal(getattr(eager, part), getattr(captured, part))


def test_it_costs_one_pass_and_nothing_where_it_is_not_asked_for() -> None:
    sampler = sampler_of("ddpm fixed_small", graph=True)
    draw(sampler)
    assert sampler.report()["programs"][0]["passes"] == 1
    draws(sampler)
    assert sampler.report()["programs"][0]["passes"] == 2
    draw(sampler)
    assert sampler.report()["captures"] == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {}, "log_prob: got True with the table ddim, whose rows add no noise, expected False"),
        ("ddpm fixed_small", {"state_fn": lambda x, x0, row: x}, "log_prob: got True with a state_fn, which moves"),
    ],
)
def test_runs_without_log_probabilities_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(build(table=name)[0], **options)


@pytest.mark.parametrize(
    ("row", "channels", "message"),
    [
        (4, 6, r"row: got 4, expected a row of ddpm that adds noise, or one per sample \(2\)"),
        (-1, 6, "row: got -1, expected a row of ddpm that adds noise"),
        ([0], 6, r"row: got \[0\], expected a row"),
        (0, 3, r"log_prob: got x \(2, 3, 4, 4\), output \(2, 3, 4, 4\), .* expected the output with 6 channels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(row: Any, channels: int, message: str) -> None:
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=message):
        fastcfg.log_prob(TABLES["ddpm learned_range"], row, x, torch.zeros(2, channels, 4, 4), x)
    with pytest.raises(ValueError, match="table: got table, which adds the unconditional output"):
        fastcfg.log_prob(TABLES["history"], 0, x, x, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": -1.0}, "clip: got -1.0, expected positive finite bounds"),
        ({"clip": float("nan")}, "clip: got nan"),
        ({"clip": torch.ones(3)}, "clip: got tensor"),
        ({"row": 1.5}, "row: got 1.5"),
    ],
    ids=str,
)
def test_bounds_and_rows_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    table, x = fastcfg.solvers.ddim(fastcfg.Schedule.named("linear").respace(4), eta=1.0), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        fastcfg.log_prob(table, options.pop("row", 0), x, x, x, **options)


def test_a_later_start_is_of_the_levels_that_were_given() -> None:
    levels = np.array([14.6, 4.0, 1.2, 0.4, 0.0])
    table, again = fastcfg.solvers.dpmpp_2m(levels), fastcfg.solvers.dpmpp_2m(levels.copy())
    levels *= 2
    assert np.array_equal(table.restarted(2).rows, again.restarted(2).rows)
