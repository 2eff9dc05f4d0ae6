"""UNets that also see images: super-resolution of guided-diffusion and GLIDE, and GLIDE's inpainting.

`in_channels` counts the channels of the image; the first convolution has more. In every `forward`:

    low_res: [B, C, h, w] in [-1, 1], resized to the size of `x`.
    inpaint_image: [B, C, H, W] in [-1, 1], used where the mask is 1; zeros if left out.
    inpaint_mask: [B, 1, H, W], 1 where the image is known; zeros if left out.

ValueError if `low_res` is missing or a shape does not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .text2im import Text2ImUNet
from .unet import UNetModel

Image = Tensor | None


class SuperResModel(UNetModel):
    """`UNetModel` that also sees a smaller image (guided-diffusion, class of the same name)."""

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Image = None, **kwargs: Any
    ) -> Tensor:
        """Apply the network, like `UNetModel.forward`; see the module for `low_res`."""
        return super().forward(torch.cat([x, _resize(low_res, x)], dim=1), timesteps, **kwargs)


class SuperResText2ImUNet(Text2ImUNet):
    """`Text2ImUNet` that also sees a smaller image (GLIDE, class of the same name)."""

    _image_inputs = 2

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Image = None, **kwargs: Any
    ) -> Tensor:
        """Apply the network, like `Text2ImUNet.forward`; see the module for `low_res`."""
        return super().forward(torch.cat([x, _resize(low_res, x)], dim=1), timesteps, **kwargs)


class InpaintText2ImUNet(Text2ImUNet):
    """`Text2ImUNet` that also sees the known part of the image and its mask (GLIDE, class of the same name)."""

    _image_inputs, _mask_inputs = 2, 1

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, inpaint_image: Image = None, inpaint_mask: Image = None, **kwargs: Any
    ) -> Tensor:
        """Apply the network, like `Text2ImUNet.forward`; see the module for the images."""
        return super().forward(torch.cat([x, *_known(x, inpaint_image, inpaint_mask)], dim=1), timesteps, **kwargs)


class SuperResInpaintText2ImUnet(Text2ImUNet):
    """Super-resolution and inpainting in one network (GLIDE, class of the same name)."""

    _image_inputs, _mask_inputs = 3, 1

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        inpaint_image: Image = None,
        inpaint_mask: Image = None,
        low_res: Image = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the network, like `Text2ImUNet.forward`; see the module for the images."""
        images = [x, *_known(x, inpaint_image, inpaint_mask), _resize(low_res, x)]
        return super().forward(torch.cat(images, dim=1), timesteps, **kwargs)


def _resize(low_res: Image, x: Tensor) -> Tensor:
    """The smaller image at the size of `x`."""
    if low_res is None or low_res.ndim != 4 or low_res.shape[:2] != x.shape[:2]:
        got = "None" if low_res is None else f"shape {tuple(low_res.shape)}"
        raise ValueError(f"low_res: got {got}, expected [{x.shape[0]}, {x.shape[1]}, height, width]")
    if low_res.shape == x.shape:  # interpolation would give the same bits
        return low_res
    return F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)


def _known(x: Tensor, image: Image, mask: Image) -> tuple[Tensor, Tensor]:
    """The known part of the image, and its mask."""
    image = torch.zeros_like(x) if image is None else image
    mask = torch.zeros_like(x[:, :1]) if mask is None else mask
    for name, given, like in (("inpaint_image", image, x), ("inpaint_mask", mask, x[:, :1])):
        if given.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(given.shape)}, expected {tuple(like.shape)}")
    return image * mask, mask
