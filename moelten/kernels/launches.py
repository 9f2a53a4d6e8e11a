"""The launches of a call, recorded the first time and repeated on other memory after that.

Triton looks at every argument of every launch to learn what it has compiled for it, which takes the
host longer than a small layer takes the GPU. But what a call launches follows from its sizes and
types: only addresses change. So kernels are launched through `launch`, and while `Launches` records
it keeps what the driver was told, each address as a place in one of the tensors of the call.

The first time of all, `Launches` has the kernels compiled side by side before any is launched.

Recorded on NVIDIA GPUs alone, and without clusters or scratch memory; Triton's launch hooks see the
first call and not its repetitions.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cache, reduce
from itertools import pairwise
from operator import or_
from typing import Any

import torch
from torch import Tensor

from moelten.kernels.constants import identify
from moelten.kernels.tensor_maps import NO_CONTEXT, TensorMap

# What Triton takes for granted of all addresses or of none: its code may differ between the two.
_ALIGNMENT = 16
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_SCRATCH = 2  # null pointers behind a kernel's own, which Triton adds and these kernels do not use
_DESCRIPTOR = "tensordesc<"
_NUMBERS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}


# Of every kernel: a product that is added is rounded once, with its sum. Tests and records are of
# such code; Triton 3.9 warns of another default to come.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """`kernel[grid](*arguments, **named)`, which may be recorded: a kernel of this folder."""
    identify(kernel)
    named = OPTIONS | named
    if _COMPILING.get():
        kernel.warmup(*arguments, grid=grid, **named)
        return
    compiled = kernel[grid](*arguments, **named)
    if (record := _RECORD.get()) is not None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        record.append((compiled, grid, values))


_RECORD: ContextVar[list[Any] | None] = ContextVar("record", default=None)
_COMPILING: ContextVar[bool] = ContextVar("compiling", default=False)


def _compile(call: Callable[[], None]) -> None:
    """Compile whatever `call` launches and was never compiled, all at once: each takes seconds."""
    from triton import AsyncCompileMode

    def together() -> None:
        _COMPILING.set(True)
        with ThreadPoolExecutor() as workers, AsyncCompileMode(workers):
            call()

    # In a context of its own: where a kernel does not compile, Triton's mode stays set, and every
    # later call would fail of that.
    copy_context().run(together)


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

    slots: where the address that each pointer has now will be found, and a null pointer under 0
    maps:  tensor maps among its arguments, and where their addresses will be found
    """

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], values: dict[str, Any], slots: dict[int, int]
    ) -> None:
        facts, kinds = compiled.metadata, _kinds(compiled)
        attribute = ctypes.pointer(_Attribute(_SERIALIZATION, 0, (1,)))
        shape = (*grid, 1, 1)[:3], (32 * facts.num_warps, 1, 1), facts.shared
        self.compiled = compiled
        self.config = _Config(*shape, None, attribute, int(facts.launch_pdl))
        self.numbers: list[Any] = []
        self.maps: list[tuple[TensorMap, Any]] = []
        described = iter(getattr(facts, "tensordesc_meta", None) or ())
        places = []
        for name, kind in kinds.items():
            value = values[name]
            if kind[0] == "*":
                places.append(slots[value.data_ptr()])
                continue
            parts = [(kind, value)]
            if kind.startswith(_DESCRIPTOR):
                map_ = TensorMap(value, next(described))
                places.append(map_.address)
                slot = slots[value.base.data_ptr()]
                self.maps.append((map_, ctypes.c_uint64.from_address(slot)))
                # Its shape and strides follow, which the kernels do not read.
                parts = [("i32", n) for n in value.shape] + [("i64", n) for n in value.strides]
            for type_, number in parts:
                self.numbers.append(_NUMBERS[type_](number))
                places.append(ctypes.addressof(self.numbers[-1]))
        places += [slots[0]] * _SCRATCH
        # As ctypes passes them on: it would convert other objects at every call.
        parameters = ctypes.byref((ctypes.c_void_p * len(places))(*places))
        function = ctypes.c_void_p.from_param(compiled.function)
        self.arguments = ctypes.byref(self.config), function, parameters, None


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
    known = ("*", _DESCRIPTOR)
    return not special and not scratch and all(k.startswith(known) or k in _NUMBERS for k in kinds)


class Launches:
    """What calls of one kind launch: the same on every memory.

    device: the NVIDIA GPU that they run on, None for any other place, where nothing is recorded
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = None if device is None else device.index
        self._compiled = False
        self._launches: list[_Launch] = []
        # Where each tensor of the memory starts, the places inside them, and a null pointer.
        self._addresses: Any = None
        self._inner: list[tuple[int, int]] = []
        self._filled: list[int] = []
        self._stream: int | None = None
        self._lock = threading.Lock()

    def repeat(self, memory: Sequence[Tensor]) -> bool:
        """Launch on this memory what was recorded, on the current stream of the GPU.

        memory: every tensor that the launches read or write, contiguous, of the same sizes and
                types every time

        Returns False, with nothing launched, where that takes a call of Triton's: see `record`.
        """
        if not self._launches:
            return False
        run, current_device, current_stream = _driver()
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.repeat(memory)
        addresses = [tensor.data_ptr() for tensor in memory]
        stream = current_stream(self._device)
        with self._lock:
            if addresses != self._filled:
                if not _are_aligned(addresses):
                    return False
                inner = [addresses[tensor] + at for tensor, at in self._inner]
                self._filled = []
                self._addresses[:-1] = addresses + inner
                maps = [pair for entry in self._launches for pair in entry.maps]
                if not all(map_.move(address.value) for map_, address in maps):
                    return False  # a new thread, to which Triton gives a context
                self._filled = addresses
            if stream != self._stream:
                for entry in self._launches:
                    entry.config.stream = stream
                self._stream = stream
            for entry in self._launches:
                if status := run(*entry.arguments):
                    if status == NO_CONTEXT and entry is self._launches[0]:
                        return False  # likewise
                    name = entry.compiled.name
                    raise RuntimeError(f"CUDA error {status} at the launch of {name}")
        return True

    def record(self, memory: Sequence[Tensor], call: Callable[[], None]) -> None:
        """Launch what `call` launches on this memory, and keep it where it may be repeated."""
        if self._device is not None and not self._compiled:
            _compile(call)
            self._compiled = True
        if self._device is None or not _are_distinct(memory):
            call()
            return
        token = _RECORD.set([])
        try:
            call()
            record = _RECORD.get() or []
        finally:
            _RECORD.reset(token)
        if not all(_is_plain(compiled) for compiled, *_ in record):
            self._device = None
            return
        pointers = dict.fromkeys(
            getattr(values[name], "base", values[name]).data_ptr()
            for compiled, _, values in record
            for name, kind in _kinds(compiled).items()
            if kind.startswith(("*", _DESCRIPTOR))
        )
        pointers.pop(0, None)  # of a tensor without elements
        found = {pointer: _find(pointer, memory) for pointer in pointers}
        starts = [(index, 0) for index in range(len(memory))]
        places = list(dict.fromkeys((*starts, *found.values())))
        addresses = (ctypes.c_uint64 * (len(places) + 1))()
        first = ctypes.addressof(addresses)
        slots = {pointer: first + 8 * places.index(place) for pointer, place in found.items()}
        slots[0] = first + 8 * len(places)
        launches = [_Launch(compiled, grid, values, slots) for compiled, grid, values in record]
        with self._lock:
            self._filled, self._stream = [], None
            self._addresses, self._inner = addresses, places[len(memory) :]
            self._launches = launches


def _find(pointer: int, memory: Sequence[Tensor]) -> tuple[int, int]:
    """Which tensor of the call an address is in, and how many bytes from its start."""
    for index, tensor in enumerate(memory):
        offset = pointer - tensor.data_ptr()
        if 0 <= offset < tensor.nbytes:
            return index, offset
    raise AssertionError("a kernel was launched on memory that is not the call's")


def _are_aligned(addresses: list[int]) -> bool:
    return not reduce(or_, addresses, 0) % _ALIGNMENT


def _are_distinct(memory: Sequence[Tensor]) -> bool:
    """Whether every address belongs to one tensor, and all are aligned."""
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in memory)
    apart = all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    return apart and _are_aligned([start for start, _ in spans])


@cache
def _driver() -> tuple[Any, Any, Any]:
    """The driver's launch, and ways to ask for the current GPU and for a GPU's current stream."""
    from triton.runtime import driver

    active: Any = driver.active
    launch_kernel = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    # NOTE: not torch.cuda.current_device, which first makes sure that CUDA is initialised: it is.
    return launch_kernel, torch._C._cuda_getDevice, active.get_current_stream
