"""GLIDE's options describe GLIDE's networks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from support import GOLDEN

from fastcfg.models.glide import GLIDE_BASE, GLIDE_UPSAMPLER, glide_network

pytestmark = pytest.mark.quick


def test_options_are_the_originals() -> None:
    recorded = json.loads((GOLDEN / "defaults.json").read_text())["glide"]
    assert recorded["model_and_diffusion_defaults"] == GLIDE_BASE
    assert recorded["model_and_diffusion_defaults_upsampler"] == GLIDE_UPSAMPLER


@pytest.mark.parametrize("name", ["glide_base", "glide_upsample", "glide_base_inpaint", "glide_upsample_inpaint"])
def test_full_size_networks_are_the_originals(name: str) -> None:
    case = json.loads((GOLDEN / "state_dict_keys" / f"{name}.json").read_text())
    meta = glide_network(case["options"])
    model = meta.build(SimpleNamespace(n_vocab=50257))
    assert type(model).__name__ == meta.network == case["cls"]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == case["shapes"]
    options = case["options"]
    assert (meta.image_size, meta.schedule, meta.num_timesteps) == (
        options["image_size"],
        options["noise_schedule"],
        1000,
    )
    assert meta.model["dropout"] == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, "model: got unknown options depth, expected some of image_size, num_channels"),
        ({"num_channels": "64"}, "model: got num_channels = '64', expected a value of type int"),
        ({"num_heads": True}, "model: got num_heads = True, expected a value of type int"),
        ({"image_size": 48}, "image_size: got 48, expected one of 64, 128, 256"),
        ({"channel_mult": "1,x"}, "channel_mult: got '1,x', expected positive integers separated by commas"),
        ({"attention_resolutions": "8,0"}, "attention_resolutions: got '8,0', expected positive integers"),
    ],
)
def test_options_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glide_network(GLIDE_BASE, **changes)


def test_all_options_are_needed() -> None:
    with pytest.raises(ValueError, match="model: got no dropout, xf_width, expected all of GLIDE's options"):
        glide_network({name: value for name, value in GLIDE_BASE.items() if name not in ("dropout", "xf_width")})
    assert glide_network(GLIDE_BASE, dropout=0).model["dropout"] == 0
    assert glide_network(GLIDE_BASE, image_size=16, channel_mult="1,2").model["attention_resolutions"] == [0, 1, 2]
