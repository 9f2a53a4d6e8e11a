"""The portable GPU backend: plain Triton over canonical rows, for every scheme.

NVIDIA from Ampere on and AMD CDNA run it; with TRITON_INTERPRET=1 so does a CPU, far too slowly
for anything but tests. A layer is at most seven launches, whose grids follow from T and k alone:
nothing waits for the device, so a CUDA graph captures it. Triton is imported when a layer runs.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moelten.activations import GELU, Activation, GeGLU, Identity, ReGLU, ReLU2, SiLU, SwiGLU
from moelten.formats import Float
from moelten.kernels.cpu import RowsLayout
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor
from moelten.routing import Routing
from moelten.weights import ExpertSpec

_WORKSPACE_BYTES = 2 << 30
_ACTIVATIONS: dict[type[Activation], str] = {
    SwiGLU: "swiglu",
    GeGLU: "geglu",
    ReGLU: "reglu",
    SiLU: "silu",
    GELU: "gelu",
    ReLU2: "relu2",
    Identity: "none",
}


class TritonBackend:
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

    def run(self, x: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        spec = experts.spec
        per_pair = 4 * (spec.intermediate_size + spec.hidden_size)
        step = max(_WORKSPACE_BYTES // (per_pair * routing.top_k), 1)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            for start in range(0, x.shape[0], step):
                part = slice(start, start + step)
                chunk = Routing(routing.ids[part], routing.weights[part], routing.on_input)
                _run_chunk(x[part], experts, chunk, out[part])


def _run_chunk(x: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
    from moelten.kernels import triton_epilogue, triton_gemm, triton_ops
    from moelten.kernels.triton_variants import block_m, current_target

    spec, extras = experts.spec, experts.tensors
    fmt, target, ids = spec.scheme.activations, current_target(), routing.ids
    where = (spec.num_experts, spec.first_expert)
    size = ids.numel()
    plan = triton_ops.make_tile_plan(ids, *where, block_m(size, spec.num_experts))

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, columns, dtype=dtype, device=x.device)

    rows, rows_per_source = _input_rows(x, experts, routing)
    name, parameters = activation_arguments(spec.activation, x.device)
    plain = isinstance(fmt, Float)
    hidden = empty(spec.intermediate_size, fmt.data_dtype if plain else torch.float32)
    triton_gemm.grouped_gemm(
        rows,
        _matrix(experts, "w13"),
        plan,
        fmt,
        hidden,
        rows_per_source=rows_per_source,
        epilogue=triton_epilogue.Epilogue(
            bias=extras.get("w13_bias"),
            activation=name,
            parameters=parameters,
            post_scale=extras.get("w2_pre_scale") if plain else None,
        ),
        target=target,
    )
    rows = triton_ops.Rows(hidden)
    if not plain:
        pairs = triton_ops.Pairs(
            ids,
            *where,
            pre_scale=extras.get("w2_pre_scale"),
            static_scale=extras.get("w2_input_scale"),
        )
        rows = triton_ops.quantize_rows(hidden, fmt, pairs)
    y = empty(spec.hidden_size)
    triton_gemm.grouped_gemm(
        rows,
        _matrix(experts, "w2"),
        plan,
        fmt,
        y,
        epilogue=triton_epilogue.Epilogue(
            bias=extras.get("w2_bias"), router=None if routing.on_input else routing.weights
        ),
        target=target,
    )
    triton_ops.combine(y, ids, *where, out)


def _input_rows(x: Tensor, experts: PackedExperts, routing: Routing) -> tuple[Any, int]:
    """Quantized rows of x, and how many pairs share each: top_k, unless pairs differ by expert."""
    from moelten.kernels.triton_ops import Pairs, Rows, quantize_rows

    spec, extras = experts.spec, experts.tensors
    fmt = spec.scheme.activations
    pre, static = extras.get("w13_pre_scale"), extras.get("w13_input_scale")
    if routing.on_input or pre is not None or static is not None:
        router = routing.weights if routing.on_input else None
        pairs = Pairs(routing.ids, spec.num_experts, spec.first_expert, router, pre, static)
        return quantize_rows(x, fmt, pairs, by_token=True), 1
    rows = Rows(x) if isinstance(fmt, Float) else quantize_rows(x, fmt)
    return rows, routing.top_k


def _matrix(experts: PackedExperts, name: str) -> QTensor:
    parts: dict[str, Any] = {
        key.removeprefix(f"{name}."): part
        for key, part in experts.tensors.items()
        if key.startswith(f"{name}.")
    }
    return QTensor(format=experts.spec.scheme.weights, **parts)


def activation_arguments(
    activation: Activation, device: torch.device
) -> tuple[str, tuple[float, float, float] | Tensor]:
    """The GEMM's name of an activation, and SwiGLU's parameters: numbers, or a table by expert."""
    name = _ACTIVATIONS[type(activation)]
    if isinstance(activation, GeGLU | GELU) and activation.approximate == "tanh":
        name += "_tanh"
    if not isinstance(activation, SwiGLU):
        return name, (1.0, 0.0, float("inf"))
    limit = float("inf") if activation.limit is None else activation.limit
    values = (activation.alpha, activation.beta, limit)
    if any(isinstance(value, tuple) for value in values):
        return name, _table(values, device)
    return name, values  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _table(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """fp32 [E, 3]; made at the first call, so a layer with such parameters warms up uncaptured."""
    count = next(len(value) for value in values if isinstance(value, tuple))
    rows = [value if isinstance(value, tuple) else (value,) * count for value in values]
    return torch.tensor(rows, dtype=torch.float32).T.contiguous().to(device)
