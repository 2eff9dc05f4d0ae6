"""The private names of torch that fastcfg uses, all of them (`tests/utils/test_torch_private.py` tries each and finds
any other). What only some programs need is looked up when it is called, so that a torch without it still imports."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_dispatch_modes  # noqa: F401
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode  # noqa: F401
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map


def lift_only_cpu_tensors(value: bool) -> bool:
    """Whether `torch.tensor(numbers, device=...)` dispatches its copy to the device; returns what it was before."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(value)
    return before


def made_by_compile(item: Any) -> bool:
    """Whether torch.compile returned a function or module, or compiled a module in place."""
    names = ("_torchdynamo_orig_callable", "_orig_mod")
    return any(hasattr(item, name) for name in names) or getattr(item, "_compiled_call_impl", None) is not None


def in_function_transform() -> bool:
    """Whether a transform of torch.func is running, or a level of forward-mode differentiation is open."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def same_tensor(tensor: torch.Tensor) -> Callable[[Any], bool]:
    """A function of a value: whether it is a tensor of the same class, dtype, device, shape, strides and dispatch keys,
    and lets gradients through or not, as the one here. (Of several tensors torch asks that none is there twice.)"""
    check: Callable[[Any], bool]
    for check in tuple(_checks):  # one for all tensors that are alike stays in the CPU's caches
        if check(tensor):
            return check
    guards: Any = torch._C._dynamo.guards.TensorGuards  # its stub is wrong
    check = guards(tensor, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    _checks.append(check)
    return check


_checks: deque[Callable[[Any], bool]] = deque(maxlen=16)  # made last


def release_capture_pool(device: int, pool: Any) -> None:
    """End the allocator's use of a graph pool on a device, as the end of a capture does."""
    torch.cuda.memory._cuda_endAllocateToPool(device, pool)
    torch.cuda.memory._cuda_releasePool(device, pool)


def fake_tensors() -> AbstractContextManager[Any]:
    """A context in which tensors have no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def inductor_compile(
    graph: torch.fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]
) -> Callable[..., object]:
    """The graph compiled by Inductor for inputs like the examples."""
    import torch._inductor

    return torch._inductor.compile(graph, list(examples), options)


def inductor_fma() -> Any:
    """Inductor's fused multiply-add, (a, b, c) to a*b + c, as an operation of a graph."""
    from torch._inductor import inductor_prims

    return inductor_prims.fma


def cpp_compiler_problem() -> str:
    """Why Inductor cannot compile C++ for want of a compiler; empty if it finds one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "Inductor finds no C++ compiler (install g++, or name one in the environment variable CXX)"
    return ""
