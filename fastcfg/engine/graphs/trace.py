"""Whether a program can be captured: its operations on a device and its demands on the host, recorded in its runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ...utils._torch_private import TorchDispatchMode, lift_only_cpu_tensors, tree_leaves, tree_map
from .errors import CaptureError, SourceLine, calling_line, describe
from .streams import on_side_stream

# The host reads values to decide what such an operation returns, or its shape. Results on the host are reads as well.
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class DispatchMode(TorchDispatchMode):
    """A mode under which torch.compile'd code runs as compiled: operations it dispatches are seen, its kernels not."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    if not hasattr(TorchDispatchMode, "ignore_compile_internals"):

        @classmethod
        def is_infra_mode(cls) -> bool:
            """The same for older versions of torch."""
            return True


@contextmanager
def visible_copies() -> Iterator[None]:
    """Context in which `torch.tensor(numbers, device=...)` dispatches its copy to the device, hidden by default."""
    before = lift_only_cpu_tensors(True)
    try:
        yield
    finally:
        lift_only_cpu_tensors(before)


def operation_name(function: Any) -> str:
    """An operation's name without namespace and overload."""
    return str(function._schema.name).split("::")[-1] if hasattr(function, "_schema") else str(function)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Constant:
    """A host tensor that a program copies to the device in every run."""

    digest: str  # of its shape, dtype and contents
    twin: Tensor  # its copy on the device


class ReuseConstants(DispatchMode):
    """Replaces host tensors by the constants' device twins, in the order in which a run of the program copies them: it
    then copies within the device, to memory of its own. CaptureError in the program where it copies something else."""

    def __init__(self, constants: Sequence[Constant]) -> None:
        super().__init__()
        self._constants, self._next = constants, 0

    def restart(self) -> None:
        """Expect the first constant next."""
        self._next = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = {id(tensor): tensor for tensor in copied_operands(function, args, kwargs)}
        if copied:
            twins = {key: self._twin(function, tensor) for key, tensor in copied.items()}
            args, kwargs = tree_map(lambda leaf: twins.get(id(leaf), leaf), (args, kwargs))
        return function(*args, **kwargs)

    def _twin(self, function: Any, tensor: Tensor) -> Tensor:
        if self._next == len(self._constants) or self._constants[self._next].digest != digest(tensor):
            raise CaptureError(f"{function}{describe(calling_line())} copies from the host what it did not copy before")
        self._next += 1
        return self._constants[self._next - 1].twin


def copied_operands(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The host tensors that an operation on another device copies there. 0-d tensors are taken as numbers, unless the
    operation is itself a copy."""
    operands = tensors_in((args, kwargs))
    hosts = [tensor for tensor in operands if tensor.device.type == "cpu"]
    device = kwargs.get("device")
    elsewhere = len(hosts) < len(operands) or (device is not None and torch.device(device).type != "cpu")
    if not hosts or not elsewhere:
        return []
    is_copy = operation_name(function) in ("_to_copy", "copy_")
    return [tensor for tensor in hosts if tensor.ndim or is_copy]


def digest(tensor: Tensor) -> str:
    """A digest of shape, dtype and contents."""
    contents = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.blake2b(contents.tobytes(), digest_size=16).hexdigest()}"


@dataclass(frozen=True)
class _Event:
    """One operation on the device: what a graph would keep of it, and the line that called it."""

    operation: str
    arguments: tuple[str, ...]
    line: SourceLine | None

    def __str__(self) -> str:
        return self.operation + describe(self.line)


class Trace(DispatchMode):
    """Records a program's operations on a device.

    On a CPU, which stands in for a device, everything that exists before the program runs counts as on the device, and
    so does everything computed from it; what is made from numbers alone counts as on the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.constants: list[Constant] = []  # what the program copied to the device, in order
        self.reads: list[str] = []  # the operations that read from the device, described
        self._device = device
        self._events: list[_Event] = []
        # Made by the host, by address; kept alive so that the address is not used again.
        self._made: dict[int, Tensor] = {}

    def difference(self, other: Trace) -> str:
        """The first operation in which another run of the program differed; "" if none did."""
        for mine, its in zip(self._events, other._events, strict=False):
            if mine.operation != its.operation:
                return f"{its} in place of {mine}"
            if mine.arguments != its.arguments:
                pairs = zip_longest(mine.arguments, its.arguments, fillvalue="nothing")
                old, new = next(pair for pair in pairs if pair[0] != pair[1])
                return f"{mine} with {new} in place of {old}"
        shorter, longer = sorted((self._events, other._events), key=len)
        return f"{longer[len(shorter)]} in some steps only" if len(longer) > len(shorter) else ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        if operation_name(function) == "lift_fresh" and self._device.type == "cpu":
            # torch.tensor made these from numbers without dispatching.
            self._made.update((_address(tensor), tensor) for tensor in operands)
        hosts = [tensor for tensor in operands if self._is_hosts(tensor)]
        # Taken before the call, which may write to its operands.
        crossing = copied_operands(function, args, kwargs)
        digests = {id(t): digest(t) for t in hosts} if crossing or len(hosts) < len(operands) else {}
        copied = [Constant(digests[id(t)], t.to(self._device)) for t in crossing]
        result = function(*args, **kwargs)
        results = tensors_in(result)
        if self._concerns_device(function, operands, hosts, results):
            arguments = tuple(_kept(leaf, digests) for leaf in tree_leaves((args, kwargs)))
            event = _Event(str(function), arguments, calling_line())
            self._events.append(event)
            self.constants += copied
            if len(hosts) < len(operands) and self._reads(function, args, kwargs, results):
                self.reads.append(f"{event} reads from the device")
        return result

    def _is_hosts(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (self._device.type != "cpu" or _address(tensor) in self._made)

    def _concerns_device(self, function: Any, operands: Any, hosts: Any, results: list[Tensor]) -> bool:
        """Whether an operation involves the device. On a CPU, results of the others are noted as made by the host."""
        if self._device.type != "cpu":
            return any(tensor.device.type != "cpu" for tensor in (*operands, *results))
        if len(hosts) < len(operands) or torch.Tag.nondeterministic_seeded in function.tags:
            for tensor in results:
                self._made.pop(_address(tensor), None)
            return True
        self._made.update((_address(tensor), tensor) for tensor in results)
        return False

    def _reads(self, function: Any, args: Any, kwargs: Any, results: list[Tensor]) -> bool:
        """Whether an operation on the device makes the host wait for it."""
        name = operation_name(function)
        if name in _INDEXING:
            return _counts_a_mask(*args)
        if not _READING.isdisjoint(function.tags) or name == "_linalg_check_errors":
            return kwargs.get("output_size") is None  # repeat_interleave reads unless it is given that
        return self._device.type != "cpu" and any(tensor.device.type == "cpu" for tensor in results)


def _counts_a_mask(x: Tensor, indices: Any, value: Tensor | None = None, accumulate: bool = False, *_: Any) -> bool:
    """Whether indexing turns a mask into indices, of which the host must know the number. To write one number where a
    single mask is true, torch fills instead and reads nothing."""
    given = [index for index in indices if index is not None]
    number = value is not None and value.numel() == 1 and value.device.type == "cpu"
    fills = number and len(given) == 1 and not accumulate
    return not fills and any(index.dtype in (torch.bool, torch.uint8) for index in given)


def _kept(leaf: Any, digests: dict[int, str]) -> str:
    """What a graph keeps of an argument: numbers, layouts, and the contents of host tensors."""
    if isinstance(leaf, Tensor):
        return digests.get(id(leaf)) or f"{leaf.dtype}{list(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, int | float | complex | str | torch.dtype | None) else type(leaf).__name__


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, eq=False)
class Examined:
    """The result for a program that can be captured."""

    constants: tuple[Constant, ...] = ()  # what it copies from the host in one run, in order

    @contextmanager
    def reused(self) -> Iterator[ReuseConstants]:
        """Context in which the program takes its constants from the device."""
        with visible_copies(), ReuseConstants(self.constants) as reuse:
            yield reuse


def examine(
    program: Callable[[], None], states: tuple[Callable[[], None], Callable[[], None]], device: torch.device
) -> Examined:
    """Run a program three times and compare the last two, which begin in different states.

    A graph repeats the same operations on the same memory with the same numbers. So nothing may be read from the
    device, and nothing may differ between the runs except the contents of device memory. Host tensors are then the same
    in every row: they could depend on the device only through a read.

    The functions `states` set the program's memory to the states to begin in, with times far apart. CaptureError names
    the operation that cannot be captured and its line.
    """
    traces = []
    with on_side_stream(device):
        # Lazy initialisation, autotuning, and caches that a model fills in its first call.
        states[0]()
        program()
        for begin in states:
            begin()
            trace = Trace(device)
            with visible_copies(), trace:
                program()
            traces.append(trace)
    first, second = traces
    if reads := first.reads or second.reads:
        raise CaptureError(reads[0])
    if changed := first.difference(second):
        raise CaptureError(f"the model's steps are not alike: {changed}")
    return Examined(tuple(first.constants))
