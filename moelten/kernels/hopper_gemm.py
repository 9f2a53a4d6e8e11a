"""The grouped GEMMs of the Hopper backend, for few and for many tokens per expert: launches."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moelten.formats import Format
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_decode import decode_kernel
from moelten.kernels.hopper_prefill import prefill_kernel
from moelten.kernels.hopper_ring import Problem
from moelten.kernels.hopper_schedule import Variant, WideVariant, box_rows
from moelten.kernels.launches import launch
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue
from moelten.kernels.triton_ops import TilePlan

# Boxes in shared memory, rows of 128 bytes: words of codes, words of row parameters, activations.
_WORDS, _PLAIN = gl.NVMMASharedLayout(128, 32, 2), gl.NVMMASharedLayout(0, 32, 2)
_TOKENS = gl.NVMMASharedLayout(128, 16, 2)
_OPERANDS = {"bf16": gl.bfloat16, "fp16": gl.float16}


def grouped_gemm(
    x: Tensor,
    matrix: dict[str, Tensor],
    fmt: Format,
    operand: str,
    shape: tuple[int, int, int],
    plan: TilePlan,
    out: Tensor,
    variant: Variant,
    *,
    first: bool,
    rows_per_source: int = 1,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Write out[s, p] for every valid pair p, from row p // rows_per_source of x.

    x:       [R, K rounded up to 8] in the operand type, "bf16" or "fp16"
    matrix:  the tensors of `hopper_layout` for weights in `fmt`, expert-major
    shape:   halves, N and K of one expert's matrix
    out:     [splits, P, N rounded up to 8], what each split of K brings; rows of invalid pairs are
             not written
    first:   whether this is the first GEMM after the plan
    """
    halves, rows, columns = shape
    scale = matrix.get("scale")
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    row_tiles = -(-rows * halves // 64)
    steps = -(-columns // (64 * variant.warps))
    launch(
        decode_kernel, (plan.max_tiles * row_tiles * variant.splits,),
        _words(x), _words(matrix["data"]), None if scale is None else _words(scale),
        _words(matrix["zero"]) if "zero" in matrix else None, matrix.get("row_scale"),
        plan.pairs, plan.tiles, plan.count, plan.max_tiles,
        epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(),
        out, variant.splits, -(-steps // variant.splits), out.stride(0),
        alpha, beta, limit, rows_per_source,
        K=columns, N=rows, HALVES=halves, W=storage(fmt, operand),
        SCALE="" if scale is None else str(scale.dtype).removeprefix("torch."),
        OPERAND=_OPERANDS[operand], ACTIVATION=epilogue.activation,
        LIMITED=table is not None or limit != float("inf"),
        BLOCK=plan.block, WARPS=variant.warps, FIRST=first,
        maxnreg=variant.registers, num_warps=variant.warps, launch_pdl=True,
    )  # fmt: skip


def prefill_gemm(
    x: Tensor,
    matrix: dict[str, Tensor],
    fmt: Format,
    operand: str,
    shape: tuple[int, int, int],
    plan: TilePlan,
    out: Tensor,
    variant: WideVariant,
    *,
    ordered: bool,
    epilogue: Epilogue = NO_EPILOGUE,
) -> None:
    """Write the row of every position of the plan to out, from its row of x.

    x:        [P, K rounded up to 32] in the operand type, columns in the order of operands
              (`hopper_plan.gather`)
    matrix:   the tensors of `hopper_layout` for weights in `fmt`, expert-major
    shape:    halves, N and K of one expert's matrix
    out:      as x if `ordered`, for the next GEMM; else [P, N]
    epilogue: without router weights
    """
    halves, rows, columns = shape
    stored, scale, zero = storage(fmt, operand), matrix.get("scale"), matrix.get("zero")
    scale_type = "" if scale is None else str(scale.dtype).removeprefix("torch.")
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    # What does not come in rows of 128 bytes is little, and loaded by the lanes.
    lanes_scale = scale if stored.scale == "block" else None
    lanes_zero = zero if stored.group == 0 else None
    chunk_rows, scale_rows, zero_rows = box_rows(stored, scale_type)
    problem = Problem(
        rows, columns, halves, stored, scale_type, _OPERANDS[operand], epilogue.activation,
        table is not None or limit != float("inf"), ordered, plan.block, variant.slots,
        variant.stage,
    )  # fmt: skip
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    launch(
        prefill_kernel, (programs,),
        _boxes(matrix["data"], variant.stage * chunk_rows, _WORDS),
        None if scale is None or lanes_scale is not None else _boxes(scale, scale_rows, _PLAIN),
        None if zero is None or lanes_zero is not None else _boxes(zero, zero_rows, _PLAIN),
        TensorDescriptor.from_tensor(x, [plan.block // 4, 64], _TOKENS),
        None if lanes_scale is None else _words(lanes_scale),
        None if lanes_zero is None else _words(lanes_zero),
        matrix.get("row_scale"), plan.tiles, plan.count, plan.max_tiles,
        -(-columns // (64 * variant.stage)), epilogue.bias, table, epilogue.post_scale, out,
        alpha, beta, limit, P=problem, num_warps=4,
    )  # fmt: skip


def _boxes(part: Tensor, rows: int, layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """Rows of 128 bytes, so many per copy."""
    words = part.view(torch.uint8).view(torch.int32).view(-1, 32)
    return TensorDescriptor.from_tensor(words, [rows, 32], layout)


def _words(part: Tensor) -> Tensor:
    return part.view(torch.int32).view(torch.uint32)
