"""Classifier gradients, sample batches in .npz, and dynamic thresholding in the drop-ins' loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.golden_data import guided, toy, toy_gradient
from torch import Tensor

from fastcfg import ClassifierFree, DynamicThreshold
from fastcfg.frontends import glide
from fastcfg.frontends.recipes import classifier_gradient, load_samples, save_samples, to_uint8

pytestmark = pytest.mark.quick

Y = torch.tensor([1.0, 2.5, 0.0, 0.0])
SHAPE = (4, 3, 4, 4)


def test_a_classifiers_gradient() -> None:
    weight = torch.randn(5, 12)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T * t.view(-1, 1)

    x, t, y = torch.randn(2, 3, 2, 2), torch.tensor([1.0, 2.0]), torch.tensor([4, 0])
    got = classifier_gradient(classifier, 3.0)(x, t, y=y)
    probabilities = classifier(x, t).softmax(1)
    # ∇ log softmax_y = t (w_y - Σ p w).
    want = 3 * t.view(-1, 1) * (weight[y] - probabilities @ weight)
    torch.testing.assert_close(got.flatten(1), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="y: got None, expected the classes"):
        classifier_gradient(classifier)(x, t)


def test_batches_are_what_the_evaluator_reads(tmp_path: Path) -> None:
    samples = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.999, 1.0]).view(2, 3, 1, 1)
    save_samples(tmp_path / "batch.npz", samples, torch.tensor([7, 3]))
    with np.load(tmp_path / "batch.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        # Cut off, not rounded: 127.5 * 1.999 is 254.87.
        assert file["arr_0"].tolist() == [[[[0, 0, 0]]], [[[127, 254, 255]]]]
        assert file["arr_1"].tolist() == [7, 3]
    images, labels = load_samples(tmp_path / "batch.npz")
    assert labels.tolist() == [7, 3]  # type: ignore[union-attr]
    assert np.array_equal(to_uint8(images), [[[[0, 0, 0]]], [[[127, 254, 255]]]])
    save_samples(tmp_path / "plain.npz", to_uint8(samples))
    assert load_samples(tmp_path / "plain.npz")[1] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.npz", "plain.npz"]


@pytest.mark.parametrize(
    ("name", "samples", "labels", "message"),
    [
        ("a.png", torch.zeros(2, 3, 4, 4), None, r"path: got '.*a\.png', expected a name that ends in \.npz"),
        ("a.npz", torch.zeros(3, 4, 4), None, r"samples: got shape \(3, 4, 4\), expected \[N, C, H, W\]"),
        ("a.npz", np.zeros((2, 4, 4, 3)), None, r"samples: got float64 \(2, 4, 4, 3\), expected uint8"),
        ("a.npz", torch.zeros(2, 3, 4, 4), torch.zeros(3), r"labels: got shape \(3,\), expected \(2,\)"),
    ],
)
def test_bad_batches_are_named(tmp_path: Path, name: str, samples: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_samples(tmp_path / name, samples, labels)
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"path: got '.*other\.npz', expected an \.npz with arr_0"):
        load_samples(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", np.zeros(3))
    with pytest.raises(ValueError, match=r"path: got arr_0 float64 \(3,\), expected uint8"):
        load_samples(tmp_path / "floats.npz")


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("functions", [{}, {"denoised_fn": lambda x0: 2 * x0}, {"cond_fn": toy_gradient}], ids=list)
def test_dynamic_thresholding_in_the_loops(method: str, functions: dict[str, Any]) -> None:
    diffusion = glide.create_gaussian_diffusion(1000, "squaredcos_cap_v2", "5")
    options = {"model_kwargs": {"y": Y}, "device": "cpu", "seed": 3, **functions}
    loop = getattr(diffusion, method)
    threshold = DynamicThreshold(0.9)
    want = loop(guided(toy, 4.0), SHAPE, threshold=threshold, backend="reference", **options)
    assert not torch.allclose(want, loop(guided(toy, 4.0), SHAPE, backend="reference", **options), atol=1e-2)
    for model in (guided(toy, 4.0), ClassifierFree(toy, 4.0)):
        got = loop(model, SHAPE, threshold=threshold, **options)
        # Measured: 2e-5.
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=1e-4)
    with pytest.raises(TypeError, match="threshold: got float, expected a DynamicThreshold or None"):
        loop(toy, SHAPE, threshold=0.9, **options)
