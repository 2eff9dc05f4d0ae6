"""Partly known pictures: checks, and a function that restores the known pixels at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["KnownPixels", "checked_inpainting"]


def checked_inpainting(inpaint: Any, channels: int, size: int, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    """Check a picture, [C, S, S] or [N, C, S, S] in [-1, 1], and its mask, [1, S, S] or [N, 1, S, S] of ones where the
    picture is known and zeros elsewhere; return both as float32 [N or 1, ...] on the device.

    Raises:
        TypeError: not a pair of tensors.
        ValueError: shapes or values that do not fit.
    """
    if not isinstance(inpaint, tuple | list) or len(inpaint) != 2 or not all(isinstance(v, Tensor) for v in inpaint):
        raise TypeError(f"inpaint: got {type(inpaint).__name__}, expected a pair of tensors (image, mask)")
    tensors = []
    for name, value, depth in (("image", inpaint[0], channels), ("mask", inpaint[1], 1)):
        shape = (depth, size, size)
        if tuple(value.shape) not in (shape, (1, *shape), (batch, *shape)):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape} or {(batch, *shape)}")
        tensors.append(value.detach().to(device, torch.float32).reshape(-1, *shape))
    image, mask = tensors
    if not (image.abs() <= 1).all():
        raise ValueError("image: got values outside [-1, 1], expected none")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask: got other values than 0 and 1, expected 1 where the image is known and 0 elsewhere")
    return image, mask


class KnownPixels:
    """A `denoised_fn` that puts the known pixels back (GLIDE's inpainting notebook): x0 (1 - mask) + image mask.

    One function serves all batches of up to `batch` samples [N, C, S, S], with their pictures in static buffers, so
    that a sampler keeps its graphs.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, channels: int, size: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self._image = torch.zeros(batch, channels, size, size, device=device)
        self._mask = torch.zeros(batch, 1, size, size, device=device)

    def load(self, image: Tensor, mask: Tensor, batch: int) -> None:
        """Set the pictures of the next batch, [N or 1, C, S, S] and [N or 1, 1, S, S]."""
        self._image[:batch].copy_(image)
        self._mask[:batch].copy_(mask)

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 [N, C, S, S] with the known pixels in their place."""
        image, mask = self._image[: len(x0)], self._mask[: len(x0)]
        return x0 * (1 - mask) + image * mask
