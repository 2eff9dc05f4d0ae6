"""fastcfg: classifier-free-guided diffusion sampling as one fused kernel per step.

The main names are `Sampler`, `CFG`, `Schedule` and the solvers:

    from fastcfg import CFG, Sampler, Schedule, solvers

    table = solvers.ddim(Schedule.named("squaredcos_cap_v2").respace(50))
    images = Sampler(model, table, guidance=CFG(3.0), clip=1.0).sample((16, 3, 64, 64), cond=..., uncond=..., seed=0)
"""

from . import _moved, solvers
from .clip import DynamicThreshold
from .engine.sampler import Preview, Sampler, Step
from .frontends import ClassifierFree, accelerate
from .guidance import (
    APG,
    CFG,
    AdaptiveCFG,
    APGMix,
    AutoGuidance,
    CFGZeroStar,
    Compose,
    GramGuidance,
    Guidance,
    InstructPix2Pix,
    MagnitudeAwareCFG,
    NoGuidance,
    PerpNeg,
    PerturbedCFG,
    TangentialCFG,
)
from .schedule import Schedule
from .table import StepTable

_moved.install()

__version__ = "0.1.0"

__all__ = [
    "APG",
    "CFG",
    "APGMix",
    "AdaptiveCFG",
    "AutoGuidance",
    "CFGZeroStar",
    "ClassifierFree",
    "Compose",
    "DynamicThreshold",
    "GramGuidance",
    "Guidance",
    "InstructPix2Pix",
    "MagnitudeAwareCFG",
    "NoGuidance",
    "PerpNeg",
    "PerturbedCFG",
    "Preview",
    "Sampler",
    "Schedule",
    "Step",
    "StepTable",
    "TangentialCFG",
    "accelerate",
    "solvers",
]
