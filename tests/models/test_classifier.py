"""The classifier's pools and what they refuse."""

from __future__ import annotations

import pytest
import torch

from fastcfg.models import EncoderUNetModel
from fastcfg.models.classifier import AttentionPool2d

pytestmark = pytest.mark.quick

SMALL = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 32,
}


@torch.no_grad()
def test_attention_pool_against_its_formula():
    generator = torch.Generator().manual_seed(0)
    pool = AttentionPool2d(3, 8, 4, 5).double()
    x = torch.randn(2, 8, 3, 3, generator=generator, dtype=torch.float64)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + pool.positional_embedding
    query, key, value = (
        torch.einsum("oc,bct->bot", pool.qkv_proj.weight[:, :, 0], tokens)
        .add(pool.qkv_proj.bias[:, None])
        .unflatten(1, (3, 2, 4))
        .unbind(1)
    )
    weights = torch.einsum("bhct,bhcs->bhts", query, key).div(2.0).softmax(dim=3)
    pooled = torch.einsum("bhts,bhcs->bhct", weights, value).flatten(1, 2)[:, :, :1]
    want = (pool.c_proj.weight[:, :, 0] @ pooled)[:, :, 0] + pool.c_proj.bias
    got = pool(x)
    assert got.shape == (2, 5)
    # Measured: 1.1e-16.
    assert (got - want).abs().max() < 1e-13


def test_activation_checkpointing_gives_the_same_gradients(classifier):
    gradients = []
    for use_checkpoint in (False, True):
        model = classifier.build(use_checkpoint=use_checkpoint).train()
        model(classifier.arrays["x"], classifier.arrays["timesteps"]).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fresh_adaptive_classifier_says_nothing():
    model = EncoderUNetModel(**SMALL)
    assert not model(torch.randn(2, 3, 16, 16), torch.zeros(2)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, "pool: got 'mean', expected one of adaptive, attention, spatial, spatial_v2"),
        ({"dims": 1}, "dims: got 1, expected 2"),
        ({"pool": "attention", "num_head_channels": -1}, "num_head_channels: got -1, expected the channels per head"),
        ({"pool": "attention", "image_size": 17}, "image_size: got 17, expected a multiple of 2"),
        ({"model_channels": 48}, r"model_channels x channel_mult: got widths \[48, 96\], expected multiples of 32"),
        ({"num_head_channels": 24}, "num_head_channels: got 24, expected a divisor of the block's 64 channels"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderUNetModel(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("x", "timesteps", "message"),
    [
        ((3, 6, 16, 16), 3, r"x: got shape \(3, 6, 16, 16\), expected \[B, 3\] and 2 spatial sizes"),
        ((3, 3, 15, 15), 3, r"x: got spatial sizes \(15, 15\), expected multiples of 2"),
        ((3, 3, 8, 32), 3, r"x: got spatial sizes \(8, 32\), expected \(16, 16\)"),
        ((3, 3, 16, 16), 2, r"timesteps: got shape \(2,\), expected \(3,\)"),
    ],
)
@pytest.mark.parametrize("classifier", ["gd_classifier_attention"], indirect=True)
def test_inputs_that_do_not_fit(classifier, x, timesteps, message):
    with pytest.raises(ValueError, match=message):
        classifier.build()(torch.zeros(x), torch.zeros(timesteps))


@pytest.mark.parametrize("classifier", ["gd_classifier_adaptive"], indirect=True)
@torch.no_grad()
def test_only_the_attention_pool_depends_on_the_size(classifier):
    assert classifier.build()(torch.zeros(2, 3, 8, 32), torch.zeros(2)).shape == (2, 10)


def test_attention_pools_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads_channels: got 3, expected a divisor of the 8 channels"):
        AttentionPool2d(4, 8, 3)
    with pytest.raises(ValueError, match=r"x: got features of \(2, 8\), expected \(4, 4\)"):
        AttentionPool2d(4, 8, 4)(torch.zeros(1, 8, 2, 8))
