"""The full-size networks have the originals' parameters; their factories the originals' options. None has weights."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import GOLDEN
from support.recorded_networks import CLASSIFIERS, GLIDE, GUIDED_DIFFUSION
from torch import nn

import fastcfg.models
from fastcfg.models import glide, guided_diffusion

pytestmark = pytest.mark.quick

DEFAULTS = json.loads((GOLDEN / "defaults.json").read_text())
NAMES = [path.stem for path in sorted((GOLDEN / "state_dict_keys").glob("*.json")) if "clip" not in path.stem]

FACTORIES = {
    "glide_text2im.model_creation.create_model": glide.create_model,
    "guided_diffusion.script_util.create_model": guided_diffusion.create_model,
    "guided_diffusion.script_util.create_classifier": guided_diffusion.create_classifier,
    "guided_diffusion.script_util.sr_create_model": guided_diffusion.sr_create_model,
}


def recorded_case(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "state_dict_keys" / f"{name}.json").read_text())


def build(case: dict[str, Any]) -> nn.Module:
    """The network of a recorded call's options, on the meta device."""
    call = case["call"].partition("(")[0].replace("_and_diffusion", "")
    factory = FACTORIES[call]
    names = inspect.signature(factory).parameters
    with torch.device("meta"):
        return factory(**{name: value for name, value in case["options"].items() if name in names})


def test_every_recorded_network_is_tested():
    assert len(NAMES) == 16
    recorded = {case["id"] for case in json.loads((GOLDEN / "models.json").read_text())}
    assert recorded <= {*GLIDE, *GUIDED_DIFFUSION, *CLASSIFIERS}


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    case = recorded_case(name)
    model = build(case)
    assert type(model) is getattr(fastcfg.models, case["cls"])
    assert list(model.buffers()) == []
    assert model.use_fp16 == case["options"].get("use_fp16", case["options"].get("classifier_use_fp16"))
    assert model.image_size == case["options"].get("image_size", case["options"].get("large_size"))

    state = model.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(case["shapes"].items())
    assert {value.dtype for value in state.values()} == {torch.float32}

    model.convert_to_fp16()
    assert str(model.dtype) == case.get("dtype_attribute", "torch.float16")
    letters = {torch.float16: "h", torch.float32: "f"}
    got = {key: letters[value.dtype] for key, value in model.state_dict().items()}
    assert got == dict(zip(case["shapes"], case["fp16_mask"], strict=True))
    model.convert_to_fp32()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("module", [glide, guided_diffusion], ids=["glide", "guided_diffusion"])
def test_default_options(module):
    recorded = DEFAULTS[module.__name__.rpartition(".")[2]]
    for name in set(recorded) - {"NUM_CLASSES", "checkpoint_names"}:
        options = getattr(module, name)()
        # In order, which is that of the flags an argument parser makes of them.
        assert list(options.items()) == list(recorded[name].items())
        options.clear()
        assert getattr(module, name)() == recorded[name]
    assert getattr(module, "NUM_CLASSES", None) == recorded.get("NUM_CLASSES")


@pytest.mark.parametrize("name", FACTORIES)
def test_signatures(name):
    signature = inspect.signature(FACTORIES[name])
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "tokenizer"
    ]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    assert str(bare) == DEFAULTS["signatures"][name]


GLIDE_OPTIONS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_heads": 1,
    "num_head_channels": 32,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "dropout": 0.1,
    "text_ctx": 12,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "resblock_updown": True,
    "use_fp16": False,
    "cache_text_emb": True,
    "inpaint": False,
    "super_res": False,
}


def test_options_as_strings():
    tokenizer = SimpleNamespace(n_vocab=20)
    model = glide.create_model(**GLIDE_OPTIONS, tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    assert model.token_embedding.weight.shape == (20, 32)
    assert model.cache_text_emb
    assert model.widths == [32, 64]
    assert [block.attention is not None for block in model.input_blocks] == [False, False, False, True]

    model = guided_diffusion.create_model(48, 32, 1, channel_mult="1, 1,2", attention_resolutions="24,12")
    assert (model.image_size, model.widths, model.num_classes) == (48, [32, 32, 64], None)
    assert [block.attention is not None for block in model.input_blocks] == [False] * 3 + [True, False, True]
    assert model.out_channels == 3


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (glide.create_model, {"channel_mult": "", "image_size": 512}, "image_size: got 512, expected one of 64, 128"),
        (glide.create_model, {"image_size": 64}, "image_size: got 64, expected 16 for the 2 levels of channel_mult"),
        (glide.create_model, {"channel_mult": "1,x"}, "channel_mult: got '1,x', expected positive integers"),
        (glide.create_model, {"attention_resolutions": ""}, "attention_resolutions: got '', expected positive"),
        (glide.create_model, {"attention_resolutions": "8,0"}, "attention_resolutions: got '8,0', expected positive"),
        (guided_diffusion.create_model, {"image_size": 32}, "image_size: got 32, expected one of 64, 128, 256, 512"),
        (guided_diffusion.create_classifier, {"image_size": 32}, "image_size: got 32, expected one of 64, 128"),
        (guided_diffusion.create_classifier, {"classifier_pool": "max"}, "pool: got 'max', expected one of adaptive"),
        (
            guided_diffusion.create_classifier,
            {"classifier_attention_resolutions": "a"},
            "classifier_attention_resolutions: got 'a'",
        ),
        (guided_diffusion.sr_create_model, {"large_size": 128}, "large_size: got 128, expected one of 64, 256, 512"),
    ],
)
def test_options_that_do_not_fit(factory, options, message):
    defaults = {
        glide.create_model: GLIDE_OPTIONS,
        guided_diffusion.create_model: guided_diffusion.model_and_diffusion_defaults(),
        guided_diffusion.create_classifier: guided_diffusion.classifier_defaults(),
        guided_diffusion.sr_create_model: guided_diffusion.sr_model_and_diffusion_defaults(),
    }[factory]
    names = inspect.signature(factory).parameters
    with pytest.raises(ValueError, match=message):
        factory(**{name: value for name, value in {**defaults, **options}.items() if name in names})
