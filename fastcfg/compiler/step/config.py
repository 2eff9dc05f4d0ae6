"""A copy of a scheduler's config that notes which of its items a step reads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

from .parts import UntraceableError

_NOTES = "_fastcfg_notes"
_READERS = ("__getattribute__", "__getattr__", "__getitem__", "__contains__", "__missing__", "get")
# Methods that see more than one item, which act on the config itself, and those that change items.
_OF_ALL = (
    "__iter__",
    "__reversed__",
    "__len__",
    "__eq__",
    "__ne__",
    "__or__",
    "__ror__",
    "__repr__",
    "__str__",
    "__reduce_ex__",
    "copy",
)
_CHANGES = (
    "__setitem__",
    "__delitem__",
    "__setattr__",
    "__delattr__",
    "__ior__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "move_to_end",
)


class ConfigReads:
    """What was read of a config: names of items, by item or as attributes; or all of it (`whole`)."""

    def __init__(self) -> None:
        self.config: Any = None
        self.names: set[str] = set()
        self.attributes: set[str] = set()  # of the names, those that were read as attributes
        self.whole = False

    def items(self) -> frozenset[str] | None:
        """The names; None for all."""
        return None if self.whole else frozenset(self.names)


def noting(config: Any, reads: ConfigReads) -> Any:
    """A copy of a config, of a subclass, that notes what is read of it and refuses changes; or the config itself, as
    read as a whole, if its class has its own ways of reading."""
    made = _noting_class(type(config)) if isinstance(config, dict) else None
    if made is None:
        reads.whole = True
        return config
    copy = made.__new__(made)
    put = OrderedDict.__setitem__ if isinstance(config, OrderedDict) else dict.__setitem__
    for name, value in config.items():
        put(copy, name, value)
    if hasattr(config, "__dict__"):
        object.__getattribute__(copy, "__dict__").update(vars(config))
    vars(made)[_NOTES].__set__(copy, reads)
    reads.config = config
    return copy


@cache
def _noting_class(kind: Any) -> Any:
    """The class of the copies; None for a class that reads items in its own way."""
    plain = OrderedDict if issubclass(kind, OrderedDict) else dict
    if any(getattr(kind, name, None) is not getattr(plain, name, None) for name in _READERS):
        return None

    def notes(self: Any) -> ConfigReads:
        found: ConfigReads = slot.__get__(self)
        return found

    def read_attribute(self: Any, name: str) -> Any:
        if name == "__class__":
            return kind
        noted = notes(self)
        if name not in noted.attributes:
            if not hasattr(kind, name):
                noted.attributes.add(name)
                noted.names.add(name)
            elif name not in ("get", "__getitem__", "__contains__"):  # these note by themselves
                noted.whole = True
        return plain.__getattribute__(self, name)

    def read_item(self: Any, name: Any) -> Any:
        notes(self).names.add(name)
        return plain.__getitem__(self, name)

    def has_item(self: Any, name: Any) -> bool:
        notes(self).names.add(name)
        return plain.__contains__(self, name)

    def get(self: Any, name: Any, default: Any = None) -> Any:
        notes(self).names.add(name)
        return plain.get(self, name, default)

    def of_all(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            notes(self).whole = True
            return getattr(kind, name)(notes(self).config, *args)

        return method

    def change(self: Any, *_: Any, **__: Any) -> Any:
        raise UntraceableError("its step changes its config")

    methods: dict[str, Any] = {"__slots__": (_NOTES,), "__module__": kind.__module__, "__hash__": None}
    methods |= {name: of_all(name) for name in _OF_ALL if hasattr(kind, name)} | dict.fromkeys(_CHANGES, change)
    methods |= {"__getattribute__": read_attribute, "__getitem__": read_item, "__contains__": has_item}
    made = type(kind)(kind.__name__, (kind,), methods | {"get": get})
    slot = vars(made)[_NOTES]
    return made
