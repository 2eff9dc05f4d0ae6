"""Compile any scheduler or sampling function with linear steps into a `StepTable`, by running it.

A sampler without step-size control is a linear system: every model input and every sample is a sum of the starting
noise, the model's outputs and the draws of noise. It is run once on the host on basis vectors instead of images, one
for the starting noise, for every output and for every draw, so that its samples show its coefficients. These are
reduced to rows that save at most three tensors, and the table is compared with the original on random inputs before it
is used.

    patching     redirect an original's draws and conversions, in this thread only
    protocol     what a scheduler offers, in the forms that projects give it
    probe        run a scheduler on basis vectors, and on numbers
    coordinates  short coordinates for a few rows of a long run
    reduction    coefficients of a whole run -> rows with few saved tensors
    assembly     rows -> a table, its noise (`Compiled`), and the proof that it reproduces the original
    scheduler    `compile_scheduler`: all of it, with the clip and learned variances
    sampler      `compile_sampler`: the same for functions of k-diffusion's form
    stand_ins    what a sampling function is given in place of its model and its draws
    trial        one run of a sampling function on them, and what it did
    prediction   x0 as a sum of a row's state and output, by what the model predicts
    rehearsal    what a scheduler's step draws and returns, seen on a small example
    sampler_rehearsal    what a sampling function does in a call, and its table
"""

from .assembly import Compiled
from .rehearsal import StepRehearsal, rehearse_step
from .sampler import compile_sampler, trace_sampler
from .sampler_rehearsal import SamplerRehearsal, rehearse_sampler
from .scheduler import NextTimestep, compile_scheduler, compile_timesteps, scheduler_clip

# The name before the two classes became one.
CompiledScheduler = Compiled

__all__ = ["Compiled", "CompiledScheduler", "NextTimestep", "SamplerRehearsal", "StepRehearsal", "trace_sampler"]
__all__ += ["compile_sampler", "compile_scheduler", "compile_timesteps", "rehearse_sampler"]
__all__ += ["rehearse_step"]
__all__ += ["scheduler_clip"]
