"""The layout head hears its own thread's features and scores names cell by cell."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.layout import LayoutHead
from fastcfg.training.shapes.scenes import COLOURS, SHAPES, Scene, SceneObject, render_batch, render_named, sample_scene
from fastcfg.training.shapes.task import build_model

pytestmark = pytest.mark.quick

TINY = ShapesConfig.from_dict(
    {
        "model": {
            "xf_width": 32,
            "xf_layers": 1,
            "xf_heads": 2,
            "model_channels": 32,
            "channel_mult": [1, 1],
            "attention_resolutions": [2],
        }
    }
)


def test_named_pixels_are_the_picture() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(20)]
    pictures, colours, shapes = render_named(scenes, np.random.default_rng(1))
    np.testing.assert_array_equal(pictures, render_batch(scenes, np.random.default_rng(1)))
    for scene, colour, shape in zip(scenes, colours, shapes, strict=True):
        pairs = {(int(c), int(s)) for c, s in zip(colour.ravel(), shape.ravel(), strict=True)}
        wanted = {(COLOURS.index(o.colour) + 1, SHAPES.index(o.shape) + 1) for o in scene.objects}
        assert pairs == wanted | {(0, 0)}
    rows, columns = np.nonzero(colours[0])
    assert (pictures[0][:, rows, columns].max(axis=0) > -0.7).all()


def test_scores_are_the_cross_entropy_of_the_cells() -> None:
    model = build_model(TINY)
    head = LayoutHead(model)
    scene = Scene((SceneObject("square", "red", "large"),))
    colours, shapes = (torch.from_numpy(a) for a in render_named([scene], np.random.default_rng(0))[1:])
    # Heads that ignore the features: background with probability 3/4, the right name 1/4, whatever the cell.
    with torch.no_grad():
        for layer, name in ((head.colour, COLOURS.index("red") + 1), (head.shape, SHAPES.index("square") + 1)):
            layer.weight.zero_()
            layer.bias.fill_(-100.0)
            layer.bias[0], layer.bias[name] = np.log(0.75), np.log(0.25)
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, 16).long(), torch.zeros(1, 16).bool())
        score = head(colours, shapes)
    # The feature map has 16 x 16 cells of 2 x 2 pixels, occupied from a quarter on.
    occupied = (colours[0].reshape(16, 2, 16, 2) > 0).float().mean(dim=(1, 3)) >= 0.25
    share = occupied.float().mean().item()
    expected = -2 * (share * np.log(0.25) + (1 - share) * np.log(0.75))
    assert 0.1 < share < 0.3
    assert score.item() == pytest.approx(expected, rel=1e-5)


def test_threads_hear_their_own_calls() -> None:
    model = build_model(TINY).eval()
    head = LayoutHead(model)
    with torch.no_grad():
        # A fresh network's attention blocks and their surroundings pass nothing on that depends on the text.
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    names = torch.zeros(1, 32, 32, dtype=torch.int64)
    empty = torch.zeros(1, 16).long(), torch.zeros(1, 16).bool()

    def score(seed: int) -> float:
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model(x, torch.zeros(1), *empty)
            return head(names, names).item()

    alone = [score(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, range(8))) == alone
    assert len(set(alone)) == 8


def test_a_network_without_attention_is_refused() -> None:
    model = build_model(TINY)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child).__name__ == "AttentionBlock":
                setattr(module, name, torch.nn.Identity())
    with pytest.raises(ValueError, match="model: got a network without attention blocks"):
        LayoutHead(model)
