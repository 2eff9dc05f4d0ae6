"""Recorded networks: small ones with weights, inputs and outputs of the original implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastcfg.models
from support import GOLDEN

GLIDE = ("glide_base", "glide_superres", "glide_inpaint")
GUIDED_DIFFUSION = ("gd_unet_class", "gd_unet_legacy", "gd_superres")
CLASSIFIERS = ("gd_classifier_attention", "gd_classifier_adaptive", "gd_classifier_spatial", "gd_classifier_spatial_v2")


@dataclass
class Recorded:
    """A recorded network, its inputs and outputs."""

    case: dict[str, Any]
    arrays: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """The recorded weights, in float32."""
        from safetensors.torch import load_file

        return {key: value.float() for key, value in load_file(GOLDEN / f"{self.case['id']}.safetensors").items()}

    def build(self, **options: Any) -> nn.Module:
        """The network with the recorded weights, in eval mode."""
        case = self.case
        kwargs = {**case["kwargs"], **options}
        if "n_vocab" in case:
            kwargs["tokenizer"] = SimpleNamespace(n_vocab=case["n_vocab"])
        model = getattr(fastcfg.models, case["cls"])(**kwargs)
        model.load_state_dict(self.weights())
        return model.eval()

    @property
    def text(self) -> dict[str, Tensor]:
        return self._some("tokens", "mask")

    @property
    def images(self) -> dict[str, Tensor]:
        return self._some("low_res", "inpaint_image", "inpaint_mask")

    @property
    def conditioning(self) -> dict[str, Tensor]:
        """All that the network takes beside x and timesteps. A classifier's `y` is not its input."""
        classes = {} if self.case["cls"] == "EncoderUNetModel" else self._some("y")
        return {**self.text, **self.images, **classes}

    def _some(self, *names: str) -> dict[str, Tensor]:
        return {name: self.arrays[name] for name in names if name in self.arrays}


def load_recorded(name: str) -> Recorded:
    """The recorded network `name`."""
    files = [GOLDEN / "models.json", GOLDEN / "models_extra.json"]
    cases = {case["id"]: case for file in files for case in json.loads(file.read_text())}
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return Recorded(cases[name], {key: torch.from_numpy(value) for key, value in arrays.items()})
