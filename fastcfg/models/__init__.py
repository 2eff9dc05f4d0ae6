"""Networks of guided-diffusion and GLIDE, state-dict compatible with the originals, and GLIDE's tokenizer."""

from __future__ import annotations

from fastcfg.models.classifier import EncoderUNetModel
from fastcfg.models.image_conditioned import (
    InpaintText2ImUNet,
    SuperResInpaintText2ImUnet,
    SuperResModel,
    SuperResText2ImUNet,
)
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.models.unet import UNetModel

__all__ = [
    "EncoderUNetModel",
    "InpaintText2ImUNet",
    "SuperResInpaintText2ImUnet",
    "SuperResModel",
    "SuperResText2ImUNet",
    "Text2ImUNet",
    "Tokenizer",
    "UNetModel",
]
