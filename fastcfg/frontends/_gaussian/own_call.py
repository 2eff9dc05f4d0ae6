"""One call of an object's own loop, to its end or, where the rest is known, to its first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from .loops import LoopCall, drawing_from
from .own_run import Begun, Fit, OwnRun
from .recording import OwnStepError, RandomState
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
        if not self._original and self._known.get(self._key):
            return self._left_at_first_step()
        return self._own()

    def _own(self) -> Any:
        run, before = self._started(), RandomState(self._device())
        try:
            with self._drawing():
                result = self._called(run)
        except OwnStepError as failed:
            before.put_back()
            return self._loops.run_in_place(self._diffusion, self._name, self._given, failed.error)
        if isinstance(result, GeneratorType):
            return self._steps(run, result)
        run.finish(self._arguments, result)
        self._note(run)
        return result

    def _started(self, stops: bool = False) -> OwnRun:
        loops = self._loops
        return OwnRun(
            self._diffusion,
            self._diffusion.num_timesteps,
            partial(loops.judge, self._diffusion),
            self._known,
            loops.runner,
            self._engine,
            self._original,
            stops,
        )

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
                whole = whole and out is run.out
                yield out
            run.finish(self._arguments, whole=whole)
            self._note(run)
        except OwnStepError as failed:
            before.put_back()
            yield from self._loops.run_in_place(self._diffusion, self._name, self._given, failed.error)
        finally:
            run.close()
            steps.close()  # type: ignore[attr-defined]

    def _left_at_first_step(self) -> Any:
        before, run = RandomState(self._device()), self._started(stops=True)
        with self._drawing():
            try:
                result = self._called(run)
                if isinstance(result, GeneratorType):
                    next(result, None)
            except Begun as begun:
                found = self._known.get((begun.name, arguments_key(begun.call.arguments)))
                if isinstance(found, Fit):
                    return self._by_engine(run, begun, found)
        before.put_back()
        return self._own()

    def _by_engine(self, run: OwnRun, begun: Begun, fit: Fit) -> Any:
        call, kind = run.loop_call(begun.name, begun.call, fit), run.kind(begun.name, begun.own, begun.call, fit)
        call.progress = bool(self._arguments.get("progress"))
        self._loops.last = {"run": "engine", "reason": ""}
        if self._name.endswith("_progressive"):
            return self._drawn(self._loops.runner.steps(call, kind))
        return self._loops.runner.final(call, kind)

    def _drawn(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Steps, with the caller's seed."""
        while True:
            with self._drawing():
                try:
                    out = next(steps)
                except StopIteration:
                    return
            yield out

    def _device(self) -> torch.device:
        return torch.device(self._arguments.get("device") or "cpu")

    def _note(self, run: OwnRun) -> None:
        reason = run.reason
        if run.is_plain and not reason:
            self._known.put(self._key, True)
        if not reason:
            self._loops.last = {
                "run": "stepped",
                "reason": "" if run.is_plain else "its loop does more than its steps",
            }
        else:
            how = "stepped, then the original" if run.by_engine > 0 else "the original"
            self._loops.last = {"run": how, "reason": reason}
            if reason != self._original:
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
        arguments["device"] = LoopCall(model=model, shape=shape, noise=arguments.get("noise")).device


class _Thresholded:
    """denoised_fn followed by a threshold."""

    def __init__(self, function: Any, threshold: Any) -> None:
        self._function, self._limits = function, (threshold.quantile, threshold.floor, threshold.ceiling)

    def __call__(self, x0: Tensor) -> Tensor:
        return dynamic_threshold(x0 if self._function is None else self._function(x0), *self._limits)
