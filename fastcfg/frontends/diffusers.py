"""diffusers' schedulers with one fused step, and its guiders with one fused blend.

`fuse(pipeline.scheduler)` returns the same scheduler with a fused `step`. Importing a class by its name from this
module gives diffusers' class, subclassed:

    from fastcfg.frontends.diffusers import DDIMScheduler
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

Any scheduler class works, including a user's own (with `fuse`): its steps are compiled by running it. Guiders of
modular pipelines work for the methods of `fastcfg.guidance`. What cannot be fused runs as before, and one logged line
says why.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from ._fused.guider import fused_guider, is_guider
from ._fused.scheduler import fused_class
from ._fused.subclass import as_subclass, is_fused

__all__ = ["fuse", "is_component"]

_Component = TypeVar("_Component")


def fuse(component: _Component) -> _Component:
    """A scheduler or guider of the same class (a subclass of it) and state that runs as one fused kernel.

    The component, of diffusers or of its protocol, is not changed. `fastcfg.accelerate` does the same.

    A scheduler's `set_timesteps` compiles. Its `step` neither reads from the device nor copies to it (except for the
    first of a shape and dtype, which allocates memory), draws noise as the original does, and returns the same.
    Everything else is the original's: the constructor, `config`, `save_pretrained`, `add_noise`, `order`,
    `begin_index`. A guider's `forward` blends in float32 and rounds once: `fastcfg.ops.blender.Blender`.

    Raises:
        TypeError: another object.

    Example:
        >>> pipeline.scheduler = fuse(pipeline.scheduler)
        >>> modular.update_components(guider=fuse(modular.guider))
    """
    kind: Any = type(component)
    if is_fused(kind):
        return component
    fused = _fused(component, kind) if is_component(component) else None
    if fused is None:
        raise TypeError(f"component: got {kind.__name__}, expected a scheduler or guider of diffusers' protocol")
    same: Any = as_subclass(component, fused)
    if getattr(same, "momentum_buffer", None) is not None:
        same.momentum_buffer = copy.copy(same.momentum_buffer)  # the given guider keeps its own past
    found: _Component = same
    return found


def is_component(candidate: object) -> bool:
    """Whether an object has the protocol of diffusers' schedulers or guiders."""
    return not isinstance(candidate, type) and (_is_scheduler(candidate) or is_guider(candidate))


def _is_scheduler(candidate: object) -> bool:
    return all(hasattr(candidate, name) for name in ("config", "set_timesteps", "step"))


def _fused(protocol: object, kind: type) -> type | None:
    """The subclass of a class by its methods or an instance's."""
    if _is_scheduler(protocol):
        return fused_class(kind)
    return fused_guider(kind) if is_guider(protocol) else None


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and (fused := _fused(found, found)) is not None:
        return fused
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor is it a scheduler or guider of diffusers")


def __dir__() -> list[str]:
    import diffusers

    return [*__all__, *(name for name in dir(diffusers) if name.endswith(("Scheduler", "Guidance")))]
