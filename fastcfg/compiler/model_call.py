"""A model's call by a sampling function, read: which argument is x, which is its time, and how often x is in the
batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .provenance import Provenance
from .stand_ins import FormError
from .subject import Form, Subject


def read_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], start: Tensor, subject: Subject, provenance: Provenance
) -> tuple[Tensor, Any, tuple[Any, ...], dict[str, Any], Form]:
    """x, its time, and the other arguments of a call of the model, by position and by name, and its form. `start` is
    what the function was given.

    Raises:
        FormError: it is called in another way.
    """
    name = _name_of_x(kwargs, start, subject, provenance) if subject.free and not args else ""
    if name:
        x, time, further = kwargs[name], None, ()
        kwargs = {other: value for other, value in kwargs.items() if other != name}
    elif args and isinstance(args[0], Tensor) and (len(args) > 1 or (subject.free and kwargs)):
        x, time, further = args[0], args[1] if len(args) > 1 else None, args[2:]
    else:
        how = ", ".join([*(type(value).__name__ for value in args), *(f"{name}=" for name in kwargs)])
        raise FormError(f"sample_fn: got one that calls its model as model({how}), expected model(x, sigma, ...)")
    return x, time, further, kwargs, Form(name, len(args) > 1, _branches(x, start, subject))


def _name_of_x(kwargs: dict[str, Any], start: Tensor, subject: Subject, provenance: Provenance) -> str:
    """The keyword of the only tensor like x that is not the caller's; "" if there is none."""
    known = {id(tensor) for tensor in subject.tensors}
    names = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.shape[1:] == start.shape[1:] and id(value) not in known
    ]
    if provenance.follows:
        names = [name for name in names if provenance.is_of_run(kwargs[name])]
    return names[0] if len(names) == 1 else ""


def _branches(x: Tensor, start: Tensor, subject: Subject) -> int:
    """How often x is in its batch."""
    if x.shape == start.shape:
        return 1
    if x.shape[1:] != start.shape[1:]:
        got, expected = tuple(x.shape), tuple(start.shape)
        raise FormError(f"sample_fn: got one whose model input has shape {got}, expected x's {expected}")
    chunks = x.split(len(start))
    if not subject.free or len(x) % len(start) or not all(torch.equal(chunks[0], chunk) for chunk in chunks[1:]):
        raise FormError(
            f"sample_fn: got one that calls its model with a batch of {len(x)} for {len(start)} samples, "
            "expected one without guidance of its own: leave it to the Sampler, as guidance=CFG(scale)"
        )
    return len(chunks)
