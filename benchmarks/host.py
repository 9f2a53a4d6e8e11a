"""What a call costs the host: `python benchmarks/host.py`. Needs a Hopper GPU and an idle host.

In benchmarks/results/h200-host.json: the first call of a layer, then of another shape, and of that
with many tokens (other kernels), in a process with an empty compilation cache and in one that finds
their kernels there; and the time in which `fused_moe` returns, launches included. `readme.py` makes
a sentence of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

RESULTS = Path(__file__).parent / "results"
SHAPES = {"tiny": (8, 256, 128, 2), "first": (16, 2048, 768, 4), "second": (16, 2880, 1024, 4)}
_CALLS, _ROUNDS = 100, 50


def make(name: str, seed: int = 0, tokens: int = 4) -> tuple[Any, Any, Any]:
    """Random packed experts, x and routing on the GPU."""
    import torch

    from moelten.commands.bench_workload import Shape, derive_experts, make_draw, random_expert
    from moelten.formats import scheme
    from moelten.moe import pack_stream

    experts, hidden, inter, top_k = SHAPES[name]
    shape, which = Shape(name, hidden, inter, experts, top_k), scheme("mxfp4_bf16")
    generator = torch.Generator("cuda").manual_seed(seed)
    spec = shape.spec(which)
    made = derive_experts(random_expert(spec, generator), experts)
    packed = pack_stream(spec, made, device="cuda")
    draw = make_draw(which, shape, tokens, "uniform", generator)
    torch.cuda.synchronize()
    return packed, draw.x, draw.routing


def first_call(name: str, tokens: int = 4) -> float:
    """Seconds until a layer's first output for so many tokens is there."""
    import torch

    from moelten import fused_moe

    experts, x, routing = make(name, tokens=tokens)
    start = time.perf_counter()
    fused_moe(x, experts, routing)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def mean_us(call: Callable[[], object], count: int = 1) -> float:
    """Microseconds until a call returns, or each of `count` calls: the median round's mean."""
    import torch

    rounds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS // count):
            call()
        rounds.append((time.perf_counter() - start) / _CALLS)
    return round(statistics.median(rounds) * 1e6, 2)


def call_times() -> dict[str, float]:
    """Microseconds until `fused_moe` returns, by kind of call; and what of that is not launching,
    with a driver that launches nothing."""
    import torch

    from moelten import fused_moe, workspace_bytes
    from moelten.kernels import launches

    experts, x, routing = make("tiny")
    others = [(make("tiny", seed), torch.empty_like(x)) for seed in range(1, 5)]
    out = torch.empty_like(x)
    size = workspace_bytes(experts, x.shape[0], routing.top_k)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def plain() -> None:
        fused_moe(x, experts, routing)

    def rotate() -> None:
        for (layer, rows, choice), there in others:
            fused_moe(rows, layer, choice, out=there)

    found = {
        "call_us": mean_us(plain),
        "call_us_workspace": mean_us(
            lambda: fused_moe(x, experts, routing, out=out, workspace=workspace)
        ),
        "call_us_other_layers": mean_us(rotate, len(others)),
    }
    _, *questions = launches._driver()
    with mock.patch.object(launches, "_driver", lambda: (lambda *arguments: 0, *questions)):
        found["call_us_without_launches"] = mean_us(plain)
    return found


def in_child(what: str, cache: str) -> Any:
    """What a process of this file prints, with that compilation cache."""
    env = os.environ | {"TRITON_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--child", what]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def child(what: str) -> Any:
    if what == "calls":
        return call_times()
    return [first_call("first"), first_call("second"), first_call("second", 2048)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=["first", "calls"])
    parser.add_argument("--output", type=Path, default=RESULTS / "h200-host.json")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return 0
    with TemporaryDirectory() as cache:
        cold, warm = in_child("first", cache), in_child("first", cache)
        calls = in_child("calls", cache)
    import torch
    import triton

    from moelten.commands.bench_records import commit

    record = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cold_first_call_s": round(cold[0], 2),
        "cold_new_shape_s": round(cold[1], 2),
        "cold_many_tokens_s": round(cold[2], 2),
        "warm_first_call_ms": round(warm[0] * 1e3, 1),
        "warm_new_shape_ms": round(warm[1] * 1e3, 1),
        "warm_many_tokens_ms": round(warm[2] * 1e3, 1),
        **calls,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
