"""The progress bars of the library: tqdm, imported when a bar is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress_bar(
    show: bool | str = True,
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str = "step",
    **options: Any,
) -> Any:
    """A tqdm bar with tqdm's arguments, on stderr; one that is not shown counts all the same. A string shown is its
    label."""
    from tqdm.auto import tqdm

    label = {"desc": show} if isinstance(show, str) else {}
    return tqdm(iterable, total=total, unit=unit, disable=show is False, **label, **options)
