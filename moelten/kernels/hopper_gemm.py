"""The grouped GEMM of the Hopper backend: its launch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from moelten.formats import Format
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_decode import decode_kernel
from moelten.kernels.hopper_schedule import Variant
from moelten.kernels.launches import launch
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue
from moelten.kernels.triton_ops import TilePlan

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


def _words(part: Tensor) -> Tensor:
    return part.view(torch.int32).view(torch.uint32)
