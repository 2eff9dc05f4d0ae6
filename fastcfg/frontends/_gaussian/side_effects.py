"""What the code of loops and steps may do beside sampling, by the names in it.

Running a loop shows what it does to its samples, its generators and its object. It does not show that it prints, or
saves pictures: that is read off the names that its code, and that of the methods it calls, refers to.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from .recognition import STEPS

# Of functions that write somewhere.
_WRITING = {
    *("add_image", "add_images", "add_scalar", "dump", "imsave", "imshow", "imwrite", "log_image", "open", "print"),
    *("save", "save_image", "savefig", "savez", "show", "tofile", "wandb", "write", "writelines"),
}
# Of what loops do with samples, times and progress bars.
_HARMLESS = {
    *(
        "th",
        "torch",
        "np",
        "numpy",
        "tqdm",
        "auto",
        "tqdm.auto",
        "trange",
        "enumerate",
        "range",
        "reversed",
        "list",
        "tuple",
        "len",
    ),
    *("dict", "int", "float", "bool", "isinstance", "next", "iter", "parameters", "device", "dtype", "shape", "size"),
    *("randn", "randn_like", "randint", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "tensor"),
    *("no_grad", "inference_mode", "enable_grad", "to", "cpu", "cuda", "type", "long", "clone", "detach", "append"),
    *("get", "items", "keys", "copy", "deepcopy", "cat", "chunk", "view", "reshape", "repeat", "expand", "stack"),
    *("arange", "as_tensor", "from_numpy", "AssertionError", "requires_grad_", "set_grad_enabled", "contiguous"),
    *("unsqueeze", "squeeze", "empty", "is_available", "max", "min", "sum", "abs", "zip", "hasattr", "getattr"),
    *("num_classes", "NotImplementedError", "RuntimeError", "ValueError", "detach_", "str", "sqrt", "clamp", "clamp_"),
    *("linspace", "flip", "int64", "float32", "item", "encode_text", "half", "eval", "permute", "transpose", "flatten"),
}
# Steps that loops choose by an argument. A run that was seen made none of them.
_OTHER_STEPS = ("p_sample_with_grad", "ddim_sample_with_grad", "plms_sample")


def writes(original: Any, name: str) -> str:
    """The name of a function that writes, in the code of a method or of those it calls; empty if there is none."""
    return next((found for found, _ in _names(original, name, set()) if found in _WRITING), "")


def is_simple(original: Any, name: str, diffusion: Any) -> bool:
    """Whether the code of a loop, up to its steps, refers to nothing that could act elsewhere."""
    data = {attribute for attribute, value in vars(diffusion).items() if not callable(value)}
    for found, is_method in _names(original, name, {*STEPS, *_OTHER_STEPS}):
        if not is_method and found not in _HARMLESS and found not in data:
            return False
    return True


def _names(original: Any, name: str, apart: set[str]) -> Iterator[tuple[str, bool]]:
    """The names in the code of a method, and whether they are its class's methods, whose names follow; but for some
    methods. Every class of the object's that has the method counts: they may call each other's."""
    seen, left = set(apart), [name]
    while left:
        method = left.pop()
        if method in seen:
            continue
        seen.add(method)
        for base in original.__mro__:
            function = vars(base).get(method)
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            for found in _of(code) if isinstance(code, CodeType) else ():
                is_method = callable(getattr(original, found, None))
                yield found, is_method
                if is_method:
                    left.append(found)


def _of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _of(part)
