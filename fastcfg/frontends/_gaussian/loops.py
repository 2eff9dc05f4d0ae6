"""The originals' sampling loops: on the engine, or step by step in the originals' own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...clip import DynamicThreshold
from ...engine.model_output import output_tensor
from ...engine.noise import NoiseSource, philox_source, recorded_source, torch_source
from ...engine.sampler import Sampler
from ...guidance import CFG
from ...ops import dynamic_threshold
from ...table import StepTable
from ...utils.identity import Alike
from ...utils.lru import LRU
from ...utils.progress import progress_bar
from ..classifier_free import ClassifierFree, split_by_branch

Model = Callable[..., Any]
Function = Callable[[Tensor], Tensor]
Keywords = dict[str, Any] | None

_ENGINE = ("seed", "guidance_scale", "backend", "noise_source", "graph", "threshold")


@dataclass(eq=False)
class LoopCall:
    """A call of a sampling loop: the originals' arguments in their order, eta, the solver (a function of
    `fastcfg.solvers`: "ddpm", "ddim" or "ddim_reverse"), and the engine's, as for `Process.p_sample_loop`."""

    model: Model
    shape: Sequence[int]
    noise: Tensor | None = None
    clip_denoised: bool = True
    denoised_fn: Function | None = None
    cond_fn: Model | None = None
    model_kwargs: Keywords = None
    device: Any = None
    progress: bool = False
    eta: float = 0.0
    solver: str = "ddpm"
    seed: int | Sequence[int] | None = None
    guidance_scale: float | None = None
    backend: str = "auto"
    noise_source: str | Callable[[int, tuple[int, ...]], Tensor] = "torch"
    graph: str | bool = "auto"
    threshold: DynamicThreshold | None = None

    def __post_init__(self) -> None:
        if self.guidance_scale is not None:
            self.model = ClassifierFree(self.model, self.guidance_scale)
        if not isinstance(self.shape, tuple | list):
            raise TypeError(f"shape: got {type(self.shape).__name__}, expected a tuple or a list")
        self.shape = tuple(self.shape)
        if self.noise is not None and tuple(self.noise.shape) != self.shape:
            raise ValueError(f"noise: got shape {tuple(self.noise.shape)}, expected {self.shape}")
        if not callable(self.noise_source) and self.noise_source not in ("torch", "philox"):
            raise ValueError(f"noise_source: got {self.noise_source!r}, expected 'torch', 'philox' or a function")
        if self.threshold is not None and not isinstance(self.threshold, DynamicThreshold):
            raise TypeError(f"threshold: got {type(self.threshold).__name__}, expected a DynamicThreshold or None")
        if isinstance(self.model, ClassifierFree) and self.shape[0] % 2:
            raise ValueError(f"shape: got a batch of {self.shape[0]}, expected an even one: [cond; uncond]")
        if self.device is None:
            parameters = self.model.parameters() if hasattr(self.model, "parameters") else iter(())
            tensor = next(iter(parameters), self.noise)
            self.device = "cpu" if tensor is None else tensor.device
        self.device = torch.device(self.device)

    @property
    def guidance(self) -> CFG | None:
        """The guidance the engine can apply, and so keep one sample of each pair; None if the model applies it, or a
        cond_fn needs the pairs."""
        fused = isinstance(self.model, ClassifierFree) and self.cond_fn is None
        return CFG(self.model.guidance_scale) if fused else None  # type: ignore[attr-defined]


def loop_call(solver: str, engine: dict[str, Any], **originals: Any) -> LoopCall:
    """A call with the originals' arguments and the engine's."""
    if unknown := sorted(set(engine) - set(_ENGINE)):
        expected = f"the originals' arguments, {', '.join(_ENGINE[:-1])} or {_ENGINE[-1]}"
        raise TypeError(f"sampling loop: got unexpected {', '.join(unknown)}, expected {expected}")
    return LoopCall(**originals, **engine, solver=solver)


class LoopRunner:
    """Runs loops on the engine for models of some variance. Samplers, with their buffers and graphs, are kept by model
    and solver."""

    def __init__(self, variance: str) -> None:
        self._variance = variance
        self._samplers: LRU[Sampler] = LRU(4)

    def steps(self, call: LoopCall, table: StepTable) -> Iterator[dict[str, Tensor]]:
        """Yield sample and pred_xstart of every step, each of the call's shape."""
        sampler, arguments = self._prepare(call, table)
        for step in progress_bar(call.progress, sampler.iterate(**arguments), total=table.num_rows):
            yield {"sample": _whole_batch(step.x, call), "pred_xstart": _whole_batch(step.x0, call)}

    def final(self, call: LoopCall, table: StepTable) -> Tensor:
        """The last sample alone, of the call's shape."""
        sampler, arguments = self._prepare(call, table)
        return _whole_batch(sampler.sample(**arguments, progress=call.progress), call)

    def _prepare(self, call: LoopCall, table: StepTable) -> tuple[Sampler, dict[str, Any]]:
        shape, guidance, denoised_fn = tuple(call.shape), call.guidance, call.denoised_fn
        batch = shape[0] // (1 if guidance is None else 2)
        if guidance is not None and denoised_fn is not None:
            denoised_fn = partial(_on_pairs, denoised_fn)
        model = call.model if guidance is None else call.model.model  # type: ignore[attr-defined]
        # float64 noise makes the originals compute in float64; everything else becomes float32.
        dtype = torch.float64 if call.noise is not None and call.noise.dtype == torch.float64 else torch.float32
        options = {"backend": call.backend, "graph": call.graph, "device": call.device}
        options |= {"dtype": dtype, "state_dtype": dtype}
        key = (Alike(model), table, shape[1], *options.values())
        options["output"] = partial(_of_channels, shape[1], self._variance)
        sampler = self._samplers.get_or_make(key, lambda: Sampler(model, table, **options))
        return sampler, {
            "shape": (batch, *shape[1:]),
            "guidance": guidance,
            "clip": call.threshold or (1.0 if call.clip_denoised else None),
            "denoised_fn": denoised_fn,
            "cond_fn": call.cond_fn,
            "branches": split_by_branch(call.model_kwargs or {}, shape[0], halves=guidance is not None),
            "noise": _engine_noise(call, sampler, batch),
            "x_T": None if call.noise is None else call.noise[:batch],
        }


def step_by_step(
    step: Callable[..., dict[str, Tensor]], times: Iterable[int], call: LoopCall
) -> Iterator[dict[str, Tensor]]:
    """The originals' loop over their own steps: the same calls, draws and roundings. A step is called as
    step(model, x, t, **arguments of the originals, noise=a function of x)."""
    indices, shape = list(times), tuple(call.shape)
    source = _originals_noise(call)
    x = source.start() if call.noise is None else call.noise
    options: dict[str, Any] = {"clip_denoised": call.clip_denoised, "denoised_fn": _thresholded(call)}
    options |= {"cond_fn": call.cond_fn, "model_kwargs": call.model_kwargs}
    for i, index in enumerate(progress_bar(call.progress, indices)):
        t = torch.full((shape[0],), index, device=call.device)
        with torch.no_grad():
            out = step(call.model, x, t, **options, noise=partial(_draw, source, i))
        yield out
        x = out["sample"]


def _engine_noise(call: LoopCall, sampler: Sampler, batch: int) -> NoiseSource:
    """The originals' draws, in every step and for the whole batch, of which the engine takes the first samples."""
    full, source = tuple(call.shape), call.noise_source
    shape = (batch, *full[1:])
    if source == "philox":
        return philox_source(call.seed, shape, sampler.device, sampler.backend)
    # The originals draw in every step, but for the reverse ODE.
    options = {"dtype": sampler.state_dtype, "every_row": call.solver != "ddim_reverse"}
    drawn = torch_source(call.seed, shape, sampler.device, drawn=full[0], **options)
    if not callable(source):
        return drawn

    def fill(row: int, buffer: Tensor) -> None:
        noise = source(row, full)
        if tuple(noise.shape) != full:
            raise ValueError(f"noise_source({row}): got shape {tuple(noise.shape)}, expected {full}")
        buffer.copy_(noise[:batch])

    return NoiseSource(drawn.start, fill)


def _originals_noise(call: LoopCall) -> NoiseSource:
    if call.noise_source == "philox":
        raise ValueError("noise_source: got 'philox' with backend='reference', expected 'torch' or a function")
    shape, source = tuple(call.shape), call.noise_source
    drawn = torch_source(call.seed, shape, call.device)
    return recorded_source(source, 0, shape, drawn.start) if callable(source) else drawn


def _draw(source: NoiseSource, step: int, x: Tensor) -> Tensor:
    buffer = torch.empty_like(x)
    source.fill(step, buffer)  # type: ignore[misc]
    return buffer


def _thresholded(call: LoopCall) -> Function | None:
    """denoised_fn followed by the threshold; the clamp leaves the result unchanged."""
    function, threshold = call.denoised_fn, call.threshold
    if threshold is None:
        return function
    limits = (threshold.quantile, threshold.floor, threshold.ceiling)
    return lambda x0: dynamic_threshold(x0 if function is None else function(x0), *limits)


def _of_channels(channels: int, variance: str, returned: Any) -> Tensor:
    """The model's output, of the channels that the originals insist on: twice the state's where it has variances."""
    output = output_tensor(returned)
    expected = (*output.shape[:1], channels * (2 if variance.startswith("learned") else 1), *output.shape[2:])
    if output.shape != expected:
        got = f"shape {tuple(output.shape)}"
        raise ValueError(f"model output: got {got}, expected {expected} for {variance} variance")
    return output


def _on_pairs(function: Function, x0: Tensor) -> Tensor:
    """A function of the doubled batch, applied to its first half."""
    return function(torch.cat([x0, x0]))[: len(x0)]


def _whole_batch(x: Tensor, call: LoopCall) -> Tensor:
    return x if call.guidance is None else torch.cat([x, x])
