"""One run of an object's own loop, whose steps are the engine's where these were shown to be its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._fused.subclass import ORIGINAL
from .folding import folded, folded_model, folded_result, unfolded_steps
from .keys import arguments_key, has_others
from .loops import LoopCall, LoopKind, LoopRunner, Order, layout_problem, memory_order
from .manner import USUAL, Manner, called
from .proof import FirstStep, StepCall, make_first
from .recognition import STEPS, step_signature
from .recording import RandomState, same
from .side_effects import Surroundings
from .view import Contents, version


@dataclass(frozen=True, eq=False)
class Fit:
    """What makes an object's steps on the engine: the kind of loop, whether x0 is limited, how many dimensions of the
    samples after the first are made part of it (`folding`), and how the steps call the model (`manner`)."""

    kind: LoopKind
    clips: bool
    folds: int = 0
    manner: Manner = USUAL

    @property
    def settled(self) -> Order:
        """The memory order that samples stay in; None for the usual one, or where that is not known."""
        return self.kind.orders[1] if self.kind.orders and self.kind.settled and not self.folds else None


class Begun(BaseException):
    """A loop has come to its first step, and the rest is known. (The loop may catch an Exception.)"""

    def __init__(self, name: str, own: Callable[..., Any], call: StepCall) -> None:
        super().__init__(name)
        self.name, self.own, self.call = name, own, call


class OwnRun:
    """A run of an object's own loop.

    Args:
        diffusion: the object.
        num_steps: T.
        judge: called with a step's name, function and `FirstStep`, returns how the engine makes such steps, or why it
            cannot.
        known: what was found about steps by their names and arguments: (name, key) to the same.
        runner: of the engine.
        engine: arguments of the engine's alone, for `LoopCall`.
        original: why the object makes all steps; empty if the engine may.
        stops: whether to raise `Begun` at the first step.

    Attributes:
        reason: why the object makes its own steps, since when it is known; empty while it does not.
        by_engine: how many steps the engine has made, or asked the object to make (`handed_over`).
        is_plain: whether the loop has done nothing but its steps, one after the other. It is not watched once it did.
    """

    def __init__(
        self,
        diffusion: Any,
        num_steps: int,
        judge: Callable[[str, Callable[..., Any], FirstStep], Fit | str],
        known: Any,
        runner: LoopRunner,
        engine: Mapping[str, Any],
        original: str = "",
        stops: bool = False,
    ) -> None:
        self.reason, self.by_engine, self.handed_over, self.is_plain = original, 0, False, True
        self._diffusion, self._num_steps, self._judge, self._known = diffusion, num_steps, judge, known
        self._runner, self._engine, self._stops = runner, engine, stops
        self._inside, self._original_class = False, vars(type(diffusion))[ORIGINAL]
        self._first: StepCall | None = None
        self._judged: tuple[Any, Fit] | None = None
        self._index = -1
        self._steps: Iterator[dict[str, Tensor]] | None = None
        self._out: Any = None
        self._told = Contents(None)
        self._random: RandomState | None = None
        self._attributes = Contents(vars(diffusion))

    def step(self, name: str, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A step of the loop."""
        if self._inside or self.reason:
            return own(*args, **kwargs)
        try:
            call = StepCall(step_signature(type(self._diffusion), name), args, kwargs)  # type: ignore[arg-type]
        except (AttributeError, TypeError):  # which the step itself says
            self._give_up("its step has other arguments than a model, x and t")
            return own(*args, **kwargs)
        if problem := self._unexpected(name, call):
            self._give_up(problem)
            return own(*args, **kwargs)
        if self._stops:
            raise Begun(name, own, call)
        self._watch(call)
        out = self._begin(name, own, call) if self._steps is None else self._next(call, own)
        self._out, self._told = out, Contents(out)
        if self.is_plain:
            self._random = RandomState(call.get("x").device)
        return out

    def _unexpected(self, name: str, call: StepCall) -> str:
        """Why a step cannot be the engine's: it is not one like the last, at the next time."""
        x, t = call.get("x"), call.get("t")
        if not isinstance(x, Tensor) or not isinstance(t, Tensor) or not callable(call.get("model")):
            return "its step is called with other things than a model, x and t"
        if torch.is_grad_enabled() and x.requires_grad:
            return "gradients are wanted"
        if x.ndim < 2 or not x.numel() or t.shape != x.shape[:1] or t.is_floating_point():
            return "its x or t has another shape or dtype"
        index, *others = t.tolist()
        if any(other != index for other in others) or not 0 <= index < self._num_steps:
            return "its samples are at different times"
        first = self._first
        if first is None:
            self._first, self._name, self._index = call, name, index
            self._given, self._state = Contents(call.others), Contents(vars(self._diffusion))
            return ""
        self._index += 1 if STEPS[name] == "ddim_reverse" else -1
        if name != self._name or index != self._index:
            return "its steps do not follow one another"
        if not same(first.others, call.others):
            return "its steps are called with different arguments"
        return self.changed()

    def changed(self) -> str:
        """What of the object and of its steps' arguments has changed since the first step; empty if nothing has."""
        if not self._state.is_current(vars(self._diffusion)):
            return "the object's attributes were changed between its steps"
        if not self._given.is_current(self._first.others):  # type: ignore[union-attr]
            return "the arguments of its steps were changed between them"
        return ""

    def _watch(self, call: StepCall) -> None:
        """Note whether the loop did something since the last step."""
        if self._out is None or not self.is_plain:
            return
        x = call.get("x")
        untouched = x is self._out["sample"] and version(x) > -1 and self.is_untouched
        self.is_plain = untouched and not self._random.moved()  # type: ignore[union-attr]

    @property
    def is_untouched(self) -> bool:
        """Whether what the last step returned is as it was."""
        return self._told.is_current(self._out)

    def _begin(self, name: str, own: Callable[..., Any], call: StepCall) -> Any:
        key = (name, arguments_key(call.arguments))
        found = self._known.get(key)
        if found is None:
            self._inside = True
            try:
                around = Surroundings(self._original_class, name)
                first = make_first(own, call, self._diffusion, around)
                found = self._judge(name, own, first)
            finally:
                self._inside = False
            self._known.put(key, found)
            if isinstance(found, str):
                self._give_up(found)
            else:
                self._settle(key, found, call)
            return first.result
        if isinstance(found, str):
            self._give_up(found)
            return call.made_by(own)
        loop_call = self.loop_call(name, call, found)
        if problem := layout_problem(loop_call, found.settled):
            self._give_up(problem)
            return call.made_by(own)
        before = RandomState(loop_call.device)
        self._steps = self.steps(loop_call, self.kind(name, own, call, found), found)
        try:
            return self._from_engine()
        except Exception as error:  # of the engine, or of the model, which then fails again
            before.put_back()
            self._give_up(f"the engine cannot make its steps ({type(error).__name__}: {error})")
            return call.made_by(own)

    def _settle(self, key: Any, found: Fit, call: StepCall) -> None:
        """Note whether a second step, from a sample in the memory order that the first left, leaves the same."""
        if self._judged is None:
            self._judged = key, found
            return
        first_key, first = self._judged
        if first.kind.orders == found.kind.orders and memory_order(call.get("x")) == found.kind.orders[1]:  # type: ignore[index]
            for known, fit in ((first_key, first), (key, found)):
                self._known.put(known, replace(fit, kind=replace(fit.kind, settled=True)))

    def _next(self, call: StepCall, own: Callable[..., Any]) -> Any:
        if self._out["sample"] is not call.get("x"):
            self._out["sample"] = call.get("x")
        return self._from_engine()

    def _from_engine(self) -> Any:
        out = next(self._steps)  # type: ignore[arg-type]
        self.by_engine += 1
        return out

    def loop_call(self, name: str, call: StepCall, fit: Fit) -> LoopCall:
        """The engine's call that begins with a step."""
        x, solver = call.get("x"), STEPS[name]
        index = int(call.get("t")[0])
        names = ("model", "denoised_fn", "cond_fn", "model_kwargs")
        arguments: dict[str, Any] = {argument: call.get(argument) for argument in names}
        arguments |= {"eta": call.get("eta", 0.0), "clip_denoised": fit.clips, "device": x.device}
        arguments["model"] = called(call.get("model"), fit.manner)
        if fit.folds:
            arguments["model"] = folded_model(arguments["model"], tuple(x.shape[: 1 + fit.folds]))
            x = folded(x, fit.folds)
        made = LoopCall(shape=tuple(x.shape), noise=x, solver=solver, **{**arguments, **self._engine})
        made.first = index if solver == "ddim_reverse" else self._num_steps - 1 - index
        return made

    def steps(self, call: LoopCall, kind: LoopKind, fit: Fit) -> Iterator[Any]:
        """The engine's steps of a call."""
        steps = self._runner.steps(call, kind)
        return unfolded_steps(steps, self._first.get("x").shape, fit.folds) if fit.folds else steps  # type: ignore[union-attr]

    def final(self, call: LoopCall, kind: LoopKind) -> Tensor:
        """The engine's last sample of a call."""
        return self._runner.final(call, kind).view(self._first.get("x").shape)  # type: ignore[union-attr]

    def kind(self, name: str, own: Callable[..., Any], call: StepCall, fit: Fit) -> LoopKind:
        """The kind of loop, whose steps are the object's own where the engine cannot make them."""

        def resume(rest: LoopCall, first: int) -> Iterator[dict[str, Tensor]]:
            x: Any = rest.noise
            shape = call.get("x").shape
            reverse = STEPS[name] == "ddim_reverse"
            for row in range(first, self._num_steps):
                t = torch.full_like(call.get("t"), row if reverse else self._num_steps - 1 - row)
                self._inside, self.handed_over = True, True
                try:
                    with torch.no_grad():
                        out = call.made_by(own, x=x.view(shape) if fit.folds else x, t=t)
                finally:
                    self._inside = False
                out = folded_result(out, fit.folds) if fit.folds else out
                yield out
                x = out["sample"]

        return replace(fit.kind, resume=resume, changed=self.changed)

    def _give_up(self, reason: str) -> None:
        self.reason, self.is_plain = reason, False
        self.close()

    def close(self) -> None:
        """Let the engine end."""
        if self._steps is not None:
            self._steps.close()  # type: ignore[attr-defined]
            self._steps = None

    def finish(self, arguments: Mapping[str, Any], result: Any = None, whole: bool = True) -> None:
        """Note the end of the loop: what it returned, or, of a generator, whether it yielded every step as it was."""
        self.close()
        if not self.is_plain or self._out is None:
            self.is_plain = False
            return
        at_end = self._index == (self._num_steps - 1 if STEPS[self._name] == "ddim_reverse" else 0)
        sample = self._out["sample"]
        unchanged = version(sample) > -1 and self.is_untouched and not self._random.moved()  # type: ignore[union-attr]
        returned = whole if result is None else result is sample
        untouched = self._attributes.is_current(vars(self._diffusion)) and not self.changed()
        self.is_plain = at_end and unchanged and returned and untouched and not has_others(arguments)

    @property
    def out(self) -> Any:
        """What the last step returned."""
        return self._out
