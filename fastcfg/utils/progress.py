"""The progress bars of the library: tqdm, imported when a bar is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["progress_bar"]


def progress_bar(
    show: bool | str = True,
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "step",
    **options: Any,
) -> Any:
    """A tqdm bar, on stderr; one that is not shown counts all the same.

    Args:
        show: False for a bar that draws nothing; a string is its label.
        iterable: what the bar wraps; None for a bar that its user updates, also as a context manager.
        total: number of units; None takes the iterable's length.
        unit: what is counted.
        **options: other arguments of `tqdm.auto.tqdm`.
    """
    from tqdm.auto import tqdm

    label = {"desc": show} if isinstance(show, str) else {}
    return tqdm(iterable, total=total, unit=unit, disable=show is False, **label, **options)
