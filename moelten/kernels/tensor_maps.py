"""How a kernel's bulk copies see a matrix in memory, as CUDA's driver encodes it.

Triton encodes a map of each `TensorDescriptor` at every launch. Here it is encoded once, and told
of other addresses, so that a launch may be repeated without Triton. The driver's functions are
cuTensorMapEncodeTiled and cuTensorMapReplaceAddress.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_BYTES, _ALIGNMENT = 128, 64
_NO_INTERLEAVE, _L2_LINES_OF_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0
# Element types as Triton's compiler numbers them, where the driver does not.
_TYPES = {8: 10, 9: 8, 10: 9}


class TensorMap:
    """One map, in memory of its own.

    descriptor: Triton's, of a matrix, zeros around it
    facts:      what Triton's compiler says of it: swizzle, elem_size, elem_type, block_size
    """

    def __init__(self, descriptor: Any, facts: Mapping[str, Any]) -> None:
        self._room = (ctypes.c_uint8 * (_BYTES + _ALIGNMENT))()
        start = ctypes.addressof(self._room)
        self.address = start + -start % _ALIGNMENT
        self._map = ctypes.c_void_p(self.address)
        shape, strides, box = descriptor.shape, descriptor.strides, facts["block_size"]
        rank, size = len(shape), facts["elem_size"]
        _check(
            "cuTensorMapEncodeTiled",
            self._map,
            ctypes.c_int(_TYPES.get(facts["elem_type"], facts["elem_type"])),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(descriptor.base.data_ptr()),
            (ctypes.c_uint64 * rank)(*reversed(shape)),
            (ctypes.c_uint64 * (rank - 1))(*(size * stride for stride in reversed(strides[:-1]))),
            (ctypes.c_uint32 * rank)(*reversed(box)),
            (ctypes.c_uint32 * rank)(*(1 for _ in shape)),
            ctypes.c_int(_NO_INTERLEAVE),
            ctypes.c_int(facts["swizzle"]),
            ctypes.c_int(_L2_LINES_OF_128_BYTES),
            ctypes.c_int(_ZEROS_OUTSIDE),
        )

    def move(self, address: int) -> bool:
        """The matrix is elsewhere now, at a multiple of 16 bytes.

        Returns False, and it is where it was, in a thread that has no CUDA context yet.
        """
        return _check("cuTensorMapReplaceAddress", self._map, ctypes.c_void_p(address))


def _check(name: str, *arguments: Any) -> bool:
    """Call a function of the driver: whether there is a context."""
    status: int = _driver()[name](*arguments)
    if status not in (0, NO_CONTEXT):
        raise RuntimeError(f"CUDA error {status} of {name}")
    return status == 0


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
