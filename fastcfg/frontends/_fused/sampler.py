"""Sampling functions of k-diffusion's form, run by their compiled tables."""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from ...compiler import Compiled, trace_sampler
from ...compiler.probe import drawing
from ...engine.conditioning import Alike
from ...engine.noise import NoiseSource
from ...engine.sampler import Sampler, Step
from .._gaussian.loops import split_by_branch
from .fall_through import FallThroughError, log_once

__all__ = ["fused"]

MAX_SAMPLERS = 4
_MAX_COMPILED = 32

# What the engine has its own way with; all else goes to the compiler.
_HANDLED = ("model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler")
_NEEDED = ("model", "x", "sigmas")


def fused(sample_fn: Callable[..., Tensor], backend: str, graph: str | bool) -> Callable[..., Tensor]:
    """As `fastcfg.frontends.k_diffusion.fuse`."""
    if not callable(sample_fn):
        raise TypeError(f"sample_fn: got {type(sample_fn).__name__}, expected a function")
    signature, name = inspect.signature(sample_fn), getattr(sample_fn, "__name__", type(sample_fn).__name__)
    missing = [argument for argument in _NEEDED if argument not in signature.parameters]
    samplers: OrderedDict[Any, Sampler] = OrderedDict()

    def sampler_for(model: Any, compiled: Compiled, x: Tensor, dtype: torch.dtype) -> Sampler:
        key = (Alike(model), compiled.table, dtype, x.device)
        state = torch.float64 if dtype == torch.float64 else torch.float32
        sampler = samplers.pop(key, None) or Sampler(
            model, compiled.table, backend=backend, graph=graph, dtype=dtype, state_dtype=state, device=x.device
        )
        samplers[key] = sampler
        while len(samplers) > MAX_SAMPLERS:
            samplers.popitem(last=False)
        return sampler

    @wraps(sample_fn)
    @torch.no_grad()
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            if missing:
                raise FallThroughError(f"it has no argument {missing[0]}")
            call = _Call.of(sample_fn, bound.arguments)
        except FallThroughError as error:
            log_once(name, str(error))
            return sample_fn(*args, **kwargs)
        return call.run(sampler_for(call.model, call.compiled, call.x, call.rehearsal.dtypes[0]))

    return sample


@dataclass(frozen=True)
class _Rehearsal:
    """What a sampling function asks of others, seen on a small example in the dtypes of the call.

    Attributes:
        draws: of every draw what the noise sampler was given, (sigma, sigma_next); None for `torch.randn_like`.
        callbacks: by the number of the model call, what the callback was given but for tensors of samples.
        plain_callbacks: whether it was given the last model call's input and result.
        tree: what its own Brownian tree was made with beside x; None where it made none.
        dtypes: of the last model input and of the result: half-precision samples become float32 in most functions.
    """

    draws: tuple[tuple[Any, ...] | None, ...]
    callbacks: dict[int, dict[str, Any]]
    plain_callbacks: bool
    tree: tuple[tuple[Any, ...], dict[str, Any]] | None
    dtypes: tuple[torch.dtype, torch.dtype]


@lru_cache(maxsize=_MAX_COMPILED)
def _compiled(
    sample_fn: Callable[..., Tensor],
    levels: tuple[float, ...],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    own_noise: bool,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Compiled, _Rehearsal]:
    rehearsal = _rehearse(sample_fn, torch.tensor(levels, dtype=dtype), x_dtype, own_noise, dict(options))
    return trace_sampler(sample_fn, torch.tensor(levels, dtype=torch.float64), **dict(options)), rehearsal


class _Tree:
    """Stands in for a function's Brownian tree while it is rehearsed."""

    made: list[tuple[tuple[Any, ...], dict[str, Any]]]
    ask: Callable[..., Tensor]

    def __init__(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        type(self).made.append((args, kwargs))

    def __call__(self, *sigmas: Any) -> Tensor:
        return type(self).ask(*sigmas)


def _rehearse(
    sample_fn: Callable[..., Tensor], sigmas: Tensor, dtype: torch.dtype, own_noise: bool, options: dict[str, Any]
) -> _Rehearsal:
    given: list[Tensor] = []
    returned: list[Tensor] = []
    draws: list[tuple[Any, ...] | None] = []
    callbacks: dict[int, dict[str, Any]] = {}
    plain = True

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        given.append(x)
        returned.append(torch.ones_like(x) * len(given))
        return returned[-1]

    def callback(info: dict[str, Any]) -> None:
        nonlocal plain
        plain = plain and bool(given) and info.get("x") is given[-1] and info.get("denoised") is returned[-1]
        plain = plain and len(given) - 1 not in callbacks
        callbacks[len(given) - 1] = {k: None if k in ("x", "denoised") else v for k, v in info.items()}

    def ask(*sigmas: Any) -> Tensor:
        draws.append(sigmas)
        return torch.zeros_like(x)

    def drawn(_: Tensor | None) -> Tensor:
        draws.append(None)
        return torch.zeros_like(x)

    x = torch.zeros(1, 1, 1, 2, dtype=dtype)
    known, module = inspect.signature(sample_fn).parameters, inspect.getmodule(sample_fn)
    arguments: dict[str, Any] = {"callback": callback, "disable": True}
    if own_noise:
        arguments["noise_sampler"] = ask
    arguments = {name: value for name, value in arguments.items() if name in known} | options
    tree: Any = type("Tree", (_Tree,), {"made": [], "ask": staticmethod(ask)})
    original = getattr(module, "BrownianTreeNoiseSampler", None)
    try:
        if original is not None:
            module.BrownianTreeNoiseSampler = tree  # type: ignore[union-attr]
        with drawing(sample_fn, drawn), torch.no_grad():
            result = sample_fn(model, x, sigmas, **arguments)
        dtypes = given[-1].dtype, result.dtype
    except Exception as error:
        raise FallThroughError(f"it fails on an example ({type(error).__name__}: {error})") from error
    finally:
        if original is not None:
            module.BrownianTreeNoiseSampler = original  # type: ignore[union-attr]
    made: list[Any] = tree.made
    return _Rehearsal(tuple(draws), callbacks, plain, made[0] if made else None, dtypes)


@dataclass(eq=False)
class _Call:
    """A call of a sampling function.

    Attributes:
        sample_fn, model, x, sigmas, extra_args, callback, disable: as given.
        noise_sampler: what draws: the caller's, the function's own Brownian tree, or None for `torch.randn_like`.
        compiled: the function's table, with its draws.
        rehearsal: what else it does.
    """

    model: Callable[..., Any]
    x: Tensor
    sigmas: Tensor
    extra_args: dict[str, Any]
    callback: Callable[[dict[str, Any]], object] | None
    disable: bool | None
    noise_sampler: Callable[..., Tensor] | None
    compiled: Compiled
    rehearsal: _Rehearsal
    _asked: Iterator[tuple[Any, ...] | None] = field(init=False)

    @classmethod
    def of(cls, sample_fn: Callable[..., Tensor], arguments: dict[str, Any]) -> _Call:
        """The call with these arguments.

        Raises:
            FallThroughError: the original must make it.
        """
        given = dict(arguments)
        for name, parameter in inspect.signature(sample_fn).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name)
        handled = {name: given.pop(name, None) for name in _HANDLED}
        x, sigmas, noise_sampler = (handled[name] for name in ("x", "sigmas", "noise_sampler"))
        if not isinstance(x, Tensor) or x.ndim < 3 or not x.numel() or not x.dtype.is_floating_point:
            raise FallThroughError("x is no floating tensor [B, C, ...] with elements")
        if not isinstance(sigmas, Tensor):
            raise FallThroughError("sigmas are no tensor")
        for name, value in given.items():
            if not isinstance(value, bool | int | float | str | None):
                raise FallThroughError(f"{name} is a {type(value).__name__}")
        levels, options = tuple(sigmas.detach().double().cpu().tolist()), tuple(sorted(given.items()))
        own_noise = noise_sampler is not None
        try:
            compiled, rehearsal = _compiled(sample_fn, levels, sigmas.dtype, x.dtype, own_noise, options)
        except ValueError as error:
            raise FallThroughError(str(error)) from error
        if len(rehearsal.draws) != len(compiled.start_draws) + sum(map(len, compiled.draws)):
            raise FallThroughError("its draws of noise depend on the dtype")
        if handled["callback"] is not None and not rehearsal.plain_callbacks:
            raise FallThroughError("its callbacks are given other tensors than the model's")
        if rehearsal.tree is not None:
            args, keywords = rehearsal.tree
            make: Any = inspect.getmodule(sample_fn).BrownianTreeNoiseSampler  # type: ignore[union-attr]
            noise_sampler = make(x, *args, **keywords)
        handled |= {"noise_sampler": noise_sampler, "extra_args": dict(handled["extra_args"] or {})}
        return cls(**handled, compiled=compiled, rehearsal=rehearsal)

    def run(self, sampler: Sampler) -> Tensor:
        """The samples."""
        compiled, x = self.compiled, self.x
        self._asked = iter(self.rehearsal.draws)
        start = x.to(sampler.state_dtype)
        if compiled.start != 1.0:
            start = start * compiled.start
        if (drawn := self._noise(compiled.start_draws)) is not None:
            start = torch.add(start, drawn)
        shows = not self.disable if self.disable is not None else sys.stderr.isatty()
        result = sampler.sample(
            tuple(x.shape),
            branches=split_by_branch(self.extra_args, len(x), fused=False),
            noise=NoiseSource(torch.empty_like, self._fill, always=any(compiled.draws)),  # type: ignore[arg-type]
            x_T=start,
            progress=shows,
            callback=None if self.callback is None else self._called_back(start),
        )
        return result.to(self.rehearsal.dtypes[1])

    def _fill(self, row: int, buffer: Tensor | None) -> None:
        weights = self.compiled.draws[row]
        drawn = self._noise(weights)
        if buffer is None:
            return
        if drawn is None:
            buffer.zero_()
        else:
            torch.mul(drawn, 1 / sum(weight**2 for weight in weights) ** 0.5, out=buffer)

    def _noise(self, weights: tuple[float, ...]) -> Tensor | None:
        """The next draws, in the original's order, weighted; None if they add to nothing."""
        total: Tensor | None = None
        for weight in weights:
            asked = next(self._asked)
            if asked is None or self.noise_sampler is None:
                drawn = torch.randn_like(self.x)
            else:
                drawn = self.noise_sampler(*asked)
            if weight:
                drawn = drawn.to(torch.promote_types(self.x.dtype, torch.float32)) * weight
                total = drawn if total is None else total + drawn
        return total

    def _called_back(self, start: Tensor) -> Callable[[Step], None]:
        """What gives the caller's callback its dictionaries."""
        x, function, before = self.x, self.callback, start
        # Made before the first step: later they would be copies that it waits for.
        prepared = {
            row: {name: value.to(x.device) if isinstance(value, Tensor) else value for name, value in info.items()}
            for row, info in self.rehearsal.callbacks.items()
        }

        def called(step: Step) -> None:
            nonlocal before
            if step.row in prepared:
                function(prepared[step.row] | {"x": before.to(x.dtype), "denoised": step.x0.to(x.dtype)})  # type: ignore[misc]
            before = step.x

        return called
