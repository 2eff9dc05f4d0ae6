"""Text-conditional UNets of GLIDE: base, super-resolution and inpainting."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastcfg.models.nn import LayerNorm32, convert_modules
from fastcfg.models.transformer import Transformer
from fastcfg.models.unet import UNetModel

# Upstream leaves the positional and padding embeddings uninitialised memory. CLIP's value serves training from scratch.
_POSITION_STD = 0.01


class HasVocabulary(Protocol):
    """What the network asks of a tokenizer."""

    n_vocab: int


class Text2ImUNet(UNetModel):
    """A UNet conditioned on text (GLIDE `text2im_model.Text2ImUNet`), state-dict compatible with it.

    A transformer encodes the tokens. Its output at the last position, projected, is added to the timestep embedding,
    and every attention block attends to all of it. Positional and padding embeddings start as small normal values.

    Args:
        text_ctx: number of text positions.
        xf_width: width of the text transformer; 0 for a network without text.
        xf_layers: its blocks.
        xf_heads: its attention heads.
        xf_final_ln: a layer norm ends it.
        tokenizer: anything with `n_vocab`; kept as `tokenizer`, for callers.
        in_channels: channels of the image; subclasses add those of their conditioning images.
        *args: further positional arguments of `UNetModel`.
        cache_text_emb: keep the encoded text of the last call, detached, and use it while tokens and mask stay equal.
            Comparing them waits for the device; passing `xf_proj` and `xf_out` to `forward` does not.
        xf_ar: nonzero adds the layer `unemb` of GLIDE's auxiliary language-model loss, for its parameters only.
        xf_padding: positions whose mask is False get a learned padding embedding.
        share_unemb: `unemb` shares its weight with the token embedding.
        **kwargs: keyword arguments of `UNetModel`.

    Example:
        >>> model = Text2ImUNet(
        ...     16, 64, 2, 2, True, tokenizer, xf_padding=True, in_channels=3, model_channels=32, out_channels=6,
        ...     num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=32,
        ... )
        >>> text = model.get_text_emb(tokens, mask)  # once
        >>> output = model(x, timesteps, **text)     # every step
    """

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
        **kwargs: Any,
    ) -> None:
        channels = self._input_channels(in_channels)
        super().__init__(channels, *args, **kwargs, encoder_channels=xf_width or None)  # type: ignore[misc]
        self.text_ctx = text_ctx
        self.xf_width = xf_width
        self.xf_ar = xf_ar
        self.xf_padding = xf_padding
        self.tokenizer = tokenizer
        self.cache_text_emb = cache_text_emb
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

    def convert_to_fp16(self) -> None:
        """Make convolutions and text matrices float16; norms, positional and padding embedding keep float32."""
        super().convert_to_fp16()
        self._convert_text(torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`."""
        super().convert_to_fp32()
        self._convert_text(torch.float32)

    def get_text_emb(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Encode text.

        Args:
            tokens: [B, text_ctx] integer ids.
            mask: [B, text_ctx] bool, True on real tokens; only used, and then needed, with `xf_padding`.

        Returns:
            `xf_proj` [B, 4 * model_channels], the summary added to the timestep embedding, and `xf_out`
            [B, xf_width, text_ctx], the features attended to: keyword arguments for `forward`.

        Raises:
            ValueError: wrong shape, or a mask that is missing or not bool.
        """
        self._check_text(tokens, mask)
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

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        xf_proj: Tensor | None = None,
        xf_out: Tensor | None = None,
    ) -> Tensor:
        """Apply the network to text given as tokens, or encoded already by `get_text_emb`.

        Args:
            x: [B, in_channels, H, W].
            timesteps: [B], integer or float.
            tokens: [B, text_ctx] integer ids.
            mask: [B, text_ctx] bool, True on real tokens.
            xf_proj: [B, 4 * model_channels].
            xf_out: [B, xf_width, text_ctx].

        Returns:
            [B, out_channels, H, W], of the dtype of `x`.

        Raises:
            ValueError: shapes that do not fit, or text given in neither form or in both.
        """
        emb = self._embed_timesteps(x, timesteps)
        if not self.xf_width:
            return self._forward_blocks(x, emb)
        if tokens is not None and xf_proj is None and xf_out is None:
            text = self.get_text_emb(tokens, mask)
            xf_proj, xf_out = text["xf_proj"], text["xf_out"]
        elif tokens is not None or mask is not None or xf_proj is None or xf_out is None:
            given = {"tokens": tokens, "mask": mask, "xf_proj": xf_proj, "xf_out": xf_out}
            names = ", ".join(name for name, value in given.items() if value is not None)
            raise ValueError(f"text: got {names or 'nothing'}, expected tokens and mask, or xf_proj and xf_out")
        for name, value, sizes in (
            ("xf_proj", xf_proj, (4 * self.model_channels,)),
            ("xf_out", xf_out, (self.xf_width, self.text_ctx)),
        ):
            if value.shape != (x.shape[0], *sizes):
                name = name if tokens is None else "tokens"
                raise ValueError(f"{name}: got encoded shape {tuple(value.shape)}, expected {(x.shape[0], *sizes)}")
        return self._forward_blocks(x, emb + xf_proj.to(emb.dtype), xf_out.to(self.dtype))

    @staticmethod
    def _input_channels(image_channels: int) -> int:
        """Channels of the first convolution's input."""
        return image_channels

    def _check_text(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Raise ValueError unless tokens and mask fit the network."""
        if tokens.ndim != 2 or tokens.shape[1] != self.text_ctx:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [B, {self.text_ctx}]")
        if self.xf_padding and (mask is None or mask.shape != tokens.shape or mask.dtype != torch.bool):
            got = "None" if mask is None else f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(f"mask: got {got}, expected torch.bool of shape {tuple(tokens.shape)}")

    def _convert_text(self, dtype: torch.dtype) -> None:
        """Cast the matrices of the text layers."""
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
