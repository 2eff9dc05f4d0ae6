"""The table of an object's own steps: other tables, limits and terms than guided-diffusion's, compiled as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compiler import scheduler as compiler
from ...compiler.assembly import Compiled
from ...compiler.patching import drawing, in_float64
from ...engine.model_output import output_tensor
from ...ops.stepper import Stepper
from ...table import COLUMNS, StepTable
from .loops import LoopKind
from .manner import Manner
from .own_run import Fit
from .proof import DifferentError, FirstStep, OtherStep, StepCall
from .recording import with_tensors

_FAR = 1e6  # samples whose x0 lies beyond every limit


def compiled_steps(
    own: Callable[..., Any], first: FirstStep, num_steps: int, reverse: bool, manner: Manner
) -> tuple[Fit, OtherStep]:
    """How the engine makes an object's own steps, and these as the step to compare with.

    Args:
        own: the step of a copy of the object.
        first: a step that the object made.
        num_steps, reverse: T, and whether the times increase.
        manner: how its steps may call the model.

    Raises:
        DifferentError: its steps are not linear in the state, the model's output and one draw of noise.
    """
    call = first.call
    if any(call.get(name) is not None for name in ("cond_fn", "denoised_fn")):
        raise DifferentError("its step is not guided-diffusion's, and has a cond_fn or denoised_fn")
    steps = _OwnSteps(own, call, first.recorders["model"].calls[0].returned, num_steps, reverse, manner)
    try:
        steps.look()
        compiled = compiler.compile_timesteps(steps)
    except ValueError as error:
        raise DifferentError(f"its step cannot be compiled ({error})") from error
    draws, bound = _draws(compiled), steps.bound
    table = replace(compiled.table, rows=steps.with_times(compiled.table), integer_time=steps.integer_time)
    variance = "learned_range" if table.learned_variance else "fixed_large"
    # Of an unknown prediction: its states may take on the memory order of the model's outputs.
    kind = LoopKind(table, "x0", variance, _never, bound=bound, draws=draws == 1)
    other = _other(table, bound, draws, steps.time_dtype, call.get("x"), reverse)
    return Fit(kind, bound is not None, manner=manner), replace(other, manner=manner)


def _other(
    table: StepTable, bound: float | None, draws: int, time_dtype: torch.dtype, like: Tensor, reverse: bool
) -> OtherStep:
    """A table's rows as the step to compare with."""
    stepper = Stepper(table, torch.empty_like(like, memory_format=torch.contiguous_format), bound, "reference")

    def make(**given: Any) -> Mapping[str, Any]:
        x, index = given["x"], int(given["t"][0])
        row = index if reverse else len(table) - 1 - index
        times = torch.full((len(x),), table["t"][row], dtype=torch.float64, device=x.device).to(time_dtype)
        output = output_tensor(given["model"](x, times, **(given.get("model_kwargs") or {})))
        noise = torch.randn_like(x) if draws else None
        sample, x0 = stepper(row, output, x, noise if table.uses_noise else None)
        return {"sample": sample, "pred_xstart": x0}

    size = np.abs(np.stack([table[name] for name in ("p_x", "p_m")])).max(axis=0)
    after = np.abs(np.stack([table[name] for name in ("a_x", "a_m", "a_0")])).max(axis=0)
    order = slice(None) if reverse else slice(None, None, -1)
    terms = {"pred_xstart": size[order], "sample": np.maximum(after, size * np.abs(table["a_0"]))[order]}
    return OtherStep(make, terms, any_shape=False)


def _never(*_: Any) -> Any:
    raise AssertionError("a run gives its own steps")


def _draws(compiled: Compiled) -> int:
    """How many draws every step makes: 0 or 1."""
    counts = {len(row) for row in compiled.draws}
    if counts not in ({0}, {1}) or min((weight for row in compiled.draws for weight in row), default=0.0) < 0:
        raise DifferentError("its step draws noise in another number")
    return counts.pop()


class _OwnSteps:
    """An object's own steps in the protocol of a scheduler."""

    def __init__(self, own: Any, call: StepCall, given: Any, num_steps: int, reverse: bool, manner: Manner) -> None:
        self._manner = manner
        self._own, self._call, self._given, self._num_steps = own, call, given, num_steps
        x, output = call.get("x"), output_tensor(given)
        learned = output.shape == (len(x), 2 * x.shape[1], *x.shape[2:])
        if not learned and output.shape != x.shape:
            raise DifferentError(f"its model returns shape {tuple(output.shape)} for {tuple(x.shape)}")
        times = torch.arange(num_steps)
        self.timesteps = times if reverse else times.flip(0)
        clips = bool(call.get("clip_denoised", True))
        self.config = SimpleNamespace(clip_sample=clips, clip_sample_range=1.0, variance_type=None)
        self.config.variance_type = "learned_range" if learned else "fixed"
        self.times: dict[int, tuple[float, torch.dtype]] = {}

    def __deepcopy__(self, memo: Any) -> _OwnSteps:
        twin: _OwnSteps = object.__new__(_OwnSteps)
        vars(twin).update({**vars(self), "config": SimpleNamespace(**vars(self.config))})
        return twin

    def set_timesteps(self, *_: Any) -> None:
        """They are set."""

    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Any:
        """A step of the object's, with a model that returns the output."""
        index, asked = int(timestep), list[Any]()

        def model(*args: Any, **kwargs: Any) -> Any:
            x, times = self._manner.read(args, kwargs)
            if not torch.equal(x, sample):
                raise ValueError("its model is called with something else than x and its time")
            asked.append((float(times[0]), times.dtype))
            return with_tensors(self._given, lambda _: output)

        t = torch.full((len(sample),), index)
        others: dict[str, Any] = {"model": model, "x": sample, "t": t}
        if "clip_denoised" in self._call.arguments:
            others["clip_denoised"] = self.config.clip_sample
        result = self._call.made_by(self._own, **others)
        if len(asked) != 1:
            raise ValueError(f"its model is called {len(asked)} times")
        self.times[index] = asked[0]
        return SimpleNamespace(prev_sample=result["sample"], pred_original_sample=result["pred_xstart"])

    @property
    def bound(self) -> float | None:
        """What the object limits x0 to."""
        return self.config.clip_sample_range if self.config.clip_sample else None

    def look(self) -> None:
        """Find the bound of x0, if the object limits it, and see on a few steps that nothing else is not linear.
        ValueError where it is: a compilation would take longer to say so."""
        generator = torch.Generator().manual_seed(0)
        x, m = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64).unbind()
        if self.config.clip_sample:
            far = self._x0(_FAR * (x + x.sign()), -_FAR * (x + x.sign())).abs()
            least, most = float(far.min()), float(far.max())
            if most < _FAR / 2 and least != most:
                raise ValueError("it limits x0 in another way than to a bound")
            self.config.clip_sample, self.config.clip_sample_range = most < _FAR / 2, most
        clipped, self.config.clip_sample = self.config.clip_sample, False
        for index in {0, self._num_steps // 2, self._num_steps - 1}:
            once, twice = (self._sample(index, size * x, size * m) for size in (1.0, 2.0))
            if not bool(((2 * once - twice).abs() <= 1e-6 * (twice.abs().max() + 1e-30)).all()):
                raise ValueError("it is not linear")
        self.config.clip_sample = clipped

    def _x0(self, x: Tensor, m: Tensor) -> Tensor:
        found: Tensor = self._step(0, x, m).pred_original_sample
        return found

    def _sample(self, index: int, x: Tensor, m: Tensor) -> Tensor:
        found: Tensor = self._step(index, x, m).prev_sample
        return found

    def _step(self, index: int, x: Tensor, m: Tensor) -> Any:
        """A step without noise."""
        output = torch.cat([m, torch.zeros_like(m)], dim=1) if "learned" in self.config.variance_type else m
        with torch.no_grad(), drawing(self, lambda like: torch.zeros_like(x if like is None else like)), in_float64():
            return self.step(output, index, x)

    @property
    def time_dtype(self) -> torch.dtype:
        """Of the model's times."""
        return next(iter(self.times.values()))[1]

    @property
    def integer_time(self) -> bool:
        """Whether the model's times are integers."""
        return not self.time_dtype.is_floating_point

    def with_times(self, table: Any) -> Any:
        """A table's rows, with the model's own times."""
        if {dtype for _, dtype in self.times.values()} - {torch.int64, torch.float32} or len(self.times) < len(table):
            raise DifferentError("its step gives the model times of another dtype")
        rows = table.rows.copy()
        rows[:, COLUMNS.index("t")] = [self.times[int(t)][0] for t in table["t"]]
        return rows
