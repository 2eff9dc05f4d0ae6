"""Tables of multistep methods for runs that begin later than their first row."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from ..schedule import Schedule
from ..table import StepTable

Builder = TypeVar("Builder", bound=Callable[..., StepTable])


def rebuilt(build: Builder) -> Builder:
    """Have the tables of a builder with one row a step know how to be built for the later part of a run
    (`StepTable.rebuild`): from the later noise levels, with lower orders at their beginning. The builder's first
    argument are the levels or the schedule."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def built(*args: Any, **options: Any) -> StepTable:
        table = build(*args, **options)
        # By the name of `built`, under which it can be pickled.
        # A copy: the caller may change its arrays later.
        arguments = copy.deepcopy(dict(signature.bind(*args, **options).arguments))
        return replace(table, rebuild=partial(_from_row, built, arguments))

    return cast(Builder, built)


def _from_row(build: Callable[..., StepTable], arguments: dict[str, Any], row: int) -> StepTable:
    first, *others = arguments
    levels, options = arguments[first], {name: arguments[name] for name in others}
    if isinstance(levels, Schedule):
        return build(levels.respace(range(levels.num_timesteps - row)), **options)
    if np.ndim(options.get("tau", 0)):  # one number a step
        options["tau"] = np.asarray(options["tau"])[row:]
    return build(np.asarray(levels)[row:], **options)
