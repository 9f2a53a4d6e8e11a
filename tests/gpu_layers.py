"""Layers and calls made on the GPU, and what the tests of every backend there ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from metrics import assert_matches
from torch import Tensor

import moelten
from moelten import PackedExperts, reference
from moelten.formats import Scheme
from moelten.qtensor import QTensor, quantize
from moelten.routing import Routing
from moelten.weights import ExpertWeights


def make_layer(which: Scheme, experts, hidden, inter, activation, biases, seed=0) -> ExpertWeights:
    """Random weights made and quantized on the GPU, one expert at a time."""
    g = torch.Generator("cuda").manual_seed(seed)

    def matrix(halves: int, rows: int, columns: int) -> QTensor:
        parts = []
        for expert in range(experts):
            scale = (0.7 + 0.6 * expert / experts) / columns**0.5
            w = torch.randn(halves, rows, columns, generator=g, device="cuda") * scale
            parts.append(quantize(w if halves == 2 else w[0], which.weights))
        stacked = {n: torch.stack([p.tensors()[n] for p in parts]) for n in parts[0].tensors()}
        return QTensor(format=which.weights, **stacked)

    bias = {}
    if biases:
        bias["w13_bias"] = torch.randn(experts, 2, inter, generator=g, device="cuda") * 0.3
        bias["w2_bias"] = torch.randn(experts, hidden, generator=g, device="cuda") * 0.3
    w13, w2 = matrix(2, inter, hidden), matrix(1, hidden, inter)
    return ExpertWeights(w13, w2, activation, which.activations, **bias)


def make_call(tokens, experts, hidden, top_k, seed=1) -> tuple[torch.Tensor, Routing]:
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, device="cuda").bfloat16()
    scores = torch.rand(tokens, experts, generator=g, device="cuda")
    weights, ids = scores.topk(top_k)
    return x, Routing(ids, weights.softmax(-1))


def check_graph(weights: ExpertWeights, packed: PackedExperts, tokens: int):
    """Captured without a warm-up call; replays follow new inputs.

    Returns the last call (x and routing) and its output.
    """
    sizes = tokens, weights.spec.num_experts, weights.spec.hidden_size, 2
    (x, routing), (other, fresh) = (make_call(*sizes, seed) for seed in (3, 4))
    out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moelten.fused_moe(x, packed, routing, out=out)
    for new_x, new in ((x.clone(), routing), (other, fresh)):
        x.copy_(new_x), routing.ids.copy_(new.ids), routing.weights.copy_(new.weights)
        graph.replay()
        assert_matches(out.cpu(), reference.moe(new_x, weights, new).cpu())
    return x, routing, out


def check_streams(
    packed: PackedExperts,
    calls: Sequence[tuple[Tensor, Routing]],
    wanted: Sequence[Tensor],
    times: int,
) -> None:
    """Calls share no state: at once on streams of their own, they give the bits that are wanted."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(times):
        found = []
        for stream, (x, routing) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(moelten.fused_moe(x, packed, routing))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
