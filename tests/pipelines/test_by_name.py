"""Solvers, schedules and guidance by name, random seeds, copies of pipelines, and pictures for PIL."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_checkpoint import SIZE, TIMESTEPS, write_tiny_checkpoint
from support.tiny_glide import BASE, UPSAMPLER, words, write_network
from torch import Tensor

from fastcfg import APG, CFG, AdaptiveCFG, Compose, PerpNeg, Sampler, Schedule, sigmas, solvers
from fastcfg.guidance.by_name import METHODS, guidance_by_name
from fastcfg.pipelines.pictures import picture_seeds, to_bytes, to_pil
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.pipelines.upsampler import Upsampler
from fastcfg.solvers.by_name import LEVELS, SOLVERS, SPACINGS, solver_table

PROMPT, NEGATIVE = "a red circle", "a blue square"
PROCESS = Schedule.named("squaredcos_cap_v2", TIMESTEPS)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    return TextToImage.load(write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"))


def by_sampler(pipeline: TextToImage, table: solvers.StepTable, guidance: CFG, seeds: list[int]) -> Tensor:
    encoded = {"cond": pipeline._encode(pipeline._tokens("prompt", PROMPT)), "uncond": pipeline._encode([])}
    sampler = Sampler(pipeline.model, table, guidance=guidance, clip=1.0, memory_format=torch.channels_last)
    return sampler.sample((len(seeds), 3, SIZE, SIZE), **encoded, seed=seeds).clamp_(-1, 1)


def test_every_solver_of_the_package_has_a_name() -> None:
    run_other_ways = {"Denoiser", "ddim_reverse", "sgld"}
    assert set(SOLVERS) == set(solvers.__all__) - run_other_ways


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(pipeline: TextToImage, solver: str) -> None:
    image = pipeline.sample(PROMPT, solver=solver, steps=4, seed=1)
    assert image.shape == (1, 3, SIZE, SIZE)
    assert image.isfinite().all()
    assert image.std() > 0.02
    assert pipeline.report()["rows"] == len(solver_table(solver, PROCESS, 4))
    assert torch.equal(pipeline.sample(PROMPT, solver=solver, steps=4, seed=1), image)


@pytest.mark.parametrize("method", METHODS)
def test_every_guidance_draws(pipeline: TextToImage, method: str) -> None:
    options: dict[str, Any] = {"steps": 3, "seed": 1, "solver": "ddim", "guidance": method}
    if method == "perp_neg":
        options["negative_prompt"] = NEGATIVE
    image = pipeline.sample(PROMPT, **options)
    assert image.isfinite().all()
    assert image.std() > 0.02
    assert guidance_by_name(method, 2.0) is not None


def test_an_interval_by_name_is_the_specs(pipeline: TextToImage) -> None:
    options: dict[str, Any] = {"steps": 4, "seed": 0}
    image = pipeline.sample("a red circle", guidance_scale=2.0, guidance_interval=(0.0, 0.5), **options)
    assert pipeline.report()["branches"] == [2, 2, 1, 1]
    assert torch.equal(image, pipeline.sample("a red circle", guidance=CFG(2.0, interval=(0.0, 0.5)), **options))
    for guidance, message in (
        ("none", "interval: got .* with guidance 'none', expected None"),
        (CFG(2.0), "guidance_interval: got .* with a CFG, expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.check("a red circle", guidance=guidance, guidance_interval=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"interval: got .*, expected 0 <= start < stop <= 1"):
        pipeline.check("a red circle", guidance_interval=(0.5, 0.5))


@pytest.mark.quick
@pytest.mark.parametrize("schedule", [*LEVELS, *SPACINGS])
def test_every_schedule_gives_the_steps_wanted(schedule: str) -> None:
    assert solver_table("dpmpp_2m", PROCESS, 7, schedule).num_steps == 7
    if schedule in SPACINGS:
        assert solver_table("ddim", PROCESS, 7, schedule).num_steps == 7


@pytest.mark.quick
def test_names_are_the_tables_built_by_hand(pipeline: TextToImage) -> None:
    levels = sigmas.discrete_sigmas(PROCESS)
    karras = sigmas.karras(5, max(levels[0], 0.02), 80.0)
    denoiser = solvers.Denoiser("epsilon", schedule=PROCESS)
    expected = {
        ("dpmpp_2m", "karras"): solvers.dpmpp_2m(karras, denoiser=denoiser),
        ("unipc", None): solvers.unipc(karras, denoiser=denoiser),
        ("euler", "trailing"): solvers.euler(sigmas.from_schedule(PROCESS, 5, "trailing")[0], denoiser=denoiser),
        ("ddim", "leading"): solvers.ddim(PROCESS.respace({0, 20, 40, 60, 80})),
        ("ddim", None): solvers.ddim(PROCESS.respace(5)),
    }
    for (solver, schedule), table in expected.items():
        assert np.array_equal(solver_table(solver, PROCESS, 5, schedule).rows, table.rows)
        drawn = pipeline.sample(PROMPT, solver=solver, schedule=schedule, steps=5, guidance_scale=2.0, seed=[3])
        assert torch.equal(drawn, by_sampler(pipeline, table, CFG(2.0), [3]))


def test_a_guidance_of_your_own_is_the_named_one(pipeline: TextToImage) -> None:
    options: dict[str, Any] = {"steps": 3, "solver": "ddim", "seed": 2}
    named = pipeline.sample(PROMPT, guidance="apg", guidance_scale=4.0, **options)
    own = pipeline.sample(PROMPT, guidance=APG(4.0, eta=0.0, momentum=-0.5), **options)
    assert torch.equal(named, own)
    assert not torch.equal(named, pipeline.sample(PROMPT, guidance_scale=4.0, **options))
    # The negative prompt of perpendicular guidance has a branch of its own.
    away = pipeline.sample(PROMPT, guidance=PerpNeg(3.0), negative_prompt=NEGATIVE, **options)
    assert len(pipeline.report()["programs"][0]["branches"]) == 3
    assert not torch.equal(away, pipeline.sample(PROMPT, negative_prompt=NEGATIVE, **options))


@pytest.mark.quick
def test_eta_is_the_solvers_own_unless_given() -> None:
    for solver, noisy in (("ddim", False), ("euler_ancestral", True), ("dpmpp_2m_sde", True), ("tcd", True)):
        assert solver_table(solver, PROCESS, 4).uses_noise is noisy
        assert not solver_table(solver, PROCESS, 4, eta=0.0).uses_noise
        assert solver_table(solver, PROCESS, 4, eta=1.0).uses_noise


def test_the_old_keyword_is_an_alias(pipeline: TextToImage) -> None:
    new, old = (pipeline.sample(PROMPT, steps=2, seed=0, **{key: NEGATIVE}) for key in ("negative_prompt", "negative"))
    assert torch.equal(new, old)
    with pytest.raises(ValueError, match="negative: got 'a blue square' with negative_prompt, expected one of them"):
        pipeline.sample(PROMPT, negative_prompt=NEGATIVE, negative=NEGATIVE)


@pytest.mark.parametrize("seed", [None, -1])
def test_random_seeds_are_reported_and_draw_the_picture_again(pipeline: TextToImage, seed: int | None) -> None:
    image = pipeline.sample(PROMPT, steps=2, num_samples=2, seed=seed)
    seeds = pipeline.report()["seeds"]
    assert seeds[1] == seeds[0] + 1
    assert torch.equal(pipeline.sample(PROMPT, steps=2, num_samples=2, seed=seeds[0]), image)
    assert not torch.equal(pipeline.sample(PROMPT, steps=2, num_samples=2, seed=seed), image)
    torch.manual_seed(5)
    first = picture_seeds(seed, 1, 1)
    torch.manual_seed(5)
    assert picture_seeds(seed, 1, 1) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "dpm"}, "solver: got 'dpm', expected one of ddpm, ddim"),
        ({"schedule": "karras"}, "schedule: got 'karras' with solver 'ddpm', expected one of linspace, leading"),
        ({"solver": "lcm", "schedule": "trailing"}, "schedule: got 'trailing' with solver 'lcm', expected one of None"),
        ({"solver": "euler", "schedule": "even"}, "schedule: got 'even' with solver 'euler', expected one of karras"),
        ({"solver": "euler", "eta": 0.5}, "eta: got 0.5 with solver 'euler', expected 0 or None: it has no eta"),
        ({"solver": "euler_ancestral", "eta": 2.0}, "eta: got 2.0, expected 0 to 1"),
        ({"solver": "euler", "steps": "ddim25"}, "steps: got the respacing 'ddim25' with solver 'euler', expected a"),
        ({"steps": "fast27", "schedule": "simple"}, "steps: got the respacing 'fast27' with schedule 'simple', exp"),
        ({"solver": "tcd", "steps": 51}, "steps: got 51, expected 1 to 50, the timesteps that such models are"),
        ({"solver": "prk", "steps": TIMESTEPS}, f"steps: got 100, expected 1 to {TIMESTEPS - 2} with solver 'prk'"),
        ({"guidance": "apgg"}, "guidance: got 'apgg', expected a Guidance or one of cfg, rescaled_cfg"),
        ({"guidance": 7.5}, "guidance: got 7.5, expected a Guidance or one of cfg"),
        ({"guidance": CFG(2.0), "guidance_scale": 3.0}, "guidance_scale: got 3.0 with a CFG, expected None"),
        ({"guidance": Compose({"cond": 1.0, "b": 2.0})}, "guidance: got the branches b, expected some of cond, unc"),
        ({"guidance": "perp_neg"}, "negative_prompt: got None with PerpNeg, expected words"),
        ({"guidance": "none", "negative_prompt": NEGATIVE}, "negative_prompt: got 'a blue square' with NoGuidance, ex"),
        ({"guidance": "adaptive", "solver": "ddim_cfg_pp"}, "guidance: got AdaptiveCFG with the table ddim_cfg_pp"),
        ({"guidance": "none", "solver": "ddim_cfg_pp"}, "guidance: got branches cond, expected 'uncond' among them"),
        ({"solver": "euler", "cond_fn": lambda x, t: x}, "cond_fn: got a function with the table euler, expected None"),
        ({"inpaint": (torch.zeros(3, SIZE, SIZE),) * 2}, "inpaint: got pictures for a Text2ImUNet, expected None"),
    ],
)
def test_what_does_not_combine_is_refused_before_any_work(
    pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was called")

    monkeypatch.setattr(pipeline.model, "forward", fail)
    monkeypatch.setattr(pipeline.model, "get_text_emb", fail)
    methods = [pipeline.sample] if "cond_fn" in changes else [pipeline.sample, pipeline.check]
    for method in methods:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            method(PROMPT, **changes)  # type: ignore[operator]


def test_guidance_that_ends_by_itself_runs_in_noise_level_space(pipeline: TextToImage) -> None:
    options: dict[str, Any] = {"steps": 6, "solver": "euler", "seed": 0}
    adaptive = pipeline.sample(PROMPT, guidance=AdaptiveCFG(3.0, threshold=-1.0), **options)
    assert pipeline.report()["branches"] == [2, 2, 1, 1, 1, 1]
    assert not torch.equal(adaptive, pipeline.sample(PROMPT, **options))


@pytest.fixture(scope="module")
def glide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An inpainting network, and an upsampler."""
    folder = tmp_path_factory.mktemp("glide")
    small, large = write_network(folder / "base.pt", inpaint=True), write_network(folder / "up.pt", super_res=True)
    return {
        "inpaint": TextToImage.load(small, tokenizer=words(), options=BASE),
        "upsample": Upsampler.load(large, tokenizer=words(), options=UPSAMPLER),
    }


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("source", ["philox", "torch", "brownian"])
def test_generators_are_the_samplers(pipeline: TextToImage, source: str) -> None:
    options: dict[str, Any] = {"steps": 3, "noise_source": source, "solver": "dpmpp_2m_sde"}
    several = {**options, "num_samples": 3, "batch_size": 2}
    images = pipeline.sample(PROMPT, generator=generators(5, 6, 7), **several)
    alone = pipeline.sample(PROMPT, generator=generators(6), **options)
    assert torch.allclose(images[1:2], alone, atol=1e-4)
    assert not torch.allclose(images[:1], alone, atol=1e-2)
    seeds = pipeline.report()["seeds"]
    assert len(seeds) == (source != "torch")

    encoded = {"cond": pipeline._encode(pipeline._tokens("prompt", PROMPT)), "uncond": pipeline._encode([])}
    table = solver_table("dpmpp_2m_sde", pipeline.schedule, 3)
    layout = torch.channels_last
    sampler = Sampler(pipeline.model, table, guidance=CFG(3.0), clip=1.0, memory_format=layout, noise_source=source)
    (one,) = generators(5)
    expected = sampler.sample((2, 3, SIZE, SIZE), **encoded, generator=one).clamp_(-1, 1)
    (again,) = generators(5)
    assert torch.equal(pipeline.sample(PROMPT, num_samples=2, generator=again, **options), expected)
    assert torch.equal(one.get_state(), again.get_state())


def test_generators_that_do_not_fit_are_refused(pipeline: TextToImage) -> None:
    with pytest.raises(ValueError, match="generator: got one beside seed=1"):
        pipeline.sample(PROMPT, seed=1, generator=generators(1))
    with pytest.raises(ValueError, match="generator: got 2 generators, expected one, or one per sample"):
        pipeline.sample(PROMPT, num_samples=3, generator=generators(1, 2))
    with pytest.raises(TypeError, match="generator: got int"):
        pipeline.sample(PROMPT, generator=1)  # type: ignore[arg-type]


def test_the_upsampler_takes_generators(glide: dict[str, Any]) -> None:
    small, run = torch.zeros(3, 3, 8, 8), glide["upsample"]
    images = run.sample(small, PROMPT, steps=2, noise_source="torch", generator=generators(1, 2, 3), batch_size=2)
    alone = run.sample(small[:1], PROMPT, steps=2, noise_source="torch", generator=generators(3))
    assert torch.allclose(images[2:], alone, atol=1e-4)
    assert not torch.allclose(images[:1], alone, atol=1e-2)


def test_the_upsampler_takes_named_solvers_too(glide: dict[str, Any]) -> None:
    small = torch.zeros(1, 3, 8, 8)
    drawn = {
        solver: glide["upsample"].sample(small, PROMPT, steps=3, solver=solver, seed=0)
        for solver in SOLVERS
        if not solver.endswith("cfg_pp")
    }
    with pytest.raises(ValueError, match="guidance: got branches cond, expected 'uncond' among them"):
        glide["upsample"].sample(small, PROMPT, solver="euler_cfg_pp", steps=3)
    assert all(image.isfinite().all() for image in drawn.values())
    hot = glide["upsample"].sample(small, PROMPT, steps=3, solver="dpmpp_2m", temperature=0.5, seed=0)
    assert not torch.equal(hot, drawn["dpmpp_2m"])
    assert len(glide["upsample"].report()["seeds"]) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_inpainting_keeps_known_pixels_or_is_refused(glide: dict[str, Any], solver: str) -> None:
    image = torch.linspace(-1, 1, 192).reshape(3, 8, 8)
    mask = (torch.arange(64).reshape(1, 8, 8) % 2).float()
    options: dict[str, Any] = {"steps": 3, "solver": solver, "seed": 0, "inpaint": (image, mask)}
    if solver in ("plms", "prk") or solver.endswith("cfg_pp"):
        with pytest.raises(ValueError, match=f"inpaint: got pictures with solver '{solver}', expected one whose"):
            glide["inpaint"].sample(PROMPT, **options)
    else:
        drawn = glide["inpaint"].sample(PROMPT, **options)
        assert torch.equal(drawn * mask, (image * mask)[None])


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["text", "inpaint", "upsample"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), saved, copy.copy])
def test_pipelines_can_be_copied_before_and_after_sampling(
    pipeline: TextToImage, glide: dict[str, Any], name: str, copied: Any
) -> None:
    original = {"text": pipeline, **glide}[name]
    arguments: list[Any] = [torch.zeros(1, 3, 8, 8), PROMPT] if name == "upsample" else [PROMPT]
    options: dict[str, Any] = {"steps": 2, "seed": 4, "graph": True}
    if name == "inpaint":
        options["inpaint"] = (torch.zeros(3, 8, 8), torch.ones(1, 8, 8))
    fresh = type(original)(original.model, original.tokenizer, original.meta)
    before = copied(fresh)
    expected = fresh.sample(*arguments, **options)
    after = copied(fresh)
    for other in (before, after):
        assert other._sampler is other._known is None
        assert other.report() == {}
        assert torch.equal(other.sample(*arguments, **options), expected)
    assert torch.equal(fresh.sample(*arguments, **options), expected)


def test_pictures_for_pil() -> None:
    levels = torch.arange(256, dtype=torch.float32)
    images = (levels / 127.5 - 1).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images[1] *= 3  # beyond the range
    assert np.array_equal(to_bytes(images)[0, :, :, 1].ravel(), np.arange(256))
    assert np.array_equal(to_bytes(images[:1].bfloat16().float()), to_bytes(images[:1].bfloat16()))
    pictures = to_pil(images)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (16, 16))] * 2
    assert np.array_equal(np.asarray(pictures[0])[..., 2].ravel(), np.arange(256))
    assert set(np.asarray(pictures[1]).ravel()[:3]) == {0}
    assert [picture.mode for picture in to_pil(images[:, :1])] == ["L", "L"]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((1, 3, 2, 2)), TypeError, "images: got ndarray, expected a tensor"),
        (torch.zeros(3, 2, 2), ValueError, r"images: got torch.float32 \[3, 2, 2\], expected a floating dtype and"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), ValueError, r"images: got torch.uint8 \[1, 3, 2, 2\]"),
        (torch.zeros(1, 4, 2, 2), ValueError, "images: got 4 channels, expected 3 or 1"),
    ],
)
def test_what_is_no_picture_is_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_pil(images)
