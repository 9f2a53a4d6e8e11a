"""The Hopper backend: Gluon kernels for 16-bit activations that stream packed weights once.

Four launches: plan, GEMM1 with activation, GEMM2 with router weights, sum over slots, each started
while the one before drains. Grids follow from T and k alone: nothing waits for the device, so a
CUDA graph captures it. The two operand types place bits differently: two layouts, two backends.
Triton is imported when a layer runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from moelten.errors import UnsupportedError
from moelten.formats import Float
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_layout import HopperLayout
from moelten.kernels.hopper_schedule import block_of, make_variant
from moelten.kernels.triton import activation_arguments
from moelten.packed import PackedExperts
from moelten.routing import Routing
from moelten.weights import ExpertSpec

_WORKSPACE_BYTES = 2 << 30


@dataclass(frozen=True)
class HopperBackend:
    """One type of operands, "bf16" or "fp16": that of the activations."""

    operand: str = "bf16"

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def layout(self) -> HopperLayout:
        return HopperLayout(self.operand)

    @property
    def devices(self) -> tuple[str, ...]:
        return ("cuda",)

    def refusals(self, spec: ExpertSpec, device: torch.device) -> list[str]:
        reasons = []
        if device.type != "cuda":
            reasons.append(f"runs on NVIDIA Hopper GPUs, the experts are for {device.type}")
        elif not torch.cuda.is_available() or torch.version.hip is not None:
            reasons.append("torch sees no NVIDIA GPU on this machine")
        elif (capability := torch.cuda.get_device_capability(device))[0] != 9:
            reasons.append("needs compute capability 9.x, {} has {}.{}".format(device, *capability))
        if find_spec("triton") is None:
            reasons.append("Triton is not installed: pip install 'moelten[triton]'")
        activations = spec.scheme.activations
        if not isinstance(activations, Float) or activations.name != self.operand:
            reasons.append(f"takes {self.operand} activations, not {activations.name}")
        try:
            storage(spec.scheme.weights, self.operand)
        except UnsupportedError as error:
            reasons.append(str(error))
        if spec.hidden_size % 8:
            reasons.append(
                f"hidden_size must be a multiple of 8 (rows of 16 bytes), got {spec.hidden_size}"
            )
        return reasons

    def run(self, x: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        spec = experts.spec
        per_pair = 4 * (spec.intermediate_size + spec.hidden_size)
        step = max(_WORKSPACE_BYTES // (per_pair * routing.top_k), 1)
        with torch.cuda.device(x.device):
            for start in range(0, x.shape[0], step):
                part = slice(start, start + step)
                chunk = Routing(routing.ids[part], routing.weights[part], routing.on_input)
                _run_chunk(x[part], experts, chunk, out[part], self.operand)


def _run_chunk(
    x: Tensor, experts: PackedExperts, routing: Routing, out: Tensor, operand: str
) -> None:
    from moelten.kernels.hopper_gemm import grouped_gemm
    from moelten.kernels.hopper_plan import combine, plan_tiles
    from moelten.kernels.triton_epilogue import Epilogue

    spec, extras, ids = experts.spec, experts.tensors, routing.ids
    where = (spec.num_experts, spec.first_expert)
    fmt, pairs = spec.scheme.weights, ids.numel()
    hidden, inter, halves = spec.hidden_size, spec.intermediate_size, spec.activation.halves
    block = block_of(pairs, spec.num_experts)
    sizes = (storage(fmt, operand), block, pairs, spec.num_experts)
    processors = _processors(x.device)
    first = make_variant(*sizes, -(-halves * inter // 64), hidden, processors, may_split=False)
    second = make_variant(*sizes, -(-hidden // 64), inter, processors, may_split=True)
    # NOTE: the plan is the first launch, so that GEMM2 may read it before it waits for GEMM1.
    plan = plan_tiles(ids, *where, block)
    rows, rows_per_source = _input_rows(x, experts, routing)
    name, parameters = activation_arguments(spec.activation, x.device)
    between = torch.empty(1, pairs, -(-inter // 8) * 8, dtype=x.dtype, device=x.device)
    grouped_gemm(
        rows,
        _matrix(experts, "w13"),
        fmt,
        operand,
        (halves, inter, hidden),
        plan,
        between,
        first,
        first=True,
        rows_per_source=rows_per_source,
        epilogue=Epilogue(extras.get("w13_bias"), name, parameters, extras.get("w2_pre_scale")),
    )
    y = torch.empty(second.splits, pairs, hidden, dtype=torch.float32, device=x.device)
    grouped_gemm(
        between,
        _matrix(experts, "w2"),
        fmt,
        operand,
        (1, hidden, inter),
        plan,
        y,
        second,
        first=False,
        epilogue=Epilogue(
            extras.get("w2_bias"), router=None if routing.on_input else routing.weights
        ),
    )
    combine(y, ids, *where, out)


def _input_rows(x: Tensor, experts: PackedExperts, routing: Routing) -> tuple[Tensor, int]:
    """Rows of x, and how many pairs share each: top_k, unless pairs differ by expert."""
    from moelten.kernels.triton_ops import Pairs, quantize_rows

    spec, pre = experts.spec, experts.tensors.get("w13_pre_scale")
    if not routing.on_input and pre is None:
        return x, routing.top_k
    router = routing.weights if routing.on_input else None
    pairs = Pairs(routing.ids, spec.num_experts, spec.first_expert, router, pre)
    return quantize_rows(x, spec.scheme.activations, pairs, by_token=True).data, 1


def _matrix(experts: PackedExperts, name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): part
        for key, part in experts.tensors.items()
        if key.startswith(f"{name}.")
    }


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
