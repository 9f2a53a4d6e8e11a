"""Tensor maps, held to cuda.h by a driver that notes what it is given; and their launches."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from moelten.kernels import launches, tensor_maps
from moelten.kernels.launches import Launches, launch
from moelten.kernels.tensor_maps import NO_CONTEXT, TensorMap

FACTS = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 64]}


class Driver(dict):
    """Stands in for libcuda: a map starts with its address."""

    def __init__(self) -> None:
        self.encoded, self.status = [], 0
        self |= {"cuTensorMapEncodeTiled": self.encode, "cuTensorMapReplaceAddress": self.replace}

    def encode(self, where, kind, rank, address, dims, strides, box, steps, *modes):
        self.replace(where, address)
        lists = [list(part) for part in (dims, strides, box, steps)]
        self.encoded.append((kind.value, rank.value, *lists, [mode.value for mode in modes]))
        return self.status

    def replace(self, where, address):
        assert where.value % 64 == 0
        ctypes.memmove(where, struct.pack("Q", address.value), 8)
        return self.status


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(tensor_maps, "_driver", lambda: found)
    return found


def describe(tensor: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(base=tensor, shape=list(tensor.shape), strides=list(tensor.stride()))


def address_in(place: int) -> int:
    return struct.unpack("Q", ctypes.string_at(place, 8))[0]


def test_a_map_as_the_driver_takes_it(driver):
    x = torch.zeros(40, 128, dtype=torch.bfloat16)
    map_ = TensorMap(describe(x), FACTS)
    # Innermost first; strides in bytes, without the innermost; the driver's number of bf16.
    assert driver.encoded == [(9, 2, [128, 40], [256], [64, 16], [1, 1], [0, 3, 2, 0])]
    assert address_in(map_.address) == x.data_ptr()
    map_.move(4096)
    assert address_in(map_.address) == 4096


def test_the_driver_refuses(driver):
    driver.status = 1
    with pytest.raises(RuntimeError, match="CUDA error 1 of cuTensorMapEncodeTiled"):
        TensorMap(describe(torch.zeros(8, 64)), FACTS)


class Kernel:
    """Stands in for Triton; its second argument is a descriptor."""

    arg_names = ("out_ptr", "x_desc", "n")

    def __init__(self) -> None:
        usual = {"num_warps": 4, "shared": 0, "launch_pdl": True, "num_ctas": 1}
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        kinds = {"out_ptr": "*fp32", "x_desc": "tensordesc<bf16[16,64],layout>", "n": "i32"}
        facts = SimpleNamespace(
            **usual, **scratch, launch_cooperative_grid=False, tensordesc_meta=[FACTS]
        )
        source = SimpleNamespace(signature=kinds)
        self.compiled = SimpleNamespace(function=5, metadata=facts, src=source, name="kernel")
        self.seen = 0

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.seen += 1
            return self.compiled

        return run

    def warmup(self, *arguments, **named):
        pass


def test_launches_with_maps_are_repeated(driver, monkeypatch):
    """On other memory the maps follow; pointer, map, its shape and strides, number, in order."""
    found = []

    def run(config, function, parameters, extra):
        out, map_, *numbers, n, _, _ = list(parameters._obj)
        sizes = [ctypes.string_at(at, 8) for at in numbers]
        shape = [struct.unpack_from("i", part)[0] for part in sizes[:2]]
        strides = [struct.unpack("q", part)[0] for part in sizes[2:]]
        number = struct.unpack("i", ctypes.string_at(n, 4))[0]
        found.append((address_in(out), address_in(map_), shape, strides, number))
        return 0

    monkeypatch.setattr(launches, "_driver", lambda: (run, lambda: 0, lambda device: 1))
    kernel, calls = Kernel(), Launches(torch.device("cuda", 0))

    def memory():
        return [torch.zeros(64), torch.zeros(50, 128, dtype=torch.bfloat16)]

    def call(out, x):
        launch(kernel, (3,), out[16:], describe(x[10:]), 7)

    first = memory()
    calls.record(first, lambda: call(*first))
    assert kernel.seen == 1
    for out, x in (first, memory(), memory(), first):
        found.clear()
        assert calls.repeat([out, x])
        start = x.data_ptr() + 10 * 256
        assert found == [(out.data_ptr() + 64, start, [40, 128], [128, 1], 7)]
    assert kernel.seen == 1 and len(driver.encoded) == 1
    # A thread without a context repeats nothing, and leaves nothing behind.
    driver.status, elsewhere = NO_CONTEXT, memory()
    found.clear()
    assert not calls.repeat(elsewhere) and not found
    driver.status = 0
    assert calls.repeat(first) and found[0][1] == first[1].data_ptr() + 10 * 256
