"""diffusers and k-diffusion, where they can be imported, and the process that they are given."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import numpy as np

from fastcfg import Schedule
from fastcfg.schedule import BETA_SCHEDULES

_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


@cache
def load_diffusers() -> ModuleType | None:
    """diffusers; None where it cannot be imported."""
    return import_module("diffusers") if _can_import("diffusers") else None


@cache
def load_k_diffusion() -> tuple[ModuleType, ModuleType] | None:
    """k-diffusion's modules `sampling` and `external`; None where they cannot be imported.

    The package's __init__ asks for all that its training scripts use. Where that fails the two are imported alone,
    with empty modules in torchvision's place while that happens if need be.
    """
    if not _can_import("k_diffusion"):
        spec = find_spec("k_diffusion")
        if spec is None:
            return None
        sys.modules["k_diffusion"] = module_from_spec(spec)
    absent = [] if _can_import(_TORCHVISION[-1]) else [name for name in _TORCHVISION if name not in sys.modules]
    sys.modules.update((name, ModuleType(name)) for name in absent)
    try:
        return import_module("k_diffusion.sampling"), import_module("k_diffusion.external")
    except ImportError:
        del sys.modules["k_diffusion"]
        return None
    finally:
        for name in absent:
            del sys.modules[name]


def _can_import(name: str) -> bool:
    try:
        import_module(name)
    except Exception:  # what a package asks for fails in ways of its own
        return False
    return True


def full_process(schedule: Schedule) -> Schedule:
    """The named process that a schedule is re-spaced from; ValueError if there is none."""
    for name in BETA_SCHEDULES:
        full = Schedule.named(name, schedule.original_num_timesteps)
        # Re-spacing to two steps costs the cosine's last alpha_bar eight digits.
        if np.allclose(full.alphas_cumprod[schedule.timestep_map], schedule.alphas_cumprod, rtol=1e-6, atol=0):
            return full
    raise ValueError(f"schedule: got one of no named process, expected one of {', '.join(BETA_SCHEDULES)}, re-spaced")
