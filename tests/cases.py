"""The one enumeration of schemes and layers that tests share.

A new scheme adds one line to EXTRA_SCHEMES only if it is not in moelten's own table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelten.activations import GPT_OSS, Activation, GeGLU, Identity, ReLU2, SwiGLU
from moelten.formats import BF16, FP8, SCHEMES, Float, Int4, Scheme
from moelten.routing import Routing
from moelten.weights import ExpertWeights

EXTRA_SCHEMES = {
    "int4g32_bf16 fp16 scales": Scheme(Int4(32, scale="float16"), BF16),
    "int4g32_bf16 fp32 scales": Scheme(Int4(32, scale="float32"), BF16),
    "fp8block_bf16 e8m0 scales": Scheme(FP8((128, 128), "e8m0"), BF16),
    "fp8block_bf16 bf16 scales": Scheme(FP8((128, 128), "bfloat16"), BF16),
}
ALL_SCHEMES = SCHEMES | EXTRA_SCHEMES


@dataclass(frozen=True)
class Case:
    """One layer and its input."""

    scheme: Scheme
    num_experts: int = 5
    hidden_size: int = 256
    intermediate_size: int = 128
    tokens: int = 33
    top_k: int = 3
    activation: Activation = SwiGLU()
    biases: bool = False
    seed: int = 0


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": SwiGLU(),
    "gpt_oss": GPT_OSS,
    "limit": SwiGLU(limit=0.5),
    "per_expert": SwiGLU((1.0, 1.2, 1.4, 1.6, 1.8), (0.0, 0.5, 1.0, 1.5, 2.0), (1, 2, 3, 4, 5.0)),
    "geglu": GeGLU(),
    "geglu_tanh": GeGLU("tanh"),
    "relu2": ReLU2(),
    "identity": Identity(),
}


def make_weights(case: Case) -> ExpertWeights:
    """Random weights in the case's formats; gate is unlike up, and experts unlike each other."""
    g = torch.Generator().manual_seed(case.seed)
    e, h, i, n = case.num_experts, case.hidden_size, case.intermediate_size, case.activation.halves
    w13 = torch.randn(e, n * i, h, generator=g) / h**0.5
    w13[:, i:] *= 1.5
    w13 *= torch.linspace(0.7, 1.3, e)[:, None, None]
    w2 = torch.randn(e, h, i, generator=g) / i**0.5
    order = "gate_up" if case.activation.gated else "no_gate"
    biases = {}
    if case.biases:
        biases["w13_bias"] = torch.randn(e, n * i, generator=g) * 0.3
        biases["w2_bias"] = torch.randn(e, h, generator=g) * 0.3
    dynamic = case.scheme.activations if not case.scheme.static else BF16
    weights = ExpertWeights.from_tensors(
        w13,
        w2,
        gate_up_order=order,
        weight_format=case.scheme.weights,
        activation_format=dynamic,
        activation=case.activation,
        **biases,
    )
    if not case.scheme.static:
        return weights
    top = case.scheme.activations.max_code * (448 if case.scheme.activations.bits == 4 else 1)
    scales = torch.linspace(4, 5, e) / top
    return replace(
        weights,
        activation_format=case.scheme.activations,
        w13_input_scale=scales,
        w2_input_scale=scales * 0.8,
    )


def make_input(case: Case) -> tuple[Tensor, Routing]:
    """x [T, H] and a routing with distinct experts per token."""
    g = torch.Generator().manual_seed(case.seed + 1)
    fmt = case.scheme.activations
    dtype = fmt.data_dtype if isinstance(fmt, Float) else torch.bfloat16
    x = torch.randn(case.tokens, case.hidden_size, generator=g).to(dtype)
    scores = torch.rand(case.tokens, case.num_experts, generator=g)
    weights, ids = scores.topk(min(case.top_k, case.num_experts))
    return x, Routing(ids.int(), weights.softmax(-1))
