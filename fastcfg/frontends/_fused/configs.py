"""The contents of a scheduler's config as keys of those of its items that a step reads."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import Any

from .keys import Key, hashable

_KEPT = 16  # configs with known keys
_MISSING = object()
_IMMUTABLE = frozenset({int, float, str, bool, type(None)})


class Configs:
    """Keys of configs, by item and as attribute, as diffusers' may have both. They are valid as long as the config
    equals a copy."""

    def __init__(self) -> None:
        self.known: dict[int, _Config] = {}

    def key(self, config: Any, names: frozenset[str] | None) -> Hashable:
        """The key of some items of a config; of all without names."""
        known = self.known.get(id(config))
        if known is None or known.config is not config or not known.unchanged():
            if len(self.known) >= _KEPT:
                self.known.clear()
            known = self.known[id(config)] = _Config(config)
        key = known.keys.get(names)
        if key is None:
            key = known.keys[names] = Key(known.key(names))
        return key


class _Config:
    """A config, and its keys as long as it is unchanged."""

    __slots__ = ("_attributes", "_items", "config", "keys")

    def __init__(self, config: Any) -> None:
        self.config = config
        self._items = _copy(config) if isinstance(config, Mapping) else config
        self._attributes = _copy(vars(config)) if hasattr(config, "__dict__") else {}
        self.keys: dict[frozenset[str] | None, Key] = {}

    def unchanged(self) -> bool:
        config = self.config
        try:
            return bool(config == self._items and self._attributes == getattr(config, "__dict__", {}))
        except (RuntimeError, ValueError):  # tensors and arrays in it have no single answer
            return False

    def key(self, names: frozenset[str] | None) -> Hashable:
        if names is None or not isinstance(self.config, Mapping):
            return hashable(self.config)
        attributes = getattr(self.config, "__dict__", {})
        values = ((self.config.get(name, _MISSING), attributes.get(name, _MISSING)) for name in sorted(names))
        return type(self.config), names, tuple((hashable(item), hashable(attribute)) for item, attribute in values)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if type(value) in _IMMUTABLE else copy.deepcopy(value) for name, value in values.items()}
