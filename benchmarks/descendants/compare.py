"""A call beside itself accelerated: what came of it, how far apart the results are, and the time of a step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastcfg
from benchmarks.suite.cases import Provider
from benchmarks.suite.measure import Turns

from .calls import Call

# Of the largest value, where that is above 1. What a step predicts of the image has x / sqrt(alpha_bar) in it, 158 x at
# the end of the linear schedule: a rounding of x is 4e-5 of a prediction that is clipped to 1. Measured: 1.1e-4, where
# both were 1.4e-4 from the same in float64.
TOLERANCE, PREDICTED_TOLERANCE = 2e-5, 2e-4
SEEDS = (0, 1, 2)
_SLOW = 2.0  # seconds
BAD = ("different", "unclear error")

Record = dict[str, Any]


def compare(call: Call, turns: int) -> Record:
    """Run a call three times, with a seed each, beside its original: an accelerated object proves itself in the first.

    Args:
        call: the call.
        turns: how often both are timed, at the end; 0: not at all. Generators and what takes seconds are not.

    Returns:
        name, progressive, outcome ("engine", "stepped", "the original", "refused", "unclear error", "different", or
        "broken": the original itself fails), runs (of each call), reason, difference (of the images; None where
        there are none) and predicted (of the steps' pred_xstart), and step_us: of the original and of the accelerated.
    """
    record: Record = {"name": call.name, "progressive": call.progressive, "difference": None, "reason": ""}
    begin = time.perf_counter()
    try:
        expected = [_seeded(call, call.obj, seed) for seed in SEEDS]
    except Exception as error:
        return broken(error, call)
    is_slow = time.perf_counter() - begin > _SLOW
    try:
        fast = fastcfg.accelerate(call.obj)
        apart, how = [], []
        for seed, (result, state) in enumerate(expected):
            found, after = _seeded(call, fast, seed)
            apart.append(distances(result, found))
            how.append(_report(fast))
            if not bool((state == after).all()):
                return record | {"outcome": "different", "reason": f"call {seed}: the generator is left elsewhere"}
    except Exception as error:
        return record | {"outcome": "refused" if is_clear(error) else "unclear error", "reason": _said(error)}
    images, predicted = (max(pair[i] for pair in apart) for i in (0, 1))
    runs = [one["run"] for one in how]
    record |= {"difference": images, "predicted": predicted, "runs": runs, "reason": how[-1]["reason"]}
    if not (images <= TOLERANCE and predicted <= PREDICTED_TOLERANCE):
        said = f"{images:.2g} apart, predictions {predicted:.2g}; {', '.join(runs)}; {how[-1]['reason']}"
        return record | {"outcome": "different", "reason": said.strip()}
    record["outcome"] = runs[-1]
    if turns and not call.progressive and not is_slow:
        record["step_us"] = _times(call, fast, turns)
    return record


def broken(error: Exception, call: Call | None = None) -> Record:
    """The record of an original that fails; without a call, of a project that does not import."""
    name, progressive = (call.name, call.progressive) if call else ("import", False)
    return {"name": name, "progressive": progressive, "difference": None, "outcome": "broken", "reason": _said(error)}


def is_clear(error: Exception) -> bool:
    """Whether an error is of the right kind, and says what was got and what is expected or what to do."""
    text = " ".join(str(error).split())
    return isinstance(error, TypeError | ValueError) and bool(re.match(r"[\w .\[\]()]+: got .*expected", text))


def distances(expected: Any, found: Any) -> tuple[float, float]:
    """The largest of everything but the steps' `pred_xstart`, and of these; infinite where the form is another."""
    ours, theirs = dict(_tensors(found)), dict(_tensors(expected))
    if not set(theirs) <= set(ours) or not theirs:
        return float("inf"), float("inf")
    apart = {place: _between(value, ours[place]) for place, value in theirs.items()}
    predicted = {place: value for place, value in apart.items() if "xstart" in place}
    images = [value for place, value in apart.items() if place not in predicted]
    return max(images, default=0.0), max(predicted.values(), default=0.0)


def _between(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    a, b = expected.detach().double(), found.detach().double()
    same_kind = bool((a.isfinite() == b.isfinite()).all())
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1)) if same_kind and a.numel() else float("inf")


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor | np.ndarray):
        yield place, torch.as_tensor(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{place}.{i}")


def _seeded(call: Call, obj: Any, seed: int) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    return call.run(obj), torch.get_rng_state()


def _report(fast: Any) -> Record:
    return {"run": "the original", "reason": "the call is none of the loops that accelerate replaces"} | fastcfg.report(
        fast
    )


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _times(call: Call, fast: Any, turns: int) -> list[float]:
    def provider(obj: Any) -> Provider:
        run: Callable[[bool], object] = lambda draw: call.run(obj)  # noqa: E731
        return Provider(lambda: None, run, None)

    taken = Turns({"original": provider(call.obj), "accelerated": provider(fast)}, {}, torch.device("cpu"), str)
    for _ in range(1 + turns):
        taken.take(False)
    if taken.failed:
        raise RuntimeError(f"failed: {taken.failed}")
    return [float(np.median(taken.whole[name][1:])) / call.steps for name in ("original", "accelerated")]
