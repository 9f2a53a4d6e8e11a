"""Top-k routing on the GPU: every method of `moelten.routing` in one launch, with the same ids.

One program routes one token. Scores are evaluated in fp64 and rounded once, as the CPU does;
selection orders integers, so NaN, infinities, both zeros and ties fall as `moelten.routing` says.
Weights follow the same formulas; only the order of a sum over the selected may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.kernels.arena import on_device
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import widen
from moelten.routing import METHODS, Routing


@dataclass(frozen=True)
class _Method:
    """score: what is selected on; weight: "score" or a function of the selected logits; norm."""

    score: str
    weight: str = "score"
    norm: str = "none"
    on_input: bool = False


_METHODS = {
    "softmax_topk": _Method("softmax"),
    "topk_softmax": _Method("raw", norm="softmax"),
    "softmax_topk_renormalize": _Method("softmax", norm="sum"),
    "topk_raw": _Method("raw"),
    "sigmoid_topk": _Method("sigmoid"),
    "topk_sigmoid": _Method("raw", weight="sigmoid"),
    "sigmoid_topk_renormalize": _Method("sigmoid", norm="clamp"),
    "minimax2": _Method("sigmoid", norm="eps"),
    "deepseek_v3": _Method("sigmoid", norm="eps"),
    "llama4": _Method("raw", weight="sigmoid", on_input=True),
    "sqrt_softplus_topk": _Method("sqrt_softplus", norm="eps"),
}
assert set(_METHODS) == set(METHODS)


def route(
    method: str,
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    *,
    num_expert_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    norm_topk_prob: bool = True,
) -> Routing:
    """`METHODS[method](logits, top_k, ...)` in one launch, for arguments that it accepts.

    logits: [T, E] fp32, bf16 or fp16; bias: [E]. Arguments that the method lacks must keep their
    defaults. Arguments are checked by the method itself, once for each kind: the same errors.
    """
    options = {
        "num_expert_group": num_expert_group,
        "topk_group": topk_group,
        "routed_scaling_factor": routed_scaling_factor,
        "norm_topk_prob": norm_topk_prob,
    }
    _check(method, top_k, _kind(logits[:0]), bias if bias is None else _kind(bias), **options)
    kind, (tokens, experts) = _METHODS[method], logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        with on_device(logits.device):
            launch(
                route_kernel, (tokens,),
                logits.contiguous(), None if bias is None else bias.contiguous(), ids, weights,
                routed_scaling_factor,
                EXPERTS=experts, SIZE=max(triton.next_power_of_2(experts), 2),
                TOP_K=top_k, SLOTS=max(triton.next_power_of_2(top_k), 2),
                GROUPS=num_expert_group, TOP_GROUPS=topk_group,
                SCORE=kind.score, WEIGHT=kind.weight, NORM=kind.norm if norm_topk_prob else "none",
            )  # fmt: skip
    return Routing(ids, weights, kind.on_input)


_DEFAULTS = {
    "num_expert_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
_Kind = tuple[torch.Size, torch.dtype, torch.device]


def _kind(tensor: Tensor) -> _Kind:
    return tensor.shape, tensor.dtype, tensor.device


def _like(kind: _Kind) -> Tensor:
    shape, dtype, device = kind
    return torch.empty(shape, dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def _check(method: str, top_k: int, logits: _Kind, bias: _Kind | None, **options: Any) -> None:
    """Run the method on no tokens: it raises what it raises on many."""
    given = {name: value for name, value in options.items() if value != _DEFAULTS[name]}
    if bias is not None:
        given["bias"] = _like(bias)
    METHODS[method](_like(logits), top_k, **given)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _scores(s, inside, SCORE: tl.constexpr):
    """fp32 scores of fp64 logits."""
    if SCORE == "softmax":
        # The maximum of numbers alone: NaN spoils the sum, and so every score, by itself.
        top = tl.max(tl.where(inside & (s == s), s, float("-inf")), axis=0)
        e = tl.where(inside, tl.exp(s - top), 0.0)
        scores = e / tl.sum(e, axis=0)
    elif SCORE == "sigmoid":
        scores = _sigmoid(s)
    elif SCORE == "sqrt_softplus":
        # log(1 + z) without losing a small z, and s itself where that is exact.
        z = tl.exp(tl.where(s > 40.0, 40.0, s))
        one = 1.0 + z
        wide = tl.log(one) * (z / tl.where(one == 1.0, 1.0, one - 1.0))
        scores = tl.sqrt(tl.where(s > 40.0, s, tl.where(one == 1.0, z, wide)))
    else:
        tl.static_assert(SCORE == "raw")
        scores = s
    return scores.to(tl.float32)


@triton.jit
def _order(x):
    """fp32 as int64, in the order of selection: NaN, +inf, ..., zeros alike, ..., -inf."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, key).to(tl.int64)


@triton.jit
def _value(key):
    """Invert `_order`, but for the sign of zero."""
    key = key.to(tl.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scaling,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    # Below every key that `_order` makes.
    NEVER: tl.constexpr = -(2**62)
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, SIZE)
    inside = e < EXPERTS
    logits = widen(tl.load(logits_ptr + token * EXPERTS + e, mask=inside, other=0.0))
    scores = _scores(logits.to(tl.float64), inside, SCORE)
    choice = scores
    if bias_ptr is not None:
        choice = choice + widen(tl.load(bias_ptr + e, mask=inside, other=0.0))
    choice = tl.where(logits == float("-inf"), float("-inf"), choice)
    # The lower id wins a tie: it sits in the low bits, counted down.
    key = tl.where(inside, _order(choice) * SIZE + (SIZE - 1 - e), NEVER)
    if TOP_GROUPS < GROUPS:
        group = e // (EXPERTS // GROUPS)
        group_key = tl.full((SIZE,), NEVER, tl.int64)
        for g in tl.static_range(GROUPS):
            mine = tl.where(group == g, key, NEVER)
            first = tl.max(mine, axis=0)
            score = _value((first - (first & (SIZE - 1))) // SIZE)
            if bias_ptr is not None and EXPERTS // GROUPS > 1:
                second = tl.max(tl.where(mine == first, NEVER, mine), axis=0)
                score = score + _value((second - (second & (SIZE - 1))) // SIZE)
            group_key = tl.where(e == g, _order(score) * SIZE + (SIZE - 1 - g), group_key)
        kept = e < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.max(group_key, axis=0)
            kept = kept | (group == SIZE - 1 - (best & (SIZE - 1)))
            group_key = tl.where(group_key == best, NEVER, group_key)
        key = tl.where(kept, key, NEVER)

    slot = tl.arange(0, SLOTS)
    ids = tl.zeros((SLOTS,), tl.int32)
    weights = tl.zeros((SLOTS,), tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(key, axis=0)
        chosen = key == best
        ids = tl.where(slot == j, (SIZE - 1 - (best & (SIZE - 1))).to(tl.int32), ids)
        weights = tl.where(slot == j, tl.sum(tl.where(chosen, scores, 0.0), axis=0), weights)
        key = tl.where(chosen, NEVER, key)

    used = slot < TOP_K
    if WEIGHT == "sigmoid":
        weights = _sigmoid(weights.to(tl.float64)).to(tl.float32)
    if NORM == "softmax":
        weights = _scores(weights.to(tl.float64), used, "softmax")
    elif NORM != "none":
        total = tl.sum(tl.where(used, weights, 0.0), axis=0)
        if NORM == "clamp":
            total = tl.where(total < 1e-20, 1e-20, total)
        elif NORM == "eps":
            total = total + 1e-20
        weights = weights / total
    weights = weights * scaling
    tl.store(ids_ptr + token * TOP_K + slot, ids, mask=used)
    tl.store(weights_ptr + token * TOP_K + slot, weights, mask=used)
