"""Known pixels: what of an image a run has to keep, and at which noise level it is put into the state of each row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .schedule import Schedule
from .table import StepTable
from .utils.checks import check_one_of

__all__ = ["KeptImage", "differential", "inpaint", "noise_pairs", "repaint"]

NOISES = ("fixed", "fresh", "row")
POSITIONS = ("before", "after")

Normals = Tensor | Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class KeptImage:
    """A `state_fn` of `Sampler` that puts an image's known pixels, with the noise of the row, into the state. Made by
    `inpaint`, `differential` and `repaint`.

    Attributes:
        image: [1 or B, C, ...].
        hold: how far each pixel is known, 0 to 1, [1 or B, 1 or C, ...].
        levels: float64 [N + 1, 2], signal and noise at the start of each of N rows, and at the end; None takes those of
            the table.
        order: the rows that the table's R rows are, int64 [R]; None for 0 ... N - 1.
        when: "before" or "after" a row.
        hard: whether a pixel is known where hold > r/R, before row 0 everywhere; else it is known by the share hold.
        free_start: whether the change of row 0 is left out.
        noise: "fixed" (the start's normals for every row), "fresh" (others in every row), "row" (those that the row's
            step adds), a tensor [1 or B, C, ...] for all rows, or a function (row, shape) -> tensor.
        renoise: a function (row, shape) -> tensor that draws the normals of jumps back; None draws them from the seeds.
    """

    image: Tensor
    hold: Tensor
    levels: NDArray[np.float64] | None = None
    order: NDArray[np.int64] | None = None
    when: str = "after"
    hard: bool = False
    free_start: bool = False
    noise: str | Normals = "fixed"
    renoise: Callable[[int, tuple[int, ...]], Tensor] | None = None

    def __post_init__(self) -> None:
        check_one_of("when", self.when, POSITIONS)
        for name in ("image", "hold"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: got {got}, expected a floating tensor")
        low, high = (float(bound) for bound in self.hold.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"hold: got values from {low:g} to {high:g}, expected 0 to 1 (of a mask: 1 - mask)")
        if isinstance(self.noise, str):
            check_one_of("noise", self.noise, NOISES)
        elif not isinstance(self.noise, Tensor) and not callable(self.noise):
            expected = "a name, a tensor or a function (row, shape) -> tensor"
            raise TypeError(f"noise: got {type(self.noise).__name__}, expected {expected}")
        if self.renoise is not None and not callable(self.renoise):
            raise TypeError(f"renoise: got {type(self.renoise).__name__}, expected a function (row, shape) -> tensor")
        order = self.order
        if order is None:
            return
        if order.ndim != 1 or not len(order) or order.min() < 0 or order[0] or order[-1] != order.max():
            raise ValueError(f"order: got {order.tolist()}, expected rows of a table, from 0 to the last")
        if (np.diff(order) > 1).any():
            raise ValueError(f"order: got {order.tolist()}, expected no row to be left out: noise can only be added")
        if self.levels is not None and order.max() >= len(self.levels) - 1:
            raise ValueError(f"order: got {order.tolist()}, expected rows below {len(self.levels) - 1}")

    @property
    def jumps(self) -> bool:
        """Whether the state is noised again between some rows."""
        return self.order is not None and bool((np.diff(self.order) < 1).any())

    def of_table(self, table: StepTable) -> KeptImage:
        """The same for a table, with its levels where none were given.

        Raises:
            ValueError: a table of another length, or without levels.
        """
        levels: Any = self.levels
        if levels is None:
            levels = table.levels
            if levels is None:
                raise ValueError(f"state_fn: got no levels with the table {table.name}, which has none, expected some")
            if self.order is not None and len(levels) == len(self.order) + 1:
                # Those of a reordered table, put back: a jump goes to a row that came before, so all rows are there.
                levels, starts = np.empty((self.order.max() + 2, 2)), levels
                levels[self.order], levels[-1] = starts[:-1], starts[-1]
        rows = len(levels) - 1 if self.order is None else len(self.order)
        if rows != table.num_rows:
            raise ValueError(f"state_fn: got levels of {rows} rows, expected the {table.num_rows} of {table.name}")
        found = copy.copy(self)  # checked when it was made: reading `hold` again would wait for the device
        object.__setattr__(found, "levels", levels)
        return found

    def rows(self) -> NDArray[np.float64]:
        """float64 [R, 5]: by row the columns `fastcfg.state_change.KNOWN_COLUMNS`, for given levels."""
        given: Any = self.levels
        order = np.arange(len(given) - 1) if self.order is None else self.order
        before, count = self.when == "before", len(order)
        levels = given[order if before else order + 1]
        gates = np.arange(count) / count if self.hard else np.ones(count)
        gates[0] = -1 if self.hard else float(not self.free_start)
        # Between a row's end and the next one's start, the state is raised to the noise of the latter.
        ends, starts = given[order[:-1] + 1], given[order[1:]]
        kept = starts[:, 0] / ends[:, 0]
        added = np.sqrt(np.maximum(starts[:, 1] ** 2 - (kept * ends[:, 1]) ** 2, 0))
        raised = np.tile([1.0, 0.0], (count, 1))
        jumps = np.diff(order) < 1
        raised[slice(1, None) if before else slice(None, -1)][jumps] = np.stack([kept, added], axis=1)[jumps]
        return np.concatenate([levels, gates[:, None], raised], axis=1)


def inpaint(
    mask: Tensor, image: Tensor, levels: Any = None, *, when: str = "after", noise: str | Normals = "fixed"
) -> KeptImage:
    """Keep the image where the mask is 0: after every row the state is mask*x + (1 - mask)*(the image with that row's
    noise), at the end the image itself. In latent or in pixel space, as the model. With noise "fixed" it is the
    blending of diffusers' `StableDiffusionInpaintPipeline` for models without input channels for the mask.

    Args:
        mask: 1 where the picture is drawn, 0 where it is kept, between them for soft edges, [1 or B, 1 or C, ...].
            Ones change nothing.
        image: [1 or B, C, ...].
        levels: the noise levels of the table's rows, as `noise_pairs`; None takes the table's own.
        when: "after" every row, or "before" it (then the end is not touched).
        noise: as the attribute of `KeptImage`.

    Raises:
        TypeError, ValueError: arguments that do not fit, mask values outside of 0 to 1.

    Example:
        >>> from fastcfg import Schedule
        >>> mask, image = torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8)
        >>> inpaint(mask, image, Schedule.named("linear").respace(10)).when
        'after'
    """
    return KeptImage(image, 1 - _floating("mask", mask), _pairs(levels), when=when, noise=noise)


def differential(keep: Tensor, image: Tensor, levels: Any = None, *, noise: str | Normals = "fixed") -> KeptImage:
    """Differential diffusion (Levin & Fried 2023, https://arxiv.org/abs/2306.00950): each pixel of the image changes
    from its own row on. Before row r of R, pixels with keep > r/R are the image's with that row's noise; before the
    first row all are, whatever the start.

    Args:
        keep: for which part of the run each pixel stays, 0 to 1, [1 or B, 1 or C, ...]: the authors' `map`. Zeros are
            the plain run from the noised image.
        image, levels, noise: as `inpaint`.

    Raises:
        TypeError, ValueError: as `inpaint`.
    """
    hold = _floating("keep", keep)
    return KeptImage(image, hold, _pairs(levels), when="before", hard=True, noise=noise)


def repaint(
    mask: Tensor,
    image: Tensor,
    order: Any,
    levels: Any = None,
    *,
    noise: str | Normals = "fresh",
    renoise: Callable[[int, tuple[int, ...]], Tensor] | None = None,
) -> KeptImage:
    """RePaint (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865): known pixels before every row but the first,
    and jumps back, in which the state is noised again between two rows.

    Args:
        mask, image, noise: as `inpaint`.
        order: of the rows, as of `fastcfg.repaint_order`. The table must be `fastcfg.reordered` by it.
        levels: of the rows before they are put in order, as `inpaint`.
        renoise: as the attribute of `KeptImage`.

    Raises:
        TypeError, ValueError: as `inpaint`; an order with rows that the levels do not have.
    """
    hold, rows = 1 - _floating("mask", mask), np.asarray(order, dtype=np.int64)
    return KeptImage(image, hold, _pairs(levels), rows, "before", free_start=True, noise=noise, renoise=renoise)


def noise_pairs(levels: Any) -> NDArray[np.float64]:
    """float64 [R + 1, 2]: signal a and noise b of the state a*x0 + b*z at the start of each of R rows, and at the end.

    Args:
        levels: a `Schedule`, respaced to one timestep a row (a = √ᾱ, b = √(1-ᾱ), and 1 and 0 at the end); noise levels
            [R + 1] (a = 1, b = σ: k-diffusion's); or the pairs themselves (of a flow 1 - σ and σ).

    Raises:
        ValueError: another shape, values that are not finite or below 0, or a signal of 0 but at the start.
    """
    if isinstance(levels, Schedule):
        alphas = np.append(levels.alphas_cumprod[::-1], 1.0)
        return np.stack([np.sqrt(alphas), np.sqrt(1 - alphas)], axis=1)
    found = torch.as_tensor(levels).detach().cpu().double().numpy().copy()
    if found.ndim == 1:
        found = np.stack([np.ones_like(found), found], axis=1)
    if found.ndim != 2 or found.shape[1] != 2 or len(found) < 2:
        raise ValueError(f"levels: got shape {found.shape}, expected a Schedule, [R + 1] or [R + 1, 2]")
    if not np.isfinite(found).all() or (found < 0).any() or (found[1:, 0] == 0).any():
        raise ValueError("levels: got values that are not finite, below 0, or a signal of 0, expected noise levels")
    return found


def _pairs(levels: Any) -> NDArray[np.float64] | None:
    return None if levels is None else noise_pairs(levels)


def _floating(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    return value if value.dtype.is_floating_point else value.float()
