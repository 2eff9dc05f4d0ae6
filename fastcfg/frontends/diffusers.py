"""diffusers' schedulers with one fused step, and its guiders with one fused blend.

`fuse(pipeline.scheduler)` returns the same scheduler with a fused `step`; importing a class by its name from here gives
diffusers' class, subclassed:

    from fastcfg.frontends.diffusers import DDIMScheduler
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

Every scheduler class there is can be had, a user's own included (`fuse`): its steps are compiled from itself. The
guiders of modular pipelines can be had likewise, for the methods of `fastcfg.guidance`. What cannot be fused runs as it
did, and a line is logged that says why.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ._fused.guider import fused_guider, is_guider
from ._fused.scheduler import fused_class
from ._fused.subclass import as_subclass, is_fused

__all__ = ["fuse"]

_Component = TypeVar("_Component")


def fuse(component: _Component) -> _Component:
    """A scheduler or guider of the same class (a subclass of it) and state, whose work is one fused kernel.

    A scheduler's `set_timesteps` compiles; `step` reads nothing back from the device and copies nothing to it (but for
    the first of a shape and dtype, which sets memory up), draws noise as the original does, and returns what it
    returns. All else is the original's: the constructor, `config`, `save_pretrained`, `add_noise`, `order`,
    `begin_index`.

    A guider's `forward` blends in float32 what the model has predicted and rounds once: `fastcfg.ops.blender.Blender`.

    Args:
        component: a scheduler or guider of diffusers, or of its protocol. It is not changed.

    Raises:
        TypeError: no such object.

    Example:
        >>> pipeline.scheduler = fuse(pipeline.scheduler)
        >>> modular.update_components(guider=fuse(modular.guider))
    """
    kind: Any = type(component)
    if is_fused(kind):
        return component
    fused = None if isinstance(component, type) else _fused(component, kind)
    if fused is None:
        raise TypeError(f"component: got {kind.__name__}, expected a scheduler or guider of diffusers' protocol")
    same: _Component = as_subclass(component, fused)
    return same


def _fused(protocol: object, kind: type) -> type | None:
    """The subclass of a class by the methods of it or of an instance."""
    if all(hasattr(protocol, name) for name in ("config", "set_timesteps", "step")):
        return fused_class(kind)
    return fused_guider(kind) if is_guider(protocol) else None


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    import diffusers

    found = getattr(diffusers, name, None)
    fused = _fused(found, found) if isinstance(found, type) else None
    if fused is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}, nor is it one of diffusers' schedulers or guiders"
        )
    return fused


def __dir__() -> list[str]:
    import diffusers

    return [*__all__, *(name for name in dir(diffusers) if name.endswith(("Scheduler", "Guidance")))]
