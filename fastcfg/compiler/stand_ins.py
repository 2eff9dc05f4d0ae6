"""Stand-ins for what a sampling function is given, while it is run to be examined: its model and its draws of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils._torch_private import TorchDispatchMode

_AT = torch.ops.aten
_BOUNDS = ((0, "min"), (1, "max"))
_CLAMPS = {_AT.clamp.default, _AT.clamp_.default}
# Products take tensors of one dtype alone.
_PRODUCTS = {_AT.bmm.default, _AT.mm.default, _AT.mv.default, _AT.dot.default, _AT.addmm.default, _AT.baddbmm.default}
# ComfyUI's: functions that its models call with their predictions, before they return the first of them.
HOOKS = "sampler_post_cfg_function"


class FormError(ValueError):
    """A sampling function does what no table can; the message says what was got and what is expected."""


_random: dict[Any, bool] = {}  # operations, whether they draw


class DrawMode(TorchDispatchMode):
    """Context, of this thread alone, in which every draw of normal noise by torch comes from `draw`, whatever Python
    name it was drawn by. `draw` is called with an uninitialised tensor of the shape, strides, dtype and device, and the
    generator or None. No generator moves, and draws of other distributions are refused.

    With `wide_ndim`, float64 tensors of so many dimensions keep their dtype where a function converts them, and
    products of these and narrower ones are float64: rounding would be taken for coefficients. `provenance` is told of
    every operation. Where `bounded` is given, it is told of tensors of so many dimensions that a function clamps to
    [-bound, bound], and they are not clamped.
    """

    def __init__(
        self,
        draw: Callable[[Tensor, torch.Generator | None], Tensor],
        wide_ndim: int | None = None,
        provenance: Any = None,
        bounded: Callable[[Tensor, float], object] | None = None,
    ) -> None:
        super().__init__()
        self._draw, self._wide_ndim, self._provenance, self._bounded = draw, wide_ndim, provenance, bounded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (random := _random.get(func)) is None:
            random = _random[func] = torch.Tag.nondeterministic_seeded in func.tags
        if random:
            return self._drawn(func, list(args), dict(kwargs))
        if func is _AT._to_copy.default and self._wide_ndim is not None:
            values, dtype = args[0], kwargs.get("dtype")
            if values.dtype == torch.float64 and values.ndim == self._wide_ndim and dtype and dtype.is_floating_point:
                kwargs["dtype"] = torch.float64
        if func in _CLAMPS and self._bounded is not None and args[0].ndim == self._wide_ndim and args[0].numel() > 1:
            low, high = ([*args[1:], None, None][i] if i + 1 < len(args) else kwargs.get(n) for i, n in _BOUNDS)
            if low is not None and high is not None and -low == high > 0:
                self._bounded(args[0], float(high))
                return args[0] if func is _AT.clamp_.default else args[0].clone()
        if func in _PRODUCTS and self._wide_ndim is not None:
            args = [value.double() if isinstance(value, Tensor) else value for value in args]
        if self._provenance is None:
            return func(*args, **kwargs)
        self._provenance.before(func, args, kwargs)
        result = func(*args, **kwargs)
        self._provenance.after(func, args, kwargs, result)
        return result

    def _drawn(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        generator = kwargs.pop("generator", None)
        if func in (_AT.randn.default, _AT.randn.generator):
            return self._draw(torch.empty(*args, **kwargs), generator)
        if func is _AT.randn_like.default:
            return self._draw(torch.empty_like(*args, **kwargs), generator)
        if func is _AT.normal.float_float and args[0] == 0:
            return self._draw(torch.empty(args[2], **kwargs), generator) * args[1]
        if func is _AT.normal_.default:
            values = args[0]
            mean, std = (args[1:] + [kwargs.get("mean", 0.0), kwargs.get("std", 1.0)][len(args) - 1 :])[:2]
            if mean == 0:
                like = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=values.device)
                values.copy_(self._draw(like, generator) * std)
                return values
        name = func.overloadpacket.__name__
        raise FormError(f"sample_fn: got one that draws by torch's {name}, expected normal noise of mean 0")


class StandInModel:
    """Called in place of a model; its attributes are the model's. `read` is called with the names of those read."""

    def __init__(self, call: Callable[..., Any], model: Any, read: Callable[[str], object] = lambda _: None) -> None:
        object.__setattr__(self, "_stands_for", (call, model, read))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stands_for[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        _, model, read = object.__getattribute__(self, "_stands_for")
        read(name)
        if model is None:
            raise FormError(f"model: got a function that reads model.{name}, expected the model too: give model=")
        if name == "forward":
            raise FormError("sample_fn: got one that calls model.forward, expected one that calls the model itself")
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FormError(f"sample_fn: got one that sets model.{name}, expected one that leaves its model alone")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        _, model, read = object.__getattribute__(self, "_stands_for")
        read("__class__")
        return StandInModel if model is None else type(model)


class ReadDict(dict[str, Any]):
    """A dictionary that notices when its items are read, but for `**`."""

    was_read = False

    def __getitem__(self, name: str) -> Any:
        self.was_read = True
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.was_read = True
        return super().__contains__(name)


def _noticed(method: str) -> Any:
    def read(self: ReadDict, *args: Any, **kwargs: Any) -> Any:
        self.was_read = True
        return getattr(dict, method)(self, *args, **kwargs)

    return read


for _method in ("get", "keys", "values", "items", "copy", "pop", "popitem", "setdefault", "update", "__or__", "__eq__"):
    setattr(ReadDict, _method, _noticed(_method))


def copied(value: Any) -> Any:
    """A value with its dictionaries and lists copied, and what these hold shared."""
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    return [copied(item) for item in value] if type(value) is list else value


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or None, or a tuple or list of these."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value and its containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def is_passive(value: Any) -> bool:
    """Whether a value is plain, a tensor, or a container of these: nothing that a function could call."""
    if isinstance(value, dict):
        return all(map(is_passive, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_passive, value))
    return isinstance(value, Tensor) or is_plain(value)


def is_torchs(value: Any) -> bool:
    """Whether a value is a function of torch."""
    return callable(value) and getattr(torch, getattr(value, "__name__", ""), None) is value


def is_stateless(value: Any) -> bool:
    """Whether a value is an object that draws noise, and has no attributes."""
    return hasattr(value, "randn_like") and getattr(value, "__dict__", None) == {}


def described(value: Any) -> Any:
    """A passive value with its tensors' shapes and dtypes in their place."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype, str(value.device)
    if isinstance(value, dict):
        return tuple((name, described(item)) for name, item in value.items())
    return tuple(map(described, value)) if isinstance(value, list | tuple) else repr(value)


@dataclass(frozen=True, eq=False)
class Passed:
    """How the keyword arguments that a function calls its model with differ from the `extra_args` it was given.

    Attributes:
        changed: new values by path; the value `Hook` stands for the function's own hook, the last of a list.
        left_out: names that the function does not pass on.
        hook: the function's own, None if there is none.
    """

    changed: Mapping[tuple[str, ...], Any]
    left_out: tuple[str, ...] = ()
    hook: Callable[[dict[str, Any]], Any] | None = None

    def arguments(self, extra_args: dict[str, Any], hook: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """A call's keyword arguments, with another hook in place of the function's."""
        if not self.changed and not self.left_out:
            return extra_args
        made = {name: value for name, value in extra_args.items() if name not in self.left_out}
        own: dict[tuple[str, ...], dict[str, Any]] = {(): made}
        for path, value in self.changed.items():
            for end in range(1, len(path)):
                if path[:end] not in own:  # dictionaries on the way to a change are copied, once
                    parent = own[path[: end - 1]]
                    own[path[:end]] = parent[path[end - 1]] = dict(parent.get(path[end - 1]) or {})
            parent = own[path[:-1]]
            parent[path[-1]] = [*(parent.get(path[-1]) or []), hook] if value is Hook else value
        return made

    def summary(self) -> Any:
        """Equal where the differences are the same."""
        return tuple((path, described(value)) for path, value in self.changed.items()), self.left_out


class Hook:
    """Stands for a function's own hook, added to the end of a list."""


def passed(given: Mapping[str, Any], got: Mapping[str, Any], passive: bool = False) -> Passed:
    """Compare what a model was called with and what its function was given; raises `FormError` for what cannot be
    passed on: values of the function's own that are not plain, or, with `passive`, not passive."""
    changed: dict[tuple[str, ...], Any] = {}
    hooks: list[Any] = []

    def compare(given: Mapping[str, Any], got: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for name, value in got.items():
            before, here = given.get(name, Hook), (*path, name)
            if name == HOOKS and isinstance(value, list):
                known = before if isinstance(before, list) else []
                if len(value) == len(known) + 1 and _same(known, value[:-1]) and callable(value[-1]):
                    hooks.append(value[-1])
                    changed[here] = Hook
                    continue
            if isinstance(value, dict) and (isinstance(before, dict) or before is Hook):
                compare(before if isinstance(before, dict) else {}, value, here)
                if before is Hook and not value:
                    changed[here] = {}
            elif before is Hook or not _same(before, value):
                if not (is_passive(value) if passive else is_plain(value)):
                    said = ".".join(map(str, here))
                    raise FormError(
                        f"sample_fn: got one that calls its model with its own {said} ({type(value).__name__}), "
                        "expected the arguments it was given, or numbers"
                    )
                changed[here] = value
        if path and (gone := set(given) - set(got)):
            raise FormError(f"sample_fn: got one that takes {', '.join(sorted(gone))} out of {'.'.join(path)}")

    compare(given, got, ())
    if len(hooks) > 1:
        raise FormError(f"sample_fn: got one with {len(hooks)} hooks, expected one")
    return Passed(changed, tuple(sorted(set(given) - set(got))), hooks[0] if hooks else None)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or containers of the same objects, or equal numbers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return is_plain(a) and bool(a == b)
