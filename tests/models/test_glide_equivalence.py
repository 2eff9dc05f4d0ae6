"""GLIDE's networks equal the original implementation: outputs of small ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.quick

# Measured: at most 3.6e-6 (outputs have a standard deviation of 0.6).
TOLERANCE = 1e-5
# Measured: 7.8e-3 between two sets of half kernels, where half itself is 5.3e-3 from single precision.
TOLERANCE_FP16 = 2e-2


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    ("timesteps", "output"), [("timesteps", "output"), ("timesteps_float", "output_timesteps_float")]
)
@torch.no_grad()
def test_output(recorded, timesteps, output):
    arrays = recorded.arrays
    got = recorded.build()(arrays["x"], arrays[timesteps], **recorded.text, **recorded.images)
    assert largest_difference(got, arrays[output]) < TOLERANCE


@torch.no_grad()
def test_text_embedding(recorded):
    text = recorded.build().get_text_emb(**recorded.text)
    assert list(text) == ["xf_proj", "xf_out"]
    for name, value in text.items():
        assert largest_difference(value, recorded.arrays[name]) < TOLERANCE


@pytest.mark.parametrize("recorded", ["glide_inpaint"], indirect=True)
@torch.no_grad()
def test_inpainting_without_image(recorded):
    arrays = recorded.arrays
    got = recorded.build()(arrays["x"], arrays["timesteps"], **recorded.text)
    assert largest_difference(got, arrays["output_without_inpaint_args"]) < TOLERANCE


@torch.no_grad()
def test_output_in_fp16(recorded):
    arrays = recorded.arrays
    model = recorded.build(use_fp16=True)
    model.convert_to_fp16()
    got = model(arrays["x"], arrays["timesteps"], **recorded.text, **recorded.images)
    assert largest_difference(got, arrays["output_fp16_cpu"]) < TOLERANCE_FP16
    # float16 did happen: in single precision the output would be 1e-5 from the recorded one.
    assert largest_difference(got, arrays["output"]) > 1e-4


@torch.no_grad()
def test_convert_to_fp32_undoes_convert_to_fp16(base):
    model = base.build()
    model.convert_to_fp16()
    model.convert_to_fp32()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    arrays = base.arrays  # the recorded weights are exact in float16, so nothing is lost
    assert largest_difference(model(arrays["x"], arrays["timesteps"], **base.text), arrays["output"]) < TOLERANCE
