"""GLIDE's recipe of two stages against its notebooks, written out with the drop-in for GLIDE's own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_glide import BASE, BASE_SIZE, CONTEXT, SIZE, UPSAMPLER, words, write_network
from torch import Tensor

from fastcfg import ClassifierFree
from fastcfg.frontends.glide import create_gaussian_diffusion
from fastcfg.models.loading import load_network
from fastcfg.pipelines.text_to_image import TextToImage
from fastcfg.pipelines.upsampler import Upsampler
from fastcfg.reference.philox import INITIAL_STREAM, philox_normal, sample_seeds

PROMPTS = ["a red circle", "a blue star below"]
STEPS, UP_STEPS = 5, "2,1,1"
SEEDS, UP_SEEDS = [4, 5, 4, 5], [1004, 1005, 1006, 1007]

# Batches of another size may round otherwise in torch's convolutions. Measured: 4.5e-5 at most over these few steps.
ROUNDING = 1e-4
# The drop-in's loops run on the same engine, but encode all texts at once and resize low_res at every step. Measured:
# 5.8e-5 at most.
BY_HAND = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """State dicts of the four networks."""
    folder = tmp_path_factory.mktemp("glide")
    kinds = {"base": (False, False), "upsample": (True, False), "base_inpaint": (False, True)}
    kinds["upsample_inpaint"] = (True, True)
    return {name: write_network(folder / f"{name}.pt", super_res=s, inpaint=i) for name, (s, i) in kinds.items()}


@pytest.fixture(scope="module")
def stages(files: dict[str, Path]) -> dict[str, Any]:
    """The four networks, loaded."""
    return {
        name: Upsampler.load(path, tokenizer=words(), options=UPSAMPLER)
        if name.startswith("upsample")
        else TextToImage.load(path, tokenizer=words(), options=BASE)
        for name, path in files.items()
    }


def known(size: int) -> tuple[Tensor, Tensor]:
    """A picture of which the left half and a corner are known."""
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
    mask = torch.zeros(1, size, size)
    mask[:, :, : size // 2] = mask[:, :2, -2:] = 1
    return image, mask


def text(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = words()
    padded = [tokenizer.padded_tokens_and_mask(tokenizer.encode(text), CONTEXT) for text in texts]
    return {"tokens": torch.tensor([p[0] for p in padded]), "mask": torch.tensor([p[1] for p in padded])}


def by_hand(path: Path, inpaint: bool) -> Tensor:
    """The base stage as in GLIDE's notebooks: batches of [conditional; unconditional] pictures, guidance 3."""
    model, _, _ = load_network(path, words(), BASE)
    texts = [prompt for prompt in PROMPTS for _ in range(2)]
    shape = (8, 3, BASE_SIZE, BASE_SIZE)
    image, mask = known(BASE_SIZE)
    pictures = {"inpaint_image": (image * mask).repeat(8, 1, 1, 1), "inpaint_mask": mask.repeat(8, 1, 1, 1)}
    pictures = pictures if inpaint else {}

    def denoised(x0: Tensor) -> Tensor:
        return x0 * (1 - pictures["inpaint_mask"]) + pictures["inpaint_image"] * pictures["inpaint_mask"]

    return create_gaussian_diffusion(100, "squaredcos_cap_v2", str(STEPS)).p_sample_loop(
        ClassifierFree(model, 3.0),
        shape,
        noise=start(SEEDS, BASE_SIZE).repeat(2, 1, 1, 1),
        model_kwargs={**text(texts + [""] * 4), **pictures},
        denoised_fn=denoised if inpaint else None,
        noise_source=replay([*SEEDS, *SEEDS]),
    )[:4]


def enlarged_by_hand(path: Path, samples: Tensor, inpaint: bool) -> Tensor:
    """The upsampler from the same parts: no guidance, temperature 0.997; DDIM, or DDPM to inpaint."""
    model, _, _ = load_network(path, words(), UPSAMPLER)
    diffusion = create_gaussian_diffusion(100, "linear", UP_STEPS)
    image, mask = known(SIZE)
    pictures = {"inpaint_image": (image * mask).repeat(4, 1, 1, 1), "inpaint_mask": mask.repeat(4, 1, 1, 1)}
    pictures = pictures if inpaint else {}

    def denoised(x0: Tensor) -> Tensor:
        return x0 * (1 - pictures["inpaint_mask"]) + pictures["inpaint_image"] * pictures["inpaint_mask"]

    loop: Callable[..., Tensor] = diffusion.p_sample_loop if inpaint else diffusion.ddim_sample_loop
    return loop(
        model,
        (4, 3, SIZE, SIZE),
        noise=start(UP_SEEDS, SIZE) * 0.997,
        model_kwargs={
            **text([prompt for prompt in PROMPTS for _ in range(2)]),
            "low_res": ((samples + 1) * 127.5).round() / 127.5 - 1,
            **pictures,
        },
        denoised_fn=denoised if inpaint else None,
        noise_source=replay(UP_SEEDS),
    )


def start(seeds: list[int], size: int) -> Tensor:
    return philox_normal(sample_seeds(seeds, len(seeds)), (3, size, size), stream=INITIAL_STREAM)


def replay(seeds: list[int]) -> Callable[[int, tuple[int, ...]], Tensor]:
    return lambda step, shape: philox_normal(sample_seeds(seeds, len(seeds)), shape[1:], row=step)


@pytest.mark.parametrize("inpaint", [False, True], ids=["text2im", "inpaint"])
def test_both_stages_are_the_notebooks(stages: dict[str, Any], files: dict[str, Path], inpaint: bool) -> None:
    ending = "_inpaint" if inpaint else ""
    pictures = {"inpaint": known(BASE_SIZE)} if inpaint else {}
    small = stages[f"base{ending}"].sample(PROMPTS, steps=STEPS, num_samples=2, seed=4, **pictures)
    expected = by_hand(files[f"base{ending}"], inpaint)
    torch.testing.assert_close(small, expected, rtol=0, atol=BY_HAND)
    pictures = {"inpaint": known(SIZE), "solver": "ddpm"} if inpaint else {}
    large = stages[f"upsample{ending}"].sample(
        small, [prompt for prompt in PROMPTS for _ in range(2)], steps=UP_STEPS, seed=1004, **pictures
    )
    expected = enlarged_by_hand(files[f"upsample{ending}"], small, inpaint)
    torch.testing.assert_close(large, expected, rtol=0, atol=BY_HAND)
    assert large.shape == (4, 3, SIZE, SIZE)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_inpainting_keeps_known_pixels_to_the_bit(stages: dict[str, Any], solver: str) -> None:
    image, mask = known(BASE_SIZE)
    small = stages["base_inpaint"].sample(
        PROMPTS, steps=STEPS, solver=solver, num_samples=2, inpaint=(image, mask), batch_size=3
    )
    assert torch.equal(small * mask, (image * mask).expand_as(small))
    assert (small * (1 - mask)).std() > 0.1
    image, mask = known(SIZE)
    images = torch.stack([image, -image, image.flip(1), image.flip(2)])
    masks = torch.stack([mask, mask, 1 - mask, mask.flip(2)])
    large = stages["upsample_inpaint"].sample(
        small, PROMPTS[0], steps=UP_STEPS, solver=solver, inpaint=(images, masks), batch_size=3
    )
    assert torch.equal(large * masks, images * masks)
    assert (large * (1 - masks)).std() > 0.1


def test_the_network_sees_what_is_known(stages: dict[str, Any]) -> None:
    image, mask = known(BASE_SIZE)
    draws = [
        stages["base_inpaint"].sample(PROMPTS[0], steps=STEPS, seed=0, inpaint=inpaint)
        for inpaint in (None, (image, mask), (image.flip(2), mask), (image, mask.bool()), (image * mask, mask))
    ]
    unknown = mask == 0
    assert (draws[0] - draws[1])[0, :, unknown[0]].abs().max() > 0.01
    assert (draws[1] - draws[2])[0, :, unknown[0]].abs().max() > 0.01
    assert torch.equal(draws[1], draws[3])
    assert torch.equal(draws[1], draws[4])


def test_pictures_to_inpaint_may_change_without_another_program(stages: dict[str, Any]) -> None:
    stage = stages["base_inpaint"]
    image, mask = known(BASE_SIZE)
    first = stage.sample(PROMPTS[0], steps=STEPS, seed=0, inpaint=(image, mask), graph=True)
    captures = stage.report()["captures"]
    other = stage.sample(PROMPTS[0], steps=STEPS, seed=0, inpaint=(-image, 1 - mask), graph=True)
    assert stage.report()["captures"] == captures
    assert torch.equal(other * (1 - mask), (-image * (1 - mask))[None])
    assert torch.equal(stage.sample(PROMPTS[0], steps=STEPS, seed=0, inpaint=(image, mask), graph=True), first)


@pytest.mark.parametrize("name", ["upsample", "upsample_inpaint"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_an_enlarged_picture_does_not_depend_on_the_others(stages: dict[str, Any], name: str, solver: str) -> None:
    images = torch.rand(5, 3, BASE_SIZE, BASE_SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    options = {"steps": UP_STEPS, "solver": solver}
    many = stages[name].sample(images, prompts, seed=[9, 8, 7, 6, 5], **options)
    for i in (0, 3):
        alone = stages[name].sample(images[i : i + 1], prompts[i], seed=9 - i, **options)
        torch.testing.assert_close(alone, many[i : i + 1], rtol=0, atol=ROUNDING)
    split = stages[name].sample(images, prompts, seed=[9, 8, 7, 6, 5], batch_size=2, **options)
    torch.testing.assert_close(split, many, rtol=0, atol=ROUNDING)


def test_everything_the_upsampler_is_given_matters(stages: dict[str, Any]) -> None:
    images = torch.rand(1, 3, BASE_SIZE, BASE_SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    variants: list[dict[str, Any]] = [
        {},
        {"images": -images},
        {"prompts": PROMPTS[1]},
        {"seed": 1},
        {"temperature": 0.5},
        {"steps": 5},
        {"solver": "ddpm"},
        {"eta": 1.0},
        {"noise_source": "torch"},
    ]
    drawn = [
        stages["upsample"].sample(**{"images": images, "prompts": PROMPTS[0], "steps": UP_STEPS, "seed": 0, **variant})
        for variant in variants
    ]
    for other in range(len(drawn)):
        for one in range(other):
            assert (drawn[one] - drawn[other]).abs().max() > 10 * ROUNDING


def test_small_pictures_are_rounded_to_256_levels(stages: dict[str, Any]) -> None:
    levels = torch.randint(1, 255, (1, 3, BASE_SIZE, BASE_SIZE), generator=torch.Generator().manual_seed(1))
    drawn = [
        stages["upsample"].sample((levels + shift) / 127.5 - 1, PROMPTS[0], steps=UP_STEPS, seed=0)
        for shift in (0, 0.4, 0.6)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_upsamplers_defaults_are_glides(stages: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, BASE_SIZE, BASE_SIZE)
    rows: list[float] = []
    plain = stages["upsample"].sample(images, PROMPTS[0], seed=0, callback=lambda step: rows.append(step.t))
    assert rows == sorted(create_gaussian_diffusion(100, "linear", "fast27").timestep_map, reverse=True)
    spelled = stages["upsample"].sample(
        images, [PROMPTS[0]], steps="fast27", solver="ddim", temperature=0.997, seed=0, eta=0.0
    )
    assert torch.equal(plain, spelled)


def test_steps_may_be_a_respacing(stages: dict[str, Any]) -> None:
    for steps, count in (("ddim25", 25), ("3,2,1", 6), ("fast27", 27), ("7", 7), (7, 7)):
        times: list[float] = []
        stages["base"].sample(PROMPTS[0], steps=steps, callback=lambda step, times=times: times.append(step.t))
        diffusion = create_gaussian_diffusion(100, "squaredcos_cap_v2", str(steps))
        assert times == diffusion.timestep_map[::-1]
        assert len(times) == count


def test_a_gradient_guides_too(stages: dict[str, Any], files: dict[str, Path]) -> None:
    seen: list[set[str]] = []

    def towards_red(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        seen.append(set(conditioning))
        gradient = torch.zeros_like(x)
        gradient[:, 0] = 30.0
        return gradient

    options = {"steps": STEPS, "guidance_scale": 1.0, "num_samples": 4, "seed": 4}
    plain = stages["base"].sample(PROMPTS[0], **options)
    guided = stages["base"].sample(PROMPTS[0], cond_fn=towards_red, **options)
    assert torch.equal(stages["base"].sample(PROMPTS[0], **options), plain)
    assert seen == [{"xf_proj", "xf_out"}] * STEPS
    model, _, _ = load_network(files["base"], words(), BASE)
    seeds = [4, 5, 6, 7]
    expected = create_gaussian_diffusion(100, "squaredcos_cap_v2", str(STEPS)).p_sample_loop(
        model,
        (4, 3, BASE_SIZE, BASE_SIZE),
        noise=start(seeds, BASE_SIZE),
        model_kwargs=text([PROMPTS[0]] * 4),
        cond_fn=towards_red,
        noise_source=replay(seeds),
    )
    torch.testing.assert_close(guided, expected.clamp(-1, 1), rtol=0, atol=BY_HAND)
    assert (guided - plain)[:, 0].mean() > 0.01


def test_checkpoints_and_state_dicts_are_the_same_networks(tmp_path: Path, stages: dict[str, Any]) -> None:
    for name in stages:
        kind = Upsampler if name.startswith("upsample") else TextToImage
        path = write_network(
            tmp_path / f"{name}.safetensors", super_res=kind is Upsampler, inpaint=name.endswith("inpaint")
        )
        loaded, stage = kind.load(path), stages[name]
        assert loaded.meta.network == stage.meta.network
        assert (loaded.meta.image_size, loaded.meta.schedule) == (stage.meta.image_size, stage.meta.schedule)
        assert loaded.inpaints == name.endswith("inpaint")
        for key, value in stage.model.state_dict().items():
            torch.testing.assert_close(loaded.model.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_a_state_dict_as_safetensors_is_read_too(tmp_path: Path, files: dict[str, Path]) -> None:
    from safetensors.torch import save_file

    save_file(torch.load(files["base"], weights_only=True), tmp_path / "base.safetensors")
    words().save(tmp_path / "words.json")
    stage = TextToImage.load(tmp_path / "base.safetensors", tokenizer=tmp_path / "words.json", options=BASE)
    expected = TextToImage.load(files["base"], tokenizer=words(), options=BASE).sample(PROMPTS[0], steps=1, seed=0)
    assert torch.equal(stage.sample(PROMPTS[0], steps=1, seed=0), expected)


@pytest.mark.parametrize("mixed", [True, False], ids=["convert_to_fp16", "bfloat16"])
def test_half_precision_draws_nearly_the_same(files: dict[str, Path], stages: dict[str, Any], mixed: bool) -> None:
    half = Upsampler.load(
        files["upsample_inpaint"], dtype=None if mixed else torch.bfloat16, tokenizer=words(), options=UPSAMPLER
    )
    if mixed:
        half.model.convert_to_fp16()
    images = torch.rand(2, 3, BASE_SIZE, BASE_SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image, mask = known(SIZE)
    one, other = (
        stage.sample(images, PROMPTS, steps=UP_STEPS, seed=0, inpaint=(image, mask))
        for stage in (half, stages["upsample_inpaint"])
    )
    assert one.dtype == torch.float32
    assert torch.equal(one * mask, (image * mask).expand_as(one))
    difference = (one - other).square().mean().sqrt()
    # Measured: 0.0014 with float16 convolutions, 0.0115 all in bfloat16.
    assert 0 < difference < (0.005 if mixed else 0.04)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda f: TextToImage.load(f["upsample"], tokenizer=words(), options=UPSAMPLER), "got a SuperResText2ImUNet"),
        (
            lambda f: Upsampler.load(f["base"], tokenizer=words(), options=BASE),
            "got a Text2ImUNet, expected a Super",
        ),
        (lambda f: TextToImage.load(f["base"], tokenizer=words()), r"weights .*base.pt: got no .*, expected the"),
        (lambda f: TextToImage.load(f["base"], tokenizer=words(), options={"depth": 3}), "unknown options depth"),
        (lambda f: TextToImage.load(f["base"], tokenizer=f["base"].parent, options=BASE), "without encoder.json"),
        (lambda f: TextToImage.load(f["base"].parent / "none.pt"), r"none.pt: got no file"),
        (lambda f: TextToImage.load(options=BASE), r"options: got num_channels, .* expected none: it has its own"),
    ],
)
def test_load_refuses(files: dict[str, Path], load: Callable[[dict[str, Path]], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(files)


def test_only_pictures_from_text_have_weights_in_the_package() -> None:
    with pytest.raises(TypeError, match="path: got None, expected a file of weights"):
        Upsampler.load()


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: got no input_blocks.0.0.weight, expected one of GLIDE's"):
        TextToImage.load(tmp_path / "other.pt")
    torch.save({"input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"of shape \[8, 4, 3, 3\], expected one of GLIDE's"):
        TextToImage.load(tmp_path / "other.pt")


IMAGE, MASK = known(BASE_SIZE)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("base", {"inpaint": (IMAGE, MASK)}, ValueError, "inpaint: got pictures for a Text2ImUNet, expected None"),
        ("base_inpaint", {"inpaint": IMAGE}, TypeError, "inpaint: got Tensor, expected a pair of tensors"),
        ("base_inpaint", {"inpaint": (IMAGE, None)}, TypeError, "inpaint: got tuple, expected a pair of tensors"),
        ("base_inpaint", {"inpaint": (IMAGE[:, 1:], MASK)}, ValueError, r"image: got shape \(3, 7, 8\), expected"),
        ("base_inpaint", {"inpaint": (IMAGE, MASK[0])}, ValueError, r"mask: got shape \(8, 8\), expected \(1, 8, 8\)"),
        ("base_inpaint", {"inpaint": (IMAGE * 2, MASK)}, ValueError, r"image: got values outside \[-1, 1\]"),
        ("base_inpaint", {"inpaint": (IMAGE * float("nan"), MASK)}, ValueError, "image: got values outside"),
        ("base_inpaint", {"inpaint": (IMAGE, MASK / 2)}, ValueError, "mask: got other values than 0 and 1"),
        ("base", {"steps": "fast"}, ValueError, "steps: got 'fast', expected a number or another respacing"),
        ("base", {"steps": "ddim99"}, ValueError, "steps: got 'ddim99', expected a number or another respacing"),
        ("base", {"cond_fn": 3}, TypeError, "cond_fn: got int, expected a function or None"),
        ("upsample", {"images": 3}, TypeError, "images: got int, expected a tensor"),
        ("upsample", {"images": IMAGE}, ValueError, r"images: got shape \(3, 8, 8\), expected \[N, 3, h, h\]"),
        ("upsample", {"images": IMAGE[None, :, 1:]}, ValueError, r"images: got shape \(1, 3, 7, 8\)"),
        (
            "upsample",
            {"images": IMAGE[None, :, 1:, 1:]},
            ValueError,
            "images: got a size of 7, expected a divisor",
        ),
        ("upsample", {"images": torch.zeros(1, 3, SIZE, SIZE)}, ValueError, "images: got a size of 16"),
        ("upsample", {"images": 2 * IMAGE[None]}, ValueError, "images: got torch.float32 or values outside"),
        ("upsample", {"prompts": PROMPTS}, ValueError, r"prompts: got 2, expected one or one per picture \(1\)"),
        ("upsample", {"prompts": 3}, TypeError, "prompts: got int, expected a string or several"),
        ("upsample", {"prompts": "a corgi"}, ValueError, "prompt: got words the model does not know: 'corgi'"),
        ("upsample", {"prompts": "red " * 7}, ValueError, "prompt: got 7 tokens"),
        ("upsample", {"temperature": -1.0}, ValueError, "temperature: got -1.0, expected a finite value of at least 0"),
        (
            "upsample",
            {"temperature": float("nan")},
            ValueError,
            "temperature: got nan, expected a finite value of at least 0",
        ),
        ("upsample", {"solver": "eulr"}, ValueError, "solver: got 'eulr', expected one of ddpm, ddim"),
        ("upsample", {"solver": "ddpm", "eta": 1.0}, ValueError, "eta: got 1.0 with solver 'ddpm'"),
        ("upsample", {"steps": 0}, ValueError, "steps: got 0, expected an integer from 1 to 100"),
        ("upsample", {"seed": [1, 2]}, ValueError, r"seed: got 2 seeds, expected one per picture \(1\)"),
        ("upsample", {"batch_size": 0}, ValueError, "batch_size: got 0, expected an integer of at least 1"),
    ],
)
def test_sample_refuses_before_the_model_runs(
    stages: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was called")

    monkeypatch.setattr(stages[name].model, "forward", fail)
    arguments = {"prompts": PROMPTS[0], "steps": 3, **changes}
    if name.startswith("upsample"):
        arguments.setdefault("images", IMAGE[None])
    with pytest.raises(error, match=message):
        stages[name].sample(**arguments)
