"""The launches of a call, recorded the first time and repeated on other memory after that.

Triton looks at every argument of every launch to learn what it has compiled for it, which takes the
host longer than a small layer takes the GPU. But what a call launches follows from its sizes and
types: only addresses change. So kernels are launched through `launch`, and while `Launches` records
it keeps what the driver was told, each address as a place in one of the tensors of the call.

Recorded on NVIDIA GPUs alone, and without clusters, scratch memory or tensor maps from the host;
Triton's launch hooks see the first call and not its repetitions.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from typing import Any

from torch import Tensor

# What Triton takes for granted of all addresses or of none: its code may differ between the two.
_ALIGNMENT = 16
_NO_CONTEXT = 201
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_SCRATCH = 2  # pointers behind a kernel's own, which Triton adds and these kernels do not use
_NUMBERS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """`kernel[grid](*arguments, **named)`, which may be recorded."""
    compiled = kernel[grid](*arguments, **named)
    if (record := _RECORD.get()) is not None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        record.append((compiled, grid, values))


_RECORD: ContextVar[list[Any] | None] = ContextVar("record", default=None)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class _Launch:
    """One launch, as the driver takes it.

    addresses: of its tensors, in an array; places: which tensor of the call each is in, and where
    """

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any], find: Any
    ) -> None:
        facts, kinds = compiled.metadata, _kinds(compiled)
        self.compiled, function = compiled, ctypes.c_void_p(compiled.function)
        attribute = ctypes.pointer(_Attribute(_SERIALIZATION, 0, (1,)))
        shape = (*grid, 1, 1)[:3], (32 * facts.num_warps, 1, 1), facts.shared
        self.config = _Config(*shape, None, attribute, int(facts.launch_pdl))
        pointers = [name for name, kind in kinds.items() if kind[0] == "*"]
        self.places = [find(values[name].data_ptr()) for name in pointers]
        self.addresses = (ctypes.c_uint64 * (len(pointers) + _SCRATCH))()
        self.numbers = [_NUMBERS[k](values[n]) for n, k in kinds.items() if n not in pointers]
        numbers, start = iter(self.numbers), ctypes.addressof(self.addresses)
        where = {name: start + 8 * index for index, name in enumerate(pointers)}
        parts = [where.get(n) or ctypes.addressof(next(numbers)) for n in kinds]
        parts += [start + 8 * (len(pointers) + index) for index in range(_SCRATCH)]
        self.parameters = (ctypes.c_void_p * len(parts))(*parts)
        self.arguments = ctypes.byref(self.config), function, self.parameters, None


def _kinds(compiled: Any) -> dict[str, str]:
    """Types of the arguments that a kernel gets at its launch, by name."""
    signature = compiled.src.signature
    return {name: kind for name, kind in signature.items() if kind != "constexpr"}


def _is_plain(compiled: Any) -> bool:
    """Whether a kernel's launch is one that `_Launch` describes; nothing was compiled for a CPU."""
    if compiled is None:
        return False
    facts, kinds = compiled.metadata, _kinds(compiled).values()
    special = facts.num_ctas > 1 or facts.launch_cooperative_grid
    scratch = facts.global_scratch_size or facts.profile_scratch_size
    return not special and not scratch and all(k[0] == "*" or k in _NUMBERS for k in kinds)


class Launches:
    """What calls of one kind launch: the same on every memory.

    recordable: whether they run on an NVIDIA GPU
    """

    def __init__(self, recordable: bool) -> None:
        self._launches: list[_Launch] | None = None
        self._recordable = recordable
        self._filled: tuple[list[int], int] = ([], 0)
        self._lock = threading.Lock()

    def run(self, memory: Sequence[Tensor], call: Callable[[], None]) -> None:
        """Launch what `call` launches, on the current stream of the current GPU.

        memory: every tensor that the launches read or write, contiguous, of the same sizes and
                types every time
        call:   launches on this memory; it is called until what it does is recorded
        """
        addresses = [tensor.data_ptr() for tensor in memory]
        if self._launches is None or not self._repeat(addresses):
            if self._recordable and _distinct(memory):
                self._record(memory, call)
            else:
                call()

    def _repeat(self, addresses: list[int]) -> bool:
        """Launch on these addresses; False where that takes another call of Triton's."""
        launches = self._launches or []
        stream = _current_stream()
        with self._lock:
            if (addresses, stream) != self._filled:
                if not _aligned(addresses):
                    return False
                for entry in launches:
                    entry.config.stream = stream
                    for index, (tensor, offset) in enumerate(entry.places):
                        entry.addresses[index] = addresses[tensor] + offset
                self._filled = (addresses, stream)
            run = _driver()
            for index, entry in enumerate(launches):
                if status := run(*entry.arguments):
                    if status == _NO_CONTEXT and not index:  # a new thread: Triton gives it one
                        return False
                    raise RuntimeError(
                        f"CUDA error {status} at the launch of {entry.compiled.name}"
                    )
        return True

    def _record(self, memory: Sequence[Tensor], call: Callable[[], None]) -> None:
        token = _RECORD.set([])
        try:
            call()
            record = _RECORD.get() or []
        finally:
            _RECORD.reset(token)

        def find(address: int) -> tuple[int, int]:
            for index, tensor in enumerate(memory):
                offset = address - tensor.data_ptr()
                if 0 <= offset < tensor.nbytes:
                    return index, offset
            raise AssertionError("a kernel was launched on memory that is not the call's")

        self._recordable = all(_is_plain(compiled) for compiled, *_ in record)
        if self._recordable:
            self._launches = [
                _Launch(kernel, grid, values, find) for kernel, grid, values in record
            ]


def _aligned(addresses: list[int]) -> bool:
    return not any(address % _ALIGNMENT for address in addresses)


def _distinct(memory: Sequence[Tensor]) -> bool:
    """Whether every address belongs to one tensor, and all are aligned."""
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in memory)
    apart = all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    return apart and _aligned([start for start, _ in spans])


def _current_stream() -> int:
    from triton.runtime import driver

    active: Any = driver.active
    return int(active.get_current_stream(active.get_current_device()))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
