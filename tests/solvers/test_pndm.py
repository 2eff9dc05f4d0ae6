"""PRK and PLMS against the paper's formulas, against glide-finetune's recorded samplers, and against exact flows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import TOYS, cases, error, guided, schedule_of, tensor, toy_gradient
from support.mixture import Mixture
from torch import Tensor

from fastcfg import CFG, Sampler, Schedule, StepTable, solvers
from fastcfg.table import MAX_HISTORY

pytestmark = pytest.mark.quick

STEM = "finetune_samplers"
CASES = {case["id"]: case for case in cases(STEM)}
ADAMS_BASHFORTH = {1: [24], 2: [36, -12], 3: [46, -32, 10], 4: [55, -59, 37, -9]}


class PNDM:
    """The methods as the paper writes them, for tensors, arrays or whatever else can be added and scaled.

    `eps_of(x, t)` is the model; t may lie halfway between two timesteps. Each step gives the new x, the ε of its
    transfer, and the ε that later steps use.
    """

    def __init__(self, schedule: Schedule, eps_of: Callable[[Any, float], Any] = lambda x, t: x) -> None:
        self.schedule, self.eps_of = schedule, eps_of

    def ᾱ(self, t: float) -> float:
        steps = np.arange(-1, self.schedule.num_timesteps)
        return float(np.interp(t, steps, np.append(1.0, self.schedule.alphas_cumprod)))

    def x0(self, x: Any, eps: Any, t: float) -> Any:
        return (x - (1 - self.ᾱ(t)) ** 0.5 * eps) / self.ᾱ(t) ** 0.5

    def transfer(self, x: Any, eps: Any, t: float, to: float) -> Any:
        return self.ᾱ(to) ** 0.5 * self.x0(x, eps, t) + (1 - self.ᾱ(to)) ** 0.5 * eps

    def runge_kutta(self, x: Any, t: int) -> tuple[Any, Any, Any]:
        eps_1 = self.eps_of(x, t)
        eps_2 = self.eps_of(self.transfer(x, eps_1, t, t - 0.5), t - 0.5)
        eps_3 = self.eps_of(self.transfer(x, eps_2, t, t - 0.5), t - 0.5)
        eps_4 = self.eps_of(self.transfer(x, eps_3, t, t - 1), t - 1)
        eps = (eps_1 + 2 * eps_2 + 2 * eps_3 + eps_4) / 6
        return self.transfer(x, eps, t, t - 1), eps, eps

    def multistep(self, x: Any, t: int, old: list[Any], order: int = 4) -> tuple[Any, Any, Any]:
        eps = self.eps_of(x, t)
        newest_first = [eps, *old[::-1]][:order]
        weights = ADAMS_BASHFORTH[len(newest_first)]
        combined = sum(w * e for w, e in zip(weights, newest_first, strict=True)) / 24
        return self.transfer(x, combined, t, t - 1), combined, eps

    def prk(self, x: Any) -> Iterator[tuple[Any, Any, Any]]:
        for t in range(self.schedule.num_timesteps - 2, 0, -1):
            yield (step := self.runge_kutta(x, t))
            x = step[0]

    def plms(self, x: Any, order: int = 4) -> Iterator[tuple[Any, Any, Any]]:
        old: list[Any] = []
        for t in range(self.schedule.num_timesteps - 1, -1, -1):
            yield (step := self.multistep(x, t, old, order))
            x, old = step[0], [*old, step[2]]

    def warmed_up_plms(self, x: Any) -> Iterator[tuple[Any, Any, Any]]:
        """glide-finetune's loop: the paper's, from the second timestep to the last but one."""
        old: list[Any] = []
        for t in range(self.schedule.num_timesteps - 2, 0, -1):
            yield (step := self.runge_kutta(x, t) if len(old) < 3 else self.multistep(x, t, old))
            x, old = step[0], [*old, step[2]]


@pytest.mark.parametrize(
    ("method", "prediction"),
    # Between two timesteps there is no previous x.
    [*product(["prk", 1, 2, 3, 4], ["epsilon", "x0", "v"]), *product([1, 2, 3, 4], ["previous_x"])],
)
def test_tables_are_the_papers_methods(method: str | int, prediction: str) -> None:
    schedule = Schedule.named("linear", 500).respace(9)

    def eps_of(x: Tensor, t: float) -> Tensor:
        return torch.tanh(x + 0.1 * t) + 0.2 * x

    def model(x: Tensor, time: Tensor) -> Tensor:
        t = float(np.interp(time[0], schedule.model_timesteps(True), np.arange(9)))
        eps, ᾱ = eps_of(x, t), paper.ᾱ(t)
        x0 = paper.x0(x, eps, t)
        if prediction == "previous_x":
            return schedule.posterior_mean_coef1[round(t)] * x0 + schedule.posterior_mean_coef2[round(t)] * x
        return {"epsilon": eps, "x0": x0, "v": ᾱ**0.5 * eps - (1 - ᾱ) ** 0.5 * x0}[prediction]

    paper = PNDM(schedule, eps_of)
    x_T = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"prediction": prediction, "rescale_timesteps": True}
    if method == "prk":
        table, steps = solvers.prk(schedule, **options), list(paper.prk(x_T))
    else:
        table, steps = solvers.plms(schedule, order=int(method), **options), list(paper.plms(x_T, int(method)))
    sampler = Sampler(model, table, clip=1.0, backend="reference", dtype=torch.float64, state_dtype=torch.float64)
    run = {step.step: step.x for step in sampler.iterate(x_T.shape, x_T=x_T)}
    assert len(run) == len(steps) == table.num_steps
    for i, (want, _, _) in enumerate(steps):
        # Measured: 6.8e-15.
        assert error(run[i], want) < 1e-12


MIXTURE = Mixture(weights=(0.5, 0.3, 0.2), means=(-1.5, 0.5, 1.6), stds=(0.3, 0.4, 0.4), classes=(0, 0, 0))


@pytest.mark.parametrize(
    ("build", "gain"),
    [
        (solvers.ddim, 4),
        (lambda schedule: solvers.plms(schedule, order=1), 4),
        (lambda schedule: solvers.plms(schedule, order=2), 10),
        (lambda schedule: solvers.plms(schedule, order=3), 30),
        (solvers.plms, 70),
        (solvers.prk, 9),
        # Not a method of second order, nor of any: its x0 and its ε are of different times.
        (solvers.ddim_extrapolated, 1),
    ],
)
def test_four_times_the_steps_bring_the_exact_flow_nearer(build: Callable[[Schedule], StepTable], gain: float) -> None:
    def distance(steps: int) -> float:
        schedule = Schedule.named("cosine").respace(steps)
        table = build(schedule)
        x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)[None, None]

        def model(x: Tensor, t: Tensor) -> Tensor:
            return MIXTURE.eps(x, np.interp(float(t[0]), schedule.timestep_map, schedule.alphas_cumprod))

        y = Sampler(model, table, backend="reference", dtype=x.dtype, state_dtype=x.dtype).sample(x.shape, x_T=x)
        ᾱ = schedule.alphas_cumprod
        first, last = (ᾱ[-2], ᾱ[0]) if table.name == "prk" else (ᾱ[-1], 1.0)
        # The probability flow ODE keeps every point's quantile.
        return float((MIXTURE.cdf(y, last) - MIXTURE.cdf(x, first)).abs().mean())

    # Measured: 4.2, 4.2, 12.5, 36.6, 80, 11.1 and 1.06.
    assert gain <= distance(20) / distance(80) < 2 * gain


def saved_tensors_needed(schedule: Schedule, loop: Callable[[PNDM], Callable[..., Iterator[Any]]]) -> int:
    """How many tensors besides x any implementation of a loop must keep, at most, from one evaluation to the next.

    Every tensor of the loop is a combination of the start and of the model's outputs. What is needed of those already
    seen is the rank of their part in everything still to come: the model's later inputs and the sample.
    """
    size = 1 + 4 * schedule.num_timesteps
    inputs: list[Any] = []

    def eps_of(x: Any, t: float) -> Any:
        inputs.append(x)
        return np.eye(size)[len(inputs)]

    *_, (sample, _, _) = loop(PNDM(schedule, eps_of))(np.eye(size)[0])
    future = np.stack([*inputs, sample])
    return max(np.linalg.matrix_rank(future[seen:, : seen + 1], tol=1e-9) for seen in range(1, len(inputs) + 1)) - 1


@pytest.mark.parametrize("respacing", [8, 20])
def test_tables_save_as_little_as_can_be(respacing: int) -> None:
    schedule = Schedule.named("squaredcos_cap_v2").respace(respacing)
    assert saved_tensors_needed(schedule, lambda paper: paper.prk) == solvers.prk(schedule).num_history == 2
    for order in ADAMS_BASHFORTH:
        needed = saved_tensors_needed(schedule, lambda paper, order=order: lambda x: paper.plms(x, order))
        assert needed == solvers.plms(schedule, order=order).num_history == order - 1
    # No table has this many.
    assert saved_tensors_needed(schedule, lambda paper: paper.warmed_up_plms) == MAX_HISTORY + 1


def recorded_schedule() -> Schedule:
    return schedule_of(CASES["plms"])


def recorded_noise(row: int) -> Tensor:
    return tensor(STEM, "noise")[row]


def run_sampler(table: StepTable, x: Tensor, clip: float | None = 1.0, model: Any = TOYS["toy"]) -> list[Any]:
    """The steps of a guided run of the recorded pair of samples."""
    cond, uncond = tensor(STEM, "y").split(2)
    sampler = Sampler(model, table, guidance=CFG(3.0), clip=clip, backend="reference")
    run = sampler.iterate(
        (2, 3, 8, 8), cond={"y": cond}, uncond={"y": uncond}, x_T=x, noise=lambda row, _: recorded_noise(row)[:2]
    )
    return list(run)


LOOPS: dict[str, Callable[[Schedule], StepTable]] = {
    "p_sample": solvers.ddpm,
    "ddim_eta0": solvers.ddim,
    "ddim_eta05": lambda schedule: solvers.ddim(schedule, eta=0.5),
    "euler": solvers.ddim,
    "euler_a_eta0.5": lambda schedule: solvers.ddim(schedule, eta=0.5),
    "euler_a_eta1.0": lambda schedule: solvers.ddim(schedule, eta=1.0),
    "dpm_order1": solvers.ddim,
    "dpm_order2": solvers.ddim_extrapolated,
    "prk": solvers.prk,
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_sampler_runs_the_forks_loop(name: str) -> None:
    case = CASES[name]
    table = LOOPS[name](recorded_schedule())
    assert table["t"].tolist() == case["model_timesteps"]
    steps = run_sampler(table, tensor(STEM, "x_T")[:2], clip=1.0 if case["clip_denoised"] else None)
    # Measured: 3.4e-6 with the largest noise, whose scale the fork derives in float32, else 1.7e-6 and below.
    assert error(steps[-1].x, tensor(STEM, f"{name}/final")[:2]) < 2e-5


def recorded_paper(model: Callable[..., Tensor], y: Tensor, conditioned: bool = False) -> PNDM:
    """The formulas over a recorded case's model, and its classifier if it is `conditioned`."""
    schedule = recorded_schedule()

    def eps_of(x: Tensor, t: float) -> Tensor:
        time = np.interp(t, np.arange(schedule.num_timesteps), schedule.model_timesteps())
        eps = model(x, torch.full((len(x),), time, dtype=torch.float32), y)[:, :3]
        if conditioned:
            # The fork gives its classifier the index of the re-spaced step.
            eps = eps - (1 - paper.ᾱ(t)) ** 0.5 * toy_gradient(x, torch.full((len(x),), t), y)
        return eps

    paper = PNDM(schedule, eps_of)
    return paper


@pytest.mark.parametrize("name", ["plms", "plms_noclip", "plms_cond"])
def test_the_papers_loop_is_the_forks(name: str) -> None:
    # Measured: 1.5e-6.
    paper = recorded_paper(lambda x, t, y: guided(TOYS["toy"], 3.0)(x, t, y=y), tensor(STEM, "y"), name == "plms_cond")
    x = tensor(STEM, "x_T")
    for i, (sample, combined, eps) in enumerate(paper.warmed_up_plms(x)):
        if name == "plms" and i in CASES["plms_steps"]["steps_kept"]:
            x0 = paper.x0(x, combined if i < 3 else eps, 18 - i).clamp(-1, 1)
            for kind, got in (("sample", sample), ("pred_xstart", x0), ("eps", eps)):
                assert error(got, tensor(STEM, f"plms_step{i:03d}/{kind}")) < 1e-5
        x = sample
    assert error(x, tensor(STEM, f"{name}/final")) < 1e-5


def after_saved(table: StepTable, row: int) -> StepTable:
    """plms from a row on, behind three rows that only save an output each: the ε of the three rows before it."""
    saving = StepTable.from_columns(t=[0, 0, 0], a_x=1.0, k_m=1.0, slot=[(row - age) % 3 for age in (3, 2, 1)])
    return StepTable(np.concatenate([saving.rows, table.rows[row:]]))


def answering_first(outputs: list[Tensor], model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A model whose first answers, in every branch, are given."""
    given = list(outputs)

    def answer(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return given.pop(0).repeat(len(x) // len(outputs[0]), 1, 1, 1) if given else model(x, t, y)

    return answer


@pytest.mark.parametrize("name", ["plms", "plms_noclip"])
def test_two_tables_run_the_forks_plms(name: str) -> None:
    # The warm-up of three Runge-Kutta steps by one table, the multistep ones by another that is given their ε.
    schedule, clip = recorded_schedule(), 1.0 if CASES[name]["clip_denoised"] else None
    start = tensor(STEM, "x_T")[:2]
    warm_up = StepTable(solvers.prk(schedule).rows[:12], integer_time=False)
    samples = [start, *(step.x for step in run_sampler(warm_up, start, clip)[3::4])]
    old = []
    for t, (x, to) in zip((18, 17, 16), pairwise(samples), strict=True):
        # The transfer solved for its ε.
        A, B = (PNDM(schedule).transfer(*unit, t, t - 1) for unit in ((1.0, 0.0), (0.0, 1.0)))
        old.append(((to.double() - A * x.double()) / B).float())
    multistep = StepTable(after_saved(solvers.plms(schedule), 4).rows[:-1])
    steps = run_sampler(multistep, samples[-1], clip, answering_first(old, TOYS["toy"]))

    # Measured: 7.3e-7 for the samples, 1.8e-6 for x0.
    assert error(steps[-1].x, tensor(STEM, f"{name}/final")[:2]) < 1e-5
    for i in CASES["plms_steps"]["steps_kept"] if name == "plms" else ():
        got = samples[i + 1] if i < 3 else steps[i].x
        assert error(got, tensor(STEM, f"plms_step{i:03d}/sample")[:2]) < 1e-5
        if i >= 3:
            assert error(steps[i].x0, tensor(STEM, f"plms_step{i:03d}/pred_xstart")[:2]) < 2e-5


def recorded_step(name: str, sample: int) -> tuple[int, Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """t, x, y, the three ε before, and the answers of one sample of a recorded single step."""
    one = slice(sample, sample + 1)
    old = [eps[one] for eps in tensor(STEM, "step/old_eps")]
    answers = {kind: tensor(STEM, f"{name}/{kind}")[one] for kind in ("sample", "pred_xstart", "eps")}
    return int(tensor(STEM, "step/t")[sample]), tensor(STEM, "step/x")[one], tensor(STEM, "step/y")[one], old, answers


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("name", ["prk_sample", "plms_sample"])
def test_the_papers_step_is_the_forks(name: str, sample: int) -> None:
    t, x, y, old, want = recorded_step(name, sample)
    paper = recorded_paper(TOYS["toy"], y)
    got, _, eps = paper.runge_kutta(x, t) if name == "prk_sample" else paper.multistep(x, t, old)
    # Measured: 1.4e-7.
    assert error(got, want["sample"]) < 2e-6
    assert error(eps, want["eps"]) < 2e-6
    assert error(paper.x0(x, eps, t).clamp(-1, 1), want["pred_xstart"]) < 2e-6


# The other sample of the multistep case is at t = 18, where a run of 20 steps has seen but one ε.
@pytest.mark.parametrize(("name", "sample"), [("prk_sample", 0), ("prk_sample", 1), ("plms_sample", 1)])
def test_the_rows_of_a_step_are_the_forks(name: str, sample: int) -> None:
    schedule = recorded_schedule()
    t, x, y, old, want = recorded_step(name, sample)
    if name == "prk_sample":
        table = StepTable(solvers.prk(schedule).rows[4 * (18 - t) :][:4], integer_time=False)
        model = TOYS["toy"]
    else:
        table = StepTable(after_saved(solvers.plms(schedule), 19 - t).rows[:4])
        model = answering_first(old, TOYS["toy"])
    *_, last = Sampler(model, table, clip=1.0, backend="reference").iterate(x.shape, cond={"y": y}, x_T=x)
    # Measured: 3.0e-7.
    assert error(last.x, want["sample"]) < 5e-6
    if name == "plms_sample":
        assert error(last.x0, want["pred_xstart"]) < 5e-6


@pytest.mark.parametrize("length", [30, 1000])
def test_the_forks_extra_schedule_is_scaled_linear(length: int) -> None:
    recorded = tensor(STEM, f"betas_linear_latent_{length}/betas")
    assert torch.equal(torch.from_numpy(Schedule.named("scaled_linear", length).betas), recorded)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: solvers.plms(s, order=5), "order: got 5, expected one of 1, 2, 3, 4"),
        (
            lambda s: solvers.plms(s, prediction="eps"),
            "prediction: got 'eps', expected one of epsilon, x0, v, previous_x",
        ),
        (
            lambda s: solvers.prk(s, prediction="previous_x"),
            "prediction: got 'previous_x', expected one of epsilon, x0, v$",
        ),
        (lambda s: solvers.prk(s.respace(2)), "schedule: got 2 timesteps, expected at least 3"),
        (lambda s: solvers.ddim_extrapolated(s, prediction="flow"), "prediction: got 'flow', expected one of"),
    ],
)
def test_bad_options_are_refused(build: Callable[[Schedule], StepTable], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Schedule.named("linear", 1000).respace(10))


def test_a_run_shorter_than_the_order_is_of_the_order_it_can_have() -> None:
    schedule = Schedule.named("linear", 1000).respace(2)
    assert np.array_equal(solvers.plms(schedule).rows[0], solvers.plms(schedule, order=2).rows[0])
    assert not solvers.plms(schedule)["a_h1"].any()
