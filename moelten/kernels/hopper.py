"""The Hopper backend: Gluon kernels for 16-bit activations that stream packed weights once.

Four launches: plan, GEMM1 with activation, GEMM2 with router weights, sum over slots, each started
while the one before drains. Grids follow from T and k alone: nothing waits for the device, so a
CUDA graph captures it. The two operand types place bits differently: two layouts, two backends.
Triton is imported when a layer runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import Float
from moelten.kernels.arena import ArenaBackend, Take
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_layout import HopperLayout
from moelten.kernels.hopper_schedule import block_of, make_variant, split_rows
from moelten.kernels.triton import activation_arguments
from moelten.packed import ACTIVATION_TABLE, PackedExperts
from moelten.routing import Routing
from moelten.weights import ExpertSpec

if TYPE_CHECKING:
    from moelten.kernels.triton_ops import Rows, TilePlan


@dataclass(frozen=True)
class HopperBackend(ArenaBackend):
    """One type of operands, "bf16" or "fp16": that of the activations."""

    operand: str = "bf16"

    @property
    def name(self) -> str:
        return self.layout.name

    @cached_property
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

    def lay_out(
        self, take: Take, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool
    ) -> _Stages:
        """Everything that a chunk of so many tokens needs beside its arguments."""
        from moelten.kernels.triton_ops import empty_plan, empty_rows

        fmt, hidden_size, inter = spec.scheme.activations, spec.hidden_size, spec.intermediate_size
        pairs, inputs = tokens * top_k, None
        if on_input or "w13_pre_scale" in spec.extras:
            inputs = empty_rows(take, pairs, hidden_size, fmt)
        hidden = take(fmt.data_dtype, 1, pairs, -(-inter // 8) * 8)
        plan = empty_plan(take, pairs, spec.num_experts, block_of(pairs, spec.num_experts))
        slots = take(torch.float32, split_rows(pairs, _row_tiles(hidden_size)), hidden_size)
        return _Stages(plan, inputs, hidden, slots)

    def run_chunk(
        self, x: Tensor, experts: PackedExperts, routing: Routing, stages: _Stages, out: Tensor
    ) -> None:
        from moelten.kernels.hopper_gemm import grouped_gemm
        from moelten.kernels.hopper_plan import combine, plan_tiles
        from moelten.kernels.triton_epilogue import Epilogue

        if x.data_ptr() % 4:
            raise FormatError(
                "x: expected an address that is a multiple of 4 (kernels read words), got "
                f"{x.data_ptr():#x}; call x.clone()"
            )
        spec, extras, ids, plan = experts.spec, experts.tensors, routing.ids, stages.plan
        where = (spec.num_experts, spec.first_expert)
        fmt, operand, pairs = spec.scheme.weights, spec.scheme.activations.name, ids.numel()
        hidden, inter, halves = spec.hidden_size, spec.intermediate_size, spec.activation.halves
        sizes = (storage(fmt, operand), plan.block, pairs, spec.num_experts)
        first = make_variant(*sizes, _row_tiles(halves * inter), hidden, may_split=False)
        second = make_variant(*sizes, _row_tiles(hidden), inter, may_split=True)
        # NOTE: the plan is the first launch, so that GEMM2 may read it before it waits for GEMM1.
        plan_tiles(ids, *where, plan)
        rows, rows_per_source = _input_rows(x, experts, routing, stages.inputs)
        name, parameters = activation_arguments(spec.activation)
        grouped_gemm(
            rows,
            experts.parts("w13"),
            fmt,
            operand,
            (halves, inter, hidden),
            plan,
            stages.hidden,
            first,
            first=True,
            rows_per_source=rows_per_source,
            epilogue=Epilogue(
                extras.get("w13_bias"),
                name,
                extras.get(ACTIVATION_TABLE, parameters),
                extras.get("w2_pre_scale"),
            ),
        )
        slots = stages.slots[: second.splits * pairs].view(second.splits, pairs, hidden)
        grouped_gemm(
            stages.hidden,
            experts.parts("w2"),
            fmt,
            operand,
            (1, hidden, inter),
            plan,
            slots,
            second,
            first=False,
            epilogue=Epilogue(
                extras.get("w2_bias"), router=None if routing.on_input else routing.weights
            ),
        )
        combine(slots, ids, *where, out)


@dataclass(frozen=True)
class _Stages:
    """Where the stages of one chunk write: P pairs, valid or not.

    inputs:  rows of the input by pair, [P]; None where GEMM1 reads x itself
    hidden:  [1, P, I rounded up to 8], in the operand type
    slots:   fp32 [rows, H], of which splits * P are used
    """

    plan: TilePlan
    inputs: Rows | None
    hidden: Tensor
    slots: Tensor


def _row_tiles(rows: int) -> int:
    return -(-rows // 64)


def _input_rows(
    x: Tensor, experts: PackedExperts, routing: Routing, rows: Rows | None
) -> tuple[Tensor, int]:
    """Rows of x, and how many pairs share each: top_k, unless pairs differ by expert."""
    from moelten.kernels.triton_ops import Pairs, quantize_rows

    spec = experts.spec
    if rows is None:
        return x, routing.top_k
    router = routing.weights if routing.on_input else None
    pre = experts.tensors.get("w13_pre_scale")
    pairs = Pairs(routing.ids, spec.num_experts, spec.first_expert, router, pre)
    quantize_rows(x, spec.scheme.activations, pairs, by_token=True, rows=rows)
    return rows.data, 1
