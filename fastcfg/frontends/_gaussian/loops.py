"""The originals' sampling loops: on the engine, or step by step in the originals' own operations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...clip import DynamicThreshold
from ...engine.model_input import input_device
from ...engine.model_output import output_tensor
from ...engine.noise import NoiseSource, fill_from, philox_source, recorded_source, seeded_generator, torch_source
from ...engine.sampler import Sampler
from ...guidance import CFG
from ...ops import dynamic_threshold
from ...table import StepTable
from ...utils.checks import plain
from ...utils.identity import Alike
from ...utils.lru import LRU
from ...utils.progress import progress_bar
from .._fused.fall_through import log_once
from ..classifier_free import ClassifierFree, split_by_branch

Model = Callable[..., Any]
Function = Callable[[Tensor], Tensor]
Keywords = dict[str, Any] | None
Order = tuple[int, ...] | None
Orders = tuple[Order, Order, Order]

ENGINE = ("seed", "guidance_scale", "backend", "noise_source", "graph", "threshold", "skip_timesteps", "init_image")
_NAMES = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop", "ddim_reverse": "ddim_reverse_sample_loop"}


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
    skip_timesteps: int = 0
    init_image: Tensor | None = None
    # The step it begins with; `from_image` sets it.
    first = 0

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list):
            raise TypeError(f"shape: got {type(self.shape).__name__}, expected a tuple or a list")
        self.shape, self.eta = tuple(map(plain, self.shape)), plain(self.eta)
        if self.guidance_scale is not None:
            self.model = ClassifierFree(self.model, self.guidance_scale, *self.shape[1:2])
        if self.noise is not None and tuple(self.noise.shape) != self.shape:
            raise ValueError(f"noise: got shape {tuple(self.noise.shape)}, expected {self.shape}")
        if not callable(self.noise_source) and self.noise_source not in ("torch", "philox"):
            raise ValueError(f"noise_source: got {self.noise_source!r}, expected 'torch', 'philox' or a function")
        if self.threshold is not None and not isinstance(self.threshold, DynamicThreshold):
            raise TypeError(f"threshold: got {type(self.threshold).__name__}, expected a DynamicThreshold or None")
        if self.solver == "ddim_reverse" and (self.skip_timesteps or self.init_image is not None):
            raise ValueError("skip_timesteps, init_image: got one for the reverse ODE, expected neither")
        if isinstance(self.model, ClassifierFree) and self.shape[0] % 2:
            raise ValueError(f"shape: got a batch of {self.shape[0]}, expected an even one: [cond; uncond]")
        if isinstance(self.model, ClassifierFree) and len(self.shape) > 1:
            self.model.guided(self.shape[1])
        if self.device is None:
            model = self.model.model if isinstance(self.model, ClassifierFree) else self.model
            weight = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
            if weight is not None and isinstance(model, torch.nn.Module):
                self.device = input_device(model)
            else:
                self.device = next((tensor.device for tensor in (weight, self.noise) if tensor is not None), "cpu")
        self.device = torch.device(self.device)

    @cached_property
    def generator(self) -> torch.Generator | None:
        """The generator of its seed, from which all draws come; None for torch's global one."""
        if self.seed is None or self.noise_source == "philox":
            return None
        return seeded_generator(self.seed, self.device)

    @property
    def name(self) -> str:
        """The original's name of the loop."""
        return _NAMES[self.solver]

    def arguments(self) -> dict[str, Any]:
        """The arguments that make this call: the originals', and the engine's that are not at their defaults."""
        skipped = {"solver", "guidance_scale", *(() if self.solver == "ddim" else ("eta",))}
        options = [field for field in fields(self) if field.name not in skipped]
        given = {field.name: getattr(self, field.name) for field in options}
        defaults = {field.name: field.default for field in options if field.name in ENGINE}
        return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}

    @property
    def guidance(self) -> CFG | None:
        """The guidance the engine can apply, and so keep one sample of each pair; None if the model applies it (it does
        where some channels are not guided), or a cond_fn needs the pairs."""
        fused = isinstance(self.model, ClassifierFree) and self.cond_fn is None
        fused = fused and self.model.guided(self.shape[1]) == self.shape[1]  # type: ignore[attr-defined]
        return CFG(self.model.guidance_scale) if fused else None  # type: ignore[attr-defined]


def loop_call(solver: str, engine: dict[str, Any], **originals: Any) -> LoopCall:
    """A call with the originals' arguments and the engine's."""
    if unknown := sorted(set(engine) - set(ENGINE)):
        expected = f"the originals' arguments, {', '.join(ENGINE[:-1])} or {ENGINE[-1]}"
        raise TypeError(f"sampling loop: got unexpected {', '.join(unknown)}, expected {expected}")
    return LoopCall(**originals, **engine, solver=solver)


def layout_problem(call: LoopCall, settled: Order = None) -> str:
    """Why the engine cannot compute and draw as the originals do from `noise=`; empty if it can. `settled` is the order
    in memory that an object's own samples stay in."""
    noise = call.noise
    if noise is None or call.noise_source != "torch":
        return ""
    if noise.dtype not in (torch.float32, torch.float64):
        return f"the original computes and draws its first step in the dtype of noise=, {noise.dtype}"
    if call.solver != "ddim_reverse" and not noise.is_contiguous() and memory_order(noise) != (settled or ()):
        return "noise= is not contiguous, and the original draws in its memory order"
    return ""


@dataclass(frozen=True)
class LoopKind:
    """What a loop's process is: its solver's table, and what the model predicts; `resume` is the originals' loop of a
    call from a step on. `bound` is what clip_denoised limits x0 to, `draws` says whether every step draws noise, used
    or not, rather than those alone that need it. `orders`, of an object's own steps, are the memory orders of an output
    of the model, and of the sample and x0 made of it, as they were seen; None for the originals'. `settled` says that a
    next step, from such a sample, has the same. `changed` says what the steps go by that has changed."""

    table: StepTable
    prediction: str
    variance: str
    resume: Callable[[LoopCall, int], Iterator[dict[str, Tensor]]]
    bound: float | None = 1.0
    draws: bool = True
    orders: Orders | None = None
    settled: bool = False
    changed: Callable[[], str] = str


class LoopRunner:
    """Runs loops on the engine. Samplers, with their buffers and graphs, are kept by model, solver and variance."""

    def __init__(self) -> None:
        self._samplers: LRU[tuple[Sampler, _Outputs]] = LRU(4)

    def steps(self, call: LoopCall, kind: LoopKind) -> Iterator[dict[str, Tensor]]:
        """Yield sample and pred_xstart of every step, each of the call's shape. The next step starts from the sample as
        its user leaves it: where the engine cannot take that, the original's loop takes over."""
        prepared, begun = self._prepare(call, kind), False
        try:
            for out in self._engine_steps(call, kind, *prepared):
                begun = True
                yield out
        except _WideOutputError as error:
            if begun or call.noise_source == "philox":
                raise
            log_once(call.name, str(error))
            prepared[2].rewind()
            yield from kind.resume(_from_sample(call, call.noise), call.first)

    def _engine_steps(
        self, call: LoopCall, kind: LoopKind, sampler: Sampler, outputs: _Outputs, draws: _Draws, arguments: Any
    ) -> Iterator[dict[str, Tensor]]:
        if outputs.draws and draws.are_watched:
            log_once(call.name, _MODEL_DRAWS)
            yield from kind.resume(call, call.first)
            return
        run, rows, sample = sampler.start(**arguments), kind.table.num_rows, call.noise
        before = _generator_state(call) if kind.orders is not None and call.noise_source == "torch" else None
        for row in progress_bar(call.progress, run.rows(), total=rows - call.first):
            if row == call.first and draws.others:
                outputs.draws = True
                draws.rewind()
                log_once(call.name, _MODEL_DRAWS)
                yield from kind.resume(_from_sample(call, call.noise), call.first)
                return
            step = run.step(row)
            if before is not None and not _draws_alike(outputs.order, call, kind):
                log_once(call.name, _OWN_ORDER)
                _set_generator_state(call, before)
                yield from kind.resume(_from_sample(call, sample), row)
                return
            _, *orders = kind.orders or (None, None, None)
            sample, x0 = (_ordered(_whole_batch(x, call), o) for x, o in zip((step.x, step.x0), orders, strict=True))
            out = {"sample": sample, "pred_xstart": x0}
            layout, order = _layout(sample), None if _draws_alike(outputs.order, call, kind) else outputs.order
            yield out
            sample, problem = out["sample"], ""
            if _layout(sample) != layout:
                problem = f"the sample of step {row} was replaced by one of another shape, dtype or memory order"
            elif order is not None:
                problem, sample = _OWN_ORDER, _ordered(sample, order)
            problem = problem or kind.changed()
            if problem and row + 1 < rows:
                log_once(call.name, problem)
                yield from kind.resume(_from_sample(call, sample), row + 1)
                return
            if row + 1 < rows:
                run.set_state(row + 1, sample[: len(step.x)])
            before = None if before is None else _generator_state(call)

    def final(self, call: LoopCall, kind: LoopKind) -> Tensor:
        """The last sample alone, of the call's shape."""
        sampler, outputs, draws, arguments = self._prepare(call, kind)

        def as_the_engine_draws() -> bool:
            ordered = all(_draws_alike(order, call, kind) for order in outputs.orders)
            return ordered and not (outputs.draws and draws.are_watched)

        if as_the_engine_draws():
            draws.strict = True
            try:
                samples = sampler.sample(**arguments, progress=call.progress)
                if call.first == kind.table.num_rows - 1 and draws.others:
                    raise _ModelDrawsError  # in the only step, which no other follows
                if as_the_engine_draws():
                    return _ordered(_whole_batch(samples, call), kind.orders and kind.orders[1])
            except _ModelDrawsError:
                outputs.draws = True
            except _WideOutputError:
                if call.noise_source == "philox":
                    raise
            draws.rewind()  # and once again, as the original draws
        *_, last = self.steps(call, kind)
        return last["sample"]

    def _prepare(self, call: LoopCall, kind: LoopKind) -> tuple[Sampler, _Outputs, _Draws, dict[str, Any]]:
        shape, guidance, denoised_fn = tuple(call.shape), call.guidance, call.denoised_fn
        batch = shape[0] // (1 if guidance is None else 2)
        if guidance is not None and denoised_fn is not None:
            denoised_fn = partial(_on_pairs, denoised_fn)
        model = call.model if guidance is None else call.model.model  # type: ignore[attr-defined]
        # float64 noise makes the originals compute in float64; everything else becomes float32.
        dtype = torch.float64 if call.noise is not None and call.noise.dtype == torch.float64 else torch.float32
        options: dict[str, Any] = {"backend": call.backend, "graph": call.graph, "device": call.device}
        options |= {"dtype": dtype, "state_dtype": dtype}
        key = (Alike(model), kind.table, shape[1], kind.variance, *options.values())

        def made() -> tuple[Sampler, _Outputs]:
            outputs = _Outputs(shape[1], kind.variance, dtype)
            return Sampler(model, kind.table, output=outputs, **options), outputs

        sampler, outputs = self._samplers.get_or_make(key, made)
        draws = _Draws(call, _engine_noise(call, kind, sampler, batch))
        return sampler, outputs, draws, {
            "shape": (batch, *shape[1:]),
            "guidance": guidance,
            "clip": call.threshold or (kind.bound if call.clip_denoised else None),
            "denoised_fn": denoised_fn,
            "cond_fn": call.cond_fn,
            "branches": split_by_branch(call.model_kwargs or {}, shape[0], halves=guidance is not None),
            "noise": draws.source,
            "x_T": None if call.noise is None else call.noise[:batch],
            "start": call.first or None,
        }  # fmt: skip


def step_by_step(
    step: Callable[..., dict[str, Tensor]], times: Iterable[int], call: LoopCall, first: int = 0
) -> Iterator[dict[str, Tensor]]:
    """The originals' loop over their own steps, from the step `first` on: the same calls, draws and roundings. A step
    is called as step(model, x, t, **arguments of the originals), with noise=(a function of x) where it takes that."""
    indices, shape = list(times)[first:], tuple(call.shape)
    source = _originals_noise(call)
    x = source.start() if call.noise is None else call.noise
    options: dict[str, Any] = {"clip_denoised": call.clip_denoised, "denoised_fn": _thresholded(call)}
    options |= {"cond_fn": call.cond_fn, "model_kwargs": call.model_kwargs}
    takes_noise = _takes_noise(step)
    if callable(call.noise_source) and not takes_noise:
        raise ValueError("noise_source: got a function, expected 'torch' for a step that takes no noise=")
    for i, index in enumerate(progress_bar(call.progress, indices), first):
        t = torch.full((shape[0],), index, device=call.device)
        drawn = {"noise": partial(_draw, source, i)} if takes_noise else {}
        with torch.no_grad(), nullcontext() if takes_noise else drawing_from(call.generator):
            out = step(call.model, x, t, **options, **drawn)
        yield out
        x = out["sample"]


def _takes_noise(step: Callable[..., Any]) -> bool:
    parameters = inspect.signature(step).parameters
    return "noise" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Context in which torch's global generator is in a generator's place."""
    if generator is None:
        yield
        return
    before = _global_state(generator.device)
    _set_global_state(generator.device, generator.get_state())
    try:
        yield
    finally:
        generator.set_state(_global_state(generator.device))
        _set_global_state(generator.device, before)


def _global_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_global_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _generator_state(call: LoopCall) -> Tensor:
    """The state of the generator that a call draws from."""
    return _global_state(call.device) if call.generator is None else call.generator.get_state()


def _set_generator_state(call: LoopCall, state: Tensor) -> None:
    _set_global_state(call.device, state) if call.generator is None else call.generator.set_state(state)


def _draws_alike(order: Order, call: LoopCall, kind: LoopKind) -> bool:
    """Whether the engine draws as the loop does, where the model's outputs are in an order: torch draws what is like a
    state in its memory order. The originals' states take on the outputs', but where the model predicts noise; of other
    steps it is known what was seen."""
    if call.noise_source != "torch" or call.solver == "ddim_reverse":
        return True
    if kind.orders is not None:
        return order == kind.orders[0] and (kind.orders[1] is None or kind.settled)
    # Conditioned by its score, DDIM takes x0 from the state again.
    return order is None or kind.prediction == "epsilon" or (call.solver == "ddim" and call.cond_fn is not None)


def memory_order(tensor: Tensor) -> Order:
    """A tensor's dimensions in memory, the outermost first; None for the usual order."""
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return None if order == tuple(range(tensor.ndim)) else order


def _ordered(x: Tensor, order: Order) -> Tensor:
    """The same values in another memory order, outermost dimension first."""
    if order is None:
        return x
    return x.permute(order).contiguous().permute(*(order.index(dim) for dim in range(x.ndim)))


def _from_sample(call: LoopCall, sample: Any) -> LoopCall:
    """The rest of a call, from a sample: it draws from the same generator."""
    rest = copy.copy(call)
    rest.noise, rest.progress = sample, False
    rest.generator = call.generator
    return rest


def _layout(sample: Any) -> Any:
    """What the engine must know of a sample: its shape, dtype, device and memory order."""
    if not isinstance(sample, Tensor):
        return type(sample)
    return sample.shape, sample.dtype, sample.device, sample.is_contiguous()


def _engine_noise(call: LoopCall, kind: LoopKind, sampler: Sampler, batch: int) -> NoiseSource:
    """The originals' draws, in every step and for the whole batch, of which the engine takes the first samples."""
    full, source = tuple(call.shape), call.noise_source
    shape = (batch, *full[1:])
    if source == "philox":
        return philox_source(call.seed, shape, sampler.device, sampler.backend)
    options = {"dtype": sampler.state_dtype, "every_row": kind.draws}
    drawn = torch_source(None, shape, sampler.device, generator=call.generator, drawn=full[0], **options)
    if not callable(source):
        order = kind.orders[1] if kind.orders and kind.settled else None
        return drawn if order is None else _drawn_in_order(drawn, order, call, sampler.state_dtype)

    def fill(row: int, buffer: Tensor) -> None:
        noise = source(row, full)
        if tuple(noise.shape) != full:
            raise ValueError(f"noise_source({row}): got shape {tuple(noise.shape)}, expected {full}")
        buffer.copy_(noise[:batch])

    return NoiseSource(drawn.start, fill)


def _drawn_in_order(drawn: NoiseSource, order: Order, call: LoopCall, dtype: torch.dtype) -> NoiseSource:
    """Draws of which all are made like states in a memory order; but the first step's where it begins with another."""
    scratch = _ordered(torch.empty(tuple(call.shape), dtype=dtype, device=call.device), order)

    def fill(row: int, buffer: Tensor | None) -> None:
        if row == call.first and call.noise.is_contiguous():  # type: ignore[union-attr]
            drawn.fill(row, buffer)  # type: ignore[misc]
        else:
            fill_from(scratch, call.generator, row, buffer)

    return replace(drawn, fill=fill)


class _WideOutputError(ValueError):
    """A model's output is wider than the state: the original goes on in the output's dtype."""


class _ModelDrawsError(Exception):
    """A model drew from the generator that the loop draws from."""


_MODEL_DRAWS = "the model draws random numbers, in the original before the step's"
_OWN_ORDER = "the model's outputs are in a memory order of their own"


class _Draws:
    """The noise of an engine's run, and whether anything else draws from its generator in the first step: the originals
    draw after the model, the engine before it."""

    def __init__(self, call: LoopCall, source: NoiseSource) -> None:
        self.strict = False  # whether to raise _ModelDrawsError at the second step
        self.are_watched = call.generator is None and call.noise_source == "torch" and call.solver != "ddim_reverse"
        self._call, self._fill, self.source = call, source.fill, source
        self._begin = self._after = None if call.noise_source == "philox" else _generator_state(call)
        if self.are_watched:
            self.source = NoiseSource(source.start, self._watched, always=source.always)

    @property
    def others(self) -> bool:
        """Whether the generator moved since the first step's noise was drawn."""
        return self.are_watched and not torch.equal(_generator_state(self._call), self._after)  # type: ignore[arg-type]

    def rewind(self) -> None:
        """Put the generator back to where the call began."""
        _set_generator_state(self._call, self._begin)  # type: ignore[arg-type]

    def _watched(self, row: int, buffer: Any) -> None:
        if row == self._call.first + 1 and self.strict and self.others:
            raise _ModelDrawsError
        self._fill(row, buffer)  # type: ignore[misc]
        if row == self._call.first:
            self._after = _generator_state(self._call)


def _originals_noise(call: LoopCall) -> NoiseSource:
    if call.noise_source == "philox":
        got = "'philox' with backend='reference'" if call.backend == "reference" else "'philox' for a loop step by step"
        raise ValueError(f"noise_source: got {got}, expected 'torch' or a function")
    shape, source = tuple(call.shape), call.noise_source
    drawn = torch_source(None, shape, call.device, generator=call.generator)
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


class _Outputs:
    """Reads a model's outputs, of the channels that the originals insist on (twice the state's where it has variances),
    and notes the last one's memory order, and all there were."""

    def __init__(self, channels: int, variance: str, dtype: torch.dtype) -> None:
        self._channels, self._variance, self._dtype = channels, variance, dtype
        self.order: Order = None
        self.orders: set[Order] = set()
        self.draws = False  # whether the model draws random numbers, as found out in a run

    def __call__(self, returned: Any) -> Tensor:
        output, variance = output_tensor(returned), self._variance
        channels = self._channels * (2 if variance.startswith("learned") else 1)
        expected = (*output.shape[:1], channels, *output.shape[2:])
        if output.shape != expected:
            got = f"shape {tuple(output.shape)}"
            raise ValueError(f"model output: got {got}, expected {expected} for {variance} variance")
        if output.dtype == torch.float64 != self._dtype:
            raise _WideOutputError(f"model output: got {output.dtype}, wider than the state's {self._dtype}")
        self.order = memory_order(output)
        self.orders.add(self.order)
        return output


def _on_pairs(function: Function, x0: Tensor) -> Tensor:
    """A function of the doubled batch, applied to its first half."""
    return function(torch.cat([x0, x0]))[: len(x0)]


def _whole_batch(x: Tensor, call: LoopCall) -> Tensor:
    return x if call.guidance is None else torch.cat([x, x])
