"""Argument parsing: errors of one line, and the types of arguments."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

T = TypeVar("T", int, float)


class UsageError(Exception):
    """The command cannot be run as given; the message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@contextlib.contextmanager
def usage_errors(label: str = "") -> Iterator[None]:
    """Turn ValueErrors and TypeErrors of the library's checks into `UsageError`s. Only for loading and checking: an
    error of the work itself is not the user's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{label}{error}") from error


def integer(least: int) -> Callable[[str], int]:
    """The type of an integer of at least `least`."""
    return lambda text: _number(int, text, f"an integer of at least {least}", lambda value: value >= least)


def respacing(text: str) -> int | str:
    """The type of a number of steps of at least 1, or of one of GLIDE's respacings: "10,15,20", "ddim50", "fast27"."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text != "fast27" and not re.fullmatch(r"ddim[0-9]+|[0-9]+(,[0-9]+)+", text):
        expected = "an integer of at least 1, or steps such as 10,15,20, ddim50 or fast27"
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return text


def any_integer(text: str) -> int:
    """The type of an integer."""
    return _number(int, text, "an integer", lambda value: True)


def finite(text: str) -> float:
    """The type of a finite number."""
    return _number(float, text, "a finite number", math.isfinite)


def several_finite(text: str) -> list[float]:
    """The type of finite numbers separated by commas."""
    return [finite(part) for part in text.split(",")]


def interval(text: str) -> tuple[float, float]:
    """The type of a part of the way from 0 to 1, "0:0.5"."""
    start, _, stop = text.partition(":")
    with contextlib.suppress(ValueError):
        if 0 <= float(start) < float(stop) <= 1:
            return float(start), float(stop)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected START:STOP with 0 <= START < STOP <= 1")


def _number(kind: Callable[[str], T], text: str, expected: str, accept: Callable[[T], bool]) -> T:
    """The number that a text is, if it is one that is accepted."""
    with contextlib.suppress(ValueError):
        if accept(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")


def choose_device(name: str) -> str:
    """The device that --device names; UsageError for "cuda" where torch sees no GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"argument --device: got 'cuda', expected auto or cpu: torch {torch.__version__} sees no GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
