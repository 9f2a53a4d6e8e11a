"""A layer stage by stage, for engines that put something of their own between the GEMMs.

    hidden = gemm1(x, experts, routing)           # per slot, fp32 [T, k, I]
    slots = gemm2(hidden, experts, routing)       # per slot, fp32 [T, k, H]
    out = combine(slots, experts, routing)        # reduced, [T, H]

On the same backend this gives the bits of `fused_moe`, which writes less and launches less. Slots
whose id is not of these experts hold exactly zero, and what they hold on input does not matter.
Each stage takes any routing of the same ids; only `gemm1` (with `on_input`) or `gemm2` uses its
weights. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import Float
from moelten.kernels import StagedBackend
from moelten.moe import check_call, find_reader
from moelten.packed import PackedExperts
from moelten.routing import Routing


def gemm1(
    x: Tensor, experts: PackedExperts, routing: Routing, *, backend: str | None = None
) -> Tensor:
    """The first grouped GEMM and the activation, per slot: fp32 [T, k, I].

        hidden[t, j] = activation(round(x[t]) @ w13[ids[t, j]].T + w13_bias)

    x:       [T, H] as `fused_moe` takes it; rounded to the activation format, after the router
             weight (if `on_input`) and w13_pre_scale
    backend: a name from `explain`

    Raises as `fused_moe` does, and UnsupportedError for a backend that runs layers only whole.

    >>> from moelten import MXFP4, ExpertWeights, fused_moe, pack, topk_softmax
    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> experts = pack(
    ...     ExpertWeights.from_tensors(w13, w2, gate_up_order="gate_up", weight_format=MXFP4()))
    >>> x = torch.randn(3, 32, dtype=torch.bfloat16)
    >>> routing = topk_softmax(torch.randn(3, 4), top_k=2)
    >>> hidden = gemm1(x, experts, routing)
    >>> hidden.shape
    torch.Size([3, 2, 32])
    >>> out = combine(gemm2(hidden, experts, routing), experts, routing)
    >>> torch.equal(out, fused_moe(x, experts, routing))
    True
    """
    check_call(x, experts, routing)
    reader = _staged(experts, backend)
    hidden = _zeros(experts, routing, experts.spec.intermediate_size)
    if hidden.numel():
        reader.gemm1(x, experts, routing, hidden)
    return hidden


def gemm2(
    hidden: Tensor, experts: PackedExperts, routing: Routing, *, backend: str | None = None
) -> Tensor:
    """The second grouped GEMM, per slot: fp32 [T, k, H], by router weight unless `on_input`.

        slots[t, j] = weights[t, j] * (round(hidden[t, j]) @ w2[ids[t, j]].T + w2_bias)

    hidden: fp32 [T, k, I] from `gemm1`; rounded to the activation format, after w2_pre_scale
    """
    _check("hidden", hidden, experts, routing, experts.spec.intermediate_size)
    reader = _staged(experts, backend)
    slots = _zeros(experts, routing, experts.spec.hidden_size)
    if slots.numel():
        reader.gemm2(hidden, experts, routing, slots)
    return slots


def combine(
    slots: Tensor,
    experts: PackedExperts,
    routing: Routing,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The sum of each token's slots, in slot order in fp32, rounded once: [T, H].

        out[t] = sum_j slots[t, j]      over the slots whose id is of these experts

    slots: fp32 [T, k, H] from `gemm2`
    dtype: bf16, fp16 or fp32; by default that of 16-bit or 32-bit activations, else bf16
    """
    _check("slots", slots, experts, routing, experts.spec.hidden_size)
    fmt = experts.spec.scheme.activations
    if dtype is None:
        dtype = fmt.data_dtype if isinstance(fmt, Float) else torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FormatError(f"combine: expected dtype bf16, fp16 or fp32, got {dtype}")
    reader = _staged(experts, backend)
    out = torch.empty(routing.num_tokens, slots.shape[2], dtype=dtype, device=slots.device)
    if out.numel():
        reader.combine(slots, experts, routing, out)
    return out


def _staged(experts: PackedExperts, backend: str | None) -> StagedBackend:
    reader = find_reader(experts, backend)
    if not isinstance(reader, StagedBackend):
        raise UnsupportedError(
            f"backend {reader.name} runs layers only whole; call fused_moe, or pack for another"
        )
    return reader


def _zeros(experts: PackedExperts, routing: Routing, width: int) -> Tensor:
    return torch.zeros(*routing.ids.shape, width, dtype=torch.float32, device=routing.ids.device)


def _check(name: str, rows: Tensor, experts: PackedExperts, routing: Routing, width: int) -> None:
    wanted = (*routing.ids.shape, width)
    if rows.dtype != torch.float32 or rows.shape != wanted or not rows.is_contiguous():
        raise FormatError(
            f"{name}: expected contiguous torch.float32 {list(wanted)}, got {rows.dtype} "
            f"{list(rows.shape)} with strides {rows.stride()}"
        )
    for what, device in ((name, rows.device), ("routing", routing.ids.device)):
        if device != experts.device:
            raise FormatError(f"{what} is on {device}, the experts are packed for {experts.device}")
