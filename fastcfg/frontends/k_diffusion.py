"""k-diffusion's samplers on the engine.

    from fastcfg.frontends.k_diffusion import sample_dpmpp_2m

is k-diffusion's function of that name, compiled by running it: the same arguments, callbacks and random numbers, with
every step one fused kernel, and from a model's second call on in one CUDA graph with it. `fuse` works for any function
of that form, ComfyUI's or a user's own. What cannot be compiled runs as before, and one logged line says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from ._fused.sampler import fused

__all__ = ["fuse"]


@cache
def fuse(sample_fn: Callable[..., Tensor], backend: str = "auto", graph: str | bool = "auto") -> Callable[..., Tensor]:
    """A sampling function with fused steps; `fastcfg.accelerate` does the same.

    The signature and name are the same. Sigmas may be on a GPU: they are read once, before the first step. Noise is
    drawn when and as the original draws it: dtype, shape, layout, generators of its own or given, its Brownian tree.
    The model is given what the function would give it, ComfyUI's hooks of CFG++ included.

    With a callback the model and the steps run one after the other and are not captured: it is given the tensors that
    the run goes by, when the original gives them. Where it writes into one, and where the model's output is unlike its
    input (dtype, shape, layout, a gradient that is wanted), the original takes over from that place, without evaluating
    the model or calling the callback twice. For this, outputs and draws are kept until such a run ends. So runs the
    first call of a model too, which shows whether it may be captured.

    `report()` of the returned function says how the last call ran: "run" is "engine", "stepped", "stepped, then the
    original" or "the original", "reason" why not the one before; with the engine also `Sampler.report`'s entries.

    Args:
        sample_fn: called as sample_fn(model, x, sigmas, extra_args, callback, disable, **options), where model(x [B, C,
            ...], sigma [B], **extra_args) returns a tensor like x, or in other ways: with model and x under other names
            and in another order, without sigmas, with tensors for its model (labels, conditionings), several branches
            side by side. It is run on stand-ins before a call: what it changes elsewhere, but for generators, is not
            put back.
        backend, graph: as for `Sampler`.

    Raises:
        TypeError: sample_fn is not callable.

    Example:
        >>> from k_diffusion.sampling import sample_heun
        >>> x = fuse(sample_heun)(model, x, sigmas)
    """
    return fused(sample_fn, backend, graph)


def __getattr__(name: str) -> Any:
    if not name.startswith("sample_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from k_diffusion import sampling

    if not hasattr(sampling, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has k_diffusion.sampling")
    return fuse(getattr(sampling, name))


def __dir__() -> list[str]:
    try:
        from k_diffusion import sampling
    except ImportError:  # or something that it imports is missing
        return __all__
    return [*__all__, *(name for name in dir(sampling) if name.startswith("sample_"))]
