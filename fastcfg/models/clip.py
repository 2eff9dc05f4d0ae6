"""GLIDE's noised CLIP: encoders of noised images and of text, and guidance by their similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import attend

# CLIP's, for pixels of 0 to 255.
_CHANNEL_MEANS = (122.77093945, 116.74601272, 104.09373519)
_CHANNEL_STDS = (68.50053285, 66.63215831, 70.32316309)

START_TOKEN = 49406
END_TOKEN = 49407


class HasEncode(Protocol):
    """A tokenizer, as far as `CLIPModel` uses it."""

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text in CLIP's vocabulary, without start and end token."""


class LayerNorm(nn.Module):
    """Layer norm computed in float32 for any dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.g.shape, self.g.float(), self.b.float()).to(x.dtype)


class Affine(nn.Module):
    """A linear layer with initial weights of the given standard deviation."""

    def __init__(self, n_in: int, n_out: int, std: float, use_bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in).normal_(std=std))
        self.b = nn.Parameter(torch.zeros(n_out)) if use_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


class AttentionResblock(nn.Module):
    """Residual self-attention over tokens, causal or not."""

    def __init__(self, width: int, heads: int, blocks: int, causal: bool) -> None:
        super().__init__()
        std = width**-0.5
        self.heads, self.causal = heads, causal
        self.ln = LayerNorm(width)
        self.f_q = Affine(width, width, std)
        self.f_k = Affine(width, width, std, use_bias=False)
        self.f_v = Affine(width, width, std)
        self.f_c = Affine(width, width, std / (2 * blocks))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(x)
        query, key, value = (layer(h).unflatten(2, (self.heads, -1)) for layer in (self.f_q, self.f_k, self.f_v))
        return x + self.f_c(attend(query, key, value, self.causal))


class FullyConnectedResblock(nn.Module):
    """Residual MLP with the exact GELU and four times the width inside."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f_1 = Affine(width, 4 * width, (2 * width) ** -0.5)
        self.f_2 = Affine(4 * width, width, width**-0.5 / (2 * blocks))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f_2(F.gelu(self.f_1(self.ln(x))))


class TransformerBlock(nn.Module):
    """Attention, then MLP."""

    def __init__(self, width: int, heads: int, blocks: int, causal: bool) -> None:
        super().__init__()
        self.f_attn = AttentionResblock(width, heads, blocks, causal)
        self.f_mlp = FullyConnectedResblock(width, blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.f_mlp(self.f_attn(x))


class TextEmbedding(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, n_vocab: int, n_context: int, width: int) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(torch.empty(n_vocab, width).normal_(std=0.02))
        self.w_pos = nn.Parameter(torch.empty(n_context, width).normal_(std=0.01))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.w_voc) + self.w_pos


class ImageEmbedding(nn.Module):
    """A token for the timestep, followed by the patches of an image."""

    def __init__(self, image_size: int, patch_size: int, width: int, n_timestep: int) -> None:
        super().__init__()
        std = width**-0.5
        self.patch_size = patch_size
        if n_timestep:
            self.w_t = nn.Parameter(torch.empty(n_timestep, width).normal_(std=std))
        else:
            self.pred_state = nn.Parameter(torch.empty(width).normal_(std=std))
        patch = torch.empty(width, 3, patch_size, patch_size)
        self.patch_proj = nn.Parameter(patch.normal_(std=math.sqrt(2 * std**2 / patch_size**2)))
        self.w_pos = nn.Parameter(torch.empty(1 + (image_size // patch_size) ** 2, width).normal_(std=std))
        self.ln = LayerNorm(width)
        # Buffers move with the weights: no call copies them from the host.
        for name, values in (("channel_means", _CHANNEL_MEANS), ("channel_stds", _CHANNEL_STDS)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        # In float32: float16 has three bits after the point for pixels up to 255.
        x = (x.float() - self.channel_means.float()) / self.channel_stds.float()  # type: ignore[operator]
        patches = F.conv2d(x.to(self.patch_proj.dtype), self.patch_proj, stride=self.patch_size)
        first = self.pred_state.expand(len(x), -1) if t is None else F.embedding(t.long(), self.w_t)
        return self.ln(torch.cat([first[:, None], patches.flatten(2).transpose(1, 2)], dim=1) + self.w_pos)


class FeatureExtractor(nn.Module):
    """Layer norm and projection of one token's features."""

    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f = Affine(width, n_embd, math.sqrt(2 / (width + n_embd)), use_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.ln(x))


class TextEncoder(nn.Module):
    """Text encoder of GLIDE's CLIP (`clip.encoders.TextEncoder`), state-dict compatible with it.

    Args:
        n_bpe_vocab, max_text_len: number of token ids, and of tokens of a padded text.
        n_embd: width of the embedding.
        n_head, n_head_state: attention heads, and channels of each.
        n_xf_blocks: transformer blocks.
    """

    def __init__(
        self, n_bpe_vocab: int, max_text_len: int, n_embd: int, n_head: int, n_xf_blocks: int, n_head_state: int = 64
    ) -> None:
        super().__init__()
        self.max_text_len = max_text_len
        embedding = TextEmbedding(n_bpe_vocab, max_text_len, n_head * n_head_state)
        self.blocks = _stack(embedding, n_head * n_head_state, n_head, n_xf_blocks, n_embd, causal=True)

    def forward(self, text: Tensor, text_len: Tensor) -> Tensor:
        """Encode padded texts of integer ids [B, max_text_len] and lengths [B]; the last token's features are used.

        Returns [B, n_embd], of the dtype of the weights, not normalised. ValueError for shapes that do not fit.
        """
        if text.ndim != 2 or text.shape[1] != self.max_text_len:
            raise ValueError(f"text: got shape {tuple(text.shape)}, expected [B, {self.max_text_len}]")
        if text_len.shape != text.shape[:1]:
            raise ValueError(f"text_len: got shape {tuple(text_len.shape)}, expected {tuple(text.shape[:1])}")
        *blocks, output = self.blocks.values()
        h = text.long()
        for block in blocks:
            h = block(h)
        last = (text_len.long() - 1)[:, None, None].expand(-1, 1, h.shape[2])
        return output(h.gather(1, last)[:, 0])


class ImageEncoder(nn.Module):
    """Encoder of noised images of GLIDE's CLIP (`clip.encoders.ImageEncoder`), state-dict compatible with it.

    Args:
        image_size, patch_size: height and width of the images, and of a patch: a divisor, or ValueError.
        n_embd, n_head, n_xf_blocks, n_head_state: see `TextEncoder`.
        n_timestep: number of timesteps; 0 for an encoder of clean images.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        n_embd: int,
        n_head: int,
        n_xf_blocks: int,
        n_head_state: int = 64,
        n_timestep: int = 0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size: got {patch_size}, expected a divisor of image_size {image_size}")
        width = n_head * n_head_state
        self.image_size, self.n_timestep = image_size, n_timestep
        embedding = ImageEmbedding(image_size, patch_size, width, n_timestep)
        self.blocks = _stack(embedding, width, n_head, n_xf_blocks, n_embd, causal=False)

    def forward(self, image: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Encode images [B, 3, image_size, image_size], pixels of 0 to 255; returns the same as `TextEncoder`.

        `timesteps` [B] are whole numbers below `n_timestep`; None for an encoder of clean images. ValueError for shapes
        that do not fit, and missing or unexpected timesteps.
        """
        expected = (3, self.image_size, self.image_size)
        if image.ndim != 4 or image.shape[1:] != expected:
            raise ValueError(f"image: got shape {tuple(image.shape)}, expected {('B', *expected)}")
        if (timesteps is None) != (self.n_timestep == 0):
            got = "None" if timesteps is None else "a tensor"
            raise ValueError(f"timesteps: got {got}, expected it exactly if n_timestep ({self.n_timestep}) is not 0")
        if timesteps is not None and timesteps.shape != image.shape[:1]:
            raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected {tuple(image.shape[:1])}")
        first, *blocks, output = self.blocks.values()
        h = first(image, timesteps)
        for block in blocks:
            h = block(h)
        return output(h[:, 0])


@dataclass
class CLIPModel:
    """GLIDE's CLIP (`clip.model_creation.CLIPModel`): the similarity of noised images and texts.

    Attributes:
        text_encoder, image_encoder: the two networks.
        tokenizer: a tokenizer with CLIP's vocabulary, needed for prompts.
        logit_scale: logarithm of the similarity's factor.
        start_token, end_token: ids before and after every text.

    Example:
        >>> from fastcfg.frontends.glide import create_clip_model, load_checkpoint
        >>> clip = create_clip_model(tokenizer=tokenizer)
        >>> clip.image_encoder.load_state_dict(load_checkpoint("image-enc.pt"))
        >>> clip.text_encoder.load_state_dict(load_checkpoint("text-enc.pt"))
        >>> cond_fn = clip.cond_fn(["a red circle"] * batch, grad_scale=3.0)
        >>> gradient = cond_fn(x, t)  # every step
    """

    text_encoder: TextEncoder
    image_encoder: ImageEncoder
    tokenizer: HasEncode | None = None
    logit_scale: float = math.log(100.0)
    start_token: int = START_TOKEN
    end_token: int = END_TOKEN

    @property
    def device(self) -> torch.device:
        """The device of the text encoder."""
        return next(self.text_encoder.parameters()).device

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and lengths of texts, cut to fit and padded with zeros: int64 [B, max_text_len] and [B], on `device`.

        TypeError for a string instead of several; ValueError for no text, or without a tokenizer.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts: got a string, expected several")
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        if self.tokenizer is None:
            raise ValueError("tokenizer: got None, expected one to encode prompts with")
        context = self.text_encoder.max_text_len
        kept = [list(self.tokenizer.encode(prompt))[: context - 2] for prompt in prompts]
        padded = [[self.start_token, *ids, self.end_token] + [0] * (context - 2 - len(ids)) for ids in kept]
        lengths = [len(ids) + 2 for ids in kept]
        return torch.tensor(padded, device=self.device), torch.tensor(lengths, device=self.device)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of texts, float32 [B, n_embd] of length 1; errors as `encode_prompts`."""
        return _normalised(self.text_encoder(*self.encode_prompts(prompts)))

    def image_embeddings(self, images: Tensor, t: Tensor) -> Tensor:
        """The same of noised images [B, 3, H, W] in [-1, 1], at timesteps `t` [B] of the full schedule."""
        return _normalised(self.image_encoder((images + 1) * 127.5, t))

    def cond_fn(self, prompts: Sequence[str], grad_scale: float) -> Callable[..., Tensor]:
        """Encode texts, one per sample or one for all, and return the gradient that guides samples towards them.

        Returns:
            `cond_fn(x, t, grad_scale=grad_scale, **kwargs)`: the gradient of the similarity of `x` and its text times
            `grad_scale`, like `x`, [B, 3, H, W]; other keyword arguments are ignored. ValueError for a batch of the
            wrong size. Errors of this method are those of `encode_prompts`.
        """
        with torch.no_grad():
            texts = self.text_embeddings(prompts)

        def cond_fn(x: Tensor, t: Tensor, grad_scale: float = grad_scale, **kwargs: Any) -> Tensor:
            if len(texts) not in (1, len(x)):
                raise ValueError(f"x: got a batch of {len(x)}, expected {len(texts)}, one per prompt")
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                similarity = math.exp(self.logit_scale) * (texts * self.image_embeddings(x, t)).sum()
                (gradient,) = torch.autograd.grad(similarity, x)
            return gradient * grad_scale

        return cond_fn


def create_clip_model(*, device: torch.device | str | None = None, tokenizer: HasEncode | None = None) -> CLIPModel:
    """GLIDE's CLIP (`clip.model_creation.create_clip_model` with its only configuration) with initial weights.

    They are on `device`; None for torch's default device.
    """
    with torch.device(torch.get_default_device() if device is None else device):
        text = TextEncoder(n_bpe_vocab=65536, max_text_len=77, n_embd=512, n_head=8, n_xf_blocks=12)
        image = ImageEncoder(image_size=64, patch_size=4, n_embd=512, n_head=12, n_xf_blocks=12, n_timestep=1000)
    return CLIPModel(text, image, tokenizer)


def _stack(embedding: nn.Module, width: int, heads: int, blocks: int, n_embd: int, causal: bool) -> nn.ModuleDict:
    """An encoder's layers, named as in the original."""
    middle = {f"block_{index}": TransformerBlock(width, heads, blocks, causal) for index in range(blocks)}
    return nn.ModuleDict({"input": embedding, **middle, "output": FeatureExtractor(width, n_embd)})


def _normalised(features: Tensor) -> Tensor:
    """Features scaled to length 1, in float32."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + 1e-12)
