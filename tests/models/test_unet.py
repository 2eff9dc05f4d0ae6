"""What training and the sampling engine need of the networks, whatever their weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcfg.models import SuperResText2ImUNet, Text2ImUNet, UNetModel
from fastcfg.models.nn import timestep_embedding

SMALL = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Replace the zeros of a fresh network, whose output would not depend on anything."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def small_text_model(**options) -> Text2ImUNet:
    torch.manual_seed(0)
    tokenizer = SimpleNamespace(n_vocab=20)
    return Text2ImUNet(12, 32, 1, 2, True, tokenizer, xf_padding=True, **{**SMALL, **options})


def test_fresh_network_is_zero_and_finite(base):
    model = small_text_model()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for embedding in (model.positional_embedding, model.padding_embedding):
        assert embedding.std().item() == pytest.approx(0.01, rel=0.2)
    arrays = base.arrays
    output = model(arrays["x"], arrays["timesteps"], base.text["tokens"] % 20, base.text["mask"])
    assert not output.any()


@torch.no_grad()
def test_channels_last_equals_contiguous(recorded):
    arrays = recorded.arrays
    model = recorded.build().to(memory_format=torch.channels_last)
    x = arrays["x"].to(memory_format=torch.channels_last)
    output = model(x, arrays["timesteps"], **recorded.text, **recorded.images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    # Measured: at most 4.7e-6.
    assert (output - arrays["output"]).abs().max() < 1e-5


def test_training_step_under_bfloat16_autocast(base):
    model, arrays = base.build().to(memory_format=torch.channels_last), base.arrays
    with torch.autocast("cpu", torch.bfloat16):
        output = model(arrays["x"], arrays["timesteps"], **base.text)
    assert output.dtype == torch.float32
    # Measured: 0.057 where outputs have a standard deviation of 0.57.
    assert (output - arrays["output"]).abs().max() < 0.1
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-2), (torch.bfloat16, 0.15)])
@torch.no_grad()
def test_whole_network_in_another_dtype(base, dtype, tolerance):
    model, arrays = base.build().to(dtype), base.arrays
    assert model.dtype == dtype
    text = model.get_text_emb(**base.text)
    for x in (arrays["x"], arrays["x"].to(dtype)):
        for xf_dtype in (torch.float32, dtype):
            encoded = {name: value.to(xf_dtype) for name, value in text.items()}
            output = model(x, arrays["timesteps"], **encoded)
            assert output.dtype == x.dtype
            # Measured: 6.3e-3 and 4.6e-2.
            assert (output.float() - arrays["output"]).abs().max() < tolerance


def test_forward_changes_no_input(base):
    model = base.build()
    inputs = {"x": base.arrays["x"], "timesteps": base.arrays["timesteps"], **base.text}
    before = copy.deepcopy(inputs)
    model(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_dropout_in_training_mode_only(base):
    model, arrays = base.build(), base.arrays

    def outputs():
        return [model(arrays["x"], arrays["timesteps"], **base.text) for _ in range(2)]

    first, second = outputs()
    assert torch.equal(first, second)
    model.train()
    first, second = outputs()
    assert not torch.equal(first, second)


def test_activation_checkpointing_gives_the_same_gradients(base):
    gradients = []
    for use_checkpoint in (False, True):
        model = base.build(use_checkpoint=use_checkpoint, dropout=0.0).train()
        model(base.arrays["x"], base.arrays["timesteps"], **base.text).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _OnDevice(TorchDispatchMode):
    """Fail if an operation makes a tensor on another device than meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", f"{func} ran on the host"
        return result


@torch.no_grad()
def test_forward_makes_nothing_on_the_host(network):
    model, arrays = network.build().to("meta"), network.arrays
    inputs = {**network.conditioning, "x": arrays["x"], "timesteps": arrays["timesteps"]}
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    with _OnDevice():
        outputs = [model(**inputs)]
        if hasattr(model, "precompute"):
            outputs.append(model(**model.precompute(**inputs)))
    assert {output.shape for output in outputs} == {arrays["logits" if "logits" in arrays else "output"].shape}


@torch.no_grad()
def test_compiles_without_graph_breaks(base):
    model, arrays = base.build(), base.arrays
    text = model.precompute(**base.text)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(
        compiled(arrays["x"], arrays["timesteps"], **text), model(arrays["x"], arrays["timesteps"], **text)
    )


@torch.no_grad()
def test_precomputed_text_of_blocks_of_different_widths(base):
    model = fill(small_text_model(attention_resolutions=(1, 2))).eval()
    x, timesteps = base.arrays["x"], base.arrays["timesteps"]
    text = {"tokens": base.text["tokens"] % 20, "mask": base.text["mask"]}
    ready = model.precompute(**text)
    # Blocks of 32, 64, 64 (the middle one), 64, 64, 32 and 32 channels.
    assert ready["xf_kv"].shape == (3, 12, 2 * 352)
    assert torch.equal(model(x, timesteps, **ready), model(x, timesteps, **text))


def test_network_without_text(base):
    model = fill(Text2ImUNet(12, 0, 0, 0, False, None, **SMALL))
    assert not any("transformer" in key or "encoder_kv" in key for key in model.state_dict())
    assert model(base.arrays["x"], base.arrays["timesteps"]).shape == (3, 6, 16, 16)
    assert model.precompute(low_res=1) == {"low_res": 1}


def test_auxiliary_text_head_has_upstream_names():
    keys = set(small_text_model(xf_ar=0.1).state_dict()) - set(small_text_model().state_dict())
    assert keys == {"unemb.weight", "unemb.bias"}
    shared = small_text_model(xf_ar=0.1, share_unemb=True)
    assert shared.unemb.weight is shared.token_embedding.weight


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize(("dims", "size"), [(1, (16,)), (2, (8, 4)), (3, (3, 4, 4))])
def test_any_number_of_dimensions(dims, size, resblock_updown):
    model = fill(UNetModel(image_size=8, **SMALL, dims=dims, resblock_updown=resblock_updown)).eval()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    output = model(x, torch.tensor([1, 999]))
    assert output.shape == (2, 6, *size)
    assert not torch.equal(output, model(x, torch.tensor([1, 500])))
    output.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_heads_of_the_upsampling_half():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    reference = fill(UNetModel(image_size=8, **SMALL, num_heads=2)).eval()
    outputs = {}
    for heads in (-1, 2, 4):
        model = UNetModel(image_size=8, **SMALL, num_heads=2, num_heads_upsample=heads).eval()
        model.load_state_dict(reference.state_dict())
        outputs[heads] = model(x, torch.tensor([5, 5]))
    assert torch.equal(outputs[-1], outputs[2])
    assert not torch.equal(outputs[4], outputs[2])


class _NormInputs(TorchDispatchMode):
    """Note the dtypes that norms compute in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.native_group_norm.default, torch.ops.aten.native_layer_norm.default):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_norms_compute_in_float32(base, autocast):
    model = base.build()
    if not autocast:
        model.convert_to_fp16()
    with _NormInputs() as norms, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(base.arrays["x"], base.arrays["timesteps"], **base.text)
    modules = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)]
    assert norms.dtypes == [torch.float32] * len(modules)


@torch.no_grad()
def test_class_embedding():
    model = fill(UNetModel(image_size=8, **SMALL, num_classes=4)).eval()
    assert model.label_emb.weight.shape == (4, 128)
    x, timesteps = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 5])
    a, b = model(x, timesteps, torch.tensor([0, 1])), model(x, timesteps, torch.tensor([0, 3]))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    with pytest.raises(ValueError, match=r"y: got None, expected it exactly if num_classes is set \(it is 4\)"):
        model(x, timesteps)
    with pytest.raises(ValueError, match=r"y: got shape \(3,\), expected \(2,\)"):
        model(x, timesteps, torch.tensor([0, 1, 2]))


def test_timestep_embedding_against_its_formula():
    timesteps = torch.tensor([0.0, 1.0, 250.5, 999.0], dtype=torch.float64)
    frequencies = torch.tensor([10000.0 ** (-i / 3) for i in range(3)], dtype=torch.float64)
    angles = timesteps[:, None] * frequencies
    want = torch.cat([angles.cos(), angles.sin(), torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    got = timestep_embedding(timesteps, 7)
    assert got.dtype == torch.float32
    # Measured: 2.8e-6; an angle near 1000 may be rounded by 3e-5 in float32.
    assert (got - want).abs().max() < 6e-5


@pytest.mark.parametrize(
    ("x", "timesteps", "message"),
    [
        ((3, 4, 16, 16), 3, r"x: got shape \(3, 4, 16, 16\), expected \[B, 3\] and 2 spatial sizes"),
        ((3, 3, 16), 3, r"x: got shape \(3, 3, 16\)"),
        ((3, 3, 16, 15), 3, r"x: got spatial sizes \(16, 15\), expected multiples of 2"),
        ((3, 3, 16, 16), 2, r"timesteps: got shape \(2,\), expected \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit(base, x, timesteps, message):
    with pytest.raises(ValueError, match=message):
        base.build()(torch.zeros(x), torch.zeros(timesteps), **base.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_channels": 48}, r"model_channels x channel_mult: got widths \[48, 96\], expected multiples of 32"),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of the block's 64 channels"),
        ({"num_head_channels": 24}, "num_head_channels: got 24, expected a divisor of the block's 64 channels"),
        ({"dims": 4}, "dims: got 4, expected 1, 2 or 3"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        UNetModel(image_size=8, **{**SMALL, **options})


def test_text_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="xf_heads: got 3, expected a divisor of xf_width 32"):
        Text2ImUNet(12, 32, 1, 3, True, SimpleNamespace(n_vocab=20), **SMALL)
    with pytest.raises(ValueError, match="tokenizer: got None"):
        Text2ImUNet(12, 32, 1, 2, True, None, **SMALL)


@pytest.mark.parametrize("network", ["glide_superres", "gd_superres"], indirect=True)
@torch.no_grad()
def test_an_image_of_the_outputs_size_is_not_resized(network, monkeypatch):
    model, arrays = network.build(), network.arrays
    conditioning = {**network.conditioning, "low_res": resized(arrays["low_res"], arrays["x"].shape[2:])}
    want = model(arrays["x"], arrays["timesteps"], **network.conditioning)
    modes = []
    interpolate = torch.nn.functional.interpolate

    def noted(*args, mode, **kwargs):
        modes.append(mode)
        return interpolate(*args, mode=mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "interpolate", noted)
        assert torch.equal(model(arrays["x"], arrays["timesteps"], **conditioning), want)
    assert set(modes) == {"nearest"}
    # What is left out would change nothing.
    assert torch.equal(resized(conditioning["low_res"], arrays["x"].shape[2:]), conditioning["low_res"])


def resized(image: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)


def test_conditioning_images_that_do_not_fit():
    model = SuperResText2ImUNet(12, 32, 1, 2, True, SimpleNamespace(n_vocab=20), **SMALL)
    x, timesteps, tokens = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"low_res: got None, expected \[2, 3, height, width\]"):
        model(x, timesteps, tokens=tokens)
    with pytest.raises(ValueError, match=r"low_res: got shape \(1, 3, 4, 4\)"):
        model(x, timesteps, low_res=torch.zeros(1, 3, 4, 4), tokens=tokens)


@pytest.mark.parametrize("recorded", ["glide_inpaint"], indirect=True)
def test_inpainting_images_that_do_not_fit(recorded):
    model, x, timesteps = recorded.build(), recorded.arrays["x"], recorded.arrays["timesteps"]
    with pytest.raises(ValueError, match=r"inpaint_image: got shape \(2, 3, 4, 4\), expected \(2, 3, 8, 8\)"):
        model(x, timesteps, inpaint_image=x[..., :4, :4], **recorded.text)
    with pytest.raises(ValueError, match=r"inpaint_mask: got shape \(2, 3, 8, 8\), expected \(2, 1, 8, 8\)"):
        model(x, timesteps, inpaint_mask=x, **recorded.text)
