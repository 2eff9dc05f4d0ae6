"""guided-diffusion's networks equal the original implementation: outputs and gradients of small ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.quick

# Measured: at most 4.8e-6, channels-last (outputs have a standard deviation of 0.6).
TOLERANCE = 1e-5
# Measured: at most 7.2e-7 (logits have standard deviations of 0.17 to 0.58).
TOLERANCE_LOGITS = 5e-6
# Measured: at most 4.8e-8, where gradients reach 0.03.
TOLERANCE_GRADIENT = 5e-7
# Measured: 4.4e-3 between two sets of half kernels, where half itself is 5.5e-3 from single precision.
TOLERANCE_FP16 = 2e-2


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return (a - b).abs().max().item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_output(guided, memory_format):
    arrays = guided.arrays
    model = guided.build().to(memory_format=memory_format)
    x = arrays["x"].to(memory_format=memory_format)
    got = model(x, arrays["timesteps"], **guided.conditioning)
    assert got.is_contiguous(memory_format=memory_format)
    assert largest_difference(got, arrays["output"]) < TOLERANCE


@torch.no_grad()
def test_output_in_fp16(guided):
    arrays = guided.arrays
    model = guided.build(use_fp16=True)
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    got = model(arrays["x"], arrays["timesteps"], **guided.conditioning)
    assert largest_difference(got, arrays["output_fp16_cpu"]) < TOLERANCE_FP16
    # float16 did happen: in single precision the output would be 1e-5 from the recorded one.
    assert largest_difference(got, arrays["output"]) > 1e-4
    model.convert_to_fp32()  # the recorded weights are exact in float16, so nothing is lost
    got = model(arrays["x"], arrays["timesteps"], **guided.conditioning)
    assert largest_difference(got, arrays["output"]) < TOLERANCE


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_classifier_and_its_gradient(classifier, memory_format):
    arrays = classifier.arrays
    model = classifier.build().to(memory_format=memory_format)
    x = arrays["x"].to(memory_format=memory_format, copy=True).requires_grad_(True)
    logits = model(x, arrays["timesteps"])
    assert largest_difference(logits.detach(), arrays["logits"]) < TOLERANCE_LOGITS
    chosen = logits.log_softmax(dim=1).gather(1, arrays["y"][:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, x)
    assert largest_difference(gradient, arrays["grad_log_prob"]) < TOLERANCE_GRADIENT


@torch.no_grad()
def test_classifier_in_fp16(classifier):
    arrays = classifier.arrays
    model = classifier.build(use_fp16=True)
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    assert {parameter.dtype for parameter in model.out.parameters()} == {torch.float32}
    got = model(arrays["x"], arrays["timesteps"])
    # Measured: 1.7e-4 to 5.5e-4.
    assert 1e-5 < largest_difference(got, arrays["logits"]) < 3e-3
