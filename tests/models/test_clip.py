"""GLIDE's noised CLIP equals the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import GOLDEN
from support.recorded_networks import Recorded, load_recorded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcfg.frontends import glide
from fastcfg.models.clip import CLIPModel, ImageEncoder, TextEncoder, create_clip_model

pytestmark = pytest.mark.quick

KEYS = GOLDEN / "state_dict_keys"


class Codes:
    """The tokenizer of the recording."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(character) % 37 for character in text]


@pytest.fixture
def recorded() -> Recorded:
    return load_recorded("glide_clip")


@pytest.fixture
def clip(recorded: Recorded) -> CLIPModel:
    case = recorded.case
    model = CLIPModel(
        TextEncoder(**case["text_encoder"]),
        ImageEncoder(**case["image_encoder"]),
        Codes(),
        start_token=38,
        end_token=39,
    )
    for name in ("text_encoder", "image_encoder"):
        weights = {
            key.removeprefix(f"{name}."): value for key, value in recorded.weights().items() if key.startswith(name)
        }
        getattr(model, name).load_state_dict(weights)
    return model


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() < tolerance


def test_weights_and_model_come_through_glides_door(clip: CLIPModel, recorded: Recorded, tmp_path: Path) -> None:
    assert (glide.create_clip_model, glide.CLIPModel) == (create_clip_model, CLIPModel)
    torch.save(clip.image_encoder.state_dict(), tmp_path / "image-enc.pt")
    again = ImageEncoder(**recorded.case["image_encoder"])
    again.load_state_dict(glide.load_checkpoint(tmp_path / "image-enc.pt"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), clip.image_encoder.parameters(), strict=True))


def test_prompts(clip, recorded):
    tokens, lengths = clip.encode_prompts(recorded.case["prompts"])
    assert torch.equal(tokens, recorded.arrays["tokens"])
    assert torch.equal(lengths, recorded.arrays["lengths"])


@torch.no_grad()
def test_features(clip, recorded):
    arrays = recorded.arrays
    # Measured: 6.0e-7 and 6.6e-7; standard deviations are near 1.
    text = clip.text_encoder(arrays["tokens"], arrays["lengths"])
    assert_close(text, arrays["text_features"], 5e-6)
    image = clip.image_encoder((arrays["x"] + 1) * 127.5, arrays["timesteps"])
    assert_close(image, arrays["image_features"], 5e-6)


@torch.no_grad()
def test_embeddings(clip, recorded):
    # Measured: 1.1e-7 and 1.4e-7, where standard deviations are 0.2.
    assert_close(clip.text_embeddings(recorded.case["prompts"]), recorded.arrays["text_embeddings"], 1e-6)
    image = clip.image_embeddings(recorded.arrays["x"], recorded.arrays["timesteps"])
    assert_close(image, recorded.arrays["image_embeddings"], 1e-6)


def test_gradient(clip, recorded):
    arrays, case = recorded.arrays, recorded.case
    x, t = arrays["x"], arrays["timesteps"]
    cond_fn = clip.cond_fn(case["prompts"], case["grad_scale"])
    gradient = cond_fn(x, t, tokens=None, y=1)
    # Measured: 6.2e-6, where gradients have a standard deviation of 4.
    assert_close(gradient, arrays["gradient"], 5e-5)
    assert not gradient.requires_grad
    assert not x.requires_grad
    assert_close(cond_fn(x, t, grad_scale=1.5), arrays["gradient"] / 2, 5e-5)
    with torch.no_grad():  # as in a sampler
        assert torch.equal(cond_fn(x, t.float()), gradient)
    assert all(parameter.grad is None for parameter in clip.image_encoder.parameters())
    one = clip.cond_fn(case["prompts"][:1], 3.0)(x, t)
    # Measured: 8.6e-6; the batch of texts has another size.
    assert_close(one, clip.cond_fn(case["prompts"][:1] * 3, 3.0)(x, t), 5e-5)


def test_gradient_in_half_precision(clip, recorded):
    arrays, case = recorded.arrays, recorded.case
    clip.text_encoder.half()
    clip.image_encoder.half()
    gradient = clip.cond_fn(case["prompts"], case["grad_scale"])(arrays["x"], arrays["timesteps"])
    # Measured: 0.042, where gradients have a standard deviation of 4.
    assert 1e-4 < (gradient - arrays["gradient"]).abs().max() < 0.25
    assert gradient.dtype == torch.float32


class _OnDevice(TorchDispatchMode):
    """Fail if an operation makes a tensor on another device than meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", f"{func} ran on the host"
        return result


def test_guidance_makes_nothing_on_the_host(clip, recorded):
    clip.text_encoder.to("meta")
    clip.image_encoder.to("meta")
    cond_fn = clip.cond_fn(recorded.case["prompts"], 3.0)
    x, t = recorded.arrays["x"].to("meta"), recorded.arrays["timesteps"].to("meta")
    with _OnDevice():
        assert cond_fn(x, t).shape == x.shape


@pytest.mark.parametrize("name", ["image_encoder", "text_encoder"])
def test_full_size_parameters(name):
    case = json.loads((KEYS / f"glide_clip_{name}.json").read_text())
    encoder = getattr(create_clip_model(device="meta"), name)
    assert type(encoder).__name__ == case["cls"]
    state = encoder.state_dict()
    assert [(key, list(value.shape)) for key, value in state.items()] == list(case["shapes"].items())
    assert {(value.dtype, value.device.type) for value in state.values()} == {(torch.float32, "meta")}


def test_factory_follows_the_default_device():
    with torch.device("meta"):
        clip = create_clip_model(tokenizer=Codes())
    assert clip.device.type == "meta"
    assert clip.image_encoder.n_timestep == 1000


def test_clean_images_need_no_timestep():
    torch.manual_seed(0)
    encoder = ImageEncoder(8, 4, 5, n_head=2, n_xf_blocks=1, n_head_state=4)
    assert "blocks.input.pred_state" in encoder.state_dict()
    assert encoder(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


def test_inputs_that_do_not_fit(clip, recorded):
    x, t = recorded.arrays["x"], recorded.arrays["timesteps"]
    tokens, lengths = recorded.arrays["tokens"], recorded.arrays["lengths"]
    for arguments, message in (
        ((x[:, :2], t), r"image: got shape \(3, 2, 8, 8\), expected \('B', 3, 8, 8\)"),
        ((x[..., :4], t), r"image: got shape \(3, 3, 8, 4\)"),
        ((x, None), r"timesteps: got None, expected it exactly if n_timestep \(20\) is not 0"),
        ((x, t[:2]), r"timesteps: got shape \(2,\), expected \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clip.image_encoder(*arguments)
    with pytest.raises(ValueError, match=r"text: got shape \(3, 9\), expected \[B, 10\]"):
        clip.text_encoder(tokens[:, :9], lengths)
    with pytest.raises(ValueError, match=r"text_len: got shape \(2,\), expected \(3,\)"):
        clip.text_encoder(tokens, lengths[:2])
    with pytest.raises(ValueError, match="patch_size: got 3, expected a divisor of image_size 8"):
        ImageEncoder(8, 3, 5, 2, 1)
    with pytest.raises(ValueError, match=r"x: got a batch of 3, expected 2, one per prompt"):
        clip.cond_fn(["a", "b"], 1.0)(x, t)


def test_prompts_that_do_not_fit(clip):
    with pytest.raises(TypeError, match="prompts: got a string, expected several"):
        clip.text_embeddings("a cat")
    with pytest.raises(ValueError, match="prompts: got none, expected at least one"):
        clip.cond_fn([], 3.0)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        CLIPModel(clip.text_encoder, clip.image_encoder).text_embeddings(["a cat"])
