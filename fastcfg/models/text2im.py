"""The text-conditional UNet of GLIDE, and its text transformer: bidirectional, pre-norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import LayerNorm32, attend, convert_modules
from .unet import UNetModel

# The original leaves positional and padding embeddings uninitialised. CLIP's value works for training from scratch.
_POSITION_STD = 0.01

# The forms of text, of which a call takes one: tokens, encoded by `get_text_emb`, and made ready by `precompute`.
_TEXT = ("tokens", "mask", "xf_proj", "xf_out", "xf_kv")
_FORMS = ({"tokens"}, {"tokens", "mask"}, {"xf_proj", "xf_out"}, {"xf_proj", "xf_kv"})


class MultiheadAttention(nn.Module):
    """Self-attention over all positions; the channels are queries, keys and values head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_qkv(x).unflatten(2, (self.heads, 3, -1)).unbind(3)))


class MLP(nn.Module):
    """Two layers with the exact GELU and four times the width in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Attention, then MLP, both residual and pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm32(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm32(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Text transformer of GLIDE (`xf.Transformer`); ValueError unless `width` is a multiple of `heads`."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"xf_heads: got {heads}, expected a divisor of xf_width {width}")
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """Map token features [B, T, width] to the same shape."""
        for block in self.resblocks:
            x = block(x)
        return x


class HasVocabulary(Protocol):
    """A tokenizer, as far as the network uses it."""

    n_vocab: int


class Text2ImUNet(UNetModel):
    """A UNet conditioned on text (GLIDE `text2im_model.Text2ImUNet`), state-dict compatible with it.

    A transformer encodes the tokens. Its projected output at the last position is added to the timestep embedding, and
    every attention block attends to its whole output.

    Args:
        text_ctx: number of text positions.
        xf_width: width of the text transformer; 0 for a network without text.
        xf_layers, xf_heads: blocks of the transformer, and attention heads of each.
        xf_final_ln: the transformer ends with a layer norm.
        tokenizer: any object with `n_vocab`; kept as an attribute for callers.
        in_channels: channels of the image; subclasses add those of their conditioning images.
        *args, image_size, **kwargs: arguments of `UNetModel`, positional ones from `model_channels` on.
        cache_text_emb: reuse the encoded text of the last call, detached, while tokens and mask stay equal. Comparing
            them waits for the device; the result of `precompute` avoids this.
        xf_ar: nonzero adds the layer `unemb` of GLIDE's auxiliary language-model loss, for its parameters only.
        xf_padding: positions with mask False get a learned padding embedding.
        share_unemb: `unemb` shares its weight with the token embedding.

    Example:
        >>> from .tokenizer import Tokenizer
        >>> tokenizer = Tokenizer.word_level(["a", "red", "circle"])
        >>> model = Text2ImUNet(
        ...     16, 64, 2, 2, True, tokenizer, xf_padding=True, in_channels=3, model_channels=32, out_channels=6,
        ...     num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=32,
        ... )
        >>> tokens, mask = tokenizer.padded_tokens_and_mask(tokenizer.encode("a red circle"), 16)
        >>> text = model.precompute(tokens=torch.tensor([tokens]), mask=torch.tensor([mask]))  # once
        >>> output = model(torch.randn(1, 3, 16, 16), torch.tensor([999]), **text)  # every step
    """

    # Number of images and masks in the input of the first convolution.
    _image_inputs, _mask_inputs = 1, 0

    def __init__(
        self,
        text_ctx: int,
        xf_width: int,
        xf_layers: int,
        xf_heads: int,
        xf_final_ln: bool,
        tokenizer: HasVocabulary | None,
        in_channels: int,
        *args: Any,
        cache_text_emb: bool = False,
        xf_ar: float = 0.0,
        xf_padding: bool = False,
        share_unemb: bool = False,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        channels = self._image_inputs * in_channels + self._mask_inputs
        super().__init__(image_size, channels, *args, **kwargs, encoder_channels=xf_width or None)
        self.text_ctx, self.xf_width, self.xf_ar, self.xf_padding = text_ctx, xf_width, xf_ar, xf_padding
        self.tokenizer, self.cache_text_emb = tokenizer, cache_text_emb
        self.cache: dict[str, Tensor | None] | None = None
        if not xf_width:
            return
        if tokenizer is None:
            raise ValueError("tokenizer: got None, expected an object with n_vocab (xf_width is not 0)")
        self.transformer = Transformer(xf_width, xf_layers, xf_heads)
        self.final_ln = LayerNorm32(xf_width) if xf_final_ln else None
        self.token_embedding = nn.Embedding(tokenizer.n_vocab, xf_width)
        self.positional_embedding = nn.Parameter(torch.empty(text_ctx, xf_width).normal_(std=_POSITION_STD))
        self.transformer_proj = nn.Linear(xf_width, 4 * self.model_channels)
        if xf_padding:
            self.padding_embedding = nn.Parameter(torch.empty(text_ctx, xf_width).normal_(std=_POSITION_STD))
        if xf_ar:
            self.unemb = nn.Linear(xf_width, tokenizer.n_vocab)
            if share_unemb:
                self.unemb.weight = self.token_embedding.weight

    def get_text_emb(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Encode text: integer ids [B, text_ctx], and a bool mask, True on real tokens, which `xf_padding` needs.

        Returns keyword arguments for `forward`: `xf_proj` [B, 4 * model_channels], added to the timestep embedding, and
        `xf_out` [B, xf_width, text_ctx], attended to. ValueError for a wrong shape, or a missing or unsuitable mask.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.text_ctx:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [B, {self.text_ctx}]")
        if self.xf_padding and (mask is None or mask.shape != tokens.shape or mask.dtype != torch.bool):
            got = "None" if mask is None else f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"mask: got {got}, expected torch.bool of shape {tuple(tokens.shape)}")
        if self.cache is not None:
            if _same(self.cache["tokens"], tokens) and _same(self.cache["mask"], mask):
                return {name: self.cache[name] for name in ("xf_proj", "xf_out")}  # type: ignore[misc]
            self.cache = None
        h = self.token_embedding(tokens.long()) + self.positional_embedding
        if self.xf_padding:
            h = torch.where(mask[..., None], h, self.padding_embedding)  # type: ignore[index]
        h = self.transformer(h.to(self.dtype))
        if self.final_ln is not None:
            h = self.final_ln(h)
        text = {"xf_proj": self.transformer_proj(h[:, -1]), "xf_out": h.transpose(1, 2)}
        if self.cache_text_emb:
            self.cache = {"tokens": tokens, "mask": mask, **{name: value.detach() for name, value in text.items()}}
        return text

    def del_cache(self) -> None:
        """Forget the text kept by `cache_text_emb`."""
        self.cache = None

    def precompute(self, **conditioning: Any) -> dict[str, Any]:
        """Do the computations on the text that are the same in every step; takes keyword arguments of `forward`.

        Returns:
            Keyword arguments for `forward` that give the same output, bitwise in a batch of the same size: the text as
            `xf_proj` [B, 4 * model_channels] and `xf_kv` [B, text_ctx, K], the keys and values of all attention blocks
            side by side; the others unchanged. Batches can be concatenated along B. Errors as `forward`.

        Example:
            >>> text = model.precompute(tokens=tokens, mask=mask, low_res=low_res)
            >>> sorted(text)
            ['low_res', 'xf_kv', 'xf_proj']
        """
        if not self.xf_width:
            return conditioning
        xf_proj, encoder_kv = self._attended_text([conditioning.pop(name, None) for name in _TEXT])
        return {**conditioning, "xf_proj": xf_proj, "xf_kv": torch.cat(list(encoder_kv), dim=2)}

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        xf_proj: Tensor | None = None,
        xf_out: Tensor | None = None,
        xf_kv: Tensor | None = None,
    ) -> Tensor:
        """Apply the network, like `UNetModel.forward`, to text in one of three forms; ValueError for none or several.

        Args:
            x, timesteps: [B, in_channels, H, W] and [B], integer or float.
            tokens, mask: arguments of `get_text_emb`.
            xf_proj, xf_out: from `get_text_emb`.
            xf_proj, xf_kv: from `precompute`.
        """
        emb = self._embed(x, timesteps)
        if not self.xf_width:
            return self._forward_blocks(x, emb)
        xf_proj, encoder_kv = self._attended_text((tokens, mask, xf_proj, xf_out, xf_kv), x.shape[0])
        return self._forward_blocks(x, emb + xf_proj.to(emb.dtype), encoder_kv)

    def _attended_text(
        self, values: Sequence[Tensor | None], batch: int | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`xf_proj`, and the keys and values of every attention block, from text in any form: the values of `_TEXT`."""
        tokens, mask, xf_proj, xf_out, xf_kv = values
        given = [name for name, value in zip(_TEXT, values, strict=True) if value is not None]
        if set(given) not in _FORMS:
            expected = "tokens and mask, xf_proj and xf_out, or xf_proj and xf_kv"
            raise ValueError(f"text: got {', '.join(given) or 'nothing'}, expected {expected}")
        if tokens is not None:
            xf_proj, xf_out = self.get_text_emb(tokens, mask).values()
        assert xf_proj is not None
        blocks = [block.attention for block in self._blocks() if block.attention is not None]
        widths = [2 * block.norm.num_channels for block in blocks]
        batch = xf_proj.shape[0] if batch is None else batch
        for name, value, sizes in (
            ("xf_proj", xf_proj, (4 * self.model_channels,)),
            ("xf_out", xf_out, (self.xf_width, self.text_ctx)),
            ("xf_kv", xf_kv, (self.text_ctx, sum(widths))),
        ):
            if value is not None and value.shape != (batch, *sizes):
                name = name if tokens is None else "tokens"
                raise ValueError(f"{name}: got encoded shape {tuple(value.shape)}, expected {(batch, *sizes)}")
        if xf_kv is not None:
            return xf_proj, xf_kv.to(self.dtype).split(widths, dim=2)
        features = xf_out.to(self.dtype).transpose(1, 2)  # type: ignore[union-attr]
        return xf_proj, [block.encoder_kv(features) for block in blocks]  # type: ignore[misc]

    def _convert_blocks(self, dtype: torch.dtype) -> None:
        """Cast the text matrices too; positional and padding embedding stay float32."""
        super()._convert_blocks(dtype)
        self.del_cache()
        if self.xf_width:
            convert_modules(self.transformer, (nn.Linear,), dtype)
            self.transformer_proj.to(dtype)
            self.token_embedding.to(dtype)
            if self.xf_ar:
                self.unemb.to(dtype)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal, or both None."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
