"""fastcfg: classifier-free-guided diffusion sampling as one fused kernel per step.

The main names are `Sampler`, `CFG`, `Schedule` and the solvers:

    from fastcfg import CFG, Sampler, Schedule, solvers

    table = solvers.ddim(Schedule.named("squaredcos_cap_v2").respace(50))
    images = Sampler(model, table, guidance=CFG(3.0), clip=1.0).sample((16, 3, 64, 64), cond=..., uncond=..., seed=0)
"""

from . import solvers
from .frontends import ClassifierFree, accelerate
from .guidance import CFG, AdaptiveCFG, Compose, Guidance, NoGuidance
from .sampler import Preview, Sampler, Step
from .schedule import Schedule
from .table import StepTable
from .threshold import DynamicThreshold

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "AdaptiveCFG",
    "ClassifierFree",
    "Compose",
    "DynamicThreshold",
    "Guidance",
    "NoGuidance",
    "Preview",
    "Sampler",
    "Schedule",
    "Step",
    "StepTable",
    "accelerate",
    "solvers",
]
