"""Text given as tokens or encoded beforehand, the padding mask, and the text cache."""

from __future__ import annotations

import pytest
import torch

from fastcfg.models.blocks import AttentionBlock


@pytest.mark.parametrize("form", ["get_text_emb", "precompute", "precompute encoded"])
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@torch.no_grad()
def test_encoding_once_equals_encoding_every_step(recorded, fp16, form):
    model, arrays = recorded.build(), recorded.arrays
    if fp16:
        model.convert_to_fp16()
    text = {"get_text_emb": model.get_text_emb, "precompute": model.precompute}[form.split()[0]](**recorded.text)
    if form.endswith("encoded"):
        text = model.precompute(**model.get_text_emb(**recorded.text))
    for timesteps in (arrays["timesteps"], arrays["timesteps"] // 2):
        every_step = model(arrays["x"], timesteps, **recorded.text, **recorded.images)
        once = model(arrays["x"], timesteps, **text, **recorded.images)
        assert torch.equal(once, every_step)


@torch.no_grad()
def test_precompute_leaves_no_text_work(recorded):
    model, arrays = recorded.build(), recorded.arrays
    given = {**recorded.text, **recorded.images, "y": "as it came"}
    made = model.precompute(**given)
    assert list(given) == [*recorded.text, *recorded.images, "y"]
    assert set(made) == {"xf_proj", "xf_kv", *recorded.images, "y"}
    assert all(made[name] is given[name] for name in (*recorded.images, "y"))
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    channels = sum(block.norm.num_channels for block in blocks)
    batch, text_ctx = recorded.text["tokens"].shape
    assert made["xf_kv"].shape == (batch, text_ctx, 2 * channels)
    assert made["xf_kv"].is_contiguous()
    again = model.precompute(**made)
    assert all(again[name] is made[name] for name in ("xf_proj", *recorded.images, "y"))
    assert torch.equal(again["xf_kv"], made["xf_kv"])

    def refuse(*args):
        raise AssertionError("the text was worked on")

    text_layers = [model.transformer, model.transformer_proj, model.token_embedding]
    for layer in (*text_layers, *(block.encoder_kv for block in blocks)):
        layer.register_forward_hook(refuse)
    del made["y"]
    assert torch.isfinite(model(arrays["x"], arrays["timesteps"], **made)).all()


@pytest.mark.parametrize("encode", ["get_text_emb", "precompute"])
@torch.no_grad()
def test_encoded_branches_concatenate(base, encode):
    """What a sampler does: the branches' encoded texts, one after the other, in one batch."""
    model, arrays = base.build(), base.arrays
    x, timesteps = arrays["x"], arrays["timesteps"]
    cond = getattr(model, encode)(**base.text)
    uncond = getattr(model, encode)(
        tokens=torch.zeros_like(base.text["tokens"]), mask=torch.zeros_like(base.text["mask"])
    )
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    got = model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **both)
    want = torch.cat([model(x, timesteps, **cond), model(x, timesteps, **uncond)])
    # Measured: 2.6e-6: the batch size may change the order of sums.
    assert (got - want).abs().max() < 1e-5
    assert (got.chunk(2)[0] - got.chunk(2)[1]).abs().mean() > 0.01


def test_gradients_reach_the_text(base):
    """Precomputed text is the same function of what was encoded, so it can be trained through."""
    model, arrays = base.build(), base.arrays
    text = model.get_text_emb(**base.text)
    gradients = []
    for precompute in (False, True):
        leaves = {name: value.detach().requires_grad_(True) for name, value in text.items()}
        given = model.precompute(**leaves) if precompute else leaves
        model.zero_grad()
        model(arrays["x"], arrays["timesteps"], **given).square().mean().backward()
        gradients.append([leaf.grad for leaf in (*leaves.values(), *model.parameters()) if leaf.grad is not None])
        assert all(leaf.grad.any() for leaf in leaves.values())
    for a, b in zip(*gradients, strict=True):
        # Measured: equal to the bit.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_only_unmasked_tokens_matter(base):
    model, arrays = base.build(), base.arrays
    tokens, mask = base.text["tokens"], torch.zeros_like(base.text["mask"])
    mask[:, :5] = True

    def output(tokens):
        return model(arrays["x"], arrays["timesteps"], tokens, mask)

    seen, unseen = tokens.clone(), tokens.clone()
    seen[:, 4] = (seen[:, 4] + 1) % 101
    unseen[:, 5:] = (unseen[:, 5:] + 1) % 101
    assert torch.equal(output(unseen), output(tokens))
    assert (output(seen) - output(tokens)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_word_order_matters(base):
    model, arrays = base.build(), base.arrays
    tokens, mask = base.text["tokens"], torch.ones_like(base.text["mask"])
    forwards = model(arrays["x"], arrays["timesteps"], tokens, mask)
    backwards = model(arrays["x"], arrays["timesteps"], tokens.flip(1), mask)
    assert (forwards - backwards).abs().max() > 1e-3


@torch.no_grad()
def test_cache_holds_for_equal_text_only(base):
    model, arrays = base.build(cache_text_emb=True), base.arrays
    tokens, mask = base.text["tokens"], base.text["mask"]
    plain = base.build()

    def output(model, tokens, mask):
        return model(arrays["x"], arrays["timesteps"], tokens, mask)

    first = output(model, tokens, mask)
    kept = model.cache["xf_out"]
    assert torch.equal(output(model, tokens, mask), first)
    assert model.cache["xf_out"] is kept
    for changed in ((tokens.flip(0), mask), (tokens, ~mask)):
        output(model, tokens, mask)
        assert torch.equal(output(model, *changed), output(plain, *changed))
        assert not torch.equal(output(plain, *changed), first)
    model.del_cache()
    assert model.cache is None


def test_without_padding_embedding_no_mask_is_needed(base):
    arrays = base.arrays
    model = base.build()
    model.xf_padding = False
    with torch.no_grad():
        assert torch.isfinite(model(arrays["x"], arrays["timesteps"], base.text["tokens"])).all()


ENCODED = {"xf_proj": torch.zeros(3, 128), "xf_out": torch.zeros(3, 32, 12)}
READY = {"xf_proj": torch.zeros(3, 128), "xf_kv": torch.zeros(3, 12, 512)}
TOKENS = torch.zeros(3, 12, dtype=torch.int64)
MASK = TOKENS == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "text: got nothing, expected tokens and mask, xf_proj and xf_out, or xf_proj and xf_kv"),
        ({"tokens": TOKENS, "mask": MASK, **ENCODED}, "text: got tokens, mask, xf_proj, xf_out"),
        ({"mask": MASK, **ENCODED}, "text: got mask, xf_proj, xf_out"),
        ({"tokens": TOKENS, "mask": MASK, "xf_out": ENCODED["xf_out"]}, "text: got tokens, mask, xf_out"),
        ({"xf_proj": ENCODED["xf_proj"]}, "text: got xf_proj, expected"),
        ({"tokens": TOKENS}, r"mask: got None, expected torch.bool of shape \(3, 12\)"),
        ({"tokens": TOKENS, "mask": MASK.int()}, "mask: got torch.int32 of shape"),
        ({"tokens": TOKENS, "mask": MASK[:2]}, r"mask: got torch.bool of shape \(2, 12\)"),
        ({"tokens": TOKENS[:, :8], "mask": MASK[:, :8]}, r"tokens: got shape \(3, 8\), expected \[B, 12\]"),
        ({"tokens": TOKENS[0], "mask": MASK[0]}, r"tokens: got shape \(12,\)"),
        ({"tokens": TOKENS[:2], "mask": MASK[:2]}, r"tokens: got encoded shape \(2, 128\), expected \(3, 128\)"),
        ({**ENCODED, "xf_proj": torch.zeros(3, 64)}, r"xf_proj: got .* \(3, 64\), expected \(3, 128\)"),
        ({**ENCODED, "xf_out": torch.zeros(3, 12, 32)}, r"xf_out: got .* \(3, 12, 32\), expected \(3, 32, 12\)"),
        ({**ENCODED, **READY}, "text: got xf_proj, xf_out, xf_kv, expected"),
        ({"tokens": TOKENS, "mask": MASK, "xf_kv": READY["xf_kv"]}, "text: got tokens, mask, xf_kv, expected"),
        ({"xf_kv": READY["xf_kv"]}, "text: got xf_kv, expected"),
        ({**READY, "xf_kv": torch.zeros(3, 12, 640)}, r"xf_kv: got .* \(3, 12, 640\), expected \(3, 12, 512\)"),
        ({**READY, "xf_kv": torch.zeros(2, 12, 512)}, r"xf_kv: got .* \(2, 12, 512\), expected \(3, 12, 512\)"),
    ],
)
def test_text_that_does_not_fit(base, text, message):
    with pytest.raises(ValueError, match=message):
        base.build()(base.arrays["x"], base.arrays["timesteps"], **text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "text: got nothing, expected tokens and mask"),
        ({"tokens": TOKENS}, "mask: got None"),
        ({"tokens": TOKENS, "mask": MASK[:, :8]}, r"mask: got torch.bool of shape \(3, 8\)"),
        ({**ENCODED, "xf_out": torch.zeros(2, 32, 12)}, r"xf_out: got .* \(2, 32, 12\), expected \(3, 32, 12\)"),
    ],
)
def test_text_that_cannot_be_precomputed(base, text, message):
    with pytest.raises(ValueError, match=message):
        base.build().precompute(**text)
