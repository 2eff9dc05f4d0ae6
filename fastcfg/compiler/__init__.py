"""The sampler compiler: any scheduler or sampling function of linear steps becomes a `StepTable`, by running it.

A sampler without step-size control is a linear system: every model input and every sample is a sum of the starting
noise, the model's outputs and the draws of noise. It is run once on the host, on basis vectors instead of images: the
starting noise is one, every model output is one, every draw is one; then what comes out holds its own coefficients.
They are reduced to rows that keep at most three tensors, and the table is compared with the original on random inputs
before anybody uses it.

    probe        run a scheduler on basis vectors
    reduction    coefficients of whole runs -> rows with few saved tensors
    assembly     rows -> a table, and the proof that it is the original
    recipe       what an original draws, for images of the same seeds
    cache        what was compiled, for schedulers that hold the same numbers
    scheduler    `compile_scheduler`: all of it, with the clip and learned variances
    sampler      `compile_sampler`: the same for functions of k-diffusion's form
"""

from .recipe import Compiled
from .sampler import compile_sampler, trace_sampler
from .scheduler import CompiledScheduler, NextTimestep, compile_scheduler, compile_timesteps, scheduler_clip

__all__ = [
    "Compiled",
    "CompiledScheduler",
    "NextTimestep",
    "compile_sampler",
    "compile_scheduler",
    "compile_timesteps",
    "scheduler_clip",
    "trace_sampler",
]
