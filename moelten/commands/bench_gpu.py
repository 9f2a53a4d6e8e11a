"""The GPU's timer: CUDA graphs over cold weights, no host in the way.

One graph holds a pass of calls, each with a draw of its own and the next copy of the weights, so
that between two uses of a byte of the weights the pass reads several times the L2 cache. A round is
one replay, its time is the mean of the pass's calls; the output that is checked is what it wrote.

Replays run in short bursts with rests between them, layers and ceilings alike, and the first of a
burst does not count: under lasting load a GPU lowers its clocks, an H200 in bf16 products by 15 %.
So a pass of long calls has few of them, and ends as soon as the products of a ceiling do.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moelten.commands.bench_bursts import time_burst
from moelten.commands.bench_records import Ceilings, Record, Timing, relative_error
from moelten.commands.bench_workload import (
    Draw,
    Layer,
    Shape,
    derive_experts,
    random_expert,
    require_memory,
)
from moelten.errors import UnsupportedError
from moelten.formats import Scheme
from moelten.moe import pack_stream
from moelten.packed import PackedExperts

# Caches' worth of weights that are read between two uses of the same bytes.
COLD_CACHES = 4
_FEWEST_CALLS, _MOST_CALLS = 8, 64
_LEAST_TOKENS, _MOST_TOKENS = 1024, 16384  # of a pass, but for one call at least
_MIN_ROUNDS, _MAX_ROUNDS = 5, 100
_BURST_SECONDS = 0.015
_CHECKED_ELEMENTS = 1 << 30


def facts() -> Record:
    """What the records say about the machine."""
    name = torch.cuda.get_device_name()
    return {"device": name, "gpu": name}


def measure_ceilings() -> Ceilings:
    """Read bandwidth and matrix rates of the current GPU."""
    from moelten.commands import bench_ceilings  # imports Triton

    return Ceilings(bench_ceilings.read_bandwidth(), bench_ceilings.matrix_rates())


def num_copies(active_bytes: int, cache_bytes: int) -> int:
    """Copies of the weights, so that one pass over them reads `COLD_CACHES` times the cache.

    active_bytes: weights that one call reads, at least

    >>> num_copies(80 << 20, 50 << 20), num_copies(1 << 30, 50 << 20)
    (3, 1)
    """
    return max(-(-COLD_CACHES * cache_bytes // active_bytes), 1)


def num_calls(tokens: int, copies: int) -> int:
    """Calls of one pass: 64 short ones to 8 of 2048 tokens or fewer of more, each copy as often.

    >>> num_calls(1, 3), num_calls(64, 1), num_calls(2048, 1), num_calls(8192, 1)
    (66, 16, 8, 2)
    """
    calls = min(max(_LEAST_TOKENS // tokens, _FEWEST_CALLS), _MOST_CALLS)
    calls = min(calls, max(_MOST_TOKENS // tokens, 1))
    return -(-calls // copies) * copies


@dataclass(frozen=True)
class Pass:
    """A graph of calls, and all that they read and write."""

    graph: torch.cuda.CUDAGraph
    draws: list[Draw]
    copies: list[PackedExperts]
    out: Tensor


@dataclass(frozen=True)
class GpuLayer(Layer):
    """Packed experts, and the copies of them that short calls walk through."""

    copies: list[PackedExperts] = field(default_factory=list)

    def time(self, tokens: int, routing: str, seconds: float) -> Timing:
        """5 to 100 rounds, in about `seconds`; what the last call of a pass returned is checked."""
        try:
            return self._time(tokens, routing, seconds)
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"{self.scheme.name} at shape {self.shape.name} with {tokens} tokens: out of GPU "
                "memory; choose fewer tokens or fewer experts (--tokens, --num-experts)"
            ) from error
        finally:
            torch.cuda.empty_cache()

    def capture(self, tokens: int, routing: str) -> Pass:
        """A pass of calls, each with a draw of its own and the next copy of the weights."""
        draws = [self.draw(tokens, routing) for _ in range(num_calls(tokens, 1))]
        fewest = min(draw.active_experts() for draw in draws)
        copies = self._copies(fewest * self.packed.nbytes // self.shape.num_experts)
        more = num_calls(tokens, len(copies)) - len(draws)
        draws += [self.draw(tokens, routing) for _ in range(more)]
        out = torch.empty_like(draws[0].x)

        self.run(draws[0], self.packed, out)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its launches can be counted
        with torch.cuda.graph(graph):
            for index, draw in enumerate(draws):
                self.run(draw, copies[index % len(copies)], out)
        graph.instantiate()
        return Pass(graph, draws, copies, out)

    def _time(self, tokens: int, routing: str, seconds: float) -> Timing:
        held = self.capture(tokens, routing)
        graph, draws, out = held.graph, held.draws, held.out
        times = time_replays(graph, seconds)
        out.fill_(torch.nan)
        graph.replay()
        launches = count_launches(graph)
        return Timing(
            [time / len(draws) for time in times],
            statistics.mean(draw.active_experts() for draw in draws),
            relative_error(self.packed, draws[-1], out, _CHECKED_ELEMENTS),
            {
                "launches": None if launches is None else round(launches / len(draws), 1),
                "weight_copies": len(held.copies),
                "calls": len(draws),
            },
        )

    def _copies(self, active_bytes: int) -> list[PackedExperts]:
        cache = torch.cuda.get_device_properties(self.packed.device).L2_cache_size
        count = num_copies(active_bytes, cache)
        missing = count - 1 - len(self.copies)
        if missing > 0:
            what = f"{missing} cold copies of {self.scheme.name} at shape {self.shape.name}"
            needed = missing * self.packed.nbytes
            require_memory(needed, free_memory(), what, self.shape.num_experts)
        self.copies.extend(self.copy() for _ in range(missing))
        return [self.packed, *self.copies[: count - 1]]


def load(scheme: Scheme, shape: Shape, backend: str | None, generator: torch.Generator) -> GpuLayer:
    """Random experts, packed on the GPU."""
    torch.cuda.empty_cache()
    spec, count = shape.spec(scheme), shape.num_experts
    first = random_expert(spec, generator)
    what = f"{scheme.name} at shape {shape.name}"
    require_memory(count * first.nbytes, free_memory(), what, count)
    experts = derive_experts(first, count)
    packed = pack_stream(spec, experts, device=generator.device, backend=backend)
    return GpuLayer(scheme, shape, backend, generator, packed)


def free_memory() -> int:
    """Bytes of GPU memory that an allocation can have."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def time_replays(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    """Seconds of each replay, the first of every burst left out."""
    graph.replay()
    replays = 1 + max(int(_BURST_SECONDS / time_burst(graph.replay, 1)[0]), 1)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _MIN_ROUNDS or (
        len(times) < _MAX_ROUNDS and time.perf_counter() - start < seconds
    ):
        times += time_burst(graph.replay, replays)[1:]
    return times


def count_launches(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels in a graph, by NVIDIA's driver; None on other GPUs."""
    if torch.version.hip is not None:
        return None
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
    count = ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(handle, None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    _check(driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)))
    kernels = 0
    for node in nodes:
        kind = ctypes.c_int()
        _check(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        kernels += kind.value == 0  # CU_GRAPH_NODE_TYPE_KERNEL
    return kernels


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver failed to read a graph: error {status}")
