"""The public operations: check, then dispatch to the kernels, to the reference, or to the reference compiled by
Inductor. The only importer of `fastcfg.kernels`.

Eager calls launch directly; under `torch.compile` they go through `torch.library`, which costs more host time than a
small kernel runs. No operation carries gradients.
"""

from .backend import BACKENDS, inductor_problem, resolve_backend, triton_problem
from .blender import Blender
from .checks import is_channels_last
from .combine import Combine
from .extension import instruction_sets, native_problem
from .finite import FiniteCheck
from .gram import gram
from .noise import brownian_noise, initial_noise
from .noise_sums import NoiseSums, sums_memory
from .pieces import guidance_blend, posterior_mean_variance, predict_x0, split_model_output
from .state_change import StateChange
from .step import GuidedStep, guided_step
from .stepper import Stepper
from .threshold import QuantileBound, dynamic_threshold, quantile_bound

__all__ = ["BACKENDS", "Blender", "Combine", "FiniteCheck", "GuidedStep", "NoiseSums", "QuantileBound"]
__all__ += ["StateChange", "Stepper", "brownian_noise", "dynamic_threshold", "gram", "guidance_blend", "guided_step"]
__all__ += ["inductor_problem", "initial_noise", "instruction_sets", "is_channels_last", "native_problem"]
__all__ += ["posterior_mean_variance", "predict_x0"]
__all__ += ["quantile_bound", "resolve_backend", "split_model_output", "sums_memory", "triton_problem"]
