"""A pretend CUDA device for machines without one: models run "on cuda" as they are, and whatever crosses between host
and device is seen.

A pretend tensor says that it is on cuda:0 and keeps its values in a CPU tensor. Operations on pretend tensors run on
those, so results are the CPU's to the bit; where a result lives, which operands may meet, and which operations make the
host wait for the device are CUDA's.

Not modelled: backward passes, pinned memory, streams, events, generators on the device, layouts other than strided.
"""

from __future__ import annotations

import copy
import ctypes
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["CAN_PRETEND", "TO_DEVICE", "TO_HOST", "Crossing", "PretendGpu", "PretendTensor"]

# torch 2.8 has no guard for devices that are not there.
CAN_PRETEND = not torch.cuda.is_available() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")
TO_DEVICE = "host to device"
TO_HOST = "device to host"

aten = torch.ops.aten
COPIES = {aten.copy_: 1, aten._to_copy: 0}  # and which of its arguments it copies
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# The host reads the values that decide what such an operation returns, or its shape.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Crossing:
    """A copy or read between host and device.

    Attributes:
        kind: `TO_DEVICE` or `TO_HOST`.
        op: the operation's name without namespace and overload: "_to_copy".
    """

    kind: str
    op: str


class PretendTensor(Tensor):
    """A tensor that says it is on cuda:0. A `PretendGpu` makes them.

    Attributes:
        held: the CPU tensor with its values.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        layout = (held.shape, held.stride(), held.storage_offset())
        tensor = Tensor._make_wrapper_subclass(cls, *layout, dtype=held.dtype, device=torch.device("cuda", 0))
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: got a pretend tensor, expected it only inside `with PretendGpu()`")

    def __repr__(self) -> str:
        return f"PretendTensor({self.held!r})"

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, other: PretendTensor) -> None:
        with no_dispatch():
            self.hold(other.held.detach())

    def hold(self, held: Tensor) -> None:
        """Take on a CPU tensor's values, shape and dtype."""
        with no_dispatch():
            Tensor.data.__set__(self, PretendTensor(held))
        self.held = held

    def data_ptr(self) -> int:
        """Address of the first element: the held tensor's."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The held tensor's storage, which views share."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """As any tensor's: a copy to the host."""
        return self.cpu().tolist()


class PretendGpu:
    """The device, there while its context is entered, one at a time. Modes entered after it see operations first, on
    pretend tensors.

    Attributes:
        crossings: all copies and reads between host and device so far.
        capturing: while True a crossing raises RuntimeError, as it does to a stream that a CUDA graph captures.

    Example:
        >>> with PretendGpu() as gpu:
        ...     x = torch.ones(2, device="cuda") * torch.tensor([1.0, 2.0]).to("cuda")
        ...     x.sum().item()
        3.0
        >>> [crossing.kind for crossing in gpu.crossings]
        ['host to device', 'device to host']
    """

    def __init__(self) -> None:
        self.crossings: list[Crossing] = []
        self.capturing = False

    def __enter__(self) -> PretendGpu:
        _set_device_guard()
        swap = torch.__future__
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
            # torch.tensor(values, device="cuda") would else copy where no mode sees it.
            stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
            # Module.to would else put a pretend tensor's insides into a parameter that is none.
            stack.callback(swap.set_swap_module_params_on_conversion, swap.get_swap_module_params_on_conversion())
            swap.set_swap_module_params_on_conversion(True)
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            library.impl("scaled_dot_product_attention", _attention, "AutogradCUDA")
            stack.enter_context(_Dispatch(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def tensor(self, tensor: Tensor) -> PretendTensor:
        """A copy of a CPU tensor on the device, without its history. Not a crossing."""
        with no_dispatch():
            return PretendTensor(tensor.detach().clone())

    def module(self, module: nn.Module) -> nn.Module:
        """A deep copy of a module with its parameters and buffers on the device. Not a crossing."""
        moved: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            moved[id(tensor)] = self.tensor(tensor).requires_grad_(tensor.requires_grad)
            moved[id(tensor)]._is_param = isinstance(tensor, nn.Parameter)
        with no_dispatch():
            return copy.deepcopy(module, moved)

    def host(self, tensor: Tensor) -> Tensor:
        """A copy of a pretend tensor on the CPU, without its history. Not a crossing."""
        if not isinstance(tensor, PretendTensor):
            raise TypeError(f"tensor: got one on {tensor.device}, expected a pretend tensor")
        with no_dispatch():
            return tensor.held.detach().clone()

    def cross(self, kind: str, op: str) -> None:
        """Note a crossing. Raises RuntimeError while capturing."""
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing ({op}, {kind})")
        self.crossings.append(Crossing(kind, op))


class _Dispatch(TorchDispatchMode):
    """Runs operations on the held tensors, once operands are checked and crossings noted."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, function.overloadpacket
        # In inference mode operations come whole.
        if function._can_decompose() and packet is not aten.scaled_dot_product_attention:
            with self:
                return function.decompose(*args, **kwargs)

        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        pretend = [operand for operand in operands if _is_pretend(operand)]
        device = kwargs.get("device")
        if packet is aten.copy_:
            on_device = _is_pretend(args[0])
        else:
            on_device = bool(pretend) if device is None else device.type == "cuda"
        if not pretend and not on_device:
            return function(*args, **kwargs)

        _check(function, args, kwargs, operands)
        for kind in _crossings(function, args, kwargs, on_device):
            self.gpu.cross(kind, packet.__name__)
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, kwargs))
        result = function(*args, **kwargs)
        for tensor in pretend:  # t_(), or out= of another shape, changes more than values
            if (tensor.shape, tensor.stride()) != (tensor.held.shape, tensor.held.stride()):
                tensor.hold(tensor.held)
        if not on_device:
            return result
        wrappers = {id(tensor.held): tensor for tensor in pretend}  # an operation in place returns its operand
        return tree_map_only(
            Tensor, lambda held: wrappers[id(held)] if id(held) in wrappers else PretendTensor(held), result
        )


def _is_pretend(value: Any) -> bool:
    return isinstance(value, PretendTensor)


def _check(function: Any, args: Any, kwargs: Any, operands: list[Tensor]) -> None:
    """Raise RuntimeError for operands that may not meet: on the host and on the device, unless those on the host are
    scalars, indices, or what is copied."""
    packet = function.overloadpacket
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if packet in COPIES or not any(map(_is_pretend, operands)):
        return
    if packet in INDEXING:
        operands = [argument for argument in args if isinstance(argument, Tensor)]
    if any(operand.dim() and not _is_pretend(operand) for operand in operands):
        message = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        raise RuntimeError(f"{message} (in {function})")


def _crossings(function: Any, args: Any, kwargs: Any, on_device: bool) -> list[str]:
    """The kinds of an operation's crossings. `on_device`: whether its result is."""
    packet = function.overloadpacket
    if packet in COPIES:
        crosses = _is_pretend(args[COPIES[packet]]) != on_device
        return [TO_DEVICE if on_device else TO_HOST] * crosses
    if packet in INDEXING:
        return _index_crossings(*args)
    reads = bool(READING & set(function.tags)) and kwargs.get("output_size") is None
    return [TO_HOST] * reads


def _index_crossings(
    source: Tensor, indices: Any, value: Tensor | None = None, accumulate: bool = False, *_: Any
) -> list[str]:
    """As `_crossings`, where indices and a value on the host are copied, and the host counts what a mask selects."""
    given = [index for index in indices if index is not None]
    masks = [_is_pretend(index) and index.dtype in (torch.bool, torch.uint8) for index in given]
    value_copied = value is not None and not _is_pretend(value)
    if value_copied and masks == [True] and not accumulate:
        return []  # torch makes it a masked_fill_
    copied = value_copied or not all(map(_is_pretend, given))
    return [TO_DEVICE] * copied + [TO_HOST] * any(masks)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention as one operation, whose kernel the held tensors choose: for a device that torch was built without there
    is none, and attention would be taken apart."""
    with torch._C._AutoDispatchBelowAutograd():
        return aten.scaled_dot_product_attention(*args, **kwargs)


def _set_device_guard() -> None:
    """Have torch switch to the device, to no effect, around what it does there; for the rest of the process, as torch
    ends it where a pretend tensor that requires gradients meets no guard.

    `_ensureCUDADeviceGuardSet` puts such a guard in the place of one that counts no devices, which builds with CUDA
    have on machines without. A build without CUDA has none: it is given an object whose methods all return 0.
    """
    # The first backward pass starts a thread for each device that is counted: let it count none.
    torch.ones((), requires_grad=True).backward()
    library, cuda = ctypes.CDLL(torch._C.__file__), 1  # c10::DeviceType::CUDA
    guards = (ctypes.c_void_p * (cuda + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    no_devices = ctypes.c_void_p(ctypes.addressof(methods))
    guards[cuda] = guards[cuda] or ctypes.addressof(no_devices)
    torch._C._ensureCUDADeviceGuardSet()
