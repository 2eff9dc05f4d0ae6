"""GLIDE's recipe of two stages against its notebooks, written out with the drop-in for GLIDE's own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_glide import BASE, BASE_SIZE, CONTEXT, SIZE, UPSAMPLER, words, write_network
from torch import Tensor

from fastcfg import ClassifierFree
from fastcfg.frontends.glide import create_gaussian_diffusion
from fastcfg.models.loading import load_network
from fastcfg.noise import INITIAL_STREAM, philox_normal, sample_seeds
from fastcfg.pipeline import TextToImage
from fastcfg.upsampler import Upsampler

PROMPTS = ["a red circle", "a blue star below"]
STEPS, UP_STEPS = 5, "2,1,1"
SEEDS, UP_SEEDS = [4, 5, 4, 5], [1004, 1005, 1006, 1007]

# Batches of another size may round otherwise in torch's convolutions.
ROUNDING = 5e-5
# The drop-in's loops run on the same engine, but encode all texts at once and resize low_res at every step.
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
    """The upsampler likewise: no guidance, temperature 0.997; DDIM, or DDPM to inpaint."""
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
