"""The portable GPU backend: plain Triton over canonical rows, for every scheme.

NVIDIA from Ampere on and AMD CDNA run it; with TRITON_INTERPRET=1 so does a CPU, far too slowly
for anything but tests. A layer is at most seven launches, whose grids follow from T and k alone:
nothing waits for the device, so a CUDA graph captures it. Triton is imported when a layer runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moelten.activations import GELU, Activation, GeGLU, Identity, ReGLU, ReLU2, SiLU, SwiGLU
from moelten.formats import Float
from moelten.kernels.arena import ArenaBackend, Take, heap, on_device, split_tokens
from moelten.kernels.cpu import RowsLayout
from moelten.kernels.triton_variants import block_m, current_target, row_dtype
from moelten.packed import ACTIVATION_TABLE, PackedExperts
from moelten.qtensor import QTensor
from moelten.routing import Routing
from moelten.weights import ExpertSpec

if TYPE_CHECKING:
    from moelten.kernels.triton_ops import Rows
    from moelten.kernels.triton_plan import TilePlan

_ACTIVATIONS: dict[type[Activation], str] = {
    SwiGLU: "swiglu",
    GeGLU: "geglu",
    ReGLU: "reglu",
    SiLU: "silu",
    GELU: "gelu",
    ReLU2: "relu2",
    Identity: "none",
}


class TritonBackend(ArenaBackend):
    name = "triton"
    layout = RowsLayout()
    devices = ("cuda", "cpu")

    def refusals(self, spec: ExpertSpec, device: torch.device) -> list[str]:
        reasons = []
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append(
                "runs on GPUs; on cpu only in Triton's interpreter, for tests: TRITON_INTERPRET=1"
            )
        elif device.type == "cuda" and not torch.cuda.is_available():
            reasons.append("torch sees no GPU on this machine")
        elif device.type == "cuda" and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                reasons.append(
                    f"needs compute capability 8.0 or more, {device} has {major}.{minor}"
                )
        elif device.type not in ("cpu", "cuda"):
            reasons.append(f"runs on cuda, the experts are for {device.type}")
        if find_spec("triton") is None:
            reasons.append("Triton is not installed: pip install 'moelten[triton]'")
        if type(spec.activation) not in _ACTIVATIONS:
            reasons.append(f"has no {type(spec.activation).__name__}")
        return reasons

    def lay_out(
        self, take: Take, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool
    ) -> _Stages:
        """Everything that a chunk of so many tokens needs beside its arguments."""
        from moelten.kernels import triton_ops, triton_plan

        fmt, hidden_size, inter = spec.scheme.activations, spec.hidden_size, spec.intermediate_size
        pairs, dtype = tokens * top_k, _row_dtype(spec)
        plain = isinstance(fmt, Float)
        as_is = plain and dtype is None
        inputs = rows = None
        if _by_pair(spec, on_input):
            inputs = triton_ops.empty_rows(take, pairs, hidden_size, fmt, dtype=dtype)
        elif not as_is:
            inputs = triton_ops.empty_rows(take, tokens, hidden_size, fmt, dtype=dtype)
        hidden = take(fmt.data_dtype if plain else torch.float32, pairs, inter)
        if not as_is:
            rows = triton_ops.empty_rows(take, pairs, inter, fmt, dtype=dtype)
        block = block_m(pairs, spec.num_experts, current_target(), fmt)
        plan = triton_plan.empty_plan(take, pairs, spec.num_experts, block)
        return _Stages(plan, inputs, hidden, rows, take(torch.float32, pairs, hidden_size))

    def run_chunk(
        self, x: Tensor, experts: PackedExperts, routing: Routing, stages: _Stages, out: Tensor
    ) -> None:
        from moelten.kernels import triton_ops

        plan = _plan(experts.spec, routing, stages.plan)
        rows, per_source = _input_rows(x, experts, routing, stages.inputs)
        plain = isinstance(experts.spec.scheme.activations, Float)
        post_scale = experts.tensors.get("w2_pre_scale") if plain else None
        _gemm1(rows, per_source, experts, plan, stages.hidden, post_scale)
        rows = triton_ops.Rows(stages.hidden)
        if stages.rows is not None:
            rows = _hidden_rows(stages.hidden, experts, routing, stages.rows, scaled=plain)
        _gemm2(rows, experts, routing, plan, stages.slots)
        triton_ops.combine(stages.slots, routing.ids, *_local(experts.spec), out)

    def gemm1(self, x: Tensor, experts: PackedExperts, routing: Routing, hidden: Tensor) -> None:
        """`stages.gemm1`, into hidden [T, k, I] of zeros."""
        for part, chunk in split_tokens(routing, self.own_chunk(experts.spec, routing)):
            with on_device(x.device):
                rows, per_source = _input_rows(x[part], experts, chunk)
                _gemm1(rows, per_source, experts, _plan(experts.spec, chunk), hidden[part])

    def gemm2(
        self, hidden: Tensor, experts: PackedExperts, routing: Routing, slots: Tensor
    ) -> None:
        """`stages.gemm2`, into slots [T, k, H] of zeros."""
        for part, chunk in split_tokens(routing, self.own_chunk(experts.spec, routing)):
            with on_device(hidden.device):
                rows = _hidden_rows(hidden[part].flatten(0, 1), experts, chunk)
                _gemm2(rows, experts, chunk, _plan(experts.spec, chunk), slots[part])

    def combine(self, slots: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        """`stages.combine`, into out [T, H]."""
        from moelten.kernels import triton_ops

        with on_device(out.device):
            triton_ops.combine(slots, routing.ids, *_local(experts.spec), out)


@dataclass(frozen=True)
class _Stages:
    """Where the stages of one chunk write: P pairs, valid or not.

    inputs:  rows of the input, [T] or [P]; None where GEMM1 reads x itself
    hidden:  [P, I], in the operand's dtype for unquantized activations, else fp32
    rows:    hidden, quantized; None where GEMM2 reads hidden itself
    slots:   fp32 [P, H]
    """

    plan: TilePlan
    inputs: Rows | None
    hidden: Tensor
    rows: Rows | None
    slots: Tensor


def _local(spec: ExpertSpec) -> tuple[int, int]:
    return spec.num_experts, spec.first_expert


def _row_dtype(spec: ExpertSpec) -> torch.dtype | None:
    return row_dtype(spec.scheme.weights, spec.scheme.activations, current_target())


def _by_pair(spec: ExpertSpec, on_input: bool) -> bool:
    """Whether input rows differ between the slots of a token."""
    return on_input or "w13_pre_scale" in spec.extras or "w13_input_scale" in spec.extras


def _plan(spec: ExpertSpec, routing: Routing, plan: TilePlan | None = None) -> TilePlan:
    from moelten.kernels.triton_plan import empty_plan, make_tile_plan

    if plan is None:
        sizes = routing.ids.numel(), spec.num_experts
        block = block_m(*sizes, current_target(), spec.scheme.activations)
        plan = empty_plan(heap(routing.ids.device), *sizes, block)
    make_tile_plan(routing.ids, *_local(spec), plan)
    return plan


def _input_rows(
    x: Tensor, experts: PackedExperts, routing: Routing, rows: Rows | None = None
) -> tuple[Rows, int]:
    """GEMM1's rows, written to `rows`, and how many pairs share each: top_k, or one."""
    from moelten.kernels.triton_ops import Pairs, Rows, quantize_rows

    spec, extras = experts.spec, experts.tensors
    fmt, dtype = spec.scheme.activations, _row_dtype(spec)
    if _by_pair(spec, routing.on_input):
        router = routing.weights if routing.on_input else None
        pre, static = extras.get("w13_pre_scale"), extras.get("w13_input_scale")
        pairs = Pairs(routing.ids, *_local(spec), router, pre, static)
        return quantize_rows(x, fmt, pairs, by_token=True, dtype=dtype, rows=rows), 1
    if isinstance(fmt, Float) and dtype is None:
        return Rows(x), routing.top_k
    return quantize_rows(x, fmt, dtype=dtype, rows=rows), routing.top_k


def _hidden_rows(
    hidden: Tensor,
    experts: PackedExperts,
    routing: Routing,
    rows: Rows | None = None,
    *,
    scaled: bool = False,
) -> Rows:
    """GEMM2's rows: hidden [P, I], `scaled` by w2_pre_scale or not, as the activation format."""
    from moelten.kernels.triton_ops import Pairs, quantize_rows

    spec, extras = experts.spec, experts.tensors
    pre = None if scaled else extras.get("w2_pre_scale")
    pairs = Pairs(routing.ids, *_local(spec), None, pre, extras.get("w2_input_scale"))
    return quantize_rows(hidden, spec.scheme.activations, pairs, dtype=_row_dtype(spec), rows=rows)


def _gemm1(
    rows: Rows,
    rows_per_source: int,
    experts: PackedExperts,
    plan: TilePlan,
    hidden: Tensor,
    post_scale: Tensor | None = None,
) -> None:
    """hidden [P, I] (or [T, k, I]) in its own dtype, of valid pairs alone."""
    from moelten.kernels import triton_epilogue, triton_gemm

    spec, extras = experts.spec, experts.tensors
    name, parameters = activation_arguments(spec.activation)
    triton_gemm.grouped_gemm(
        rows,
        _matrix(experts, "w13"),
        plan,
        spec.scheme.activations,
        hidden,
        rows_per_source=rows_per_source,
        epilogue=triton_epilogue.Epilogue(
            bias=extras.get("w13_bias"),
            activation=name,
            parameters=extras.get(ACTIVATION_TABLE, parameters),
            post_scale=post_scale,
        ),
        target=current_target(),
    )


def _gemm2(
    rows: Rows, experts: PackedExperts, routing: Routing, plan: TilePlan, slots: Tensor
) -> None:
    """slots [P, H] (or [T, k, H]), by router weight unless that was on the input."""
    from moelten.kernels import triton_epilogue, triton_gemm

    triton_gemm.grouped_gemm(
        rows,
        _matrix(experts, "w2"),
        plan,
        experts.spec.scheme.activations,
        slots,
        epilogue=triton_epilogue.Epilogue(
            bias=experts.tensors.get("w2_bias"),
            router=None if routing.on_input else routing.weights,
        ),
        target=current_target(),
    )


def _matrix(experts: PackedExperts, name: str) -> QTensor:
    parts: dict[str, Any] = experts.parts(name)
    return QTensor(format=experts.spec.scheme.weights, **parts)


def activation_arguments(activation: Activation) -> tuple[str, tuple[float, float, float]]:
    """The GEMM's name of an activation, and SwiGLU's parameters where they are the same for all."""
    name = _ACTIVATIONS[type(activation)]
    if isinstance(activation, GeGLU | GELU) and activation.approximate == "tanh":
        name += "_tanh"
    if not isinstance(activation, SwiGLU) or activation.table() is not None:
        return name, (1.0, 0.0, float("inf"))
    limit = float("inf") if activation.limit is None else activation.limit
    return name, (activation.alpha, activation.beta, limit)  # type: ignore[return-value]
