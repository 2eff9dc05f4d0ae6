"""What a sampling function tells beside its samples: its model, the user, its callback and the caller. It must not
depend on the samples, or be known sums of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .assembly import Compiled, Other
from .probe import Recording, Response
from .stand_ins import described, tensors_in
from .trial import Trial


def check_alike(what: str, one: Trial, other: Trial) -> None:
    """Raise ValueError if two runs on different samples tell their model, the user or the caller different things."""
    for call, again in zip(one.calls, other.calls, strict=True):
        told, again_told = ((c.passed.summary(), described(c.further), c.form) for c in (call, again))
        tensors, again_tensors = ([*tensors_in((c.further, dict(c.passed.changed)))] for c in (call, again))
        if told != again_told or not all(map(torch.equal, tensors, again_tensors)):
            raise ValueError(f"{what} whose model's arguments depend on the samples, expected the same ones")
    if one.talk != other.talk:
        raise ValueError(f"{what} that prints what depends on the samples, expected the same")
    if one.outcome.template != other.outcome.template:
        raise ValueError(f"{what} that returns other things for other samples, expected the same")


def check_others(
    compiled: Compiled, run: Recording, trial: Trial, sums: Sequence[tuple[int, str]], tolerance: float, what: str
) -> None:
    """Raise ValueError unless what a run told beside its samples is what is known of it."""
    tensors = (*trial.outcome.others, *(trial.told[key] for key in sums))
    for (row, a, b, c, constant), tensor in zip(compiled.others, tensors, strict=True):
        x, got = run.states[row], tensor.detach().double().cpu()
        made = a * x + (b * run.outputs[row] if b else 0.0) + (c * run.states[row + 1] if c else 0.0) + constant
        size = max(1.0, abs(a) * float(x.abs().max()), float(got.abs().max()))
        if not float((made - got).abs().max()) <= tolerance * size:
            raise ValueError(
                f"{what} that tells of tensors that differ from a row's, expected sums of its x and output"
            )


def take_constants(still: Trial, runs: Sequence[Trial], what: str) -> list[float]:
    """What a function adds to its samples and to the other tensors that it tells, which a run of zeros shows; it is
    taken out of other runs."""
    constants = []
    for values in (still.result, *still.others):
        constants.append(float(values.flatten()[0]))
        if not bool((values == constants[-1]).all()):
            raise ValueError(f"{what} that adds a tensor to its samples, expected linear steps")
    for run in runs:
        run.result = run.result - constants[0]
        told = zip(run.others, [*constants[1:], *[0.0] * len(run.bounded)], strict=False)
        run.others = [values - constant for values, constant in told]
    return constants


def others_of(response: Response, calls: int, latest: Sequence[int], constants: Sequence[float]) -> tuple[Other, ...]:
    """The tensors told beside the samples, which follow the states, as sums of a row's state and output, and of the
    state that it makes. `latest` is the last row that each may be of, or, if it is told at the end, the number of
    rows."""
    states, found = response.states[: calls + 1], list[Other]()
    for vector, last, constant in zip(response.states[calls + 1 :], latest, constants, strict=False):
        for row in range(last, -1, -1):
            parts = [states[row]] if row == calls else [states[row], response.predictions[row]]  # type: ignore[index]
            if last == calls > row:
                parts.append(states[row + 1])
            for count in range(1, len(parts) + 1):
                weights, *_ = np.linalg.lstsq(np.stack(parts[:count], axis=1), vector, rcond=None)
                made = weights @ np.stack(parts[:count])
                if np.abs(made - vector).max() <= 1e-7 * max(1.0, float(np.abs(vector).max())):
                    a, b, c = [*weights.tolist(), 0.0, 0.0][:3]
                    found.append((row, a, b, c, constant))
                    break
            else:
                continue
            break
        else:
            raise ValueError("sample_fn: got one that tells of other tensors than sums of a row's x and output")
    return tuple(found)
