"""Layers on the Hopper GPU against the reference, for its GEMMs of few and of many tokens alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from cases import ALL_SCHEMES, Case, make_input, make_weights
from gpu_layers import make_call, make_layer
from metrics import assert_matches
from ties import assert_matches_but_for_ties

import moelten
from moelten import GPT_OSS, SwiGLU, reference
from moelten.formats import (
    BF16,
    FP8_GROUP,
    FP8_ROW,
    FP16,
    INT8_GROUP,
    INT8_ROW,
    Int4,
    Scheme,
    scheme,
)
from moelten.routing import Routing
from moelten.weights import ExpertWeights

GROUPED = {
    name: s
    for name, s in ALL_SCHEMES.items()
    if s.activations in (FP8_GROUP, INT8_GROUP) and s.weights.block[1] == 128
}
SCHEMES = GROUPED | {
    name: s for name, s in ALL_SCHEMES.items() if s.activations in (BF16, FP16, FP8_ROW, INT8_ROW)
}
SHAPES = {
    "gpt-oss-120b": (scheme("mxfp4_bf16"), 32, 2880, 2880, 4, GPT_OSS, True),
    "deepseek-v3": (
        Scheme(scheme("fp8block_fp8").weights, BF16),
        24,
        7168,
        2048,
        8,
        SwiGLU(),
        False,
    ),
    "deepseek-v3 fp8": (scheme("fp8block_fp8"), 24, 7168, 2048, 8, SwiGLU(), False),
    "kimi-k2": (scheme("int4g32_bf16"), 24, 7168, 2048, 8, SwiGLU(), False),
    "mixtral": (Scheme(Int4(128), BF16), 4, 4096, 14336, 2, SwiGLU(), False),
}


def backend(which: Scheme) -> str:
    return "hopper-fp16" if which.activations == FP16 else "hopper"


def to_gpu(routing: Routing) -> Routing:
    return Routing(routing.ids.cuda(), routing.weights.cuda(), routing.on_input)


def on_gpu(weights: ExpertWeights) -> ExpertWeights:
    """The same weights on the GPU, where the reference is fast."""
    parts = {name: getattr(weights, name).map(torch.Tensor.cuda) for name in ("w13", "w2")} | {
        name: part.cuda() for name, part in weights.extras().items()
    }
    return replace(weights, **parts)


def check(weights: ExpertWeights, x: torch.Tensor, routing: Routing, packed=None) -> torch.Tensor:
    weights, x, routing = on_gpu(weights), x.cuda(), to_gpu(routing)
    if packed is None:
        packed = moelten.pack(weights, backend=backend(weights.spec.scheme))
    out = moelten.fused_moe(x, packed, routing)
    assert_matches_but_for_ties(out, x, weights, routing, reference.moe(x, weights, routing))
    return out.cpu()


def check_scheme(which: Scheme, counts: Iterable[int]) -> None:
    case = Case(which, num_experts=7, hidden_size=320, intermediate_size=192)
    if case.scheme.weights.block[1] == 128:
        case = replace(case, hidden_size=384, intermediate_size=256)
    weights = make_weights(case)
    packed = moelten.pack(on_gpu(weights), backend=backend(weights.spec.scheme))
    for tokens in counts:
        check(weights, *make_input(replace(case, tokens=tokens, seed=tokens)), packed)


def check_router_weights(case: Case) -> None:
    """Applied to the input; and beside pre-scales of both inputs."""
    weights = make_weights(case)
    x, routing = make_input(case)
    check(weights, x, Routing(routing.ids, routing.weights, on_input=True))
    scaled = replace(
        weights,
        w13_pre_scale=torch.rand(case.num_experts, case.hidden_size) + 0.5,
        w2_pre_scale=torch.rand(case.num_experts, case.intermediate_size) + 0.5,
    )
    check(scaled, x, routing)


def check_production_shape(name: str, counts: Iterable[int]) -> None:
    which, experts, hidden, inter, top_k, activation, biases = SHAPES[name]
    weights = make_layer(which, experts, hidden, inter, activation, biases)
    packed = moelten.pack(weights, backend="hopper")
    for tokens in counts:
        x, routing = make_call(tokens, experts, hidden, top_k)
        out = moelten.fused_moe(x, packed, routing)
        assert_matches(out, reference.moe(x, weights, routing))


def spoil(ids: torch.Tensor) -> torch.Tensor:
    """Some name no expert, some one that the layer does not have."""
    bad = ids.clone()
    bad[::3, 0], bad[1::3, 1], bad[5] = -1, 5, 1 << 20
    return bad
