"""What stands for networks: small modules of the interfaces that the families' scripts call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 24  # of the longer process, whose times networks look up


class Network(nn.Module):
    """A function of x, its channel and a looked-up time, of each element alone; `outputs` times as many channels, in
    the given dimension. With y [B] it depends on the label."""

    def __init__(self, outputs: int = 1, dim: int = 1) -> None:
        super().__init__()
        self.times = nn.Embedding(STEPS, 1)
        with torch.no_grad():
            self.times.weight.copy_(torch.linspace(-1, 1, STEPS)[:, None])
        self.outputs, self.dim = outputs, dim

    def forward(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        assert t.shape == (len(x),), f"times of shape {tuple(t.shape)}"
        time = self.times(t) if not t.is_floating_point() else t[:, None] / 1000
        shape = [1] * x.ndim
        shape[self.dim] = x.shape[self.dim]
        channels = torch.arange(x.shape[self.dim], dtype=x.dtype).reshape(shape)
        result = 0.5 * x + 0.3 * torch.tanh(x + 0.2 * channels + time.reshape(-1, *[1] * (x.ndim - 1)))
        if isinstance(y, Tensor):
            result = result + 0.2 * y.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        if self.outputs == 1:
            return result
        return torch.cat([result] + [torch.sin(3 * x) * 0.5] * (self.outputs - 1), self.dim)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guides the first three channels of [cond; uncond], which are given the first half's x."""
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        guided, rest = output.split([3, output.shape[self.dim] - 3], self.dim)
        cond, uncond = guided.chunk(2)
        half = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([half, half]), rest], self.dim)

    def forward_with_rising_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, diffusion_steps: int = STEPS, scale_pow: float = 4.0
    ) -> Tensor:
        """The scale rises as the noise falls, as MDT's does."""
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y)
        guided, rest = output[:, :3], output[:, 3:]
        cond, uncond = guided.chunk(2)
        rise = (1 - torch.cos(((1 - t[: len(half)] / diffusion_steps) ** scale_pow) * torch.pi)) / 2
        scale = (1 + (cfg_scale - 1) * rise).reshape(-1, 1, 1, 1)
        half = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([half, half]), rest], dim=1)


class Captioned(Network):
    """PixArt's: captions, their mask and data about the picture, nested."""

    def forward_with_cfg(  # type: ignore[override]
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, mask: Any = None, data_info: Any = None
    ) -> Tensor:
        assert set(data_info) == {"img_hw", "aspect_ratio"}
        strength = (y * mask[..., None]).mean((1, 2)) * data_info["aspect_ratio"][0, 0]
        return super().forward_with_cfg(x, t, strength, cfg_scale)


class Text(nn.Module):
    """A motion network: nested y; text is encoded by `encode_text`, in every call but for those with an embedding."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.encoded = Network(), 0

    def encode_text(self, text: list[str]) -> Tensor:
        self.encoded += 1
        return torch.tensor([len(one) / 10 for one in text])

    def forward(self, x: Tensor, timesteps: Tensor, y: Any = None) -> Tensor:
        label = y["text_embed"] if "text_embed" in y else self.encode_text(y["text"])
        label = torch.zeros_like(label) if y.get("uncond") else label
        return self.inner(x, timesteps, label) * y["mask"]


class TextGuided(nn.Module):
    """The motion network with guidance of a scale per sample in y."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Text()
        self.encode_text, self.num_classes = self.model.encode_text, self.model.num_classes

    def forward(self, x: Tensor, timesteps: Tensor, y: Any = None) -> Tensor:
        without = {**y, "uncond": True}
        cond, uncond = self.model(x, timesteps, y), self.model(x, timesteps, without)
        return uncond + y["scale"].view(-1, 1, 1, 1) * (cond - uncond)


class Wrapped(nn.Module):
    """A network whose output is in a dictionary, an object or a tuple."""

    def __init__(self, form: str, outputs: int = 1) -> None:
        super().__init__()
        self.inner, self.form = Network(outputs), form

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        output = self.inner(x, t, **kwargs)
        return {"dict": {"x": output}, "object": SimpleNamespace(pred=output), "tuple": (output, None)}[self.form]


class Classifier:
    """A `cond_fn`: the gradient of a log-probability, by autograd."""

    def __init__(self, scale: float = 0.5) -> None:
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, y: Any = None, **_: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            time = t.float().reshape(-1, *[1] * (x.ndim - 1)) / 1000
            logit = torch.log_softmax(torch.stack([torch.sin(x + time), 0.3 * x]), 0)[0].sum()
            return torch.autograd.grad(logit, x)[0] * self.scale
