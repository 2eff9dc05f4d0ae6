"""The pieces of guided-diffusion's sampling scripts: a classifier's gradient, and sample batches for its evaluator."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..utils.files import replacing

__all__ = ["classifier_gradient", "load_samples", "save_samples", "to_uint8"]


def classifier_gradient(classifier: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Callable[..., Tensor]:
    """The cond_fn of `classifier_sample.py`: scale * ∇ log p(y | x_t) of a classifier of noisy images, (x [B, C, ...],
    t [B]) -> logits [B, classes].

    It is a function (x, t, y int64 [B]) -> [B, C, ...], for the loops' `cond_fn`; `model_kwargs` must contain y. It
    selects by `gather`, which a CUDA graph can capture.

    Example:
        >>> cond_fn = classifier_gradient(lambda x, t: x.flatten(1)[:, :10], scale=2.0)
        >>> cond_fn(torch.zeros(1, 3, 2, 2), torch.tensor([5]), y=torch.tensor([3])).shape
        torch.Size([1, 3, 2, 2])
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise ValueError("y: got None, expected the classes, int64 [B], in model_kwargs")
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_probabilities = torch.log_softmax(classifier(x, t).float(), dim=-1)
            selected = log_probabilities.gather(1, y.view(-1, 1))
            return torch.autograd.grad(selected.sum(), x)[0] * scale

    return cond_fn


def to_uint8(samples: Tensor) -> NDArray[np.uint8]:
    """[N, C, H, W] in [-1, 1] as the scripts' bytes, uint8 [N, H, W, C]: scaled and truncated, not rounded."""
    if samples.ndim != 4:
        raise ValueError(f"samples: got shape {tuple(samples.shape)}, expected [N, C, H, W]")
    scaled = ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_samples(
    path: str | os.PathLike[str], samples: Tensor | NDArray[np.uint8], labels: Tensor | None = None
) -> None:
    """Write a batch as the scripts do, for guided-diffusion's evaluator; an error leaves no partial file.

    Args:
        path: an `.npz` file.
        samples: [N, C, H, W] in [-1, 1], or the result of `to_uint8`; becomes `arr_0`, uint8 [N, H, W, C].
        labels: int64 [N]; becomes `arr_1`.

    Raises:
        ValueError: another suffix, samples that are not images, or another number of labels.
        OSError: the file cannot be written.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name that ends in .npz")
    images = to_uint8(samples) if isinstance(samples, Tensor) else samples
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"samples: got {images.dtype} {images.shape}, expected uint8 [N, H, W, C]")
    arrays = [images]
    if labels is not None:
        if tuple(labels.shape) != (len(images),):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {(len(images),)}")
        arrays.append(labels.cpu().numpy())
    with replacing(path) as temporary:
        np.savez(temporary, *arrays)


def load_samples(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """Read a batch back: float32 [N, C, H, W] in [-1, 1] (the input of `super_res_sample.py`), and its labels.

    Raises:
        ValueError: the file does not contain such a batch.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file.files else None
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"path: got {os.fspath(path)!r}, expected an .npz with arr_0 ({error})") from error
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"path: got arr_0 {images.dtype} {images.shape}, expected uint8 [N, H, W, C]")
    samples = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return samples.contiguous(), None if labels is None else torch.from_numpy(labels)
