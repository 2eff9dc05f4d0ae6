#!/usr/bin/env bash
# diffusers 0.42.1: TangentialClassifierFreeGuidance computes in float32 also what it is given, and returns, in float64.
#
# Seen: for float64 predictions the output is float64, but the projection of the unconditional prediction is computed
# in float32 and only then converted. With guidance_scale=0 the output is that projection alone, and each of its values
# is exactly a float32. With guidance_scale=7.5 the output is about 1e-6 (of its largest value) from the same formula
# in float64, no nearer than from float32 predictions. ClassifierFreeGuidance stays in float64.
#
# What to do: expect float32's accuracy of this guider, also in a float64 comparison.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance, TangentialClassifierFreeGuidance

torch.manual_seed(0)
cond, uncond = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)


def guided(guider, scale, *predictions):
    return guider(guidance_scale=scale).forward(*predictions).pred


def expected(scale):
    """The formula in float64, by the Gram matrix's eigenvectors."""
    rows = torch.stack([cond, uncond], dim=1).flatten(2)
    vectors = torch.linalg.eigh(rows @ rows.mT).eigenvectors[:, :, -1:]
    direction = torch.nn.functional.normalize(vectors.mT @ rows, dim=-1)
    projected = (rows[:, 1:] @ direction.mT @ direction).reshape(uncond.shape)
    return projected + scale * (cond - projected)


def error(result, scale):
    return ((result.double() - expected(scale)).abs().max() / expected(scale).abs().max()).item()


projection = guided(TangentialClassifierFreeGuidance, 0.0, cond, uncond)
assert projection.dtype == torch.float64
assert torch.equal(projection, projection.float().double())
double = guided(TangentialClassifierFreeGuidance, 7.5, cond, uncond)
single = guided(TangentialClassifierFreeGuidance, 7.5, cond.float(), uncond.float())
assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
errors = error(double, 7.5), error(single, 7.5)
print(f"off the formula in float64: {errors[0]:.1e} of float64 predictions, {errors[1]:.1e} of float32 ones")
assert 1e-8 < errors[0] < 1e-5 and errors[0] > errors[1] / 10, errors

plain = guided(ClassifierFreeGuidance, 7.5, cond, uncond)
difference = (plain - (uncond + 7.5 * (cond - uncond))).abs().max().item()
print(f"ClassifierFreeGuidance: {difference:.1e} off its formula")
assert plain.dtype == torch.float64 and difference < 1e-13, difference
print(f"as described, diffusers {diffusers.__version__}")
PY
