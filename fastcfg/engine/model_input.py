"""What dtype and device a model's input must have, by what the model says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def input_dtype(model: Any) -> torch.dtype:
    """The dtype in which a model computes: that of its first floating parameter, else float32.

    A class's `dtype` property (diffusers, transformers) is asked first. Parameters of 8 bits, and of integers, are
    storage: where a model has such, what its modules or hooks name as their compute dtype counts, then the first
    parameter of 16 bits or more, then an attribute `dtype`.
    """
    if not isinstance(model, nn.Module):
        return torch.float32
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(getattr(type(model), "dtype", None), property) and _computes(declared := model.dtype):
        return declared
    dtypes = list(dict.fromkeys(parameter.dtype for parameter in model.parameters()))
    found = [dtype for dtype in dtypes if _computes(dtype)]
    if len(found) < len(dtypes):
        named = (getattr(part, "compute_dtype", None) for part in _parts_and_hooks(model))
        found = [*filter(_computes, named), *found]
    if not found and _computes(declared := getattr(model, "dtype", None)):
        return declared
    return found[0] if found else torch.float32


def input_device(model: Any) -> torch.device:
    """Where a model computes: where a hook that offloads it says (accelerate, diffusers), else where its first
    parameter is, else the CPU. ValueError for weights on "meta" alone."""
    if not isinstance(model, nn.Module):
        return torch.device("cpu")
    for part in _parts_and_hooks(model):
        device = getattr(part, "execution_device", None)
        if device is None:
            device = getattr(getattr(part, "group", None), "onload_device", None)
        if isinstance(device, torch.device | str | int) and not isinstance(part, nn.Module):
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    devices = [parameter.device for parameter in model.parameters()]
    found = next((device for device in devices if device.type != "meta"), None)
    if devices and found is None:
        raise ValueError("model: got weights on the meta device, expected loaded ones, or the device= it computes on")
    return found or torch.device("cpu")


def _computes(dtype: Any) -> bool:
    """Whether something is a dtype in which a model may compute."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2


def _parts_and_hooks(model: nn.Module) -> Iterator[Any]:
    """A model's modules, each after the hooks that accelerate and diffusers put on it."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        yield from (part for part in (hook, *getattr(hook, "hooks", ())) if part is not None)
        yield from getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        yield module
