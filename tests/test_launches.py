"""Recorded launches, held to cuda.h by a driver that reads the structures byte by byte."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime._async_compile import active_mode

import moelten
from moelten.kernels import launches
from moelten.kernels.launches import Launches, launch

SIGNATURE = {"a_ptr": "*bf16", "n": "i32", "one": "constexpr", "b_ptr": "*i32", "scale": "fp32",
             "SIZE": "constexpr", "big": "i64", "out_ptr": "*fp32"}  # fmt: skip
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


class Kernel:
    """Stands in for Triton: notes each launch, and returns what it would have compiled."""

    def __init__(self, function: int, **facts) -> None:
        self.arg_names, self.seen, self.warm = list(SIGNATURE), [], []
        usual = {"num_warps": 4, "shared": 1024, "launch_pdl": True, "num_ctas": 1}
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        metadata = SimpleNamespace(**(usual | scratch | facts), launch_cooperative_grid=False)
        source = SimpleNamespace(signature=SIGNATURE)
        self.compiled = SimpleNamespace(
            function=function, metadata=metadata, src=source, name=f"kernel{function}"
        )

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.seen.append((grid, arguments, named))
            return self.compiled

        return run

    def warmup(self, *arguments, grid, **named):
        assert active_mode.get() is not None, "compiled one after the other"
        self.warm.append((grid, arguments, named))


class Driver:
    """Stands in for cuLaunchKernelEx: decodes what it is given as cuda.h lays it out."""

    def __init__(self) -> None:
        self.launches, self.statuses = [], []

    def __call__(self, config, function, parameters, extra):
        time.sleep(0)  # other threads run, as they may during the call of a library
        raw = ctypes.string_at(ctypes.addressof(config._obj), 56)
        *shape, shared = struct.unpack_from("7I", raw)
        stream, attributes, count = struct.unpack_from("QQI", raw, 32)
        pairs = [struct.unpack_from("i4xi", ctypes.string_at(attributes, 72)) for _ in range(count)]
        places, values = list(parameters._obj), {}
        for (name, kind), at in zip(
            ((n, k) for n, k in SIGNATURE.items() if k != "constexpr"), places, strict=False
        ):
            code = FORMATS.get(kind, "Q")
            (values[name],) = struct.unpack(code, ctypes.string_at(at, struct.calcsize(code)))
        assert extra is None and len(places) == len(values) + 2
        assert all(ctypes.string_at(at, 8) == bytes(8) for at in places[-2:])
        self.launches.append(
            (ctypes.cast(function, ctypes.c_void_p).value, shape, shared, stream, pairs, values)
        )
        return self.statuses.pop(0) if self.statuses else 0


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    stand_ins = found, lambda: 7, lambda device: 70 + device
    monkeypatch.setattr(launches, "_driver", lambda: stand_ins)
    return found


def recorder() -> Launches:
    return Launches(torch.device("cuda", 7))


def run(calls, tensors, call):
    """A call of a layer, as `ArenaBackend.run` makes it."""
    if not calls.repeat(tensors):
        calls.record(tensors, call)


def memory():
    return [torch.zeros(64), torch.zeros(64, dtype=torch.int32), torch.zeros(256)]


def layer(kernels, tensors):
    """A call of two launches, whose pointers are places in its three tensors."""
    a, b, out = tensors
    first, second = kernels
    launch(first, (5,), a[8:], 3, 1, b, 0.5, SIZE=16, big=1 << 40, out_ptr=out[64:], num_warps=4)
    launch(second, (5, 2), out, 3, 1, b[4:], 2.0, SIZE=16, big=-7, out_ptr=a)


def test_repeats_what_the_first_call_launched(driver):
    kernels = Kernel(11), Kernel(12, launch_pdl=False, num_warps=8)
    calls, first = recorder(), memory()
    run(calls, first, lambda: layer(kernels, first))
    assert [len(k.seen) for k in kernels] == [1, 1] and not driver.launches
    for tensors in (memory(), memory(), first):
        driver.launches.clear()
        for _ in range(2):
            run(calls, tensors, pytest.fail)
        a, b, out = (t.data_ptr() for t in tensors)
        wanted = [
            (11, [5, 1, 1, 128, 1, 1], 1024, 77, [(6, 1)],
             {"a_ptr": a + 32, "n": 3, "b_ptr": b, "scale": 0.5, "big": 1 << 40,
              "out_ptr": out + 256}),
            (12, [5, 2, 1, 256, 1, 1], 1024, 77, [],
             {"a_ptr": out, "n": 3, "b_ptr": b + 16, "scale": 2.0, "big": -7, "out_ptr": a}),
        ]  # fmt: skip
        assert driver.launches == wanted * 2


def test_compiles_all_kernels_before_it_launches_one():
    """Once for all calls of a kind; what is compiled is what is launched."""
    kernels, calls = (Kernel(1), Kernel(2)), recorder()
    seen = [[list(kernel.seen) for kernel in kernels]]

    def call(tensors):
        seen.append([list(kernel.seen) for kernel in kernels])
        layer(kernels, tensors)

    for _ in range(2):
        tensors = memory()
        calls.record(tensors, lambda t=tensors: call(t))
    assert len(seen) == 4 and seen[1] == seen[2] == [[], []]
    for kernel in kernels:
        (warm,) = kernel.warm
        assert str(warm) == str(kernel.seen[0])
    assert active_mode.get() is None


def test_follows_the_stream(driver, monkeypatch):
    kernels, calls, tensors = (Kernel(1), Kernel(2)), recorder(), memory()
    for stream in (77, 77, 5, 77):
        monkeypatch.setattr(
            launches, "_driver", lambda s=stream: (driver, lambda: 7, lambda device: s)
        )
        run(calls, tensors, lambda: layer(kernels, tensors))
    assert [entry[3] for entry in driver.launches] == [77, 77, 5, 5, 77, 77]


def test_goes_to_its_gpu(driver, monkeypatch):
    kernels, calls, tensors, current = (Kernel(1), Kernel(2)), recorder(), memory(), [7]

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    run(calls, tensors, lambda: layer(kernels, tensors))
    found = []
    stand_ins = (lambda *_: found.append(current[-1])), (lambda: current[-1]), int
    monkeypatch.setattr(launches, "_driver", lambda: stand_ins)
    current[0] = 6
    run(calls, tensors, pytest.fail)
    assert found == [7, 7] and current == [6]


def test_what_cannot_be_recorded_is_called_every_time(driver):
    tensors = memory()
    aliased = [tensors[0], tensors[1], tensors[0]]
    odd = [tensors[0][1:], *tensors[1:]]
    ready = recorder()
    run(ready, tensors, lambda: layer((Kernel(1), Kernel(2)), tensors))
    for calls, where, special in (
        (Launches(None), tensors, {}),
        (recorder(), aliased, {}),
        (recorder(), odd, {}),
        (ready, odd, {}),
        (recorder(), tensors, {"num_ctas": 2}),
        (recorder(), tensors, {"global_scratch_size": 8}),
    ):
        kernels = Kernel(1), Kernel(2, **special)
        for _ in range(2):
            run(calls, where, lambda k=kernels, t=where: layer(k, t))
        assert [len(k.seen) for k in kernels] == [2, 2] and not driver.launches


def test_foreign_memory_is_an_error(driver):
    tensors = memory()
    with pytest.raises(AssertionError, match="not the call's"):
        run(recorder(), tensors[:2], lambda: layer((Kernel(1), Kernel(2)), tensors))
    assert launches._RECORD.get() is None


def test_errors_and_new_threads(driver):
    kernels, calls, tensors = (Kernel(1), Kernel(2)), recorder(), memory()

    def call():
        layer(kernels, tensors)

    run(calls, tensors, call)
    driver.statuses = [201]  # this thread has no context yet: Triton, called again, makes one
    run(calls, tensors, call)
    assert [len(k.seen) for k in kernels] == [2, 2]
    for statuses in ([700], [0, 201]):
        driver.statuses = statuses
        with pytest.raises(RuntimeError, match=f"{statuses[-1]} at the launch of kernel"):
            run(calls, tensors, call)


def test_threads_do_not_mix_addresses(driver):
    kernels, calls, first = (Kernel(1), Kernel(2)), recorder(), memory()
    run(calls, first, lambda: layer(kernels, first))
    own = [memory() for _ in range(4)]

    def work(tensors):
        for _ in range(200):
            run(calls, tensors, pytest.fail)

    threads = [threading.Thread(target=work, args=(tensors,)) for tensors in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = zip(driver.launches[::2], driver.launches[1::2], strict=True)
    starts = {first[5]["a_ptr"] - 32: second[5]["out_ptr"] for first, second in pairs}
    assert starts == {t[0].data_ptr(): t[0].data_ptr() for t in own}
    assert len(driver.launches) == 4 * 200 * 2


def test_all_kernels_are_launched_here():
    """A launch beside `launch` would be missing from the repetition, and have other options."""
    folder = Path(moelten.__file__).parent / "kernels"
    for path in (*folder.glob("triton_*.py"), *folder.glob("hopper*.py")):
        assert not re.findall(r"kernel\w*\[[^\]]*\]\(", path.read_text()), path.name


def test_every_kernel_has_the_options_that_tests_compile_with():
    """Whatever a version of Triton, or its environment, takes for granted."""
    kernel = Kernel(1)
    launch(kernel, (3,), num_warps=8)
    assert kernel.seen == [((3,), (), launches.OPTIONS | {"num_warps": 8})]
    assert launches.OPTIONS == {"enable_fp_fusion": True}


def test_a_kernel_that_does_not_compile_leaves_nothing_behind():
    def fail():
        raise ValueError("no such instruction")

    def call():
        active_mode.get().submit("key", fail, lambda kernel: None)

    for _ in range(2):
        with pytest.raises(ValueError, match="no such instruction"):
            launches._compile(call)
        assert active_mode.get() is None and not launches._COMPILING.get()
