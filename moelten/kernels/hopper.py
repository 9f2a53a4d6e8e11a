"""The Hopper backend: Gluon kernels for 16-bit activations that stream packed weights once.

Few tokens per expert take four launches: plan, which one token needs not, GEMM1 with activation,
GEMM2 with router weights, sum over slots, each started while the one before drains. Many take other
GEMMs, from the same packed weights: plan (two launches for many pairs), rows with columns in the
order of operands, GEMM1, which may gather those, GEMM2, sum; GEMM2 begins with tiles that GEMM1 has
finished, while that is at its last. Activations of 8 bits are quantized before each GEMM: for few
tokens in a launch of its own, for many by what orders columns, and in one more before GEMM2. Grids
follow from T and k alone: nothing waits for the device, so a CUDA graph captures it. The two
operand types place bits differently: two layouts, two backends. Triton is imported when a layer
runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import (
    FP8_GROUP,
    FP8_ROW,
    INT8_GROUP,
    INT8_ROW,
    Float,
    Format,
    Scheme,
)
from moelten.kernels.arena import ArenaBackend, Take
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_layout import HopperLayout
from moelten.kernels.hopper_schedule import (
    WideVariant,
    block_of,
    choose_wide,
    make_variant,
    padded,
    row_tiles,
    slot_bytes,
    split_rows,
    type_name,
)
from moelten.kernels.triton import activation_arguments
from moelten.packed import ACTIVATION_TABLE, PackedExperts
from moelten.routing import Routing
from moelten.weights import ExpertSpec

if TYPE_CHECKING:
    from moelten.kernels.hopper_plan import OneToken
    from moelten.kernels.triton_epilogue import Epilogue
    from moelten.kernels.triton_ops import Pairs, Rows
    from moelten.kernels.triton_plan import TilePlan

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
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
        if isinstance(activations, Float):
            if activations.name != self.operand:
                reasons.append(f"takes {self.operand} activations, not {activations.name}")
        elif self.operand != "bf16" or not _takes(spec.scheme):
            more = (
                ", and 8-bit ones with a scale per token or, beside weights with scales for as many"
                " columns, for every 128 of them,"
            )
            reasons.append(
                f"takes {self.operand} activations"
                + (more if self.operand == "bf16" else "")
                + f" not {activations.name}"
            )
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
        from moelten.kernels.triton_ops import Rows, empty_rows
        from moelten.kernels.triton_plan import empty_plan

        fmt, hidden_size, inter = spec.scheme.activations, spec.hidden_size, spec.intermediate_size
        pairs, experts = tokens * top_k, spec.num_experts
        weights, plain = spec.scheme.weights, isinstance(fmt, Float)
        own = fmt.data_dtype if plain else torch.bfloat16  # which holds every code of 8 bits
        stored, scale_type = storage(weights, self.operand), type_name(weights.scale_dtype)
        grouped = _grouped(fmt)
        sizes = pairs, experts, (hidden_size, inter)
        x_scale = "none" if plain else "group" if grouped else "row"
        variant = choose_wide(stored, scale_type, *sizes, x_scale=x_scale)
        block = variant.block if variant else block_of(pairs, experts)
        unit = variant.unit if variant else block
        dtype = _DTYPES[variant.weights.code.operand] if variant else own
        inputs = wide = None
        by_pair = on_input or "w13_pre_scale" in spec.extras
        if by_pair if plain else variant is None:
            count = pairs if by_pair else tokens
            inputs = empty_rows(take, count, hidden_size, fmt, dtype=None if plain else dtype)
        # Where rows are gathered the plan says which, and else nobody asks what stands where.
        shared = top_k if variant and not by_pair else 1
        plan = empty_plan(
            take, pairs, experts, block, unit=unit, shared=shared, inverse=variant is not None
        )
        width = -(-inter // 32) * 32
        hidden = take(own if plain else torch.float32, 1, pairs, width)
        # Codes of 8 bits, or bf16 rows for operands of fp16: those times a power of two each.
        scaled = not plain or dtype != own
        place = hidden[0].view(dtype) if plain else take(dtype, pairs, width)
        if variant and grouped:
            rows = _by_position(take, place, pairs, inter, variant)
        else:
            groups = -(-inter // 128) if grouped else 1
            rows = Rows(place, take(torch.float32, pairs, groups) if scaled else None)
        # Rows by position that GEMM1 reads are not needed any more when GEMM2 writes.
        count = split_rows(pairs, row_tiles(hidden_size)) * hidden_size
        if variant:
            count = max(count, pairs * slot_bytes(hidden_size) // 4)
        slots = take(torch.float32, count)
        if variant:
            # Taken even where rows are gathered before, lest more tokens need less.
            ordered = take(dtype, pairs if by_pair else tokens, padded(hidden_size))
            if not variant.gathers:
                # Where GEMM2 writes the sums of a tile, GEMM1 read that tile's rows.
                width, stride = -(-hidden_size // 32) * 32, slot_bytes(hidden_size)
                ordered = slots.view(dtype)[: pairs * stride // dtype.itemsize]
                ordered = ordered.view(pairs, -1)[:, :width]
            if grouped:
                first = _by_position(take, ordered, pairs, hidden_size, variant)
            else:
                first = Rows(ordered, take(torch.float32, pairs, 1) if scaled else None)
            wide = _Wide(variant, first)
        return _Stages(plan, inputs, hidden, rows, slots, wide)

    def run_chunk(
        self, x: Tensor, experts: PackedExperts, routing: Routing, stages: _Stages, out: Tensor
    ) -> None:
        from moelten.kernels.hopper_plan import OneToken, combine, plan_tiles
        from moelten.kernels.triton_epilogue import Epilogue

        if x.data_ptr() % 4:
            raise FormatError(
                "x: expected an address that is a multiple of 4 (kernels read words), got "
                f"{x.data_ptr():#x}; call x.clone()"
            )
        spec, extras, ids = experts.spec, experts.tensors, routing.ids
        where = (spec.num_experts, spec.first_expert)
        plan: TilePlan | OneToken = stages.plan
        if stages.wide is None and len(ids) == 1:
            plan = OneToken(ids.contiguous(), *where, plan.block)
        else:
            # NOTE: this is the first launch, so that GEMM2 may read it before it waits for GEMM1.
            plan_tiles(ids, *where, stages.plan)
        name, parameters = activation_arguments(spec.activation)
        first = Epilogue(
            extras.get("w13_bias"),
            name,
            extras.get(ACTIVATION_TABLE, parameters),
            extras.get("w2_pre_scale"),
        )
        router = None if routing.on_input else routing.weights
        if stages.wide is None:
            second = Epilogue(extras.get("w2_bias"), router=router)
            slots = _few(x, experts, routing, stages, plan, first, second)
            combine(slots, ids, *where, out)
        else:
            second = Epilogue(extras.get("w2_bias"))
            slots = _many(x, experts, routing, stages, stages.wide, first, second)
            combine(slots, ids, *where, out, inverse=stages.plan.inverse, router=router)


def _few(
    x: Tensor,
    experts: PackedExperts,
    routing: Routing,
    stages: _Stages,
    plan: TilePlan | OneToken,
    first: Epilogue,
    second: Epilogue,
) -> Tensor:
    """Both GEMMs for few tokens per expert: the slots [splits, P, H]."""
    from moelten.kernels.hopper_gemm import grouped_gemm, matrices
    from moelten.kernels.triton_ops import Rows

    rows, rows_per_source = _input_rows(x, experts, routing, stages.inputs)
    (w13, w2), hidden = matrices(experts), stages.hidden
    pairs = routing.ids.numel()
    sizes = (w13.stored, plan.block, pairs, experts.spec.num_experts)
    grouped = _grouped(experts.spec.scheme.activations)
    v13 = make_variant(*sizes, w13.row_tiles, w13.columns, may_split=False, grouped=grouped)
    v2 = make_variant(*sizes, w2.row_tiles, w2.columns, may_split=True, grouped=grouped)
    grouped_gemm(
        rows, w13, plan, hidden, v13, first=True, rows_per_source=rows_per_source, epilogue=first
    )
    # What this GEMM writes and reads is padded to 8 columns, not to 32.
    width = -(-w2.columns // 8) * 8
    narrow = Rows(_of_width(stages.rows.data, width), stages.rows.scale)
    rows = _requantize(_of_width(hidden[0], width), experts, narrow)
    slots = stages.slots[: v2.splits * pairs * w2.rows].view(v2.splits, pairs, w2.rows)
    grouped_gemm(rows, w2, plan, slots, v2, first=False, epilogue=second)
    return slots


def _many(
    x: Tensor,
    experts: PackedExperts,
    routing: Routing,
    stages: _Stages,
    wide: _Wide,
    first: Epilogue,
    second: Epilogue,
) -> Tensor:
    """Both GEMMs for many tokens per expert: the slots [1, P, bytes]."""
    from moelten.kernels.hopper_gemm import matrices, pieces_per_tile, prefill_gemm
    from moelten.kernels.hopper_rows import Places, order, quantize

    (w13, w2), plan, hidden = matrices(experts), stages.plan, stages.hidden[0]
    variant, fmt = wide.variant, experts.spec.scheme.activations
    assert plan.inverse is not None
    if isinstance(fmt, Float):
        rows, _ = _input_rows(x, experts, routing, stages.inputs)
        places = None if variant.gathers else Places(plan.inverse, plan.shared)
        order(rows.data, wide.first, places)
    else:
        places = Places(plan.inverse, plan.shared, variant.gathers)
        quantize(x, fmt, wide.first, places, _pairs(experts, routing))
    gemm = partial(
        prefill_gemm, plan=plan, variant=variant,
        awaited=pieces_per_tile(w13, variant) if stages.rows.scale is None else 0,
    )  # fmt: skip
    gemm(wide.first, w13, out=hidden, ordered=True, epilogue=first)
    if _grouped(fmt):
        quantize(hidden, fmt, stages.rows)
    else:
        _requantize(hidden, experts, stages.rows)
    count, width = len(hidden), slot_bytes(w2.rows)
    slots = stages.slots.view(torch.uint8)[: count * width].view(count, width)
    gemm(stages.rows, w2, out=slots, ordered=False, epilogue=second)
    return slots[None]


def _of_width(rows: Tensor, width: int) -> Tensor:
    """As many rows of fewer columns, in the same place."""
    return rows.flatten()[: len(rows) * width].view(len(rows), width)


def _requantize(hidden: Tensor, experts: PackedExperts, rows: Rows) -> Rows:
    """GEMM2's rows: hidden itself, unless they have scales."""
    from moelten.kernels.triton_ops import quantize_rows

    if rows.scale is None:
        return rows
    return quantize_rows(hidden, experts.spec.scheme.activations, rows=rows)


@dataclass(frozen=True)
class _Wide:
    """What many tokens per expert need.

    first: rows of GEMM1, if it gathers one for each token, or each pair if they differ, `padded`;
           else one for each position in the plan, in the slots' place
    """

    variant: WideVariant
    first: Rows


def _by_position(take: Take, data: Tensor, pairs: int, columns: int, variant: WideVariant) -> Rows:
    """Rows with room for scales of groups, as `hopper_rows.quantize` writes them."""
    from moelten.kernels.triton_ops import Rows

    last = None if variant.by_warp else take(torch.float32, pairs)
    return Rows(data, take(torch.float32, -(-columns // 128), pairs, 4), last)


@dataclass(frozen=True)
class _Stages:
    """Where the stages of one chunk write: P pairs, valid or not.

    inputs: rows of the input, [T] or [P]; None where GEMM1 reads x itself
    hidden: [1, P, I rounded up to 32], in the operand type, or fp32 where it is quantized
    rows:   of GEMM2: hidden itself, or quantized
    slots:  fp32, of which splits * P rows of H are used; or P times `slot_bytes` of bytes
    wide:   None for few tokens per expert
    """

    plan: TilePlan
    inputs: Rows | None
    hidden: Tensor
    rows: Rows
    slots: Tensor
    wide: _Wide | None


def _grouped(activations: Format) -> bool:
    """Whether activations have a scale for every 128 columns."""
    return activations in (FP8_GROUP, INT8_GROUP)


def _takes(scheme: Scheme) -> bool:
    """Whether kernels have the scales of activations of 8 bits."""
    if _grouped(scheme.activations):
        return scheme.weights.block[1] == 128
    return scheme.activations in (FP8_ROW, INT8_ROW)


def _input_rows(
    x: Tensor, experts: PackedExperts, routing: Routing, rows: Rows | None
) -> tuple[Rows, int]:
    """Rows of x, and how many pairs share each: top_k, unless pairs differ by expert."""
    from moelten.kernels.triton_ops import Rows, quantize_rows

    fmt, pairs = experts.spec.scheme.activations, _pairs(experts, routing)
    if rows is None:
        return Rows(x), routing.top_k
    if pairs is None:
        return quantize_rows(x, fmt, rows=rows), routing.top_k
    return quantize_rows(x, fmt, pairs, by_token=True, rows=rows), 1


def _pairs(experts: PackedExperts, routing: Routing) -> Pairs | None:
    """What makes rows of x differ by expert, if anything does."""
    from moelten.kernels.triton_ops import Pairs

    spec, pre = experts.spec, experts.tensors.get("w13_pre_scale")
    if not routing.on_input and pre is None:
        return None
    router = routing.weights if routing.on_input else None
    return Pairs(routing.ids, spec.num_experts, spec.first_expert, router, pre)
