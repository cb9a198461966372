"""Device memory is host memory with another tag; pinned memory is host memory that is on a list.

A tensor goes through DLPack with the device in its header rewritten: both tensors share the bytes, and the one that is
tagged keeps the other one alive. Views of a device tensor share its storage, as on any device.
"""

import ctypes
import weakref

import torch
from torch import Tensor

from tests.fake_device import counters, races
from tests.fake_device.counters import one_at_a_time

NAME = "fake"
DLPACK_HOST, DLPACK_DEVICE = 1, 12  # kDLCPU, kDLExtDev
DEVICE_TYPE_OFFSET, DEVICE_INDEX_OFFSET = 8, 12  # of int32 fields in a DLTensor, after the pointer to the data

capacity = [2**40] * counters.DEVICES  # bytes; a test may lower it

used = [False]  # whether anything was ever allocated: before that, CUDA's allocator answers no questions

_pinned: set[int] = set()
_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _tagged(tensor: Tensor, device_type: int, index: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor.detach())
    header = _pointer_in(capsule, b"dltensor")
    ctypes.c_int32.from_address(header + DEVICE_TYPE_OFFSET).value = device_type
    ctypes.c_int32.from_address(header + DEVICE_INDEX_OFFSET).value = index
    return torch._C._from_dlpack(capsule)


def is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def as_host(tensor: Tensor) -> Tensor:
    """The same bytes as a CPU tensor: for kernels, never to be seen by a user of the device."""
    return _tagged(tensor, DLPACK_HOST, 0) if is_on_device(tensor) else tensor


def as_device(tensor: Tensor, index: int) -> Tensor:
    """The same bytes as a tensor of a device, uncounted."""
    return _tagged(tensor, DLPACK_DEVICE, index)


def allocate(tensor: Tensor, index: int, stream: int, clock: races.Clock) -> Tensor:
    """Make a new CPU tensor a new tensor of a device, that counts there until its last view is gone."""
    used[0] = True
    nbytes = tensor.untyped_storage().nbytes()
    if counters.total.live_bytes[index] + nbytes > capacity[index]:
        raise torch.OutOfMemoryError(f"{NAME}:{index} has {capacity[index]} bytes, {nbytes} more do not fit")
    result = as_device(tensor, index)
    address = result.untyped_storage().data_ptr()
    counters.allocated(index, nbytes)
    races.allocate(address, stream, clock)

    @one_at_a_time
    def free() -> None:
        counters.total.live_bytes[index] -= nbytes
        races.free(address)

    weakref.finalize(result.untyped_storage(), free).atexit = False
    return result


def poison(tensor: Tensor) -> None:
    """Set all bits of a CPU tensor: NaN for every floating-point type, -1 or the largest number for the others."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.itemsize)
    if bits is not None and not tensor.is_complex():
        tensor.view(bits).fill_(-1)


def pin(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """`aten::_pin_memory`: a copy in pinned memory, at an address that no other allocator could have given it."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin a tensor on '{tensor.device}': only dense CPU tensors can be pinned")
    copy = tensor.clone()
    storage = copy.untyped_storage()
    address, nbytes = storage.data_ptr(), storage.nbytes()
    _pinned.add(address)
    counters.total.pinned_bytes += nbytes

    @one_at_a_time
    def unpin() -> None:
        _pinned.discard(address)
        counters.total.pinned_bytes -= nbytes
        races.free(address)

    weakref.finalize(storage, unpin).atexit = False
    return copy


def is_pinned(tensor: Tensor, device: torch.device | None = None) -> bool:
    """`aten::is_pinned`"""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _pinned
