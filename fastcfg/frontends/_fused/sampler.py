"""Sampling functions of k-diffusion's form, run by their compiled tables."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...compiler import compile_and_rehearse
from ...engine.noise import NoiseSource
from ...engine.sampler import Sampler, Step
from ...utils.identity import Alike
from ...utils.lru import LRU
from ..classifier_free import split_by_branch
from .fall_through import FallThroughError, falling_through, log_once
from .subclass import ORIGINAL

# Arguments the engine takes, the first three always; all others go to the compiler.
_ENGINE = ("model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler")


def fused(sample_fn: Callable[..., Tensor], backend: str, graph: str | bool) -> Callable[..., Tensor]:
    """As `fastcfg.frontends.k_diffusion.fuse`."""
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    signature, name = inspect.signature(sample_fn), getattr(sample_fn, "__name__", type(sample_fn).__name__)
    missing = [argument for argument in _ENGINE[:3] if argument not in signature.parameters]
    samplers: LRU[Sampler] = LRU(4)

    def sampler_for(call: _SamplerCall) -> Sampler:
        model, table, device, dtype = call.model, call.compiled.table, call.x.device, call.rehearsal.dtypes[0]
        state = torch.float64 if dtype == torch.float64 else torch.float32
        options = {"backend": backend, "graph": graph, "device": device, "dtype": dtype, "state_dtype": state}
        key = (Alike(model), table, dtype, device)
        return samplers.get_or_make(key, lambda: Sampler(model, table, **options))

    @wraps(sample_fn)
    @torch.no_grad()
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            if missing:
                raise FallThroughError(f"it has no argument {missing[0]}")
            call = _SamplerCall(sample_fn, bound.arguments)
        except FallThroughError as error:
            log_once(name, str(error))
            return sample_fn(*args, **kwargs)
        return call.run(sampler_for(call))

    setattr(sample, ORIGINAL, sample_fn)
    return sample


class _SamplerCall:
    """A call of a sampling function, arguments by name. Raises `FallThroughError` if the original must make it."""

    def __init__(self, sample_fn: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
        options = dict(arguments)
        for name, parameter in inspect.signature(sample_fn).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                options |= options.pop(name)
        given = {name: options.pop(name, None) for name in _ENGINE}
        self.model, self.x, sigmas = given["model"], given["x"], given["sigmas"]
        self.extra_args, self.callback, self.disable = given["extra_args"] or {}, given["callback"], given["disable"]
        x = self.x
        if not isinstance(x, Tensor) or x.ndim < 3 or not x.numel() or not x.dtype.is_floating_point:
            raise FallThroughError("x is not a floating tensor [B, C, ...] with elements")
        if not isinstance(sigmas, Tensor):
            raise FallThroughError("sigmas are not a tensor")
        for name, value in options.items():
            if not isinstance(value, bool | int | float | str | None):
                raise FallThroughError(f"{name} is a {type(value).__name__}")
        # The caller's, the function's own Brownian tree, or None for `torch.randn_like`.
        self.noise_sampler = given["noise_sampler"]
        levels = tuple(sigmas.detach().double().cpu().tolist())
        kind = (levels, sigmas.dtype, x.dtype, self.noise_sampler is not None, dict(sorted(options.items())))
        with falling_through(ValueError):
            self.compiled, self.rehearsal = compile_and_rehearse(sample_fn, *kind)
        if self.callback is not None and not self.rehearsal.plain_callbacks:
            raise FallThroughError("its callbacks are given other tensors than the model's")
        if self.rehearsal.tree is not None:
            args, keywords = self.rehearsal.tree
            make: Any = inspect.getmodule(sample_fn).BrownianTreeNoiseSampler  # type: ignore[union-attr]
            self.noise_sampler = make(x, *args, **keywords)
        self._arguments = iter(self.rehearsal.draws)

    def run(self, sampler: Sampler) -> Tensor:
        """The samples."""
        compiled, start = self.compiled, self.x.to(sampler.state_dtype)
        if compiled.start != 1.0:
            start = start * compiled.start
        if (noise := compiled.start_noise(self._draw)) is not None:
            start = torch.add(start, noise)
        result = sampler.sample(
            tuple(start.shape),
            branches=split_by_branch(self.extra_args, len(start), halves=False),
            noise=NoiseSource(torch.empty_like, self._fill, always=any(compiled.draws)),  # type: ignore[arg-type]
            x_T=start,
            progress=not self.disable if self.disable is not None else sys.stderr.isatty(),
            callback=None if self.callback is None else self._called_back(start),
        )
        return result.to(self.rehearsal.dtypes[1])

    def _fill(self, row: int, buffer: Tensor | None) -> None:
        noise = self.compiled.noise(self._draw, row)
        if buffer is not None:
            buffer.zero_() if noise is None else buffer.copy_(noise)

    def _draw(self) -> Tensor:
        """The next draw, in the original's order."""
        arguments = next(self._arguments)
        if arguments is None or self.noise_sampler is None:
            return torch.randn_like(self.x)
        return self.noise_sampler(*arguments)

    def _called_back(self, start: Tensor) -> Callable[[Step], None]:
        """A callback of the engine that gives the caller's callback its dictionaries."""
        x, function, before = self.x, self.callback, start

        def placed(info: dict[str, Any]) -> dict[str, Any]:
            return {name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in info.items()}

        # Copied to the device before the first step: later a copy would be waited for.
        prepared = {row: placed(info) for row, info in self.rehearsal.callbacks.items()}

        def called(step: Step) -> None:
            nonlocal before
            if step.row in prepared:
                function(prepared[step.row] | {"x": before.to(x.dtype), "denoised": step.x0.to(x.dtype)})
            before = step.x

        return called
