"""Falling through to the original where it cannot be fused, with one line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_logger = logging.getLogger("fastcfg")
_logged: set[tuple[str, str]] = set()


class FallThroughError(Exception):
    """The original must run; the message says why."""


@contextmanager
def falling_through(*kinds: type[Exception]) -> Iterator[None]:
    """Context in which exceptions of some kinds become a `FallThroughError`."""
    try:
        yield
    except kinds as error:
        raise FallThroughError(str(error)) from error


def log_once(name: str, reason: str, what: str = "is not fused") -> None:
    """Log what is to be said of `name` and why, the first time."""
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        _logger.warning("%s %s: %s", name, what, reason)
