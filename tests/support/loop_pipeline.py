"""A diffusers-like pipeline around any scheduler."""

from __future__ import annotations

from typing import Any

import torch


class Pipeline:
    """The loop of a pipeline around any scheduler, in any dtype."""

    def __init__(self, scheduler: Any, dtype: torch.dtype = torch.float32, skipped: int = 0, **options: Any) -> None:
        self.scheduler, self.dtype, self.skipped, self.options = scheduler, dtype, skipped, options

    def __call__(self, steps: int = 20) -> Any:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0)) * float(self.scheduler.init_noise_sigma)
        x = x.to(self.dtype)
        for t in self.scheduler.timesteps[self.skipped :]:
            output = torch.tanh(self.scheduler.scale_model_input(x, t).float()).to(self.dtype)
            x = self.scheduler.step(output, t, x, return_dict=False, **self.options)[0]
        return x
