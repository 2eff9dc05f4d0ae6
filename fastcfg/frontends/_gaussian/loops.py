"""The originals' sampling loops on the engine: their arguments translated into a `Sampler` and its noise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...clip import DynamicThreshold
from ...engine.conditioning import Alike, Shared
from ...engine.noise import NoiseSource, philox_source, torch_source
from ...engine.sampler import Sampler
from ...guidance import CFG, NoGuidance
from ...table import StepTable
from ..classifier_free import ClassifierFree

__all__ = ["Engine", "Request", "split_by_branch"]

# Models and solvers whose samplers are kept for the next call.
MAX_SAMPLERS = 4


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of a sampling loop, those of the originals first.

    Attributes:
        model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress: as in the originals.
        seed: of the noise; None draws from torch's global generator.
        backend: "auto", "triton", "reference" (the originals' own operations) or another of `Sampler`.
        noise_source: "torch", "philox", or a function (step, shape) -> standard normals, step 0 executed first.
        graph: as `Sampler`.
        threshold: dynamic thresholding instead of the clamp to [-1, 1].
        draws: whether the original draws noise at every step: all but its reverse ODE do.
    """

    model: Callable[..., Any]
    shape: Sequence[int]
    noise: Tensor | None = None
    clip_denoised: bool = True
    denoised_fn: Callable[[Tensor], Tensor] | None = None
    cond_fn: Callable[..., Tensor] | None = None
    model_kwargs: dict[str, Any] | None = None
    device: torch.device | str | None = None
    progress: bool = False
    seed: int | Sequence[int] | None = None
    backend: str = "auto"
    noise_source: str | Callable[[int, tuple[int, ...]], Tensor] = "torch"
    graph: str | bool = "auto"
    threshold: DynamicThreshold | None = None
    draws: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list):
            raise TypeError(f"shape: got {type(self.shape).__name__}, expected a tuple or a list")
        if self.noise is not None and tuple(self.noise.shape) != tuple(self.shape):
            raise ValueError(f"noise: got shape {tuple(self.noise.shape)}, expected {tuple(self.shape)}")
        if not callable(self.noise_source) and self.noise_source not in ("torch", "philox"):
            raise ValueError(f"noise_source: got {self.noise_source!r}, expected 'torch', 'philox' or a function")
        if self.threshold is not None and not isinstance(self.threshold, DynamicThreshold):
            raise TypeError(f"threshold: got {type(self.threshold).__name__}, expected a DynamicThreshold or None")
        if isinstance(self.model, ClassifierFree) and self.shape[0] % 2:
            raise ValueError(
                f"shape: got a batch of {self.shape[0]}, expected an even one: [conditional; unconditional]"
            )

    @property
    def fused(self) -> bool:
        """Whether the guidance is the engine's, so that it keeps one sample of each pair. A cond_fn is given pairs."""
        return isinstance(self.model, ClassifierFree) and self.cond_fn is None

    @property
    def place(self) -> torch.device:
        """The device: as given, or that of the model's parameters, of the noise, or the CPU."""
        if self.device is not None:
            return torch.device(self.device)
        parameters = self.model.parameters() if hasattr(self.model, "parameters") else iter(())
        tensor = next(iter(parameters), self.noise)
        return torch.device("cpu") if tensor is None else tensor.device


class Engine:
    """Runs requests, keeping samplers (and with them buffers and graphs) for the next call of the same kind."""

    def __init__(self) -> None:
        self._samplers: OrderedDict[Any, Sampler] = OrderedDict()
        self._pairs: _OnPairs | None = None

    def run(self, request: Request, table: StepTable) -> Iterator[dict[str, Tensor]]:
        """Yield sample and pred_xstart of every step, each of the request's shape."""
        sampler, arguments = self._prepare(request, table)
        copies = 2 if request.fused else 1
        steps: Iterator[Any] = sampler.iterate(**arguments)
        if request.progress:
            from tqdm.auto import tqdm

            steps = iter(tqdm(steps, total=table.num_rows))
        for step in steps:
            yield {"sample": _repeat(step.x, copies), "pred_xstart": _repeat(step.x0, copies)}

    def final(self, request: Request, table: StepTable) -> Tensor:
        """The last sample alone, of the request's shape."""
        sampler, arguments = self._prepare(request, table)
        x = sampler.sample(**arguments, progress=request.progress)
        return _repeat(x, 2 if request.fused else 1)

    def _prepare(self, request: Request, table: StepTable) -> tuple[Sampler, dict[str, Any]]:
        full = tuple(request.shape)
        batch = full[0] // 2 if request.fused else full[0]
        sampler = self._sampler(request, table)
        sampler.guidance = CFG(request.model.guidance_scale) if request.fused else NoGuidance()  # type: ignore[attr-defined]
        sampler.denoised_fn = request.denoised_fn
        if request.fused and request.denoised_fn is not None:
            # The same object for the same function, by which the sampler knows its programs.
            if self._pairs is None or Alike(self._pairs.function) != Alike(request.denoised_fn):
                self._pairs = _OnPairs(request.denoised_fn)
            sampler.denoised_fn = self._pairs
        sampler.cond_fn = request.cond_fn
        conditioning = split_by_branch(request.model_kwargs or {}, full[0], fused=request.fused)
        return sampler, {
            "shape": (batch, *full[1:]),
            "branches": conditioning,
            "noise": _noise(request, sampler, batch),
            "x_T": None if request.noise is None else request.noise[:batch],
        }

    def _sampler(self, request: Request, table: StepTable) -> Sampler:
        model: Any = request.model.model if request.fused else request.model  # type: ignore[attr-defined]
        # float64 noise makes the originals compute in float64; all else becomes float32.
        dtype = torch.float64 if request.noise is not None and request.noise.dtype == torch.float64 else torch.float32
        clip = request.threshold or (1.0 if request.clip_denoised else None)
        options = (clip, request.backend, request.graph, dtype, request.place)
        key = (Alike(model), table, options)
        sampler = self._samplers.pop(key, None) or Sampler(
            model,
            table,
            clip=clip,
            backend=request.backend,
            graph=request.graph,
            dtype=dtype,
            state_dtype=dtype,
            device=request.place,
        )
        self._samplers[key] = sampler
        while len(self._samplers) > MAX_SAMPLERS:
            self._samplers.popitem(last=False)
        return sampler


def _noise(request: Request, sampler: Sampler, batch: int) -> NoiseSource:
    """What the originals draw: at every step, for the whole batch."""
    full = tuple(request.shape)
    shape = (batch, *full[1:])
    source = request.noise_source
    if source == "philox":
        return philox_source(request.seed, shape, sampler.device, sampler.backend)
    drawn = torch_source(
        request.seed, shape, sampler.device, drawn=full[0], dtype=sampler.state_dtype, every_row=request.draws
    )
    if not callable(source):
        return drawn

    def fill(row: int, buffer: Tensor) -> None:
        noise = source(row, full)
        if tuple(noise.shape) != full:
            raise ValueError(f"noise_source({row}): got shape {tuple(noise.shape)}, expected {full}")
        buffer.copy_(noise[:batch])

    return NoiseSource(drawn.start, fill)


def split_by_branch(model_kwargs: dict[str, Any], batch: int, *, fused: bool) -> dict[str, dict[str, Any]]:
    """model_kwargs by branch; what has not one row per sample is shared."""
    cond: dict[str, Any] = {}
    uncond: dict[str, Any] = {}
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            cond[name], uncond[name] = value.chunk(2) if fused else (value, value)
        else:
            cond[name] = uncond[name] = Shared(value)
    return {"cond": cond, "uncond": uncond} if fused else {"cond": cond}


class _OnPairs:
    """A function of the doubled batch, for a batch that is not doubled."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x0: Tensor) -> Tensor:
        return self.function(_repeat(x0, 2))[: len(x0)]


def _repeat(x: Tensor, copies: int) -> Tensor:
    return x if copies == 1 else torch.cat([x] * copies)
