"""What a captured program has baked in: weights' addresses, modules' structure, Python numbers, torch's settings."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.checks import listed

# Functions of these packages do not use weights among their globals.
LIBRARIES = frozenset({"torch", "triton", "numpy", "fastcfg"}) | sys.stdlib_module_names
_MAX_NAMES = 3
MAX_ITEMS = 4096
_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (bool, int, float, complex, str)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Fingerprint:
    """A record of everything some functions refer to, compared later to find whether a captured program is stale.

    It covers modules, functions, methods, partials, callable objects and containers: their tensors, numbers and
    strings, and what they refer to through closures, defaults, attributes, and the globals that their code names (the
    guidance scale of GLIDE's notebooks, a LoRA's strength). Tensors changed in place do not change it. It keeps no
    tensor and no module alive. Take it after a capture: a model may count its calls. The functions' names are used in
    the results of `changes`.

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
        """One-line summary of what changed since; "" if nothing did. Costs a few microseconds per module."""
        if _Walk(functions, named=False).values == self._values:
            return ""
        now = _Walk(functions, named=True)
        mine, its = (dict(zip(w[0], w[1], strict=True)) for w in ((self._names, self._values), (now.names, now.values)))
        replaced = [name for name, value in its.items() if name in mine and mine[name] != value]
        new = [name for name in its if name not in mine]
        gone = [name for name in mine if name not in its]
        parts = {"replaced": replaced, "new": new, "gone": gone}
        return "; ".join(f"{listed(names, _MAX_NAMES)} {what}" for what, names in parts.items() if names)


class _Walk:
    """Visits everything once and notes what is compared, with names if they are wanted."""

    def __init__(self, functions: Mapping[str, Callable[..., Any] | None], named: bool) -> None:
        self.values: list[Any] = []
        self.names: list[str] = []
        self._named = named
        self._seen: set[int] = set()
        self._held: list[Any] = []  # keeps the objects alive whose ids are compared
        for name, function in functions.items():
            self._visit(name, function)

    def _note(self, name: str, key: str, value: Any) -> None:
        self.values.append(value)
        if self._named:
            self.names.append(f"{name}.{key}" if key else name)

    def _child(self, name: str, key: Any) -> str:
        return f"{name}.{key}" if self._named else ""

    def _visit(self, name: str, value: Any) -> None:
        """Note a value under a name, then visit what it refers to."""
        if isinstance(value, nn.Module):
            self._module(name, value)
        elif isinstance(value, Tensor):
            self._note(name, "", _memory(value))
        elif type(value) in _NUMBERS:
            self._note(name, "", repr(value))  # NaN equals itself
        elif _has_parts(value) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._held.append(value)
            if isinstance(value, types.FunctionType):
                self._note(name, "", _Identity(value))
            for key, item in _parts(value):
                self._visit(self._child(name, key), item)

    def _module(self, name: str, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._held.append(module)
        attributes = module.__dict__
        hooks = len(attributes["_forward_hooks"]), len(attributes["_forward_pre_hooks"])
        forward = getattr(type(module).forward, "__func__", type(module).forward)
        own = type(module).__module__.partition(".")[0] not in LIBRARIES
        # A class's forward may be replaced too, as caches are put into networks.
        identity = _Identity(forward) if own and isinstance(forward, types.FunctionType) else None
        self._note(name, "", (type(module), identity, module.training, hooks))
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            for key, tensor in tensors.items():
                if tensor is not None:
                    self._note(name, key, _memory(tensor))
        # Instances of torch's own classes are replaced, not changed.
        if not type(module).__module__.startswith("torch."):
            for key, value in attributes.items():
                if key not in _MODULE_ATTRIBUTES:
                    self._visit(self._child(name, key), value)
        elif "forward" in attributes:
            self._visit(self._child(name, "forward"), attributes["forward"])
        for key, child in attributes["_modules"].items():
            if child is not None:
                self._module(self._child(name, key), child)


class _Identity:
    """An object's identity, without keeping it alive."""

    def __init__(self, value: Any) -> None:
        self._reference = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return isinstance(other, _Identity) and value is not None and value is other._reference()

    __hash__ = None  # type: ignore[assignment]


def _memory(tensor: Tensor) -> Any:
    """A tensor's address and layout; for a tensor subclass, those of its inner tensors."""
    if tensor.__class__ not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        return [_memory(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, ValueError):  # not initialised, or without storage
        return _Identity(tensor)


def _has_parts(value: Any) -> bool:
    """Whether a value may refer to something that is compared."""
    if isinstance(value, list | tuple | dict):
        return len(value) <= MAX_ITEMS
    return callable(value) and not isinstance(value, types.ModuleType | type | types.BuiltinFunctionType)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """A value's parts, by name."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from variables(value)
    else:
        yield from getattr(value, "__dict__", {}).items()
        yield from (("call", getattr(type(value).__call__, "__func__", type(value).__call__)),)


def variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of a function's code: closure, defaults, and the globals that it names."""
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
    if str(scope.get("__name__")).partition(".")[0] not in LIBRARIES:
        yield from ((name, scope[name]) for name in named(function.__code__) if name in scope)


def named(code: types.CodeType) -> set[str]:
    """The globals that a code object, or one nested in it, may name."""
    nested = (named(item) for item in code.co_consts if isinstance(item, types.CodeType))
    return set(code.co_names).union(*nested)


def torch_settings(device: torch.device) -> tuple[Any, ...]:
    """torch's global settings that choose a program's kernels on a device, hashable. Does not initialise CUDA."""
    backends, cuda = torch.backends, torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
        *(backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.mkldnn.enabled),
        _setting(lambda: backends.cudnn.allow_tf32),
        _setting(lambda: cuda.matmul.allow_tf32),
        *(cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        cuda.cudnn_sdp_enabled(),
    )


def _setting(setting: Callable[[], Any]) -> Any:
    """A setting's value, or None: torch refuses to read TF32's older names once a newer name was set."""
    try:
        return setting()
    except RuntimeError:
        return None
