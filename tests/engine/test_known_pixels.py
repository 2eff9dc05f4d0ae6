"""Known pixels: inpainting, differential diffusion and RePaint as their published loops have them, written here on
stand-in models and diffusers' schedulers; kernel and reference; and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.captured_cases import SCHEDULE, SHAPE, build, conditioning, draw
from torch import Tensor

import fastcfg
from fastcfg import Sampler, Schedule, StepTable, differential, inpaint, reordered, repaint, repaint_order, solvers
from fastcfg.known_pixels import KeptImage, noise_pairs
from fastcfg.ops import triton_problem
from fastcfg.reference.philox import INITIAL_STREAM, STEP_STREAM, philox_normal, sample_seeds
from fastcfg.solvers.ddim import noise_split
from fastcfg.state_change import FRESH_STREAM

INTERPRETED = not triton_problem(torch.device("cpu"))
BACKENDS = ["reference", "triton"] if INTERPRETED else ["reference"]
BATCH = SHAPE[0]


def made(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGE = made(*SHAPE).clamp(-1, 1)
MASK = torch.tensor([1.0, 1.0, 0.25, 0.0]).expand(1, 1, 4, 4)


def eps(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a network, sensitive to its time."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -1)) + 1e-3 * t.view(-1, 1, 1, 1)


def normals(stream: int, row: int = 0, seed: int = 3) -> Tensor:
    return philox_normal(sample_seeds(seed, BATCH), SHAPE[1:], row=row, stream=stream)


def scheduler_and_table(kind: str, rows: int = 6) -> tuple[Any, Any, Any]:
    """A scheduler of diffusers, and the same method here with its levels."""
    diffusers = pytest.importorskip("diffusers")
    options = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = Schedule.named("scaled_linear")
    if kind == "ddim":
        made_of = diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
        made_of.set_timesteps(rows)
        levels = schedule.respace(np.flip(np.asarray(made_of.timesteps)))
        return made_of, solvers.ddim(levels), levels
    if kind == "euler":
        made_of = diffusers.EulerDiscreteScheduler(**options, timestep_spacing="trailing")
    elif kind == "dpmpp_2m":
        made_of = diffusers.DPMSolverMultistepScheduler(**options, timestep_spacing="trailing")
    else:
        made_of = diffusers.FlowMatchEulerDiscreteScheduler()
    table = fastcfg.compiler.compile_scheduler(made_of, rows)
    made_of.set_timesteps(rows)
    σ = made_of.sigmas.double().numpy()
    if kind == "euler":
        return made_of, table, σ
    a = 1 - σ if kind == "flow" else 1 / np.sqrt(1 + σ**2)
    return made_of, table, np.stack([a, σ if kind == "flow" else σ * a], axis=1)


def noised(scheduler: Any, image: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    times = timestep.repeat(len(image))
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(image, times, noise)
    return scheduler.add_noise(image, noise, times)


def stepped(scheduler: Any, t: Tensor, latents: Tensor) -> Tensor:
    scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
    return scheduler.step(eps(scaled, t.expand(len(latents)).float()), t, latents).prev_sample


def inpainted(scheduler: Any, latents: Tensor, noise: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The loop of StableDiffusionInpaintPipeline for a network with 4 input channels."""
    for i, t in enumerate(scheduler.timesteps):
        latents = stepped(scheduler, t, latents)
        known = image
        if i < len(scheduler.timesteps) - 1:
            known = noised(scheduler, image, noise, scheduler.timesteps[i + 1 : i + 2])
        latents = (1 - mask) * known + mask * latents
    return latents


def differential_loop(scheduler: Any, noise: Tensor, image: Tensor, keep: Tensor) -> Tensor:
    """The loop of the authors' pipelines."""
    steps = len(scheduler.timesteps)
    thresholds = torch.arange(steps, dtype=keep.dtype) / steps
    masks = [(keep > threshold).to(image.dtype) for threshold in thresholds]
    originals = [noised(scheduler, image, noise, t[None]) for t in scheduler.timesteps]
    latents = originals[0]
    for i, t in enumerate(scheduler.timesteps):
        if i > 0:
            latents = originals[i] * masks[i] + latents * (1 - masks[i])
        latents = stepped(scheduler, t, latents)
    return latents


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["ddim", "euler", "dpmpp_2m", "flow"])
def test_inpainting_is_that_of_diffusers(kind: str, graph: bool) -> None:
    scheduler, table, levels = scheduler_and_table(kind)
    noise = normals(INITIAL_STREAM)
    start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    want = inpainted(scheduler, start, noise, IMAGE, MASK)
    sampler = Sampler(eps, table, state_fn=inpaint(MASK, IMAGE, levels), graph=graph)
    got = sampler.sample(SHAPE, seed=3, cond={})
    # Measured: 2.3e-6 at most; the states reach 20.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got[..., 3], IMAGE[..., 3])


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpmpp_2m", "flow"])
def test_a_mask_of_ones_is_img2img_of_diffusers(kind: str) -> None:
    scheduler, table, levels = scheduler_and_table(kind)
    noise = normals(INITIAL_STREAM)
    start = noised(scheduler, IMAGE, noise, scheduler.timesteps[:1])
    want = inpainted(scheduler, start, noise, IMAGE, torch.ones(1, 1, 1, 1))
    sampler = Sampler(eps, table)
    plain = sampler.sample(SHAPE, seed=3, cond={}, x_T=start)
    got = sampler.sample(SHAPE, seed=3, cond={}, x_T=start, state_fn=inpaint(torch.ones(1, 1, 1, 1), IMAGE, levels))
    assert torch.equal(got, plain)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    none = differential(torch.zeros(1, 1, 4, 4), IMAGE, levels)
    # Measured: 1.2e-5 where the state is 30.
    torch.testing.assert_close(sampler.sample(SHAPE, seed=3, cond={}, state_fn=none), want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["ddim", "euler", "dpmpp_2m", "flow"])
def test_differential_diffusion_is_the_authors(kind: str, graph: bool) -> None:
    scheduler, table, levels = scheduler_and_table(kind)
    keep = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    keep.view(-1)[5] = 2 / 6  # on a threshold, exactly
    want = differential_loop(scheduler, normals(INITIAL_STREAM), IMAGE, keep)
    got = Sampler(eps, table, graph=graph).sample(SHAPE, seed=3, cond={}, state_fn=differential(keep, IMAGE, levels))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def repaint_loop(schedule: Schedule, times: list[int], draw: Any, learned: bool) -> Tensor:
    """The authors' `p_sample_loop_progressive` with jumps: times end with -1. `draw(what, row)` are its normals."""
    x, row, started = draw("start", 0), 0, False
    betas, ᾱ = torch.from_numpy(schedule.betas), torch.from_numpy(schedule.alphas_cumprod)
    log_var = torch.from_numpy(schedule.posterior_log_variance_clipped)
    for last, now in pairwise(times):
        if now > last:
            beta = betas[last + 1]
            x = (1 - beta).sqrt() * x + beta.sqrt() * draw("undo", (row - 1, last))
            continue
        if started:
            known = ᾱ[last].sqrt() * IMAGE.double() + (1 - ᾱ[last]).sqrt() * draw("known", row)
            x = (1 - MASK) * known + MASK * x
        time = torch.tensor(float(schedule.timestep_map[last])).expand(BATCH)
        m = eps(x, time)
        x0 = ((x - (1 - ᾱ[last]).sqrt() * m) / ᾱ[last].sqrt()).clamp(-1, 1)
        mean = schedule.posterior_mean_coef1[last] * x0 + schedule.posterior_mean_coef2[last] * x
        log_variance = log_var[last]
        if learned:
            share = (torch.sin(3 * x) + 1) / 2
            log_variance = share * betas[last].log() + (1 - share) * log_var[last]
        x = mean + (last != 0) * torch.exp(0.5 * log_variance) * draw("step", row)
        started, row = True, row + 1
    return x


@pytest.mark.parametrize("learned", [False, True])
def test_repaint_is_the_authors(learned: bool) -> None:
    schedule = Schedule.named("linear").respace(8)
    times, left = [], {0: 2, 3: 2}
    t = 8
    while t >= 1:  # get_schedule_jump with jump_length 3 and jump_n_sample 3
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(3):
                t += 1
                times.append(t)
    order = repaint_order(8, 3, 3)
    executed = [7 - last for last, now in zip(times, [*times[1:], -1], strict=True) if now < last]
    assert order == executed
    assert len(order) == 8 + 3 * 4
    betas, ᾱ = schedule.betas, schedule.alphas_cumprod

    def draw(what: str, place: Any) -> Tensor:
        if what == "start":
            return normals(INITIAL_STREAM).double()
        if what == "undo":
            return made(*SHAPE, seed=1000 * place[0] + place[1]).double()
        return normals({"known": FRESH_STREAM, "step": STEP_STREAM}[what], place).double()

    def renoise(row: int, shape: tuple[int, ...]) -> Tensor:
        """The normals of single steps of noise as those of the jump."""
        total, first = torch.zeros(shape, dtype=torch.float64), 7 - order[row - 1]
        for last in range(first - 1, first + 2):
            total = np.sqrt(1 - betas[last + 1]) * total + np.sqrt(betas[last + 1]) * draw("undo", (row - 1, last))
        return total / np.sqrt(1 - ᾱ[first + 2] / ᾱ[first - 1])

    def jumps_only(row: int, shape: tuple[int, ...]) -> Tensor:
        jumped = row > 0 and order[row] <= order[row - 1]
        return renoise(row, shape) if jumped else torch.full(shape, 9.0)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([eps(x, t), torch.sin(3 * x)], dim=1) if learned else eps(x, t)

    variance = "learned_range" if learned else "fixed_small"
    table = reordered(solvers.ddpm(schedule, variance=variance), order)
    state_fn = repaint(MASK, IMAGE, order, schedule, renoise=jumps_only)
    options: dict[str, Any] = {"clip": 1.0, "state_dtype": torch.float64, "dtype": torch.float64}
    got = Sampler(model, table, state_fn=state_fn, **options).sample(SHAPE, seed=3, cond={})
    want = repaint_loop(schedule, [*times, -1], draw, learned)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    # And in float32, captured. Measured: 8e-7.
    narrow = Sampler(model, table, state_fn=state_fn, clip=1.0, graph=True).sample(SHAPE, seed=3, cond={})
    torch.testing.assert_close(narrow.double(), want, rtol=0, atol=1e-5)


def test_repaint_leaves_the_first_row_alone() -> None:
    """Which hardly shows in the samples: what is known replaces it."""
    order, table = repaint_order(5, 2, 2), solvers.ddpm(SCHEDULE, variance="fixed_small")
    sampler = Sampler(eps, reordered(table, order))
    first, second = (
        [step.x for step in sampler.iterate(SHAPE, seed=3, cond={}, state_fn=change)]
        for change in (None, repaint(MASK, IMAGE, order))
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_repaint_is_that_of_diffusers() -> None:
    """Known pixels after the step, with its noise, then single steps of noise back."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=8, beta_start=1e-3, beta_end=0.2, eta=1.0)
    scheduler.set_timesteps(8, jump_length=3, jump_n_sample=2)
    schedule = Schedule(scheduler.betas.double().numpy())
    times, draws = scheduler.timesteps.tolist(), torch.Generator().manual_seed(5)
    keep = 1 - MASK.expand(SHAPE)
    x, order, steps, undone = normals(INITIAL_STREAM), [], [], {}
    last = times[0] + 1
    for t in times:
        before = draws.get_state()
        if t < last:
            x = scheduler.step(eps(x, torch.full((BATCH,), float(t))), t, x, IMAGE, keep, draws).prev_sample
            order.append(7 - t)
        else:
            x = scheduler.undo_step(x, last, draws)
        drawn = torch.randn(SHAPE, generator=torch.Generator().set_state(before))
        if t < last:
            steps.append(drawn)
        else:
            undone.setdefault(len(order) - 1, []).append((last, drawn))
        last = t

    def renoise(row: int, shape: tuple[int, ...]) -> Tensor:
        total, kept = torch.zeros(shape), 1.0
        for time, z in undone.get(row, []):
            beta = float(scheduler.betas[time])
            total, kept = (1 - beta) ** 0.5 * total + beta**0.5 * z, kept * (1 - beta)
        return total / max(1 - kept, 1e-9) ** 0.5

    # Its ε is the model's, beside a clipped x0.
    σ, direction = (values[::-1] for values in noise_split(schedule, 1.0))
    ᾱ, ᾱ_prev = schedule.alphas_cumprod[::-1], schedule.alphas_cumprod_prev[::-1]
    columns = {"p_x": 1 / np.sqrt(ᾱ), "p_m": -np.sqrt(1 / ᾱ - 1), "a_0": np.sqrt(ᾱ_prev), "a_m": direction, "s": σ}
    table = reordered(StepTable.from_columns(t=np.arange(8)[::-1], **columns), order)
    pixels = KeptImage(IMAGE, keep, noise_pairs(schedule), np.array(order), "after", noise="row", renoise=renoise)
    options: dict[str, Any] = {"cond": {}, "x_T": normals(INITIAL_STREAM), "noise": torch.stack(steps)}
    for graph in (False, True):
        got = Sampler(eps, table, clip=1.0, graph=graph).sample(SHAPE, **options, state_fn=pixels)
        torch.testing.assert_close(got, x, rtol=0, atol=1e-5)
    assert len(undone) == 2


@pytest.mark.parametrize(
    ("noise", "when"),
    [
        ("fixed", "after"),
        ("fresh", "before"),
        ("row", "after"),
        ("row", "before"),
        ("given", "before"),
        ("drawn", "after"),
    ],
)
def test_kernel_reference_and_replay_agree(noise: str, when: str) -> None:
    schedule = SCHEDULE
    order = [0, 1, 2, 1, 2, 3, 4]
    source: Any = {"given": made(1, *SHAPE[1:]), "drawn": lambda row, shape: made(*shape, seed=row)}.get(noise, noise)
    hard = when == "before"
    hold = torch.rand(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = KeptImage(
        IMAGE[:1],
        hold,
        noise_pairs(schedule),
        np.array(order),
        when,
        hard,
        noise=source,
        renoise=source if noise == "drawn" else None,
    )
    table = reordered(solvers.ddim(schedule, eta=0.7), order)
    runs = []
    for backend, graph, rows in (("reference", False, 1), ("reference", True, 3), (BACKENDS[-1], True, 1)):
        sampler = Sampler(eps, table, backend=backend, graph=graph, rows_per_graph=rows, clip=1.0)
        runs.append(sampler.sample(SHAPE, seed=3, cond={}, state_fn=pixels))
        assert sampler.report()["copies"] == 2 * (noise == "drawn")
    assert all(torch.equal(run, runs[0]) for run in runs)
    by_torch = Sampler(eps, table, noise_source="torch", clip=1.0)
    if noise in ("drawn",):
        assert by_torch.sample(SHAPE, seed=3, cond={}, state_fn=pixels).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"state_fn .*in a run without seeds"):
            by_torch.sample(SHAPE, seed=3, cond={}, state_fn=pixels)


def test_the_noise_of_the_row_is_torchs_where_the_steps_is() -> None:
    sampler = build(table="ddim eta x0", graph=True)[0]
    seen: list[Tensor] = []
    pixels = inpaint(torch.zeros(1, 1, 4, 4), torch.zeros(SHAPE), SCHEDULE, noise="row")
    run = sampler.start(SHAPE, branches=conditioning(sampler.guidance), seed=1, state_fn=pixels)
    for row in run.rows():
        seen.append(run.step(row).x)
    drawn = torch.Generator().manual_seed(1)
    draws = [torch.randn(SHAPE, generator=drawn) for _ in range(6)][1:]
    for row, x in enumerate(seen):
        torch.testing.assert_close(x, draws[row] * float(noise_pairs(SCHEDULE)[row + 1, 1]), rtol=1e-6, atol=0)


def test_another_mask_and_image_need_no_capture() -> None:
    sampler, _ = build(noise_source="philox")
    first = draw(sampler, state_fn=inpaint(MASK, IMAGE, SCHEDULE))
    other = draw(sampler, state_fn=inpaint(1 - MASK, -IMAGE, SCHEDULE))
    assert sampler.report()["captures"] == 1
    assert sampler.report()["programs"][0]["passes"] == 2
    assert torch.equal(
        other, draw(build(noise_source="philox", graph=False)[0], state_fn=inpaint(1 - MASK, -IMAGE, SCHEDULE))
    )
    assert torch.equal(draw(sampler, state_fn=inpaint(MASK, IMAGE, SCHEDULE)), first)


@pytest.mark.parametrize("table", ["ddpm learned_range", "ddim", "plms", "history", "prk"])
def test_ones_change_no_bit_and_zeros_give_the_image(table: str) -> None:
    fused = {"backend": "triton", "memory_format": torch.channels_last, "graph": False}
    for options in ({}, fused) if INTERPRETED and table == "history" else ({},):
        sampler = build(table=table, noise_source="philox", **options)[0]
        pairs = np.linspace([0.1, 1.0], [1.0, 0.0], len(sampler.table) + 1)
        plain = draw(sampler)
        assert torch.equal(draw(sampler, state_fn=inpaint(torch.ones(1, 1, 4, 4), IMAGE, pairs)), plain)
        assert torch.equal(draw(sampler, state_fn=inpaint(torch.zeros(1, 1, 4, 4), IMAGE, pairs)), IMAGE)
        before = inpaint(torch.ones(1, 1, 4, 4), IMAGE, pairs, when="before")
        assert torch.equal(draw(sampler, state_fn=before), plain)


def test_an_image_alone_is_the_image_in_a_batch() -> None:
    sampler = Sampler(eps, solvers.ddim(SCHEDULE, eta=0.5))
    pixels = inpaint(MASK, IMAGE, SCHEDULE, noise="fresh")
    alone = inpaint(MASK, IMAGE[1:], SCHEDULE, noise="fresh")
    whole = sampler.sample(SHAPE, seed=[3, 9], cond={}, state_fn=pixels)
    assert torch.equal(sampler.sample((1, *SHAPE[1:]), seed=[9], cond={}, state_fn=alone), whole[1:])


def test_levels_are_those_of_the_schedule() -> None:
    pairs = noise_pairs(SCHEDULE)
    np.testing.assert_allclose(pairs[:-1, 0] ** 2, SCHEDULE.alphas_cumprod[::-1])
    np.testing.assert_allclose((pairs**2).sum(axis=1), 1)
    assert pairs[-1].tolist() == [1, 0]
    assert noise_pairs([4.0, 2.0, 0.0]).tolist() == [[1, 4], [1, 2], [1, 0]]
    assert noise_pairs(torch.tensor([[0.2, 0.8], [1.0, 0.0]], dtype=torch.float64)).tolist() == [[0.2, 0.8], [1, 0]]


def test_orders_have_the_jumps_of_the_paper() -> None:
    order = repaint_order(250)
    assert len(order) == 250 + 10 * 9 * 24  # 24 places, from each of which there are 9 jumps
    assert order[:10] == list(range(10))
    assert repaint_order(20, jump_samples=1) == list(range(20))


ONES = torch.ones(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: inpaint(2 * ONES, IMAGE, SCHEDULE), ValueError, "hold: got values from -1 to -1, expected 0 to 1"),
        (lambda: inpaint(ONES, "cat.png", SCHEDULE), TypeError, "image: got str, expected a floating tensor"),
        (lambda: inpaint("mask.png", IMAGE, SCHEDULE), TypeError, "mask: got str, expected a tensor"),
        (
            lambda: inpaint(ONES, IMAGE, SCHEDULE, when="on"),
            ValueError,
            "when: got 'on', expected one of before, after",
        ),
        (lambda: inpaint(ONES, IMAGE, SCHEDULE, noise="own"), ValueError, "noise: got 'own', expected one of fixed"),
        (lambda: inpaint(ONES, IMAGE, SCHEDULE, noise=3), TypeError, "noise: got int, expected a name, a tensor or"),
        (lambda: inpaint(ONES, IMAGE, [[1.0]]), ValueError, r"levels: got shape \(1, 1\), expected a Schedule"),
        (lambda: inpaint(ONES, IMAGE, [1.0, float("nan")]), ValueError, "levels: got values that are not finite"),
        (
            lambda: repaint(ONES, IMAGE, [0, 1, 2, 3, 4, 5], SCHEDULE),
            ValueError,
            r"order: got \[0, 1, 2, 3, 4, 5\], expected rows below 5",
        ),
        (lambda: repaint(ONES, IMAGE, [0, 2], SCHEDULE), ValueError, "expected no row to be left out"),
        (lambda: repaint(ONES, IMAGE, [0], renoise=3), TypeError, "renoise: got int, expected a function"),
        (lambda: reordered(solvers.plms(SCHEDULE), [0, 1]), ValueError, "table: got plms with 3 saved tensors"),
        (
            lambda: reordered(solvers.ddim(SCHEDULE), [5]),
            ValueError,
            r"order: got \[5\], expected rows of the table, 0",
        ),
        (lambda: repaint_order(0), ValueError, "num_rows: got 0, expected an integer of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_brownian_noise_of_a_row_is_refused_where_rows_add_none() -> None:
    table = solvers.dpmpp_2s_ancestral([14.0, 4.0, 1.0, 0.3, 0.0])
    sampler = Sampler(lambda x, t: torch.tanh(x), table, noise_source="brownian", graph=False)
    with pytest.raises(
        ValueError, match="state_fn noise: got 'row' with Brownian noise and rows of dpmpp_2s_ancestral"
    ):
        sampler.sample(IMAGE.shape, seed=0, state_fn=inpaint(ONES, IMAGE, noise="row"))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (inpaint(ONES, IMAGE, [3.0, 1.0, 0.0]), "state_fn: got levels of 2 rows, expected the 5 of ddim"),
        (inpaint(ONES, IMAGE[:, :2], SCHEDULE), r"state_fn image: got shape \(2, 2, 4, 4\), expected \(2, 3, 4, 4\)"),
        (inpaint(ONES[0], IMAGE, SCHEDULE), r"state_fn hold: got shape \(1, 4, 4\), expected"),
        (inpaint(ONES, IMAGE, SCHEDULE, noise=made(3)), r"state_fn noise: got shape \(3,\), expected"),
        (inpaint(ONES, IMAGE, SCHEDULE, noise=lambda row, shape: made(3)), r"state_fn noise\(0\): got shape \(3,\)"),
        (inpaint(ONES, IMAGE, SCHEDULE, noise="fresh"), "state_fn noise: got 'fresh' in a run without seeds"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(pixels: KeptImage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(build()[0], state_fn=pixels)


@pytest.mark.parametrize("table", ["ddpm fixed_small", "ddim", "plms"])
def test_levels_are_the_tables_unless_they_are_given(table: str) -> None:
    sampler = build(table=table, noise_source="philox")[0]
    given = draw(sampler, state_fn=inpaint(MASK, IMAGE, SCHEDULE))
    assert torch.equal(draw(sampler, state_fn=inpaint(MASK, IMAGE)), given)
    keep = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    given = draw(sampler, state_fn=differential(keep, IMAGE, SCHEDULE))
    assert torch.equal(draw(sampler, state_fn=differential(keep, IMAGE)), given)
    with pytest.raises(ValueError, match="state_fn: got no levels with the table table, which has none"):
        draw(build(table="history")[0], state_fn=inpaint(MASK, IMAGE))


def test_a_reordered_table_has_the_levels_of_its_rows() -> None:
    order, table = repaint_order(5, 2, 2), solvers.ddpm(SCHEDULE, variance="fixed_small")
    sampler = Sampler(eps, reordered(table, order), clip=1.0)
    given = sampler.sample(SHAPE, seed=3, cond={}, state_fn=repaint(MASK, IMAGE, order, SCHEDULE))
    assert torch.equal(sampler.sample(SHAPE, seed=3, cond={}, state_fn=repaint(MASK, IMAGE, order)), given)
    assert sampler.table.levels is not None
    np.testing.assert_array_equal(sampler.table.levels[:-1], noise_pairs(SCHEDULE)[order])
    assert sampler.table.levels[-1].tolist() == [1, 0]


@pytest.mark.parametrize("table", ["ddim", "ddpm learned_range"])
@pytest.mark.parametrize("noise", ["fixed", "fresh", "row"])
def test_two_parts_are_one_piece_and_an_image_may_be_the_start(table: str, noise: str) -> None:
    sampler = build(table=table, noise_source="philox")[0]
    pixels = inpaint(MASK, IMAGE, noise=noise)
    whole, branches = draw(sampler, state_fn=pixels), conditioning(sampler.guidance)
    state = sampler.export(SHAPE, branches=branches, seed=1, stop=3, state_fn=pixels)
    again = sampler.resume(state, branches=branches, state_fn=pixels)
    assert torch.equal(again, whole)
    ones = inpaint(torch.ones(1, 1, 4, 4), IMAGE, noise=noise)
    started = {"init": IMAGE, "strength": 0.6}
    assert torch.equal(draw(sampler, state_fn=ones, **started), draw(sampler, **started))
    with pytest.raises(ValueError, match="state_fn: got a function before rows in a resumed run"):
        sampler.resume(state, branches=branches, state_fn=fastcfg.StateFunction(lambda x, x0, row: x, "before"))


def test_vectors_too() -> None:
    image = made(2, 7)
    mask = (torch.arange(7) > 2).float().view(1, 7)
    table = solvers.ddpm(SCHEDULE, variance="fixed_small")
    for options in ({"backend": backend} for backend in BACKENDS):
        sampler = Sampler(lambda x, t: torch.tanh(x), table, check_finite="raise", **options)
        found: Any = sampler.sample((2, 7), cond={}, seed=3, state_fn=inpaint(mask, image))
        assert torch.equal(found[:, :3], image[:, :3])
        drawn: Any = sampler.sample((2, 7), cond={}, seed=3, log_prob=True)
        z = philox_normal(sample_seeds(3, 2), (7,), row=0).double()
        want = torch.distributions.Normal(0.0, table["s"][0]).log_prob(z * table["s"][0]).sum(1)
        torch.testing.assert_close(drawn.log_prob[0], want, rtol=1e-6, atol=1e-6)
