"""moelten beside transformers' own experts: one process, the same draws, measured floors.

A point is (scheme, shape, tokens). Its contenders run in turn within each round on that round's
draw of inputs and routing, and each walks through copies of its weights that exceed the cache, so
weights come from memory while code stays warm, as between the layers of a model. The floor is the
larger of weight bytes over the read bandwidth and FLOPs over the bf16 matmul rate, both measured in
the same run. The baseline holds the same weights decoded to bf16; its fastest implementation
counts. GPUs are not timed here.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten import reference
from moelten.commands.doctor import cpu_model, package_version
from moelten.errors import FormatError, UnsupportedError
from moelten.formats import Float, Scheme
from moelten.kernels import backend_of
from moelten.moe import fused_moe, pack_stream
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor, dequantize, quantize
from moelten.routing import Routing, softmax_topk_renormalize
from moelten.weights import ExpertSpec, ExpertWeights

ROUTINGS = ("uniform", "zipf", "onehot")
BASELINES = ("grouped_mm", "batched_mm", "eager")
_ABSURDLY_SLOW = 3.0
_MIN_ROUNDS, _MAX_ROUNDS, _FEWEST_ROUNDS = 20, 60, 3
_CHECKED_ELEMENTS = 48 << 20
_GIB = 1 << 30

Record = dict[str, Any]
Call = Callable[["Draw"], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; every expert is a SwiGLU without biases."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", 2048, 1024, 32, 4),
        Shape("A", 4096, 2048, 256, 6),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4),
        Shape("deepseek-v3", 7168, 2048, 256, 8),
        Shape("kimi-k2", 7168, 2048, 384, 8),
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("qwen3-235b", 4096, 1536, 128, 8),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
    )
}


@dataclass(frozen=True)
class Draw:
    """One round's inputs: x [T, H], its routing, and both as transformers' experts take them."""

    x: Tensor
    routing: Routing
    baseline: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """What is timed: packed experts, and the same weights in bf16, [E, 2I, H] and [E, H, I].

    baseline_missing: why there are no bf16 weights
    """

    scheme: Scheme
    shape: Shape
    packed: PackedExperts
    decoded: tuple[Tensor, Tensor] | None
    baseline_missing: str | None


@dataclass(frozen=True)
class Floors:
    """What the machine did in this run: bytes/s of a plain read, FLOP/s of a bf16 matmul."""

    read: float
    mma: float


def run(
    schemes: list[Scheme],
    shape: Shape,
    tokens: list[int],
    *,
    routing: str = "uniform",
    backend: str | None = None,
    seconds: float = 20.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda label: None,
) -> Iterator[Record]:
    """Yield one record per (scheme, number of tokens), as `record_keys` lists them.

    seconds bounds the rounds of one point: 20 to 60 rounds, fewer only when 20 do not fit.
    Raises UnsupportedError where the weights do not fit in memory or no backend runs the scheme.
    """
    if routing not in ROUTINGS:
        raise FormatError(f"routing is {' or '.join(ROUTINGS)}, got {routing!r}")
    if not 1 <= shape.top_k <= shape.num_experts:
        raise FormatError(f"top_k is 1..{shape.num_experts} (num_experts), got {shape.top_k}")
    generator = torch.Generator().manual_seed(seed)
    progress("measuring the floors")
    floors = measure_floors(torch.ones(cold_bytes() // 4))
    for scheme in schemes:
        progress(f"{scheme.name}: packing")
        layer = make_layer(scheme, shape, backend, generator)
        for count in tokens:
            progress(f"{scheme.name}: {count} tokens")
            draws = make_draws(scheme, shape, count, routing, generator)
            times = time_rounds(_calls(layer, backend), draws, seconds)
            yield _record(layer, count, routing, draws, times, floors)


def check_device(device: str) -> None:
    """Refuse what cannot be timed in this version."""
    if device != "cpu":
        raise UnsupportedError(
            f"bench times the CPU in this version, GPUs are not timed yet; got {device!r}"
        )


def find_shape(name: str, sizes: dict[str, int]) -> Shape:
    """A named shape, with `sizes` (fields of Shape) in place of its own."""
    if name not in SHAPES:
        raise UnsupportedError(f"unknown shape {name!r}; shapes: {', '.join(SHAPES)}")
    for size, value in sizes.items():
        if value < 1:
            raise FormatError(f"{size} is at least 1, got {value}")
    return replace(SHAPES[name], name="custom", **sizes) if sizes else SHAPES[name]  # type: ignore[arg-type]


def cold_bytes() -> int:
    """Bytes that the last-level cache cannot hold: twice its size, 256 MiB to 1 GiB."""
    sizes = [
        int(text.removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()).endswith("K")
    ]
    return min(max(2 * max(sizes, default=0), _GIB // 4), _GIB)


def measure_floors(sweep: Tensor, size: int = 2048) -> Floors:
    """Best of a few: reading `sweep` once, and a bf16 matmul of size**3."""
    a = torch.randn(size, size).bfloat16()
    read = min(_elapsed(sweep.sum) for _ in range(5))
    mma = min(_elapsed(lambda: a @ a) for _ in range(5))
    return Floors(sweep.nbytes / read, 2 * size**3 / mma)


def time_rounds(
    calls: dict[str, Call], draws: list[Draw], seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call, by contender: all contenders in turn within each round.

    The first call of each warms up. A contender that then takes 3 times the fastest baseline (all
    but "moelten") is dropped, so that it does not eat the time of the others.
    """
    probes = {}
    for name, call in calls.items():
        call(draws[0])
        probes[name] = _elapsed(lambda call=call: call(draws[0]))  # type: ignore[misc]
    fastest = min((probes[name] for name in calls if name != "moelten"), default=0.0)
    kept = [n for n in calls if n == "moelten" or probes[n] <= _ABSURDLY_SLOW * fastest]
    times: dict[str, list[float]] = {name: [] for name in kept}
    start = time.perf_counter()
    for index in range(_MAX_ROUNDS):
        spent = time.perf_counter() - start
        enough = _FEWEST_ROUNDS if spent > seconds else _MIN_ROUNDS
        if spent > seconds / 2 and index >= enough:
            break
        draw = draws[index % len(draws)]
        for offset in range(len(kept)):
            name = kept[(index + offset) % len(kept)]
            times[name].append(_elapsed(lambda: calls[name](draw)))  # noqa: B023 - called at once
    return times


def _elapsed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make_layer(
    scheme: Scheme, shape: Shape, backend: str | None, generator: torch.Generator
) -> Layer:
    """Random experts, packed, and decoded to bf16 if that fits in memory."""
    first = _first_expert(scheme, shape, generator)
    spec = replace(first.spec, num_experts=shape.num_experts)
    _require_memory(shape.num_experts * first.nbytes, f"{scheme.name} at shape {shape.name}")
    experts = (
        replace(first, w13=_rolled(first.w13, e), w2=_rolled(first.w2, e))
        for e in range(shape.num_experts)
    )
    packed = pack_stream(spec, experts, backend=backend)
    missing = _baseline_missing(spec)
    if missing is not None:
        return Layer(scheme, shape, packed, None, missing)
    w13 = _decoded(first.w13, shape.num_experts).flatten(1, 2)
    return Layer(scheme, shape, packed, (w13, _decoded(first.w2, shape.num_experts)), None)


def _baseline_missing(spec: ExpertSpec) -> str | None:
    """Why there is no baseline for this layer, None if there is one."""
    if package_version("transformers") is None:
        return "transformers is not installed: pip install 'moelten[transformers]'"
    if spec.logical_bytes > 0.8 * _available_memory():
        return f"bf16 weights of {spec.logical_bytes / _GIB:.1f} GiB do not fit in memory"
    return None


def _first_expert(scheme: Scheme, shape: Shape, generator: torch.Generator) -> ExpertWeights:
    """One Gaussian expert (E = 1) whose outputs have the magnitude of its inputs."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    w13 = torch.randn(1, 2, inter, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(1, hidden, inter, generator=generator) * inter**-0.5
    static = torch.full((1,), 6.0 / 448.0 / (6.0 if scheme.weights.packed else 1.0))
    scales: dict[str, Any] = (
        {"w13_input_scale": static, "w2_input_scale": static} if scheme.static else {}
    )
    return ExpertWeights(
        quantize(w13, scheme.weights),
        quantize(w2, scheme.weights),
        activation_format=scheme.activations,
        **scales,
    )


def _shift(matrix: QTensor) -> int:
    """Rows by which experts differ: one scale block, or none where blocks are partial."""
    block = matrix.format.block[0] or 1
    return 0 if matrix.shape[-2] % block else block


def _rolled(matrix: QTensor, expert: int) -> QTensor:
    """Expert 0's rows in another order, scales with them: as random, and as fast as a copy."""
    shift = expert * _shift(matrix)
    parts: dict[str, Any] = {
        "data": matrix.data.view(torch.uint8).roll(shift, -2).view(matrix.data.dtype)
    }
    for name in ("scale", "zero"):
        part = getattr(matrix, name)
        if part is not None and shift:
            rows = shift // (matrix.format.block[0] or part.shape[-2])
            parts[name] = part.view(torch.uint8).roll(rows, -2).view(part.dtype)
    return replace(matrix, **parts)


def _decoded(first: QTensor, experts: int) -> Tensor:
    """bf16 values of `_rolled(first, e)` for every expert e."""
    values = dequantize(first)[0].bfloat16()
    out = torch.empty(experts, *values.shape, dtype=torch.bfloat16)
    for e in range(experts):
        out[e] = values.roll(e * _shift(first), -2)
    return out


def _require_memory(needed: int, what: str) -> None:
    available = _available_memory()
    if needed > 0.9 * available:
        raise UnsupportedError(
            f"{what} needs {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are free; "
            "choose a smaller shape or fewer experts"
        )


def _available_memory() -> int:
    path = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    if match:
        return int(match[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_draws(
    scheme: Scheme, shape: Shape, tokens: int, routing: str, generator: torch.Generator
) -> list[Draw]:
    """One draw per round: fresh inputs, fresh routing."""
    fmt = scheme.activations
    dtype = fmt.data_dtype if isinstance(fmt, Float) else torch.bfloat16
    draws = []
    for _ in range(_MAX_ROUNDS):
        x = torch.randn(tokens, shape.hidden_size, generator=generator).to(dtype)
        drawn = draw_routing(routing, tokens, shape.num_experts, shape.top_k, generator)
        # Converted here, before any clock runs.
        baseline = x.bfloat16(), drawn.ids.long(), drawn.weights.bfloat16()
        draws.append(Draw(x, drawn, baseline))
    return draws


def draw_routing(
    kind: str, tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> Routing:
    """Distinct experts per token.

    uniform: all alike; zipf: the expert of rank r is wanted like 1/r, ranks dealt anew in every
    draw; onehot: one expert, another in every draw, is visited by every token.
    """
    logits = torch.zeros(experts)
    order = torch.randperm(experts, generator=generator)
    if kind == "zipf":
        logits[order] = -torch.arange(1, experts + 1).float().log()
    elif kind == "onehot":
        logits[order[0]] = 100.0
    # Gumbel noise: the top k are a sample without replacement from softmax(logits).
    uniform = torch.rand(tokens, experts, generator=generator).clamp_min(1e-20)
    return softmax_topk_renormalize(logits - (-uniform.log()).log(), top_k)


def _calls(layer: Layer, backend: str | None) -> dict[str, Call]:
    """The contenders by name; those of transformers where there are weights for them."""
    packed = layer.packed
    copies = itertools.cycle(
        [packed]
        + [
            replace(packed, tensors={n: t.clone() for n, t in packed.tensors.items()})
            for _ in range(_more_copies(packed.nbytes))
        ]
    )
    ours: dict[str, Call] = {
        "moelten": lambda draw: fused_moe(draw.x, next(copies), draw.routing, backend=backend)
    }
    return ours if layer.decoded is None else ours | _baseline_calls(*layer.decoded)


def _more_copies(nbytes: int) -> int:
    """Copies of `nbytes` of weights, beside the first, that together exceed the cache."""
    return max(-(-cold_bytes() // nbytes) - 1, 0)


def _baseline_calls(w13: Tensor, w2: Tensor) -> dict[str, Call]:
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

    more = range(_more_copies(w13.nbytes + w2.nbytes))
    copies = itertools.cycle([module(w13, w2)] + [module(w13.clone(), w2.clone()) for _ in more])

    def call(implementation: str) -> Call:
        def run(draw: Draw) -> None:
            config._experts_implementation = implementation
            with torch.no_grad():
                next(copies)(*draw.baseline)

        return run

    return {f"transformers {name}": call(name) for name in BASELINES}


def _record(
    layer: Layer,
    tokens: int,
    routing: str,
    draws: list[Draw],
    times: dict[str, list[float]],
    floors: Floors,
) -> Record:
    shape, packed = layer.shape, layer.packed
    ours = times["moelten"]
    baselines = {n: statistics.median(t) for n, t in times.items() if n != "moelten"}
    best = min(baselines, key=baselines.__getitem__, default=None)
    used = [draw.routing.ids for draw in draws[: len(ours)]]
    active = statistics.mean(len(set(ids.flatten().tolist())) for ids in used)
    seconds = statistics.median(ours)
    weight_bytes = active * packed.nbytes / shape.num_experts
    flops = 6.0 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
    floor = max(weight_bytes / floors.read, flops / floors.mma)
    return {
        "scheme": layer.scheme.name,
        "shape": shape.name,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "tokens": tokens,
        "routing": routing,
        "active_experts": round(active, 1),
        "backend": backend_of(packed.layout.name, packed.device).name,
        "rounds": len(ours),
        "us": _us(seconds),
        "us_p10": _us(_quantile(ours, 0.1)),
        "us_p90": _us(_quantile(ours, 0.9)),
        "weight_gbps": round(weight_bytes / seconds / 1e9, 2),
        "tflops": round(flops / seconds / 1e12, 4),
        "floor_us": _us(floor),
        "percent_of_floor": round(100 * floor / seconds, 2),
        "read_gbps": round(floors.read / 1e9, 2),
        "mma_tflops": round(floors.mma / 1e12, 3),
        "rel_error": relative_error(packed, draws[0]),
        "packed_bytes": packed.nbytes,
        "baseline": best,
        "baseline_us": _us(baselines[best]) if best else None,
        "speedup": round(baselines[best] / seconds, 3) if best else None,
        "baseline_bytes": sum(t.nbytes for t in layer.decoded) if layer.decoded else None,
        "baseline_missing": layer.baseline_missing,
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def relative_error(packed: PackedExperts, draw: Draw) -> float:
    """|fused - reference| / |reference| (Frobenius, fp64) on a few tokens and experts of a draw.

    The fp64 reference decodes whole experts, so only as many are visited as keep it to seconds.
    """
    spec = packed.spec
    elements = spec.logical_bytes // 2 // spec.num_experts
    ids = draw.routing.ids[:4]
    allowed = sorted(set(ids.flatten().tolist()))[: max(_CHECKED_ELEMENTS // elements, 1)]
    kept = torch.isin(ids, torch.tensor(allowed, dtype=ids.dtype))
    routing = Routing(torch.where(kept, ids, -1), draw.routing.weights[:4])
    x = draw.x[:4].contiguous()
    got = fused_moe(x, packed, routing).double()
    wanted = torch.zeros_like(got)
    for expert in allowed:
        wanted += reference.moe(x, packed.unpack_expert(expert), routing)
    return float(torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted))


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def _commit() -> str | None:
    """The checkout's commit; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
