"""Networks: GLIDE-compatible text-conditional UNets and their tokenizer."""

from __future__ import annotations

from fastcfg.models.image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResText2ImUNet
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.models.unet import UNetModel

__all__ = [
    "InpaintText2ImUNet",
    "SuperResInpaintText2ImUnet",
    "SuperResText2ImUNet",
    "Text2ImUNet",
    "Tokenizer",
    "UNetModel",
]
