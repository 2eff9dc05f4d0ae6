"""diffusers' schedulers with one fused step.

`fuse(pipeline.scheduler)` returns the same scheduler with a fused `step`; importing a class by its name from here gives
diffusers' class, subclassed:

    from fastcfg.frontends.diffusers import DDIMScheduler
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

Every scheduler class there is can be had, a user's own included (`fuse`): its steps are compiled from itself. What
cannot be compiled runs as it did, and a line is logged that says why.
"""

from __future__ import annotations

from typing import Any

from ._fused_scheduler import fused_class, is_fused

__all__ = ["fuse"]


def fuse(scheduler: Any) -> Any:
    """A scheduler of the same class (a subclass of it) and state, whose `step` is one fused kernel.

    `set_timesteps` compiles; `step` reads nothing back from the device and copies nothing to it, draws noise as the
    original does, and returns what it returns. All else is the original's: the constructor, `config`,
    `save_pretrained`, `add_noise`, `order`, `begin_index`.

    Args:
        scheduler: of diffusers, or of its protocol. It is not changed.

    Raises:
        TypeError: no such object.

    Example:
        >>> pipeline.scheduler = fuse(pipeline.scheduler)                           # doctest: +SKIP
    """
    if is_fused(type(scheduler)):
        return scheduler
    missing = [name for name in ("config", "set_timesteps", "step") if not hasattr(scheduler, name)]
    if missing or isinstance(scheduler, type):
        raise TypeError(f"scheduler: got {type(scheduler).__name__}, expected a scheduler of diffusers' protocol")
    kind: Any = type(scheduler)
    fused: Any = object.__new__(fused_class(kind))
    fused.__dict__.update(vars(scheduler))
    return fused


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    import diffusers

    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not hasattr(found, "set_timesteps"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor is it a scheduler of diffusers")
    return fused_class(found)


def __dir__() -> list[str]:
    import diffusers

    return [*__all__, *(name for name in dir(diffusers) if name.endswith("Scheduler"))]
