"""Networks of guided-diffusion and GLIDE, state-dict compatible with the originals, and GLIDE's tokenizer."""

from __future__ import annotations

from .classifier import EncoderUNetModel
from .image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResModel, SuperResText2ImUNet
from .text2im import Text2ImUNet
from .tokenizer import Tokenizer
from .unet import UNetModel

__all__ = ["EncoderUNetModel", "InpaintText2ImUNet", "SuperResInpaintText2ImUnet", "SuperResModel"]
__all__ += ["SuperResText2ImUNet", "Text2ImUNet", "Tokenizer", "UNetModel"]
