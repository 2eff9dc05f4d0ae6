"""From prompts to pictures: what the model is given, what comes out, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_checkpoint import CONTEXT, SIZE, TIMESTEPS, WORDS, write_tiny_checkpoint
from torch import Tensor

from fastcfg import CFG, Sampler, Schedule, solvers
from fastcfg.models import Text2ImUNet
from fastcfg.models.checkpoint import load_checkpoint
from fastcfg.pipelines.text_to_image import TextToImage

pytestmark = pytest.mark.quick

PROMPT, OTHER = "a red circle", "a blue star below"
STEPS = 5

# Batches of another size may round otherwise in torch's convolutions. Measured: 7e-6 at most over these few steps.
ROUNDING = 5e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> TextToImage:
    return TextToImage.load(checkpoint)


def by_sampler(checkpoint: Path, prompt: str, negative: str, scale: float, solver: str, seeds: list[int]) -> Tensor:
    """The same pictures from the parts the pipeline is made of, tokens encoded again at every step."""
    model, tokenizer, _ = load_checkpoint(checkpoint)
    schedule = Schedule.named("squaredcos_cap_v2", TIMESTEPS).respace(STEPS)
    table = solvers.ddpm(schedule, variance="learned_range") if solver == "ddpm" else solvers.ddim(schedule)
    branches = {}
    for name, text in (("cond", prompt), ("uncond", negative)):
        tokens, mask = tokenizer.padded_tokens_and_mask(tokenizer.encode(text), CONTEXT)
        branches[name] = {"tokens": torch.tensor([tokens]), "mask": torch.tensor([mask])}
    sampler = Sampler(model, table, guidance=CFG(scale), clip=1.0)
    return sampler.sample((len(seeds), 3, SIZE, SIZE), **branches, seed=seeds)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("negative", [None, "a blue square"])
def test_pictures_are_the_samplers(pipeline: TextToImage, checkpoint: Path, solver: str, negative: str | None) -> None:
    got = pipeline.sample(
        PROMPT, negative=negative, guidance_scale=2.5, steps=STEPS, solver=solver, num_samples=3, seed=7
    )
    expected = by_sampler(checkpoint, PROMPT, negative or "", 2.5, solver, [7, 8, 9])
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    assert got.abs().max() <= 1
    assert got.std() > 0.1


def test_the_prompt_the_negative_and_the_scale_matter(pipeline: TextToImage) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"prompts": OTHER},
        {"negative": "a blue square"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"seed": 1},
        {"solver": "ddim"},
        {"solver": "ddim", "eta": 1.0},
        {"steps": STEPS + 1},
        {"noise_source": "torch"},
    ]
    images = [pipeline.sample(**{"prompts": PROMPT, "steps": STEPS, "seed": 0, **variant}) for variant in variants]
    for a, b in itertools.combinations(images, 2):
        assert (a - b).abs().max() > 100 * ROUNDING


def test_at_scale_0_the_prompt_does_not_matter_without_its_variance(pipeline: TextToImage) -> None:
    one, other = (
        pipeline.sample(prompt, guidance_scale=0.0, solver="ddim", steps=STEPS, seed=0) for prompt in (PROMPT, OTHER)
    )
    assert torch.equal(one, other)
    assert pipeline.report()["branches"] == [1] * STEPS


def test_samples_of_the_first_prompt_come_first_and_share_their_seeds(pipeline: TextToImage) -> None:
    both = pipeline.sample([PROMPT, OTHER], steps=STEPS, num_samples=3, seed=4)
    assert both.shape == (6, 3, SIZE, SIZE)
    assert both.dtype == torch.float32
    for start, prompt in ((0, PROMPT), (3, OTHER)):
        alone = pipeline.sample(prompt, steps=STEPS, num_samples=3, seed=4)
        torch.testing.assert_close(both[start : start + 3], alone, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_picture_i_does_not_depend_on_how_many_are_drawn(pipeline: TextToImage, solver: str) -> None:
    many = pipeline.sample(PROMPT, steps=STEPS, solver=solver, num_samples=7, seed=2)
    for count in (1, 4):
        few = pipeline.sample(PROMPT, steps=STEPS, solver=solver, num_samples=count, seed=2)
        torch.testing.assert_close(few, many[:count], rtol=0, atol=ROUNDING)
    split = pipeline.sample(PROMPT, steps=STEPS, solver=solver, num_samples=7, seed=2, batch_size=3)
    torch.testing.assert_close(split, many, rtol=0, atol=ROUNDING)


def test_torchs_noise_is_each_pictures_own_too(pipeline: TextToImage) -> None:
    options = {"steps": STEPS, "noise_source": "torch"}
    many = pipeline.sample(PROMPT, num_samples=5, seed=2, batch_size=2, **options)
    for i, seed in enumerate(pipeline.report()["seeds"]):
        torch.testing.assert_close(pipeline.sample(PROMPT, seed=seed, **options)[0], many[i], rtol=0, atol=ROUNDING)


def test_no_seed_is_a_random_one(pipeline: TextToImage) -> None:
    images, seeds = [], []
    for seed in (None, -1, torch.tensor(-1), None):
        images.append(pipeline.sample(PROMPT, steps=STEPS, seed=seed))
        seeds += pipeline.report()["seeds"]
    assert len(set(seeds)) == 4
    assert torch.equal(pipeline.sample(PROMPT, steps=STEPS, seed=seeds[2]), images[2])


def test_every_picture_may_have_its_own_seed(pipeline: TextToImage) -> None:
    images = pipeline.sample([PROMPT, PROMPT], steps=STEPS, num_samples=2, seed=[5, 9, 9, 6])
    torch.testing.assert_close(images[1], images[2], rtol=0, atol=ROUNDING)
    expected = pipeline.sample(PROMPT, steps=STEPS, num_samples=2, seed=5)
    torch.testing.assert_close(images[[0, 3]], expected, rtol=0, atol=ROUNDING)


def test_a_second_call_repeats_the_first_bit_for_bit_and_keeps_its_sampler(pipeline: TextToImage) -> None:
    first = pipeline.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=2.0)
    sampler = pipeline._sampler
    pipeline.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=5.0)
    assert torch.equal(pipeline.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=2.0), first)
    assert pipeline._sampler is sampler
    pipeline.sample(PROMPT, steps=STEPS + 1, seed=0, guidance_scale=2.0)
    assert torch.equal(pipeline.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=2.0), first)


def test_a_recorded_graph_gives_the_same_pictures(pipeline: TextToImage) -> None:
    eager = pipeline.sample(PROMPT, steps=STEPS, seed=0, num_samples=2, graph=False)
    assert torch.equal(pipeline.sample(PROMPT, steps=STEPS, seed=0, num_samples=2, graph=True), eager)
    assert pipeline.report()["graph"] == "stand-in"


def test_text_is_encoded_once_per_prompt(pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = Text2ImUNet.get_text_emb

    def counted(self: Text2ImUNet, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        calls.append(len(tokens))
        return encode(self, tokens, mask)

    monkeypatch.setattr(Text2ImUNet, "get_text_emb", counted)
    pipeline.sample([PROMPT, OTHER], steps=STEPS, seed=0, num_samples=3)
    assert calls == [1, 1, 1]


def test_callback_and_progress_follow_every_row(pipeline: TextToImage, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = pipeline.sample(PROMPT, steps=STEPS, seed=0, num_samples=3, batch_size=2)
    assert capsys.readouterr() == ("", "")
    seen: list[tuple[int, int]] = []
    shown = pipeline.sample(
        PROMPT,
        steps=STEPS,
        seed=0,
        num_samples=3,
        batch_size=2,
        progress="my label",
        callback=lambda step: seen.append((len(step.x), step.row)),
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "my label" in captured.err
    assert f"{2 * STEPS}/{2 * STEPS}" in captured.err
    assert seen == [(2, row) for row in range(STEPS)] + [(1, row) for row in range(STEPS)]
    assert torch.equal(shown, quiet)


def test_one_step_and_all_steps_work(pipeline: TextToImage) -> None:
    for steps in (1, TIMESTEPS):
        images = pipeline.sample(PROMPT, steps=steps)
        assert images.isfinite().all()


def test_a_model_in_half_precision_draws_nearly_the_same(checkpoint: Path, pipeline: TextToImage) -> None:
    half = TextToImage.load(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    images = half.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=1.0)
    assert images.dtype == torch.float32
    expected = pipeline.sample(PROMPT, steps=STEPS, seed=0, guidance_scale=1.0)
    # Measured: 0.0042 root mean square.
    assert (images - expected).square().mean().sqrt() < 0.02


def test_the_package_brings_a_model() -> None:
    pipeline = TextToImage.load()
    images = pipeline.sample("a red circle above a blue square", steps=2, solver="ddim")
    assert images.shape == (1, 3, 32, 32)
    assert images.std() > 0.05


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": ""}, ValueError, "prompt: got '', expected words"),
        ({"prompts": [PROMPT, "  "]}, ValueError, "prompt: got '  ', expected words"),
        ({"prompts": []}, ValueError, "prompts: got none, expected at least one"),
        ({"prompts": 3}, TypeError, "prompts: got int, expected a string or several"),
        ({"prompts": [3]}, TypeError, "prompt: got int, expected a string"),
        ({"prompts": "a red cirlce"}, ValueError, r"'cirlce' \(did you mean circle\?\); expected some of a, red, blue"),
        ({"prompts": "a corgi and zebra"}, ValueError, "prompt: got words the model does not know: 'corgi', 'zebra';"),
        ({"prompts": " ".join(["red"] * 7)}, ValueError, "prompt: got 7 tokens in 'red .*', expected at most 6"),
        ({"negative": "a corgi"}, ValueError, "negative_prompt: got words the model does not know: 'corgi'"),
        ({"negative": " ".join(["red"] * 7)}, ValueError, "negative_prompt: got 7 tokens"),
        ({"steps": 0}, ValueError, f"steps: got 0, expected an integer from 1 to {TIMESTEPS}"),
        (
            {"steps": TIMESTEPS + 1},
            ValueError,
            f"steps: got {TIMESTEPS + 1}, expected an integer from 1 to {TIMESTEPS}",
        ),
        ({"steps": 2.5}, ValueError, "steps: got 2.5"),
        ({"solver": "eulr"}, ValueError, "solver: got 'eulr', expected one of ddpm, ddim, .*euler, "),
        ({"solver": "ddim", "eta": -1.0}, ValueError, "eta: got -1.0, expected a finite value of at least 0"),
        ({"eta": 0.5}, ValueError, "eta: got 0.5 with solver 'ddpm', expected 0 or None"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: got nan, expected a finite number"),
        ({"guidance_scale": float("-inf")}, ValueError, "guidance_scale: got -inf"),
        ({"guidance_scale": "3"}, ValueError, "guidance_scale: got '3'"),
        ({"num_samples": 0}, ValueError, "num_samples: got 0, expected an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, expected an integer of at least 1"),
        ({"seed": 0.5}, TypeError, "seed: got 0.5, expected an integer or a sequence of integers"),
        ({"seed": -2}, ValueError, "seed: got -2, expected at least 0, or -1 for a random one"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616, expected -2"),
        ({"seed": [2**64]}, ValueError, "seed: got 18446744073709551616"),
        ({"seed": [1, 2]}, ValueError, r"seed: got 2 seeds, expected one per picture \(1\)"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda', expected one of"),
        ({"graph": "always"}, ValueError, "graph: got 'always'"),
        ({"noise_source": "white"}, ValueError, "noise_source: got 'white'"),
    ],
)
def test_sample_refuses_before_the_model_runs(
    checkpoint: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    pipeline = TextToImage.load(checkpoint)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was called")

    pipeline.model.forward = pipeline.model.get_text_emb = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(error, match=message):
        pipeline.sample(**{"prompts": PROMPT, "steps": STEPS, **changes})


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not safetensors")


def missing(path: Path) -> None:
    pass


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [foreign, missing, folder], ids=lambda make: make.__name__)
def test_load_refuses_what_is_no_checkpoint(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: got .*, expected a (fastcfg-checkpoint|state dict)"):
        TextToImage.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device: got 'abacus', expected one like 'cpu' or 'cuda'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99', expected one of the"),
        ({"dtype": torch.int32}, "dtype: got torch.int32, expected a floating dtype"),
    ],
)
def test_load_refuses(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextToImage.load(checkpoint, **options)


def test_a_network_without_learned_variances_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "narrow.safetensors", out_channels=3)
    with pytest.raises(ValueError, match="model: got 3 output channels, expected 6"):
        TextToImage.load(path)


def test_the_vocabulary_named_is_the_models(pipeline: TextToImage) -> None:
    with pytest.raises(ValueError) as caught:
        pipeline.sample("a corgi", steps=STEPS, seed=0)
    assert str(caught.value).endswith(f"expected some of {', '.join(WORDS)}")
