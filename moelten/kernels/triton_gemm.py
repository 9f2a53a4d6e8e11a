"""The grouped GEMM, in Triton: every scheme's weights in canonical rows, on any GPU.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

The weights are the left operand, so that few tokens still fill a matrix instruction. Both operands
pass through one decoder. A code becomes a value that is exact in the operand type; a scale joins it
there only where the product is exact too (`fold`), and otherwise multiplies the fp32 accumulator,
per group or once per row. Bias, activation and router weight follow in fp32; one rounding stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.formats import Format
from moelten.kernels.triton_casts import (
    INTERPRET,
    decode_e2m1,
    decode_e4m3,
    dot,
    load_scale,
    round_to,
)
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue, finish, store_pairs
from moelten.kernels.triton_ops import Rows, TilePlan
from moelten.kernels.triton_scaled import scaled_constants, scaled_gemm_kernel
from moelten.kernels.triton_variants import Target, Variant, make_variant
from moelten.qtensor import QTensor


def grouped_gemm(
    rows: Rows,
    matrix: QTensor,
    plan: TilePlan,
    activation_format: Format,
    out: Tensor,
    *,
    rows_per_source: int = 1,
    epilogue: Epilogue = NO_EPILOGUE,
    target: Target,
) -> None:
    """Write out[p] for every valid pair p, from row p // rows_per_source of `rows`.

    rows:    activations [R, K] in `activation_format`
    matrix:  [E, halves, N, K] (or [E, N, K])
    out:     [P, N], bf16, fp16 or fp32; rows of invalid pairs are not written
    """
    *batch, height, columns = matrix.shape
    halves = batch[1] if len(batch) == 2 else 1
    variant = make_variant(matrix.format, activation_format, target, plan.block, halves)
    tiles_n = triton.cdiv(height, variant.block_n)
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    launch = {} if INTERPRET else {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    kernel = scaled_gemm_kernel if variant.block_scaled else gemm_kernel
    zero = () if variant.block_scaled else (matrix.zero,)
    kernel[(plan.max_tiles * tiles_n,)](
        as_bytes(matrix.data), as_bytes(matrix.scale), *zero, matrix.global_scale,
        rows.data, rows.scale, rows.global_scale,
        plan.pairs, plan.tiles, plan.count, plan.max_tiles,
        epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(), out,
        alpha, beta, limit, rows_per_source,
        K=columns, N=height, HALVES=halves, ACTIVATION=epilogue.activation,
        LIMITED=table is not None or limit != float("inf"),
        BLOCK_M=plan.block, **constants(variant), **launch,
    )  # fmt: skip


def as_bytes(part: Tensor | None) -> Tensor | None:
    """float8 as uint8: kernels decode bytes themselves, and old GPUs have no such type."""
    if part is not None and part.dtype == torch.float8_e4m3fn:
        return part.view(torch.uint8)
    return part


def constants(variant: Variant) -> dict[str, object]:
    """The kernel's compile-time arguments that a variant decides."""
    if variant.block_scaled:
        return scaled_constants(variant)
    w, a = variant.weights, variant.activations
    operand = {
        "bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32,
        "e4m3": tl.float8e4nv, "int8": tl.int8,
    }[variant.operand]  # fmt: skip
    return {
        "W_CODES": w.codes, "W_SCALE": w.scale, "W_MODE": w.mode,
        "W_GROUP": w.group, "W_ROWS": w.row_block,
        "A_CODES": a.codes, "A_SCALE": a.scale, "A_MODE": a.mode, "A_GROUP": a.group,
        "OPERAND": operand, "NATIVE": variant.native_fp8, "PRECISION": variant.precision,
        "BLOCK_N": variant.block_n, "BLOCK_K": variant.block_k,
    }  # fmt: skip


@triton.jit
def _operand(
    codes_ptr, row, inside, scale_ptr, scale_row, zero, start,
    K: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Values [ROWS, BLOCK_K] from column `start`, exact in OPERAND; outside the matrix, zeros.

    row, scale_row: int64 [ROWS], each row's first code and scale; zero: [ROWS] or None.
    """
    PER_BYTE: tl.constexpr = 2 if CODES == "int4" or CODES == "e2m1" else 1
    k = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    mask = inside[:, None] & (k < K // PER_BYTE)[None, :]
    codes = tl.load(codes_ptr + row[:, None] + k[None, :], mask=mask, other=0)
    narrow: tl.constexpr = not INTERPRET and (OPERAND == tl.bfloat16 or OPERAND == tl.float16)
    if PER_BYTE == 2 and not narrow:
        # NOTE: measured on H200: bytes stream 1.5 times faster than 32-bit words of eight codes.
        codes = tl.interleave(codes & 0xF, codes >> 4)
    if CODES == "float" or (CODES == "int8" and OPERAND == tl.int8):
        return codes
    elif CODES == "int4" and narrow:
        return _pair_of_int4(codes, zero, OPERAND)
    elif CODES == "int4":
        values = (codes.to(tl.int8) ^ 8) - 8
        if zero is not None:
            values = values - zero[:, None]
        if OPERAND == tl.int8:
            return values
        else:
            return round_to(values.to(tl.float32), OPERAND)
    elif CODES == "e4m3" and OPERAND == tl.float8e4nv:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif CODES == "int8":
        return round_to(codes.to(tl.float32), OPERAND)
    else:
        # Products stay exact in 16 bits; the interpreter has no bf16 arithmetic.
        TYPE: tl.constexpr = OPERAND if narrow else tl.float32
        if CODES == "e4m3":
            values = decode_e4m3(codes, NATIVE, TYPE)
        elif narrow:
            values = _pair_of_e2m1(codes, TYPE)
        else:
            values = decode_e2m1(codes)
        if MODE == "fold":
            g = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            known = inside[:, None] & (g < (K + GROUP - 1) // GROUP)[None, :]
            scale = load_scale(scale_ptr + scale_row[:, None] + g[None, :], known, SCALE, NATIVE)
            values = tl.reshape(values, (ROWS, BLOCK_K // GROUP, GROUP))
            values = tl.reshape(values * scale.to(TYPE)[:, :, None], (ROWS, BLOCK_K))
        return round_to(values, OPERAND)


@triton.jit
def _halves(words, TYPE: tl.constexpr):
    """int32 [R, C] to its 16-bit halves as TYPE [R, 2C], low half first."""
    low, high = (words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)
    return tl.interleave(low, high).to(TYPE, bitcast=True)


@triton.jit
def _pair_of_int4(codes, zero, TYPE: tl.constexpr):
    """Bytes [R, C] of two's complement nibbles to TYPE [R, 2C], less their rows' zero points."""
    # Both nibbles of a byte at once. In bf16 the low bits of 128 count units, in fp16 of 1024.
    ONE: tl.constexpr = 0x43084308 if TYPE == tl.bfloat16 else 0x64086408
    BASE: tl.constexpr = 136.0 if TYPE == tl.bfloat16 else 1032.0
    spread = codes.to(tl.int32)
    spread = spread | (spread << 12)
    values = _halves((spread & 0x000F000F) ^ ONE, TYPE)
    base = tl.full((1,), BASE, tl.float32)
    if zero is not None:
        base = base + zero.to(tl.float32)
    return values - base.to(TYPE)[:, None]


@triton.jit
def _pair_of_e2m1(codes, TYPE: tl.constexpr):
    """Bytes [R, C] of e2m1 nibbles to TYPE [R, 2C], both nibbles of a byte at once."""
    # A nibble's low bits are a number's last exponent bits and first mantissa bit; the product
    # mends the exponent, out of bf16's or fp16's subnormals.
    SHIFT: tl.constexpr = 6 if TYPE == tl.bfloat16 else 9
    FACTOR: tl.constexpr = 2.0**126 if TYPE == tl.bfloat16 else 16384.0
    spread = codes.to(tl.int32)
    spread = spread | (spread << 12)
    words = ((spread & 0x00070007) << SHIFT) | ((spread & 0x00080008) << 12)
    return _halves(words, TYPE) * tl.full((1, 1), FACTOR, TYPE)


@triton.jit
def _accumulate(
    acc, w, a, w_scale, a_scale,
    W_MODE: tl.constexpr, A_MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + w @ a, the product alone scaled where scales belong to groups of K."""
    if W_MODE == "group" or A_MODE == "group":
        kind: tl.constexpr = tl.int32 if w.dtype == tl.int8 else tl.float32
        part = dot(w, a, tl.zeros(acc.shape, kind), PRECISION).to(tl.float32)
        if W_MODE == "group":
            part = part * w_scale[:, None]
        if A_MODE == "group":
            part = part * a_scale[None, :]
        return acc + part
    else:
        return dot(w, a, acc, PRECISION)


@triton.jit(do_not_specialize=["max_tiles", "alpha", "beta", "limit"])
def gemm_kernel(
    w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
    pairs_ptr, tiles_ptr, count_ptr, max_tiles,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    alpha, beta, limit, rows_per_source,
    K: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr,
    W_CODES: tl.constexpr, W_SCALE: tl.constexpr, W_MODE: tl.constexpr,
    W_GROUP: tl.constexpr, W_ROWS: tl.constexpr,
    A_CODES: tl.constexpr, A_SCALE: tl.constexpr, A_MODE: tl.constexpr, A_GROUP: tl.constexpr,
    OPERAND: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pairs of one expert by BLOCK_N rows of its matrix (of both halves)."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program // TILES_N
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    position = tl.load(tiles_ptr + max_tiles + tile) + tl.arange(0, BLOCK_M)
    inside_m = position < tl.load(tiles_ptr + 2 * max_tiles + tile)
    pair = tl.load(pairs_ptr + position, mask=inside_m, other=0).to(tl.int64)
    n = (program % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N

    ITEMS_W: tl.constexpr = K // 2 if W_CODES == "int4" or W_CODES == "e2m1" else K
    ITEMS_A: tl.constexpr = K // 2 if A_CODES == "e2m1" else K
    matrix = expert * HALVES
    w_row = (matrix * N + n) * ITEMS_W
    # Scale rows: one per row, per block of rows, or (0) one for the whole matrix.
    SCALE_ROWS: tl.constexpr = 1 if W_ROWS == 0 else (N + W_ROWS - 1) // W_ROWS
    SCALE_COLUMNS: tl.constexpr = (K + W_GROUP - 1) // W_GROUP
    scale_at = n * 0 if W_ROWS == 0 else n // W_ROWS
    w_scale_row = (matrix * SCALE_ROWS + scale_at) * SCALE_COLUMNS
    HALF: tl.constexpr = N * ITEMS_W
    SCALE_HALF: tl.constexpr = SCALE_ROWS * SCALE_COLUMNS
    source = pair // rows_per_source
    a_row = source * ITEMS_A
    a_scale_row = source * ((K + A_GROUP - 1) // A_GROUP)

    INTEGER: tl.constexpr = OPERAND == tl.int8 and W_MODE != "group" and A_MODE != "group"
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc0 = tl.zeros((BLOCK_N, BLOCK_M), kind)
    acc1 = acc0
    for start in range(0, K, BLOCK_K):
        a = _operand(
            a_ptr, a_row, inside_m, a_scale_ptr, a_scale_row, None, start,
            K, A_CODES, A_SCALE, A_MODE, A_GROUP, BLOCK_M, BLOCK_K, OPERAND, NATIVE,
        )  # fmt: skip
        a = tl.trans(a)
        a_scale = None
        if A_MODE == "group":
            at = a_scale_ptr + a_scale_row + start // A_GROUP
            a_scale = load_scale(at, inside_m, A_SCALE, NATIVE)
        for half in tl.static_range(HALVES):
            zero = None
            at = w_scale_row + half * SCALE_HALF + start // W_GROUP
            if w_zero_ptr is not None:
                zero = tl.load(w_zero_ptr + at, mask=inside_n, other=0)
            w_scale = None
            if W_MODE == "group":
                w_scale = load_scale(w_scale_ptr + at, inside_n, W_SCALE, NATIVE)
            w = _operand(
                w_ptr, w_row + half * HALF, inside_n,
                w_scale_ptr, w_scale_row + half * SCALE_HALF, zero, start,
                K, W_CODES, W_SCALE, W_MODE, W_GROUP, BLOCK_N, BLOCK_K, OPERAND, NATIVE,
            )  # fmt: skip
            if half == 0:
                acc0 = _accumulate(acc0, w, a, w_scale, a_scale, W_MODE, A_MODE, PRECISION)
            else:
                acc1 = _accumulate(acc1, w, a, w_scale, a_scale, W_MODE, A_MODE, PRECISION)

    a_scale = None
    if A_MODE == "row":
        a_scale = tl.load(a_scale_ptr + a_scale_row, mask=inside_m, other=0.0)
    a_global = None
    if a_global_ptr is not None:
        a_global = tl.load(a_global_ptr + source, mask=inside_m, other=0.0)
    h0 = finish(
        acc0, w_scale_ptr, w_global_ptr, bias_ptr, a_scale, a_global, matrix, n, inside_n,
        w_scale_row, N, W_SCALE, W_MODE, A_MODE, NATIVE,
    )  # fmt: skip
    h1 = h0
    if HALVES == 2:
        h1 = finish(
            acc1, w_scale_ptr, w_global_ptr, bias_ptr, a_scale, a_global, matrix + 1, n, inside_n,
            w_scale_row + SCALE_HALF, N, W_SCALE, W_MODE, A_MODE, NATIVE,
        )  # fmt: skip
    store_pairs(
        h0, h1, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit,
        expert, pair, inside_m, n, inside_n, N, ACTIVATION, LIMITED,
    )  # fmt: skip
