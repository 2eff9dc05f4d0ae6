"""The networks equal the original implementation: outputs of small ones, parameters of the full-size ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcfg.models

KEYS = Path(__file__).parents[1] / "golden" / "state_dict_keys"

# Measured: at most 3.6e-6 (outputs have a standard deviation of 0.6).
TOLERANCE = 1e-5
# Measured: 7.8e-3 between two sets of half kernels, where half itself is 5.3e-3 from single precision.
TOLERANCE_FP16 = 2e-2

CHANNEL_MULT = {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}


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


def build_full_size(case: dict[str, Any]) -> torch.nn.Module:
    """The network of GLIDE's options, without weights."""
    options = case["options"]
    size = options["image_size"]
    with torch.device("meta"):
        return getattr(fastcfg.models, case["cls"])(
            options["text_ctx"],
            options["xf_width"],
            options["xf_layers"],
            options["xf_heads"],
            options["xf_final_ln"],
            SimpleNamespace(n_vocab=50257),
            3,
            options["num_channels"],
            6,
            options["num_res_blocks"],
            tuple(size // int(resolution) for resolution in options["attention_resolutions"].split(",")),
            options["dropout"],
            CHANNEL_MULT[size],
            xf_padding=options["xf_padding"],
            **{
                name: options[name]
                for name in (
                    "cache_text_emb",
                    "use_fp16",
                    "num_heads",
                    "num_head_channels",
                    "num_heads_upsample",
                    "use_scale_shift_norm",
                    "resblock_updown",
                )
            },
        )


@pytest.mark.parametrize("name", ["glide_base", "glide_upsample", "glide_base_inpaint", "glide_upsample_inpaint"])
def test_full_size_parameters(name):
    case = json.loads((KEYS / f"{name}.json").read_text())
    model = build_full_size(case)
    assert list(model.buffers()) == []

    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(case["shapes"].items())
    assert {value.dtype for value in state.values()} == {torch.float32}

    model.convert_to_fp16()
    assert str(model.dtype) == case["dtype_attribute"]
    letters = {torch.float16: "h", torch.float32: "f"}
    got = {key: letters[value.dtype] for key, value in model.state_dict().items()}
    assert got == dict(zip(case["shapes"], case["fp16_mask"], strict=True))
