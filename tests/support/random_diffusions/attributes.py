"""What users do to an object between two calls: its tables, types, and methods set on it or on its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from support.families.base import Mean, Var

from .steps import TABLES


def _entry(diffusion: Any, n: int) -> None:
    getattr(diffusion, TABLES[n % len(TABLES)])[n % diffusion.num_timesteps] *= 1.07


def _replaced(diffusion: Any, n: int) -> None:
    name = TABLES[n % len(TABLES)]
    setattr(diffusion, name, np.asarray(getattr(diffusion, name)) * 1.02)


def _on_the_object(name: str) -> Any:
    def edit(diffusion: Any, n: int) -> None:
        original = getattr(diffusion, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            return {**out, "sample": out["sample"] * 0.95} if isinstance(out, dict) and "sample" in out else out

        setattr(diffusion, name, method)

    return edit


def _posterior(diffusion: Any, n: int) -> None:
    original = diffusion.q_posterior_mean_variance

    def method(x_start: Tensor, x_t: Tensor, t: Tensor) -> Any:
        mean, *rest = original(x_start, x_t, t)
        return 0.97 * mean, *rest

    diffusion.q_posterior_mean_variance = method


def _on_the_class(diffusion: Any, n: int) -> None:
    kind = next(base for base in type(diffusion).__mro__ if "_fastcfg_original" not in vars(base))
    original = kind.p_mean_variance

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out["mean"] = out["mean"] * 0.95
        return out

    kind.p_mean_variance = method


def _type(name: str, *values: Any) -> Any:
    def edit(diffusion: Any, n: int) -> None:
        setattr(diffusion, name, values[n % len(values)])

    return edit


def _map(diffusion: Any, n: int) -> None:
    if hasattr(diffusion, "timestep_map"):
        diffusion.timestep_map[n % len(diffusion.timestep_map)] += 1


EDITS: dict[str, Callable[[Any, int], None]] = {
    "nothing": lambda diffusion, n: None,
    "entry": _entry,
    "table": _replaced,
    "p_sample": _on_the_object("p_sample"),
    "ddim_sample": _on_the_object("ddim_sample"),
    "posterior": _posterior,
    "class": _on_the_class,
    "mean type": _type("model_mean_type", Mean.START_X, Mean.EPSILON),
    "var type": _type("model_var_type", Var.FIXED_SMALL, Var.FIXED_LARGE),
    "rescale": _type("rescale_timesteps", True),
    "timesteps": _type("num_timesteps", 4, 3),
    "map": _map,
    "attribute": _type("anything", 1),
}
