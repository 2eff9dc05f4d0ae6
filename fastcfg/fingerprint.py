"""What a captured program has baked in: where the weights lie, how the modules around them are built, and torch's
settings."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "torch_settings"]

# Functions of these packages are known not to look for weights among their globals.
_LIBRARIES = frozenset({"torch", "triton", "numpy", "fastcfg"}) | sys.stdlib_module_names
_MAX_NAMES = 3


@dataclass(frozen=True)
class Fingerprint:
    """The weights and modules that some functions reach, so that what was captured can be told from what is there now.

    Found are modules, and functions, methods, partials, callable objects and containers that lead to one: through
    closures, defaults, attributes, and the globals that their code names. Tensors changed in place leave a fingerprint
    as it was. It keeps no tensor and no module alive.

    Attributes:
        entries: by dotted name, what is compared.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = Fingerprint.of({"model": model})
        >>> _ = model.double()
        >>> before.difference(Fingerprint.of({"model": model}))
        'model.weight, model.bias replaced'
    """

    entries: Mapping[str, Any]

    @classmethod
    def of(cls, functions: Mapping[str, Callable[..., Any] | None]) -> Fingerprint:
        """The fingerprint of now.

        Args:
            functions: by the names that `difference` gives them.
        """
        walk = _Walk()
        for name, function in functions.items():
            walk.visit(name, function)
        return cls(walk.entries)

    def difference(self, other: Fingerprint) -> str:
        """What is otherwise in another fingerprint, in a line; empty if nothing is."""
        mine, its = self.entries, other.entries
        if mine == its:
            return ""
        replaced = [name for name, value in its.items() if name in mine and mine[name] != value]
        new = [name for name in its if name not in mine]
        gone = [name for name in mine if name not in its]
        parts = ((replaced, "replaced"), (new, "new"), (gone, "gone"))
        return "; ".join(f"{_listed(names)} {what}" for names, what in parts if names)


class _Walk:
    """Visits everything once."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self._seen: set[int] = set()
        self._held: list[Any] = []  # ids are compared as long as the objects live

    def visit(self, name: str, value: Any) -> None:
        """Note what is there under a name, and go on to what it leads to."""
        if isinstance(value, Tensor):
            self.entries[name] = _memory(value)
            return
        if not _leads_on(value) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._held.append(value)
        if isinstance(value, nn.Module):
            self._module(name, value)
            return
        if isinstance(value, types.FunctionType):
            self.entries[name] = _Identity(value)
        for key, item in _parts(value):
            self.visit(f"{name}.{key}", item)

    def _module(self, name: str, module: nn.Module) -> None:
        attributes = vars(module)
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        self.entries[name] = (_Identity(type(module)), module.training, hooks)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                self.entries[f"{name}.{key}"] = _memory(tensor)
        for key, value in attributes.items():
            if type(value) is Tensor:
                self.entries[f"{name}.{key}"] = _memory(value)
        if "forward" in attributes:
            self.visit(f"{name}.forward", attributes["forward"])
        for key, child in module._modules.items():
            if child is not None:
                self.visit(f"{name}.{key}", child)


class _Identity:
    """Which object it was, without keeping it alive."""

    def __init__(self, value: Any) -> None:
        self._reference = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return isinstance(other, _Identity) and value is not None and value is other._reference()

    __hash__ = None  # type: ignore[assignment]


def _memory(tensor: Tensor) -> Any:
    """Where a tensor's elements lie and how they are read; of a subclass, where those of the tensors it is made of."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        return [_memory(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except (RuntimeError, ValueError):  # not initialised, or without memory of its own
        return _Identity(tensor)


def _leads_on(value: Any) -> bool:
    """Whether weights may be found through a value."""
    if isinstance(value, types.ModuleType | type | types.BuiltinFunctionType):
        return False
    return callable(value) or isinstance(value, list | tuple | dict | nn.Module)


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
