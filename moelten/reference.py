"""The specification: one MoE layer in fp64 (or fp32), with every rounding point written out.

    x'  = x * weight (only where the router's weight applies to the input)
    a   = round_act(x' * w13_pre_scale)                       rounding point 1
    h   = a @ w13.T + w13_bias
    b   = round_act(activation(h) * w2_pre_scale)             rounding point 2
    y   = b @ w2.T + w2_bias
    out = sum over slots, in slot order, of weight * y        (one more rounding by the caller)

Weights are decoded exactly, code * scale; `round_act` is the activation format's quantizer applied
to fp32 values. Nothing else rounds, and no backend may add a rounding point. Speed is no concern
here: every backend is held to this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelten.qtensor import dequantize, round_activations
from moelten.routing import Routing
from moelten.weights import ExpertWeights


def moe(
    x: Tensor, weights: ExpertWeights, routing: Routing, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Outputs [T, H] in `dtype`, unrounded, for x [T, H] and routing over global expert ids.

    A pair whose id is not in first_expert .. first_expert + E - 1 contributes exactly zero.
    """
    spec = weights.spec
    tokens, top_k = routing.ids.shape
    pairs = torch.zeros(tokens, top_k, spec.hidden_size, dtype=dtype, device=x.device)
    for expert in range(spec.num_experts):
        token, at = (routing.ids == spec.first_expert + expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        router = routing.weights[token, at].float()[:, None]
        if routing.on_input:
            y = expert_mlp(x[token].float() * router, weights, expert, dtype)
        else:
            y = expert_mlp(x[token].float(), weights, expert, dtype) * router.to(dtype)
        pairs[token, at] = y
    out = torch.zeros(tokens, spec.hidden_size, dtype=dtype, device=x.device)
    for slot in range(top_k):
        out += pairs[:, slot]
    return out


def expert_mlp(
    x: Tensor, weights: ExpertWeights, expert: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """One expert on fp32 rows x [P, H]: GEMM1, activation, requantization, GEMM2."""
    fmt = weights.activation_format
    w13 = dequantize(weights.w13[expert], dtype).flatten(0, 1)
    w2 = dequantize(weights.w2[expert], dtype)

    def extra(name: str) -> Tensor | None:
        part = getattr(weights, name)
        return None if part is None else part[expert]

    def rounded(rows: Tensor, pre_scale: Tensor | None, input_scale: Tensor | None) -> Tensor:
        rows = rows if pre_scale is None else rows * pre_scale
        static = None if input_scale is None else input_scale.expand(rows.shape[0])
        return round_activations(rows.float(), fmt, static).to(dtype)

    a = rounded(x, extra("w13_pre_scale"), extra("w13_input_scale"))
    h = a @ w13.T
    if (bias := extra("w13_bias")) is not None:
        h = h + bias.flatten()
    h = h.view(x.shape[0], *weights.w13.shape[1:3])
    ids = torch.full((x.shape[0],), expert, device=x.device)
    hidden = weights.activation(h, ids)
    b = rounded(hidden, extra("w2_pre_scale"), extra("w2_input_scale"))
    y = b @ w2.T
    if (bias := extra("w2_bias")) is not None:
        y = y + bias
    return y
