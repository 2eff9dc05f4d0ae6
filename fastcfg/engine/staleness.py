"""What a captured program has baked in: where the weights lie, how the modules around them are built, numbers that
Python knows, and torch's settings."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "torch_settings"]

# Functions of these packages are known not to look for weights among their globals.
_LIBRARIES = frozenset({"torch", "triton", "numpy", "fastcfg"}) | sys.stdlib_module_names
_MAX_NAMES = 3
_MAX_ITEMS = 4096
_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (bool, int, float, complex, str)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Fingerprint:
    """What some functions reach, so that what was captured can be told from what is there now.

    Looked at are modules, functions, methods, partials, callable objects and containers: their tensors, numbers and
    strings, and what they lead to through closures, defaults, attributes, and the globals that their code names (the
    guidance scale of GLIDE's notebooks, a LoRA's strength). Tensors changed in place leave a fingerprint as it was.
    It keeps no tensor and no module alive, and is to be taken after a capture: a model may count its calls.

    Args:
        functions: by the names that `changes` gives them.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = Fingerprint({"model": model})
        >>> _ = model.double()
        >>> before.changes({"model": model})
        'model.weight, model.bias replaced'
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any] | None]) -> None:
        walk = _Walk(functions, named=True)
        self._values, self._names = walk.values, walk.names

    def changes(self, functions: Mapping[str, Callable[..., Any] | None]) -> str:
        """What is otherwise now, in a line; empty if nothing is. It costs some microseconds for each module."""
        if _Walk(functions, named=False).values == self._values:
            return ""
        now = _Walk(functions, named=True)
        mine, its = (dict(zip(w[0], w[1], strict=True)) for w in ((self._names, self._values), (now.names, now.values)))
        replaced = [name for name, value in its.items() if name in mine and mine[name] != value]
        new = [name for name in its if name not in mine]
        gone = [name for name in mine if name not in its]
        parts = ((replaced, "replaced"), (new, "new"), (gone, "gone"))
        return "; ".join(f"{_listed(names)} {what}" for names, what in parts if names)


class _Walk:
    """Visits everything once, noting what is compared, and under which names if they are wanted."""

    def __init__(self, functions: Mapping[str, Callable[..., Any] | None], named: bool) -> None:
        self.values: list[Any] = []
        self.names: list[str] = []
        self._named = named
        self._seen: set[int] = set()
        self._held: list[Any] = []  # ids are compared as long as the objects live
        for name, function in functions.items():
            self._visit(name, function)

    def _note(self, name: str, key: str, value: Any) -> None:
        self.values.append(value)
        if self._named:
            self.names.append(f"{name}.{key}" if key else name)

    def _below(self, name: str, key: Any) -> str:
        return f"{name}.{key}" if self._named else ""

    def _visit(self, name: str, value: Any) -> None:
        """Note what is there under a name, and go on to what it leads to."""
        if isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, Tensor):
            self._note(name, "", _memory(value))
        elif type(value) in _NUMBERS:
            self._note(name, "", repr(value))  # NaN equals itself
        elif _leads_on(value) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._held.append(value)
            if isinstance(value, types.FunctionType):
                self._note(name, "", _Identity(value))
            for key, item in _parts(value):
                self._visit(self._below(name, key), item)

    def _module(self, name: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._held.append(module)
        attributes = module.__dict__
        hooks = len(attributes["_forward_hooks"]), len(attributes["_forward_pre_hooks"])
        self._note(name, "", (type(module), module.training, hooks))
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            if tensors:
                for key, tensor in tensors.items():
                    if tensor is not None:
                        self._note(name, key, _memory(tensor))
        if not _is_torchs(type(module).__module__):
            for key, value in attributes.items():
                if key not in _OF_EVERY_MODULE:
                    self._visit(self._below(name, key), value)
        elif "forward" in attributes:
            self._visit(self._below(name, "forward"), attributes["forward"])
        for key, child in attributes["_modules"].items():
            if child is not None:
                self._module(self._below(name, key), child)


class _Identity:
    """Which object it was, without keeping it alive."""

    def __init__(self, value: Any) -> None:
        self._reference = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return isinstance(other, _Identity) and value is not None and value is other._reference()

    __hash__ = None  # type: ignore[assignment]


def _is_torchs(package: str) -> bool:
    """Whether modules of a class from a package are torch's, which nobody changes but by replacing them."""
    return package.startswith("torch.")


def _memory(tensor: Tensor) -> Any:
    """Where a tensor's elements lie and how they are read; of a subclass, where those of the tensors it is made of."""
    if tensor.__class__ not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        return [_memory(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, ValueError):  # not initialised, or without memory of its own
        return _Identity(tensor)


def _leads_on(value: Any) -> bool:
    """Whether something to compare may be found through a value."""
    if isinstance(value, list | tuple | dict):
        return len(value) <= _MAX_ITEMS
    return callable(value) and not isinstance(value, types.ModuleType | type | types.BuiltinFunctionType)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value holds, by names."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _variables(value)
    else:
        yield from getattr(value, "__dict__", {}).items()
        yield from (("call", getattr(type(value).__call__, "__func__", type(value).__call__)),)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function's code finds under names: in its closure, its defaults, and among its globals."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield "defaults", function.__defaults__ or ()
    yield "defaults", function.__kwdefaults__ or {}
    if "_torchdynamo_orig_callable" in vars(function):
        yield "compiled", vars(function)["_torchdynamo_orig_callable"]
    scope = function.__globals__
    if str(scope.get("__name__")).partition(".")[0] not in _LIBRARIES:
        yield from ((name, scope[name]) for name in _names(function.__code__) if name in scope)


def _names(code: types.CodeType) -> set[str]:
    """The globals that a code or one nested in it may name."""
    nested = (_names(item) for item in code.co_consts if isinstance(item, types.CodeType))
    return set(code.co_names).union(*nested)


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def torch_settings(device: torch.device) -> tuple[Any, ...]:
    """torch's global settings that choose the kernels of a program on a device, hashable. CUDA is not initialised."""
    backends = torch.backends
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
        *(backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.mkldnn.enabled),
        _told(lambda: backends.cudnn.allow_tf32),
        _told(lambda: backends.cuda.matmul.allow_tf32),
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def _told(setting: Callable[[], Any]) -> Any:
    """torch refuses to tell the older names for TF32 where the newer ones were used for one of two backends."""
    try:
        return setting()
    except RuntimeError:
        return None
