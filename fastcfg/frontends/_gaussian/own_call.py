"""One call of an object's own loop, to its end or, where the rest is known, to its first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor

from ...engine.noise import seeded_generator
from ...ops import dynamic_threshold
from ...utils.lru import LRU
from .._fused.fall_through import log_once
from ..classifier_free import ClassifierFree
from .keys import arguments_key
from .loops import LoopCall, LoopKind, drawing_from, layout_problem
from .own_run import Begun, Fit, OwnRun
from .recording import OwnStepError, RandomState
from .side_effects import is_simple
from .view import with_steps


class Known:
    """An LRU under a key that all its keys begin with."""

    def __init__(self, values: LRU[Any], key: Any) -> None:
        self._values, self._key = values, key

    def get(self, key: Any) -> Any:
        """The value under a key; None if there is none."""
        return self._values.get((self._key, key))

    def put(self, key: Any, value: Any) -> None:
        """Store a value."""
        self._values.put((self._key, key), value)


class OwnCall:
    """One call of a loop of an object's own."""

    def __init__(self, loops: Any, diffusion: Any, name: str, base: Any, bound: Any, engine: dict[str, Any]) -> None:
        self._loops, self._diffusion, self._name, self._base, self._bound = loops, diffusion, name, base, bound
        self._known = loops.known(diffusion)
        self._given = {**dict(list(bound.arguments.items())[1:]), **engine}
        _fill(bound.arguments, engine)
        self._arguments = dict(list(bound.arguments.items())[1:])
        self._key = ("loop", name, arguments_key(self._arguments))
        seed = engine.pop("seed", None)
        self._original = "backend='reference'" if engine.get("backend") == "reference" else ""
        self._engine = engine
        if seed is None:
            self._drawing: Callable[[], Any] = nullcontext
        else:
            generator = seeded_generator(seed, torch.device(bound.arguments.get("device") or "cpu"))
            self._drawing = partial(drawing_from, generator)

    def run(self) -> Any:
        """The loop's result, or a generator."""
        if self._original or not self._known.get(self._key):
            return self._own()
        if inspect.isgeneratorfunction(self._base):
            return self._steps_of_rest()
        if (found := self._rest()) is None:
            return self._own()
        run, call, kind, _ = found
        with self._drawing():
            return run.final(call, kind)

    def _own(self) -> Any:
        run, before = self._started(), RandomState(self._device())
        try:
            with self._drawing():
                result = self._called(run)
        except OwnStepError as failed:
            return self._in_place(before, failed.error)
        if isinstance(result, GeneratorType):
            return self._steps(run, result)
        run.finish(self._arguments, result)
        self._note(run)
        return result

    def _started(self, stops: bool = False) -> OwnRun:
        loops = self._loops
        run = OwnRun(
            self._diffusion,
            self._diffusion.num_timesteps,
            partial(loops.judge, self._diffusion),
            self._known,
            loops.runner,
            self._engine,
            self._original,
            stops,
        )
        if (plain := self._known.get(self._key)) is None:
            plain = is_simple(loops.original, self._name, self._diffusion)
        run.is_plain = plain
        return run

    def _called(self, run: OwnRun) -> Any:
        view = with_steps(self._diffusion, self._loops.original, run.step)
        arguments = inspect.BoundArguments(self._bound.signature, dict(self._bound.arguments))
        arguments.arguments[next(iter(arguments.arguments))] = view
        return self._base(*arguments.args, **arguments.kwargs)

    def _steps(self, run: OwnRun, steps: Iterator[Any]) -> Iterator[Any]:
        whole, before = True, RandomState(self._device())
        try:
            while True:
                with self._drawing():
                    try:
                        out = next(steps)
                    except StopIteration as end:
                        if end.value is not None:
                            whole = False
                        break
                whole = whole and out is run.out and run.is_untouched
                yield out
            run.finish(self._arguments, whole=whole)
            self._note(run)
        except OwnStepError as failed:
            yield from self._in_place(before, failed.error)
        except GeneratorExit:
            run.is_plain = False
            self._note(run)
            raise
        finally:
            run.close()
            steps.close()  # type: ignore[attr-defined]

    def _steps_of_rest(self) -> Iterator[Any]:
        """The steps of a loop that is left at its first one, which it comes to when that is asked for."""
        if (found := self._rest()) is None:
            yield from self._own()
            return
        run, call, kind, fit = found
        steps = run.steps(call, kind, fit)
        while True:
            with self._drawing():
                try:
                    out = next(steps)
                except StopIteration:
                    return
            yield out

    def _rest(self) -> tuple[OwnRun, LoopCall, LoopKind, Fit] | None:
        """Run a loop to its first step: what is left. None, and nothing is drawn, if this is not known."""
        before, run = RandomState(self._device()), self._started(stops=True)
        with self._drawing():
            try:
                result = self._called(run)
                if isinstance(result, GeneratorType):
                    next(result, None)
            except Begun as begun:
                fit = self._known.get((begun.name, arguments_key(begun.call.arguments)))
                call = run.loop_call(begun.name, begun.call, fit) if isinstance(fit, Fit) else None
                if isinstance(fit, Fit) and call is not None and not layout_problem(call):
                    call.progress = bool(self._arguments.get("progress"))
                    self._loops.last = {"run": "engine", "reason": ""}
                    return run, call, run.kind(begun.name, begun.own, begun.call, fit), fit
        before.put_back()
        return None

    def _in_place(self, before: RandomState, error: Exception) -> Any:
        """guided-diffusion's loop in place of the object's own, from the start. Raises the own one's error where these
        differ."""
        failed = RandomState(self._device())
        before.put_back()
        try:
            return self._loops.run_in_place(self._diffusion, self._name, self._given, error)
        except Exception:
            failed.put_back()
            raise

    def _device(self) -> torch.device:
        return torch.device(self._arguments.get("device") or "cpu")

    def _note(self, run: OwnRun) -> None:
        if run.out is None and not run.reason:
            run.reason = "its loop makes no step of those that are known"
        loops, reason = self._loops, run.reason
        if not reason and not run.handed_over:
            self._known.put(self._key, run.is_plain)
            reason = "its first call looks at the loop" if run.is_plain else "its loop may do more than its steps"
            loops.last = {"run": "stepped", "reason": reason}
            return
        reason = reason or "the engine handed over"
        loops.last = {"run": "stepped, then the original" if run.by_engine else "the original", "reason": reason}
        if run.reason and run.reason != self._original:
            log_once(f"{type(self._diffusion).__name__}.{self._name}", reason)


def _fill(arguments: dict[str, Any], engine: dict[str, Any]) -> None:
    """Put the engine's options that change functions into the arguments of an object's own loop; and the device, which
    its loop would look for in the model's parameters."""
    scale, threshold = engine.pop("guidance_scale", None), engine.pop("threshold", None)
    shape: Any = arguments.get("shape")
    model: Any = arguments.get("model")
    if scale is not None:
        arguments["model"] = model = ClassifierFree(model, scale, *tuple(shape or ())[1:2])
    if threshold is not None:
        if "denoised_fn" not in arguments:
            raise TypeError("threshold: got one for a loop without denoised_fn, expected None")
        arguments["denoised_fn"] = _Thresholded(arguments["denoised_fn"], threshold)
    if "device" in arguments and arguments["device"] is None and isinstance(shape, tuple | list):
        # Its loop may take noise of another shape.
        with suppress(TypeError, ValueError):
            arguments["device"] = LoopCall(model=model, shape=shape, noise=arguments.get("noise")).device


class _Thresholded:
    """denoised_fn followed by a threshold."""

    def __init__(self, function: Any, threshold: Any) -> None:
        self._function, self._limits = function, (threshold.quantile, threshold.floor, threshold.ceiling)

    def __call__(self, x0: Tensor) -> Tensor:
        return dynamic_threshold(x0 if self._function is None else self._function(x0), *self._limits)
