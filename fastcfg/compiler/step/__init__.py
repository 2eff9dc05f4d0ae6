"""One step of a scheduler as sums of tensors, found by running it.

A step is a function of the sample, the model's output, the tensors that the scheduler kept from earlier steps in its
own attributes, and draws of noise; all other attributes (levels, counters, options) decide which. It is run on basis
vectors, which show the coefficients of everything it returns or keeps, and on random tensors of the caller's dtypes,
which show what it draws, the dtypes of its results, and which attributes it writes. The sums are proved on both. They
hold as long as the attributes that the step read have the same contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...combination import Combination
from ..probe import Array
from .limits import clip_of, over_limited_x0
from .parts import (
    SAMPLE,
    Constant,
    Container,
    Draw,
    Given,
    Means,
    Part,
    Small,
    Source,
    Sum,
    TracedStep,
    UntraceableError,
    Write,
    has_number,
    same_parts,
)
from .reader import Reader
from .run import MISSING, Reads, Runs, class_attribute
from .sums import TOLERANCE, coefficients_of, combination_of, prove
from .tensors import CONFIG, BasisVectors, Examples, Inputs, laid_out
from .watch import unchanged, undrawn

__all__ = [
    "CONFIG",
    "MISSING",
    "Constant",
    "Container",
    "Draw",
    "Given",
    "Means",
    "Part",
    "Small",
    "Source",
    "Sum",
    "TracedStep",
]
__all__ += ["UntraceableError", "Write", "laid_out", "trace_step"]

# Between the sums and the original's step in the caller's dtypes, which may cancel: roundings of the coarsest dtype.
_ROUNDINGS, _LEAST = 64, 2e-4


def trace_step(
    scheduler: Any, step: Callable[..., Any], output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any]
) -> TracedStep:
    """Trace a step of a scheduler, which is not changed; no random numbers are drawn.

    Args:
        scheduler: an object with whatever attributes the step reads.
        step: called as step(scheduler, output, timestep=timestep, sample=sample, **options).
        output, sample: the step's tensors, [B, C, ...], output also [B, 2C, ...]; their contents are not read.
        timestep: a number, or a tensor of one in the host's memory.
        options: further arguments; tensors like the sample are inputs too, others are small and in the host's memory.

    Raises:
        UntraceableError: the step is no sum of its tensors, fails on an example, or does what cannot be reproduced.
    """
    reads = Reads()
    graded = torch.is_grad_enabled()  # which leaving inference mode would turn on
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(graded),
            undrawn(options.get("generator")),
            unchanged(scheduler, step),
        ):
            inputs = Inputs.of(scheduler, output, sample, options)
            runs = Runs(scheduler, step, timestep, options, inputs, reads)
            with runs.open():
                return _traced(scheduler, inputs, runs, reads)
    except UntraceableError as error:
        error.reads, error.config = _reads(reads)
        raise


def _traced(scheduler: Any, inputs: Inputs, run: Runs, reads: Reads) -> TracedStep:
    clip = clip_of(run.config)
    vectors = BasisVectors(inputs) if clip is None else BasisVectors(inputs, _signs(inputs))
    linear = run(vectors)
    shape = inputs.example_shape(13, 7, 11)
    if 1 in inputs.shape and set(inputs.orders.values()) != {tuple(range(len(inputs.shape)))}:
        # What torch makes of strides of a single element depends on them.
        shape = inputs.shape
    reader = _read(run, inputs, shape)
    if has_number((reader.result, reader.writes), shape):
        # It may depend on the size.
        other = _read(run, inputs, inputs.example_shape(5, 3, 17))
        if not same_parts((reader.result, reader.writes), (other.result, other.writes)):
            reader = _read(run, inputs, inputs.shape)
    sources: tuple[Source, ...] = ()
    combination = None
    if reader.dtypes:
        sums = reader.sums_of(linear)
        converted = [value for value in linear.converted if value.shape == vectors.shape] if clip is not None else []
        rows = coefficients_of([*sums, *converted], vectors, inputs)
        combination = combination_of(rows[: len(sums)], inputs, vectors, sums)
        if clip is not None:
            combination = over_limited_x0(combination, inputs, vectors, sums, rows[len(sums) :], reader, clip, run)
        else:
            prove(combination, inputs, vectors.values(), [value[vectors.random] for value in sums], TOLERANCE)
        coarsest = max(torch.finfo(dtype).eps for dtype in (*inputs.dtypes.values(), *reader.dtypes))
        found, tolerance = reader.sums_of(reader.trial), max(_ROUNDINGS * coarsest, _LEAST)
        prove(combination, inputs, reader.examples.values(), found, tolerance, together=True)
        sources, combination = _needed(combination, inputs)
    of_class = {name: class_attribute(type(scheduler), name) for name in reads.of_class}
    own, config = _reads(reads)
    return TracedStep(
        reads=own,
        config=config,
        of_class={name: value for name, value in of_class.items() if value is not None},
        sources=sources,
        combination=combination,
        dtypes=tuple(reader.dtypes),
        orders=tuple(None if order == inputs.orders[SAMPLE] else order for order in reader.orders),
        draws=tuple(reader.trial.draws),
        result=reader.result,
        writes=reader.writes,
    )


def _reads(reads: Reads) -> tuple[frozenset[str], frozenset[str] | None]:
    """The attributes that were read, but the config, and what was read of this."""
    return frozenset(reads.own - {CONFIG}), reads.config.items()


def _read(run: Runs, inputs: Inputs, shape: tuple[int, ...]) -> Reader:
    examples = Examples(inputs, shape)
    return Reader(examples, run(examples))


def _signs(inputs: Inputs) -> Array:
    """Of the coefficients of most x0: of the sample, and less the model's output."""
    signs = np.zeros(len(inputs.names))
    signs[0], signs[1] = 1.0, -1.0
    return signs


def _needed(combination: Combination, inputs: Inputs) -> tuple[tuple[Source, ...], Combination]:
    """The sources of the inputs that a combination uses, and the combination of these alone."""
    x0, noise = combination.x0, combination.noise
    rows = combination.coefficients if x0 is None else np.vstack([combination.coefficients, x0])
    uses: Any = rows.any(axis=0)
    used = [i for i, is_used in enumerate(uses.tolist()) if i < 2 or is_used or i == noise]
    return tuple(inputs.names[i] for i in used), replace(
        combination,
        coefficients=combination.coefficients[:, used],
        x0=None if x0 is None else x0[used],
        noise=None if noise is None else used.index(noise),
    )
