"""fastcfg: classifier-free-guided diffusion sampling as one fused kernel per step.

The main names are `Sampler`, `CFG`, `Schedule` and the solvers:

    from fastcfg import CFG, Sampler, Schedule, solvers

    table = solvers.ddim(Schedule.named("squaredcos_cap_v2").respace(50))
    images = Sampler(model, table, guidance=CFG(3.0), clip=1.0).sample((16, 3, 64, 64), cond=..., uncond=..., seed=0)

`accelerate` takes another project's sampler, scheduler or guider and returns a fused one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved, guidance, sigmas, solvers
from .clip import DynamicThreshold
from .engine.by_row import ByRow
from .engine.conditioning import Padded, Shared
from .engine.config import SamplerConfig
from .engine.sampler import Preview, RunState, Sampler, Step
from .engine.state_function import StateFunction
from .engine.trajectory import Trajectory
from .frontends import ClassifierFree, accelerate, is_fused, report
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
from .known_pixels import differential, inpaint, repaint
from .reference.log_prob import log_prob
from .schedule import Schedule
from .solvers.repaint import reordered, repaint_order
from .table import StepTable

if TYPE_CHECKING:
    from . import compiler
    from .pipelines.pictures import to_pil
    from .pipelines.text_to_image import TextToImage
    from .pipelines.upsampler import Upsampler

__version__ = "0.1.0"

__all__ = ["APG", "CFG", "APGMix", "AdaptiveCFG", "AutoGuidance", "ByRow", "CFGZeroStar", "ClassifierFree", "Compose"]
__all__ += ["DynamicThreshold", "GramGuidance", "Guidance", "InstructPix2Pix", "MagnitudeAwareCFG", "NoGuidance"]
__all__ += ["Padded", "PerpNeg", "PerturbedCFG", "Preview", "RunState", "Sampler", "SamplerConfig", "Schedule"]
__all__ += ["Shared", "StateFunction", "Step", "StepTable", "TangentialCFG", "TextToImage", "Trajectory", "Upsampler"]
__all__ += ["accelerate", "compiler", "differential", "guidance", "inpaint", "is_fused", "log_prob", "reordered"]
__all__ += ["repaint", "repaint_order", "report", "sigmas", "solvers", "to_pil"]

# Names loaded on first use, and the modules they are in. Submodules are loaded on first use too.
_LAZY = {"TextToImage": "pipelines.text_to_image", "Upsampler": "pipelines.upsampler", "to_pil": "pipelines.pictures"}

_moved.install()


def __getattr__(name: str) -> Any:
    try:
        if name in _LAZY:
            return getattr(import_module(f".{_LAZY[name]}", __name__), name)
        if not name.startswith("_"):
            return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
