"""The CPU's timer: moelten beside transformers' own experts, in one process, on the same draws.

All contenders run in turn within each round on that round's draw, and each walks through copies of
its weights that exceed the cache, so weights come from memory while code stays warm, as between the
layers of a model. The baseline holds the same weights decoded to bf16; its fastest implementation
counts.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten.commands.bench_records import Ceilings, Record, Timing, relative_error
from moelten.commands.bench_workload import (
    Draw,
    Layer,
    Shape,
    derive_experts,
    random_expert,
    require_memory,
    roll_rows,
)
from moelten.commands.doctor import cpu_model, package_version
from moelten.formats import Scheme
from moelten.moe import pack_stream
from moelten.qtensor import QTensor, dequantize

BASELINES = ("grouped_mm", "batched_mm", "eager")
_ABSURDLY_SLOW = 3.0
_MIN_ROUNDS, _MAX_ROUNDS, _FEWEST_ROUNDS = 20, 60, 3
_CHECKED_ELEMENTS = 48 << 20
_GIB = 1 << 30

Call = Callable[[int], Any]


def facts() -> Record:
    """What the records say about the machine."""
    return {
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "transformers": package_version("transformers"),
    }


def cold_bytes() -> int:
    """Bytes that the last-level cache cannot hold: twice its size, 256 MiB to 1 GiB."""
    sizes = [
        int(text.removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()).endswith("K")
    ]
    return min(max(2 * max(sizes, default=0), _GIB // 4), _GIB)


def measure_ceilings(size: int = 2048) -> Ceilings:
    """Best of a few: reading `cold_bytes` once, and a bf16 matmul of size**3."""
    sweep = torch.ones(cold_bytes() // 4)
    a = torch.randn(size, size).bfloat16()
    read = min(_elapsed(sweep.sum) for _ in range(5))
    mma = min(_elapsed(lambda: a @ a) for _ in range(5))
    return Ceilings(sweep.nbytes / read, {"bf16": 2 * size**3 / mma})


@dataclass(frozen=True)
class CpuLayer(Layer):
    """What is timed: packed experts, and the same weights in bf16.

    decoded:          [E, 2I, H] and [E, H, I]
    baseline_missing: why there are no bf16 weights
    """

    decoded: tuple[Tensor, Tensor] | None
    baseline_missing: str | None

    def time(self, tokens: int, routing: str, seconds: float) -> Timing:
        """20 to 60 rounds, one draw each; fewer only when 20 do not fit into `seconds`."""
        draws = [self.draw(tokens, routing) for _ in range(_MAX_ROUNDS)]
        times = time_rounds(self._calls(draws), seconds)
        ours = times.pop("moelten")
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = min(medians, key=medians.__getitem__, default=None)
        out = self.run(draws[0], self.packed)
        return Timing(
            ours,
            statistics.mean(draw.active_experts() for draw in draws[: len(ours)]),
            relative_error(self.packed, draws[0], out, _CHECKED_ELEMENTS),
            {
                "baseline": best,
                "baseline_us": round(medians[best] * 1e6, 1) if best else None,
                "speedup": round(medians[best] / statistics.median(ours), 3) if best else None,
                "baseline_bytes": sum(t.nbytes for t in self.decoded) if self.decoded else None,
                "baseline_missing": self.baseline_missing,
            },
        )

    def _calls(self, draws: list[Draw]) -> dict[str, Call]:
        """The contenders by name, each taking the number of a draw."""
        more = range(_more_copies(self.packed.nbytes))
        copies = itertools.cycle([self.packed] + [self.copy() for _ in more])

        def ours(index: int) -> Any:
            return self.run(draws[index], next(copies))

        calls: dict[str, Call] = {"moelten": ours}
        return calls if self.decoded is None else calls | _baseline_calls(*self.decoded, draws)


def load(scheme: Scheme, shape: Shape, backend: str | None, generator: torch.Generator) -> CpuLayer:
    """Random experts, packed, and decoded to bf16 if that fits in memory."""
    spec, count = shape.spec(scheme), shape.num_experts
    first = random_expert(spec, generator)
    what = f"{scheme.name} at shape {shape.name}"
    require_memory(count * first.nbytes, available_memory(), what, count)
    packed = pack_stream(spec, derive_experts(first, count), backend=backend)
    missing = _baseline_missing(shape, spec.logical_bytes)
    decoded = None
    if missing is None:
        decoded = _decoded(first.w13, count).flatten(1, 2), _decoded(first.w2, count)
    return CpuLayer(scheme, shape, backend, generator, packed, decoded, missing)


def _baseline_missing(shape: Shape, nbytes: int) -> str | None:
    """Why there is no baseline for this layer, None if there is one."""
    if package_version("transformers") is None:
        return "transformers is not installed: pip install 'moelten[transformers]'"
    if shape.biases:
        return f"the baseline's experts are SwiGLU without biases, those of {shape.name} are not"
    if nbytes > 0.8 * available_memory():
        return f"bf16 weights of {nbytes / _GIB:.1f} GiB do not fit in memory"
    return None


def _decoded(first: QTensor, experts: int) -> Tensor:
    """bf16 values of `roll_matrix(first, e)` for every expert e."""
    values = dequantize(first)[0].bfloat16()
    block = first.format.block[0] or 1
    rows = values.shape[-2] // block * block
    out = torch.empty(experts, *values.shape, dtype=torch.bfloat16)
    for e in range(experts):
        out[e] = roll_rows(values, e * block, rows)
    return out


def available_memory() -> int:
    """Bytes of RAM that are free or can be freed."""
    path = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    if match:
        return int(match[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def time_rounds(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, by contender: all contenders in turn within each round.

    The first call of each warms up. A contender that then takes 3 times the fastest baseline (all
    but "moelten") is dropped, so that it does not eat the time of the others.
    """
    probes = {}
    for name, call in calls.items():
        call(0)
        probes[name] = _elapsed(lambda call=call: call(0))  # type: ignore[misc]
    fastest = min((probes[name] for name in calls if name != "moelten"), default=0.0)
    kept = [n for n in calls if n == "moelten" or probes[n] <= _ABSURDLY_SLOW * fastest]
    times: dict[str, list[float]] = {name: [] for name in kept}
    start = time.perf_counter()
    for index in range(_MAX_ROUNDS):
        spent = time.perf_counter() - start
        enough = _FEWEST_ROUNDS if spent > seconds else _MIN_ROUNDS
        if spent > seconds / 2 and index >= enough:
            break
        for offset in range(len(kept)):
            name = kept[(index + offset) % len(kept)]
            times[name].append(_elapsed(lambda: calls[name](index)))  # noqa: B023 - called at once
    return times


def _elapsed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _more_copies(nbytes: int) -> int:
    """Copies of `nbytes` of weights, beside the first, that together exceed the cache."""
    return max(-(-cold_bytes() // nbytes) - 1, 0)


def _baseline_calls(w13: Tensor, w2: Tensor, draws: list[Draw]) -> dict[str, Call]:
    """transformers' Qwen3-MoE experts on bf16 weights, by implementation."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=w2.shape[1], moe_intermediate_size=w2.shape[2], num_experts=w2.shape[0]
    )

    def module(gate_up: Tensor, down: Tensor) -> Any:
        with torch.device("meta"):
            untyped: Any = Qwen3MoeExperts
            experts = untyped(config)
        experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        return experts

    def modules() -> Iterator[Any]:
        yield module(w13, w2)
        for _ in range(_more_copies(w13.nbytes + w2.nbytes)):
            yield module(w13.clone(), w2.clone())

    copies = itertools.cycle(list(modules()))
    # Converted here, before any clock runs.
    inputs = [(d.x.bfloat16(), d.routing.ids.long(), d.routing.weights.bfloat16()) for d in draws]

    def call(implementation: str) -> Call:
        def run(index: int) -> None:
            config._experts_implementation = implementation
            with torch.no_grad():
                next(copies)(*inputs[index])

        return run

    return {f"transformers {name}": call(name) for name in BASELINES}
