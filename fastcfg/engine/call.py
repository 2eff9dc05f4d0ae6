"""One call of a sampler: its arguments, checked, as what the rest of the engine takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..clip import DynamicThreshold
from ..guidance import Guidance, GuidancePlan
from ..table import StepTable
from ..utils import checks
from ..utils.identity import Alike
from .config import SamplerConfig
from .noise import NoiseSource
from .row_plan import RowKind, RowPlan, Watch
from .span import Span
from .staleness import torch_settings
from .state_function import StateOptions, StatePlan


@dataclass(frozen=True)
class ProgramOptions:
    """What buffers and programs depend on beside the shapes of a call's arguments; equal options can share them.

    Functions are compared by what they do. Branches and roles are as in `Guidance`; mix, rescale and momentum as in
    `GuidancePlan`; `clip` says whether x0 is clipped to bounds given with every call, `keep_x0` whether it is kept for
    callbacks, `log_prob` whether the rows' log-probabilities are.
    """

    config: SamplerConfig
    table: StepTable
    models: tuple[Alike, ...]  # several where rows take turns
    denoised_fn: Alike
    cond_fn: Alike
    branch_models: tuple[tuple[str, Alike], ...]
    branches: tuple[str, ...]
    base: int | None
    conditional: int
    unconditional: int | None
    mix: Alike
    rescale: float
    momentum: float | None
    clip: bool
    threshold: DynamicThreshold | None
    weights_by: str  # as in `StepSpec`
    noise_source: str  # "none", "tensor" or "philox"
    keep_x0: bool
    rows_per_graph: int
    change: StateOptions | None = None
    log_prob: bool = False

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.config.device  # type: ignore[return-value]

    def uses_outputs(self, active: tuple[int, ...]) -> bool:
        """Whether a row with these branches computes its weights from their outputs."""
        return len(active) > 1 and (self.mix.value is not None or self.rescale > 0)

    def functions(self) -> dict[str, Any]:
        """The caller's functions by name: what a captured program may have baked in."""
        found = {f"models[{k}]" if k else "model": alike.value for k, alike in enumerate(self.models)}
        found |= {name: getattr(self, name).value for name in ("denoised_fn", "cond_fn", "mix")}
        found["state_fn"] = None if self.change is None else self.change.function.value
        return found | {f"branch_models[{name!r}]": alike.value for name, alike in self.branch_models}


@dataclass(frozen=True, eq=False)
class Call:
    """A checked call."""

    options: ProgramOptions
    models: tuple[Callable[..., Any], ...]  # compiled if wanted
    shape: tuple[int, ...]  # (B, C, ...)
    plan: GuidancePlan
    rows: RowPlan
    bounds: Tensor | None  # of x0, float64 [1] or [B]
    source: NoiseSource
    span: Span  # the rows to run, and from what state
    change: StatePlan | None = None  # of state_fn
    # Reads the conditionings again, where a caller may change them in mid-run.
    again: Callable[[], RowPlan] | None = None
    watch: Watch | None = None

    @property
    def kinds(self) -> tuple[RowKind, ...]:
        """What programs are needed for: of every row, and then those of rows whose guidance has ended."""
        kinds = [self.rows.kind(row, active) for row, active in enumerate(self.plan.active)]
        if self.plan.agreement is not None:
            kinds += [kind._replace(active=self.plan.fallback_branches) for kind in kinds]
        return tuple(kinds)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that can share buffers and programs."""
        plan = self.plan
        layout = (self.shape, self.rows.signature())
        branches: tuple[Any, ...] = (frozenset(self.kinds), plan.agreement, plan.fallback_branches)
        if plan.places is not None:
            branches += (frozenset((active, len(self.place_weights(active))) for active in set(plan.active)),)
        return self.options, layout, branches, torch_settings(self.options.device)

    def place_weights(self, active: tuple[int, ...]) -> NDArray[np.float64]:
        """float64 [1 or R, N, K]: the planned weights by place of some branches; one row where those of all rows that
        evaluate them are the same."""
        rows = [row for row, found in enumerate(self.plan.active) if found == active]
        of_rows = self.plan.places.of_rows(rows, active)  # type: ignore[union-attr]
        return of_rows if len(of_rows) == 1 else self.plan.places.values[:, :, list(active)]  # type: ignore[union-attr]


def check_shape(
    shape: Sequence[int], memory_format: torch.memory_format, clip: Tensor | DynamicThreshold | None
) -> tuple[int, ...]:
    """(B, C, ...) as a tuple; ValueError if it is no shape, or if layout or clip do not fit it."""
    sizes = checks.check_shape("shape", shape)
    if isinstance(clip, DynamicThreshold):
        clip.rank(math.prod(sizes[1:]))
    elif clip is not None and len(clip) not in (1, sizes[0]):
        raise ValueError(f"clip: got {len(clip)} bounds, expected 1 or one per sample ({sizes[0]})")
    if memory_format == torch.channels_last and len(sizes) != 4:
        raise ValueError(f"memory_format: got torch.channels_last with shape {sizes}, expected (B, C, H, W)")
    return sizes


def check_places(plan: GuidancePlan, clip: Tensor | DynamicThreshold | None) -> None:
    """ValueError unless weights by place, if a plan has them, go with the clip."""
    if plan.places is not None and isinstance(clip, DynamicThreshold):
        raise ValueError("clip: got a DynamicThreshold with scales by place, expected a bound or None")


def check_functions(
    table: StepTable,
    guidance: Guidance,
    branch_models: Mapping[str, Callable[..., Any]],
    **functions: Callable[..., Any] | None,
) -> None:
    """Raise TypeError or ValueError unless the caller's functions (denoised_fn, cond_fn) and branch models fit."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}: got {type(function).__name__}, expected a function or None")
    for name, model in branch_models.items():
        if name not in guidance.branches:
            known = ", ".join(guidance.branches)
            raise ValueError(f"branch_models: got {name!r}, expected branches of the guidance: {known}")
        if not callable(model):
            raise TypeError(f"branch_models[{name!r}]: got {type(model).__name__}, expected a callable")
    raw = table.uses_raw_output or table.uses_unconditional or table["k_m"].any()
    for name, unfit, reason in (
        ("denoised_fn", raw, "its rows use the model's output beside x0"),
        ("cond_fn", not table.uses_gradient, "its rows have no place for a gradient (p_g, a_g)"),
    ):
        if functions[name] is not None and unfit:
            raise ValueError(f"{name}: got a function with the table {table.name}, expected None: {reason}")


def clip_bounds(clip: float | Sequence[float] | Tensor | DynamicThreshold | None) -> Tensor | DynamicThreshold | None:
    """A clip as given, its numbers as float64 [n]; TypeError or ValueError unless they are positive and finite."""
    if clip is None or isinstance(clip, DynamicThreshold):
        return clip
    try:
        if isinstance(clip, bool):
            raise TypeError("a switch is no bound")
        given = [checks.plain(one) for one in clip] if isinstance(clip, list | tuple) else checks.plain(clip)
        bounds = torch.as_tensor(given, dtype=torch.float64).detach().flatten().clone()
    except TypeError as error:
        raise TypeError(f"clip: got {clip!r}, expected None, numbers or a DynamicThreshold") from error
    if not bounds.numel() or not torch.isfinite(bounds).all() or (bounds <= 0).any():
        raise ValueError(f"clip: got {clip!r}, expected None or positive finite bounds")
    return bounds
