"""The grouped GEMMs of the Hopper backend, for few and for many tokens per expert: launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moelten.formats import Float
from moelten.kernels.hopper_codes import Storage, storage
from moelten.kernels.hopper_decode import Task, decode_kernel
from moelten.kernels.hopper_plan import OneToken
from moelten.kernels.hopper_prefill import prefill_kernel
from moelten.kernels.hopper_products import TOKEN_BOXES
from moelten.kernels.hopper_ring import OPERANDS, Problem
from moelten.kernels.hopper_schedule import Variant, WideVariant, box_rows, row_tiles, type_name
from moelten.kernels.launches import launch
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue
from moelten.kernels.triton_ops import Rows
from moelten.kernels.triton_plan import TilePlan
from moelten.packed import PackedExperts

# Boxes in shared memory, rows of 128 bytes: words of codes and of row parameters, of several row
# tiles of an expert; scales of activations, which themselves are `TOKEN_BOXES`.
_WORDS, _PLAIN = gl.NVMMASharedLayout(128, 32, 4), gl.NVMMASharedLayout(0, 32, 4)
_FACTORS = gl.NVMMASharedLayout(0, 32, 2)


@dataclass(frozen=True)
class Matrix:
    """One matrix of every expert.

    parts:         the tensors of `hopper_layout`, expert-major
    halves:        2 for gate and up, else 1
    rows, columns: N and K of each half
    """

    parts: dict[str, Tensor]
    stored: Storage
    operand: Any
    halves: int
    rows: int
    columns: int

    @property
    def row_tiles(self) -> int:
        return row_tiles(self.rows * self.halves)

    @property
    def scale_type(self) -> str:
        scale = self.parts.get("scale")
        return type_name(None if scale is None else scale.dtype)


def matrices(experts: PackedExperts) -> tuple[Matrix, Matrix]:
    """w13 and w2."""
    spec, activations = experts.spec, experts.spec.scheme.activations
    # Codes of 8 bits are exact in bf16, and scales of rows multiply sums.
    operand = activations.name if isinstance(activations, Float) else "bf16"
    kind = storage(spec.scheme.weights, operand), OPERANDS[operand]
    hidden, inter = spec.hidden_size, spec.intermediate_size
    return (
        Matrix(experts.parts("w13"), *kind, spec.activation.halves, inter, hidden),
        Matrix(experts.parts("w2"), *kind, 1, hidden, inter),
    )


def grouped_gemm(
    x: Rows,
    matrix: Matrix,
    plan: TilePlan | OneToken,
    out: Tensor,
    variant: Variant,
    *,
    first: bool,
    rows_per_source: int = 1,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Write out[s, p] for every valid pair p, from row p // rows_per_source of x.

    x:       [R, K rounded up to 8] in the operand type, and the scales of its rows, if any, one
             each or one for every 128 columns
    out:     [splits, P, N rounded up to 8], what each split of K brings; rows of invalid pairs are
             not written
    first:   whether this is the first GEMM
    """
    scale, zero = matrix.parts.get("scale"), matrix.parts.get("zero")
    table, *numbers, limited = _activation(epilogue)
    places: tuple[Any, ...]
    if isinstance(plan, OneToken):
        tiles = plan.ids.numel()
        places = (None, plan.ids, None, tiles, plan.first_expert, plan.num_experts)
    else:
        tiles = plan.max_tiles
        places = (plan.pairs, plan.tiles, plan.count, tiles, 0, 0)
    task = Task(
        matrix.rows, matrix.columns, matrix.halves, matrix.scale_type, epilogue.activation, limited,
        matrix.stored, matrix.operand, 1 if x.scale is None else x.scale.shape[1], plan.block,
        variant.warps, first,
    )  # fmt: skip
    launch(
        decode_kernel, (tiles * matrix.row_tiles * variant.splits,),
        _words(x.data), x.scale, _words(matrix.parts["data"]), _words(scale), _words(zero),
        matrix.parts.get("row_scale"), *places, epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(),
        out, variant.splits, -(-task.steps // variant.splits), out.stride(0), *numbers,
        rows_per_source, P=task, maxnreg=variant.registers, num_warps=variant.warps,
        launch_pdl=True,
    )  # fmt: skip


def prefill_gemm(
    x: Rows,
    matrix: Matrix,
    plan: TilePlan,
    out: Tensor,
    variant: WideVariant,
    *,
    ordered: bool,
    awaited: int,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Write the row of every position of the plan to out, from its row of x.

    GEMM1 of a variant that gathers has rows [R, `padded` K] of x, of which the plan's pairs are the
    numbers.

    x:        [P, K rounded up to 32] in the operand type, columns in the order of operands
              (`hopper_rows`), and the scales of each row, if any; of a grouped variant what
              `hopper_rows.quantize` writes, with the last as `global_scale`
    out:      columns as those of x if `ordered`, for the next GEMM; else uint8 [P, slot_bytes], in
              the order of sums, for `hopper_plan.combine`
    awaited:  for both GEMMs of a layer, if nothing is launched between them: `pieces_per_tile`,
              after which GEMM2 may read a tile's rows; else 0
    epilogue: without router weights
    """
    stored, zero = variant.weights, matrix.parts.get("zero")
    table, *numbers, limited = _activation(epilogue)
    scale_width = 4 if stored.scale == "block" else 32
    code_rows, scale_rows, zero_rows = box_rows(stored, matrix.scale_type, variant.stage)
    problem = Problem(
        matrix.rows, matrix.columns, matrix.halves, matrix.scale_type, epilogue.activation,
        limited, ordered, awaited > 0, variant,
    )  # fmt: skip
    boxes = None
    if not problem.gathers:
        boxes = TensorDescriptor.from_tensor(x.data, [variant.unit, 64], TOKEN_BOXES.value)
    x_scale, x_scales = x.scale, None
    if variant.grouped:
        assert x.scale is not None
        x_scale = x.global_scale
        x_scales = TensorDescriptor.from_tensor(x.scale.view(-1, 4), [variant.block, 4], _FACTORS)
    processors = torch.cuda.get_device_properties(out.device).multi_processor_count
    launch(
        prefill_kernel, (processors * variant.programs,),
        _boxes(matrix, "data", variant.tiles, code_rows, _WORDS),
        _boxes(matrix, "scale", variant.tiles, scale_rows, _PLAIN, scale_width),
        _boxes(matrix, "zero", variant.tiles, zero_rows, _PLAIN),
        boxes, x_scales, *((x.data, plan.pairs) if problem.gathers else (None, None)),
        None if zero_rows else _words(zero),
        matrix.parts.get("row_scale"), x_scale, plan.tiles, plan.count, plan.max_tiles,
        len(plan.pairs), variant.steps(matrix.columns), awaited, epilogue.bias, table,
        epilogue.post_scale, out, *numbers,
        P=problem, num_warps=variant.warps, maxnreg=variant.registers, launch_pdl=True,
    )  # fmt: skip


def pieces_per_tile(w13: Matrix, variant: WideVariant) -> int:
    """Of GEMM1; 0 where the one before a piece could not be counted in time (`hopper_ring`)."""
    in_time = variant.steps(w13.columns) >= variant.slots
    return variant.row_blocks(w13.row_tiles) if in_time else 0


def _activation(epilogue: Epilogue) -> tuple[Tensor | None, float, float, float, bool]:
    """Per-expert parameters, or alpha, beta and limit of all; and whether there may be limits."""
    parameters = epilogue.parameters
    if isinstance(parameters, Tensor):
        return parameters, 1.0, 0.0, 0.0, True
    return None, *parameters, parameters[2] != float("inf")


def _boxes(
    matrix: Matrix, name: str, tiles: int, rows: int, layout: Any, width: int = 32
) -> TensorDescriptor | None:
    """So many times 128 bytes of so many row tiles per copy, from any row of `width` words on.

    None where there are none.
    """
    part = matrix.parts.get(name)
    if part is None or rows == 0:
        return None
    words = part.view(torch.uint8).view(torch.int32).view(len(part), matrix.row_tiles, -1, width)
    return TensorDescriptor.from_tensor(words, [1, tiles, rows * 32 // width, width], layout)


def _words(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.view(torch.int32).view(torch.uint32)
