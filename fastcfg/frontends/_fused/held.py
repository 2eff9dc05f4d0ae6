"""Objects that sample and have their model in an attribute: subclasses of their classes whose methods are fused.

A method is taken for a sampling function of the model: it is run on a copy of the object that has another model in the
attribute's place.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...compiler.stand_ins import FormError
from ...compiler.surroundings import Surroundings, active, all_names, class_data, contents_of
from ...utils.identity import NoValueError
from .arguments import HELD
from .fall_through import FallThroughError, log_once
from .sampler import Runner
from .subclass import STATE, as_subclass, subclass

# Attributes that hold the model, and methods by which it is called, if it is not called itself.
MODELS = ("model", "velocity_model")
CALLS = ("apply_model", "forward_with_cond_scale")


def accelerated(obj: Any, methods: tuple[str, ...]) -> Any:
    """An object with its state, whose methods are fused."""
    kind: Any = type(obj)
    return as_subclass(obj, _fused_class(kind, methods))


def model_name(obj: Any) -> str:
    """The attribute of an object that holds its model; "" if there is none."""
    return next((name for name in MODELS if callable(_model_of(getattr(obj, name, None))[0])), "")


@functools.cache
def _fused_class(original: type, methods: tuple[str, ...]) -> type:
    made = {name: _method(original, name) for name in methods}
    return subclass(original, made, functools.partial(_fused_class, methods=methods))


class _State:
    """The runners of an object's methods."""

    def __init__(self) -> None:
        self.runners: dict[str, tuple[_Held, Runner]] = {}
        self.last: Runner | None = None

    def report(self) -> dict[str, Any]:
        """How the last call ran."""
        return {} if self.last is None else self.last.report()


def _method(original: type, name: str) -> Callable[..., Any]:
    function = getattr(original, name)

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: _State | None = getattr(self, STATE, None)
        if state is None:
            state = _State()
            setattr(self, STATE, state)
        if name not in state.runners:
            held = _Held(self, original, name)
            state.runners[name] = held, Runner(held, "auto", "auto")
        held, state.last = state.runners[name][0], state.runners[name][1]
        try:
            call = state.last.prepared(args, kwargs, {HELD: held.model})
        except FallThroughError as error:
            state.last.note("the original", str(error))
            log_once(held.__name__, str(error))
            return function(self, *args, **kwargs)
        result = state.last.run(call)
        held.settle(call.rehearsal.call.left)
        return result

    return method


class _Held:
    """A method of an object as a function of the object's model.

    Attributes:
        left: the attributes that the last run has set on its copy.
    """

    def __init__(self, obj: Any, original: type, name: str) -> None:
        self._obj, self._original, self._name = obj, original, name
        self.__name__ = f"{original.__name__}.{name}"
        self.__signature__ = inspect.signature(getattr(obj, name))
        self.left: dict[str, Any] = {}
        self._read: set[str] = set()  # attributes of the model

    @property
    def model(self) -> Any:
        """What the object calls."""
        return _model_of(getattr(self._obj, model_name(self._obj), None))[0]

    def __call__(self, /, **arguments: Any) -> Any:
        model, name = arguments.pop(HELD), model_name(self._obj)
        for key, value in vars(self._obj).items():
            if key != name and isinstance(value, types.FunctionType) and not Surroundings(value).constant:
                raise FormError(f"its {key} may do more than return a value")
        real = getattr(self._obj, name)
        state = {key: dict(value) if type(value) is dict else value for key, value in vars(self._obj).items()}
        state |= {key: list(value) for key, value in state.items() if type(value) is list}
        if isinstance(real, torch.nn.Module) and "_modules" in state:
            del state["_modules"][name]
        inner: Any = object.__new__(self._original)
        vars(inner).update(state)
        how = _model_of(real)[1]
        vars(inner)[name] = _Holder(real, how, model, self._read) if how else model
        before = {key: copy.copy(value) if type(value) in (list, dict) else value for key, value in vars(inner).items()}
        # What it sets is seen even if it fails.
        try:
            return getattr(inner, self._name)(**arguments)
        finally:
            self.left = {key: value for key, value in vars(inner).items() if not _is_same(before.get(key), value)}
            self.left |= {key: None for key in before if key not in vars(inner)}

    def settle(self, left: dict[str, Any]) -> None:
        """Set on the object what a run has set on its copy."""
        vars(self._obj).update(left)

    def contents(self) -> Hashable:
        """What the method may read of its object and of its model, by value; None if some of it has no value."""
        model = getattr(self._obj, model_name(self._obj))
        try:
            read = {key: contents_of(getattr(model, key)) for key in sorted(self._read)}
            items = (*self._own().items(), *class_data(self._original))
            return (*read.items(), *((key, contents_of(value)) for key, value in items))
        except (NoValueError, AttributeError):
            return None

    def functions(self) -> list[Any]:
        """The method and those of its object that it may call."""
        found, names = dict[str, Any](), [self._name]
        while names:
            name = names.pop()
            member = inspect.getattr_static(self._original, name, None)
            if name not in found and member is not None:
                found[name] = function = _plain(member)
                code = getattr(inspect.unwrap(function), "__code__", None)
                names += () if code is None else all_names(code)
        return [*found.values(), *active(self._own().values())]

    def _own(self) -> dict[str, Any]:
        """The object's attributes but for the model."""
        name = model_name(self._obj)
        own = {key: value for key, value in vars(self._obj).items() if key != name}
        if "_modules" in own:
            own["_modules"] = {key: value for key, value in own["_modules"].items() if key != name}
        return own


def _plain(member: Any) -> Any:
    """A class's member as a function."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def _is_same(before: Any, now: Any) -> bool:
    """Whether an attribute is the same object, or a list or dictionary of the same objects."""
    if type(now) is list and type(before) is list:
        return len(now) == len(before) and all(map(operator.is_, now, before))
    if type(now) is dict and type(before) is dict:
        return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))
    return now is before


class _Holder:
    """Stands for an object that is called by a method: its other attributes are the object's."""

    def __init__(self, real: Any, how: str, model: Any, names: set[str]) -> None:
        self.__dict__.update(_real=real, _names=names, **{how: model})

    def __getattr__(self, name: str) -> Any:
        self.__dict__["_names"].add(name)
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FormError(f"it sets {name} of its model")


def _model_of(value: Any) -> tuple[Any, str]:
    """What is called of an object's model, and by which method; "" if it is called itself."""
    for how in CALLS:
        if callable(getattr(value, how, None)):
            return getattr(value, how), how
    return value, ""
