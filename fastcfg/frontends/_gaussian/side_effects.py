"""What the code of loops and steps may do beside sampling, by the names in it.

Running a loop shows what it does to its samples, its generators and its object. It does not show that it prints, or
saves pictures: that is read off the names that its code, and that of the methods it calls, refers to.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .recognition import STEPS
from .recording import same
from .view import copied, tensors_in

# Names of functions that write somewhere.
_WRITING = """
add_image add_images add_scalar dump imsave imshow imwrite log_image open print save save_image savefig savez show
tofile wandb write writelines
"""
# Names in what loops do with samples, times and progress bars.
_HARMLESS = """
AssertionError NotImplementedError RuntimeError Tensor ValueError abs append arange as_tensor auto bool cat chunk clamp
clamp_ clone contiguous copy cpu cuda deepcopy detach detach_ device dict dtype empty enable_grad encode_text
enumerate eval expand flatten flip float float32 from_numpy full full_like get getattr half hasattr inference_mode
int int64 is_available isinstance item items iter keys len linspace list long max min next no_grad np num_classes
numpy ones ones_like parameters permute randint randn randn_like range repeat requires_grad_ reshape reversed
set_grad_enabled shape size sqrt squeeze stack str sum tensor th to torch tqdm tqdm.auto trange transpose tuple type
unsqueeze view zeros zeros_like zip
"""
# Names of functions that make numbers of tensors.
_CONVERTING = """
__array__ __bool__ __contains__ __float__ __format__ __index__ __int__ __repr__ allclose equal is_nonzero item numpy
tolist
"""
_NUMBERS = frozenset(_CONVERTING.split())
_WRITES, _KNOWN = frozenset(_WRITING.split()), frozenset(_HARMLESS.split())
# Steps that loops choose by an argument. A run that was seen made none of them.
_OTHER_STEPS = ("p_sample_with_grad", "ddim_sample_with_grad", "plms_sample")


def writes(original: Any, name: str) -> str:
    """The name of a function that writes, in the code of a method or of those it calls; empty if there is none."""
    return next((found for found, _ in _names(original, name, set()) if found in _WRITES), "")


class Surroundings:
    """What the code of a method, and of those it calls, refers to in its modules, classes and closures: numbers, and
    containers, which it may change; and the attributes and defaults of these functions."""

    def __init__(self, original: Any, name: str) -> None:
        functions = list(_functions(original, name, set()))
        owners: list[tuple[Any, Any]] = [(one.__globals__, set(_of(one.__code__))) for one in functions]
        owners += [(vars(base), set(vars(base))) for base in original.__mro__ if base is not object]
        own = [_Own(function) for function in functions]
        owners += [(one, one.keys()) for one in own]
        self._values = [
            (owner, found, copied(owner[found]))
            for owner, names in owners
            for found in names & owner.keys()
            if isinstance(owner[found], bool | int | float | str | list | dict) and not found.startswith("__")
        ]

    def changed(self) -> str:
        """The name of something that is another by now; empty if nothing is."""
        return next((name for owner, name, was in self._values if not same(copied(owner.get(name)), was)), "")


class _Own(Mapping[str, Any]):
    """What a function has of its own, by name: its closure's variables, its attributes and its defaults."""

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        of_itself = {"its attributes": vars(self._function), "its defaults": list(self._function.__defaults__ or ())}
        try:
            return of_itself[name] if name in of_itself else self._cells[name].cell_contents
        except ValueError:  # an empty cell
            return None

    def __iter__(self) -> Iterator[str]:
        return iter((*self._cells, "its attributes", "its defaults"))

    def __len__(self) -> int:
        return len(self._cells) + 2


def is_simple(original: Any, name: str, diffusion: Any) -> bool:
    """Whether the code of a loop, up to its steps, refers to nothing that could act elsewhere."""
    known = _KNOWN | {attribute for attribute, value in vars(diffusion).items() if not callable(value)}
    for found, is_method in _names(original, name, {*STEPS, *_OTHER_STEPS}):
        if not is_method and found not in known:
            return False
    return True


def _names(original: Any, name: str, apart: set[str]) -> Iterator[tuple[str, bool]]:
    """The names in the code of a method and of what it calls, and whether they are its class's methods or its module's
    functions, whose code is read too; but for some methods. Every class of the object's that has the method counts:
    they may call each other's."""
    for function in _functions(original, name, apart):
        for found in _of(function.__code__):
            by_module = function.__globals__.get(found)
            method = callable(getattr(original, found, None)) and not callable(by_module)
            yield found, method or _helper(function, found) is not None


def _functions(original: Any, name: str, apart: set[str]) -> Iterator[FunctionType]:
    """The functions of a method, and of the methods and the module's own functions that it calls."""
    seen: set[Any] = set(apart)
    left: list[Any] = [name]
    while left:
        method = left.pop()
        if method in seen:
            continue
        seen.add(method)
        of_classes = isinstance(method, str)
        for function in [vars(base).get(method) for base in original.__mro__] if of_classes else [method]:
            function = getattr(inspect.unwrap(function), "__func__", function) if function is not None else None
            if isinstance(function, FunctionType):
                yield function
                for found in _of(function.__code__):
                    left += [found if callable(getattr(original, found, None)) else None, _helper(function, found)]


def _helper(function: FunctionType, name: str) -> FunctionType | None:
    """The function that a name means in the module of another."""
    helper = function.__globals__.get(name)
    own = isinstance(helper, FunctionType) and helper.__module__ == function.__module__
    return helper if own else None


def _of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _of(part)


class Conversions(TorchFunctionMode):
    """Context that notices where tensors become numbers of Python, on which code may branch.

    Args:
        known: tensors whose values are the same in every call: an object's attributes.

    Attributes:
        seen: whether any did.
        of_data: the name of the function by which one did that is not computed from times and known tensors alone.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen, self.of_data = False, ""
        self._known = {id(tensor): tensor for tensor in known}

    def know(self, tensor: Tensor) -> None:
        """Count a tensor of times as known."""
        self._known[id(tensor)] = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch's."""
        name, given = getattr(func, "__name__", ""), list(tensors_in((args, kwargs or {})))
        known = "rand" not in name and "normal" not in name and all(id(tensor) in self._known for tensor in given)
        if name in _NUMBERS:
            self.seen, self.of_data = True, self.of_data or ("" if known else name)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if known:
                self._known[id(tensor)] = tensor
            else:
                self._known.pop(id(tensor), None)  # written in place
        return result
