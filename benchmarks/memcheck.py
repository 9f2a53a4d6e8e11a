"""Small layers on both GPU backends, for `compute-sanitizer --tool memcheck python`.

Ragged sizes and routing ids out of range, so that a mask that is missing shows; PyTorch's caching
of memory is off, so that what lies behind a tensor is nobody's. Every layer runs twice: the second
time its launches are repeated. `gpu_tests.py` runs this and reports what was found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from cases import Case, make_input, make_weights
from ties import assert_matches_but_for_ties

import moelten
from moelten import reference
from moelten.commands.describe import find_scheme
from moelten.routing import Routing

# Tokens: one, and more than a tile holds.
SAMPLE = {
    "triton": (("mxfp4_bf16", "int4g128_int8", "fp8block_fp8", "nvfp4_nvfp4"), (3, 40)),
    "hopper": (
        (
            *("mxfp4_bf16", "int4g32_bf16", "nvfp4_bf16", "fp8block_bf16", "int4g128_fp8"),
            "fp8block_fp8",
        ),
        (1, 20, 300),
    ),
}


def check(backend: str, name: str, tokens: int) -> None:
    """One layer against the reference."""
    which = find_scheme(name)
    blocks = which.weights.block[1] == 128
    sizes = {"hidden_size": 384, "intermediate_size": 256} if blocks else {}
    ragged = {"hidden_size": 320, "intermediate_size": 192, "num_experts": 5, "tokens": tokens}
    case = Case(which, **(ragged | sizes))
    weights, (x, routing) = make_weights(case), make_input(case)
    ids = routing.ids.clone()
    ids[::3, 0], ids[1::4, -1], ids[-1] = -1, 5, 2**31 - 1
    routing = Routing(ids, routing.weights)
    expected = reference.moe(x, weights, routing)
    packed = moelten.pack(weights, device="cuda", backend=backend)
    rows, there = x.cuda(), Routing(ids.cuda(), routing.weights.cuda())
    for _ in range(2):
        out = moelten.fused_moe(rows, packed, there, backend=backend)
        assert_matches_but_for_ties(out.cpu(), x, weights, routing, expected)
    print(f"{backend} {name} T={tokens}", flush=True)


if __name__ == "__main__":
    torch.cuda.init()
    for backend, (names, counts) in SAMPLE.items():
        for name in names:
            for tokens in counts:
                check(backend, name, tokens)
