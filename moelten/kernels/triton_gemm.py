"""The grouped GEMM, in Triton: every scheme's weights in canonical rows, on any GPU.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

With few tokens the weights are the left operand, so that they fill a matrix instruction; with many
the tokens are, and weights are decoded once for all of a tile. Rows of both halves take turns in
one operand and part again after the sum. A code becomes a value that is exact in the operand type;
a scale joins it there only where the product is exact too (`fold`), and otherwise multiplies the
fp32 accumulator, per group or once per row. Bias, activation and router weight follow in fp32; one
rounding stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.formats import Format
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import INTERPRET, abs_bits, dot, widen
from moelten.kernels.triton_decode import (
    columns_of,
    decode_bytes,
    decode_scale,
    decode_words,
    load_raw_scale,
)
from moelten.kernels.triton_epilogue import NO_EPILOGUE, Epilogue, finish, store_pairs
from moelten.kernels.triton_ops import Rows
from moelten.kernels.triton_plan import TilePlan
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

    rows:    activations [R, K] in `activation_format`, or their codes in the type of `row_dtype`
    matrix:  [E, halves, N, K] (or [E, N, K])
    out:     [P, N], bf16, fp16 or fp32; rows of invalid pairs are not written
    """
    *batch, height, columns = matrix.shape
    halves = batch[1] if len(batch) == 2 else 1
    variant = make_variant(
        matrix.format, activation_format, target, plan.block, halves, rows.data.dtype
    )
    tiles_n = triton.cdiv(height, variant.block_n)
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    options = {} if INTERPRET else variant.launch
    kernel = scaled_gemm_kernel if variant.block_scaled else gemm_kernel
    zero = () if variant.block_scaled else (matrix.zero,)
    launch(
        kernel, (plan.max_tiles * tiles_n,),
        stored(matrix.data, variant, columns), as_bytes(matrix.scale), *zero, matrix.global_scale,
        stored(rows.data, variant, columns), rows.scale, rows.global_scale,
        plan.pairs, plan.tiles, plan.count, plan.max_tiles,
        epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(), out,
        alpha, beta, limit, rows_per_source,
        K=columns, N=height, HALVES=halves, ACTIVATION=epilogue.activation,
        LIMITED=table is not None or limit != float("inf"),
        BLOCK_M=plan.block, **constants(variant), **options,
    )  # fmt: skip


def as_bytes(part: Tensor | None) -> Tensor | None:
    """float8 as uint8: kernels decode bytes themselves, and old GPUs have no such type."""
    if part is not None and part.dtype == torch.float8_e4m3fn:
        return part.view(torch.uint8)
    return part


def stored(codes: Tensor, variant: Variant, columns: int) -> Tensor:
    """Codes as the kernel reads them: two to a byte, where the operand allows, eight to a word."""
    packed = codes.dtype == torch.uint8 and codes.shape[-1] < columns
    if packed and variant.decodes_words and columns % 8 == 0:
        return codes.view(torch.int32)
    return as_bytes(codes)  # type: ignore[return-value]


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
        "BLOCK_N": variant.block_n, "BLOCK_K": variant.block_k, "TOKENS_LEFT": variant.tokens_left,
    }  # fmt: skip


@triton.constexpr_function
def _items(kind, columns, codes):
    """How many items of a pointer's type hold a row of K codes."""
    if kind == tl.int32:
        return columns // 8
    return columns // 2 if codes in ("int4", "e2m1") else columns


@triton.jit
def _scales(
    pointer, row, inside, start,
    K: tl.constexpr, KIND: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Undecoded scales of the block at column `start`: [R, groups], or [R] for a single group."""
    if MODE == "fold" and BLOCK_K > GROUP:
        g = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
        mask = inside[:, None] & (g < (K + GROUP - 1) // GROUP)[None, :]
        return load_raw_scale(pointer + row[:, None] + g[None, :], mask, KIND)
    else:
        return load_raw_scale(pointer + row + start // GROUP, inside & (start < K), KIND)


@triton.jit
def _row_units(pointer, row, inside, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """fp32 [R] twice: a power of two that brings each row's scales into fp16, and its inverse.

    The largest comes to 2**11 .. 2**12, so that 8 times it fits. Products with int4 codes, of 11
    bits, are exact down to 2**-26 of that; below, they are off by less than 2**-36 of it.
    """
    ROWS: tl.constexpr = row.shape[0]
    top = tl.zeros((ROWS, STEP), tl.int32)
    # Unrolled, so that all loads are under way at once.
    for start in tl.static_range(0, COLUMNS, STEP):
        g = start + tl.arange(0, STEP)
        mask = inside[:, None] & (g < COLUMNS)[None, :]
        scale = tl.load(pointer + row[:, None] + g[None, :], mask=mask, other=0.0)
        top = tl.maximum(top, abs_bits(widen(scale)))
    exponent = tl.minimum(tl.maximum(tl.max(top, axis=1) >> 23, 12), 254)
    down = ((265 - exponent) << 23).to(tl.float32, bitcast=True)
    return down, ((exponent - 11) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weights(
    pointer, row, inside, zero, scale, unit, start,
    K: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NATIVE: tl.constexpr, FRAGMENT: tl.constexpr,
):  # fmt: skip
    """Values [R, BLOCK_K] from column `start`, exact in OPERAND; outside the matrix, zeros.

    row: int64 [R], where each row's codes begin; zero: [R] or None; scale, unit: for mode "fold".
    """
    WORDS: tl.constexpr = pointer.dtype.element_ty == tl.int32
    PER_BYTE: tl.constexpr = 2 if CODES == "int4" or CODES == "e2m1" else 1
    PER_ITEM: tl.constexpr = 8 if WORDS else PER_BYTE
    k = start // PER_ITEM + tl.arange(0, BLOCK_K // PER_ITEM)
    mask = inside[:, None] & (k < K // PER_ITEM)[None, :]
    if CODES == "float":
        return tl.load(pointer + row[:, None] + k[None, :], mask=mask, other=0.0)
    codes = tl.load(pointer + row[:, None] + k[None, :], mask=mask, other=0)
    factor = None
    if MODE == "fold":
        factor = decode_scale(scale, SCALE, NATIVE)
        if unit is not None:
            factor = factor * (unit if len(factor.shape) == 1 else unit[:, None])
    if WORDS:
        return decode_words(codes, zero, factor, CODES, OPERAND, FRAGMENT)
    else:
        return decode_bytes(codes, zero, factor, CODES, OPERAND, NATIVE)


@triton.jit
def _activations(
    pointer, row, inside, scale_ptr, scale_row, start,
    K: tl.constexpr, CODES: tl.constexpr, SCALE: tl.constexpr, MODE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, NATIVE: tl.constexpr,
    FRAGMENT: tl.constexpr,
):  # fmt: skip
    """Values [R, BLOCK_K] as `_weights` has them, in the same order of columns."""
    if FRAGMENT and CODES == "float":
        k = start + columns_of(tl.arange(0, BLOCK_K), BLOCK_K)
        mask = inside[:, None] & (k < K)[None, :]
        return tl.load(pointer + row[:, None] + k[None, :], mask=mask, other=0.0)
    else:
        scale = None
        if MODE == "fold":
            scale = _scales(scale_ptr, scale_row, inside, start, K, SCALE, MODE, GROUP, BLOCK_K)
        return _weights(
            pointer, row, inside, None, scale, None, start,
            K, CODES, SCALE, MODE, BLOCK_K, OPERAND, NATIVE, FRAGMENT,
        )  # fmt: skip


@triton.jit
def _accumulate(
    acc, w, a, w_scale, a_scale,
    W_MODE: tl.constexpr, A_MODE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    """acc + the product, which alone is scaled where scales belong to groups of K."""
    if W_MODE == "group" or A_MODE == "group":
        kind: tl.constexpr = tl.int32 if w.dtype == tl.int8 else tl.float32
        part = tl.zeros(acc.shape, kind)
    else:
        part = acc
    if TOKENS_LEFT:
        part = dot(a, tl.trans(w), part, PRECISION)
    else:
        part = dot(w, tl.trans(a), part, PRECISION)
    if W_MODE == "group" and A_MODE == "group":
        if TOKENS_LEFT:
            return acc + part.to(tl.float32) * (a_scale[:, None] * w_scale[None, :])
        else:
            return acc + part.to(tl.float32) * (w_scale[:, None] * a_scale[None, :])
    elif W_MODE == "group":
        return acc + part.to(tl.float32) * (w_scale[None, :] if TOKENS_LEFT else w_scale[:, None])
    elif A_MODE == "group":
        return acc + part.to(tl.float32) * (a_scale[:, None] if TOKENS_LEFT else a_scale[None, :])
    else:
        return part


@triton.jit
def _part_halves(acc, HALVES: tl.constexpr, TOKENS_LEFT: tl.constexpr):
    """Both halves [BLOCK_N, BLOCK_M] of the accumulator; one half twice."""
    if TOKENS_LEFT:
        acc = tl.trans(acc)
    if HALVES == 1:
        return acc, acc
    else:
        ROWS: tl.constexpr = acc.shape[0]
        COLUMNS: tl.constexpr = acc.shape[1]
        RUN: tl.constexpr = 1 if TOKENS_LEFT else 8
        acc = tl.reshape(acc, (ROWS // (2 * RUN), 2, RUN, COLUMNS))
        h0, h1 = tl.split(tl.permute(acc, (0, 2, 3, 1)))
        shape: tl.constexpr = (ROWS // 2, COLUMNS)
        return tl.reshape(h0, shape), tl.reshape(h1, shape)


@triton.jit
def _gemm_tile(
    w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
    pairs_ptr, begin, end, expert, first,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    alpha, beta, limit, rows_per_source,
    K: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr,
    W_CODES: tl.constexpr, W_SCALE: tl.constexpr, W_MODE: tl.constexpr,
    W_GROUP: tl.constexpr, W_ROWS: tl.constexpr,
    A_CODES: tl.constexpr, A_SCALE: tl.constexpr, A_MODE: tl.constexpr, A_GROUP: tl.constexpr,
    OPERAND: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    """Pairs begin .. end - 1 of one expert by BLOCK_N rows of its matrix (of both halves)."""
    ROWS: tl.constexpr = BLOCK_N * HALVES
    position = begin + tl.arange(0, BLOCK_M)
    inside_m = position < end
    pair = tl.load(pairs_ptr + position, mask=inside_m, other=0).to(tl.int64)
    # Rows of the halves take turns so that one thread's accumulators hold both of an output:
    # one by one along a fragment's columns, by eights along its rows.
    RUN: tl.constexpr = 1 if TOKENS_LEFT else 8
    r = tl.arange(0, ROWS)
    half = r // RUN % HALVES
    n = first + (r // RUN // HALVES * RUN + r % RUN)
    inside_r = n < N

    W_ITEMS: tl.constexpr = _items(w_ptr.dtype.element_ty, K, W_CODES)
    A_ITEMS: tl.constexpr = _items(a_ptr.dtype.element_ty, K, A_CODES)
    WORDS: tl.constexpr = w_ptr.dtype.element_ty == tl.int32
    FRAGMENT: tl.constexpr = (
        WORDS and not TOKENS_LEFT and BLOCK_K >= 32
        and (A_CODES == "float" or a_ptr.dtype.element_ty == tl.int32)
    )  # fmt: skip
    matrix = expert * HALVES
    w_row = ((matrix + half) * N + n) * W_ITEMS
    # Scale rows: one per row, per block of rows, or (0) one for the whole matrix.
    SCALE_ROWS: tl.constexpr = 1 if W_ROWS == 0 else (N + W_ROWS - 1) // W_ROWS
    SCALE_COLUMNS: tl.constexpr = (K + W_GROUP - 1) // W_GROUP
    SCALE_HALF: tl.constexpr = SCALE_ROWS * SCALE_COLUMNS
    scale_at = n * 0 if W_ROWS == 0 else n // W_ROWS
    w_scale_row = ((matrix + half) * SCALE_ROWS + scale_at) * SCALE_COLUMNS
    # Whether one scale serves the whole tile, of each half.
    BLOCKED: tl.constexpr = W_MODE == "group" and W_ROWS > 1 and W_ROWS % BLOCK_N == 0
    block_ptr = w_scale_ptr
    if BLOCKED:
        block_ptr += (matrix * SCALE_ROWS + first // W_ROWS) * SCALE_COLUMNS
    source = pair // rows_per_source
    a_row = source * A_ITEMS
    a_scale_row = source * ((K + A_GROUP - 1) // A_GROUP)

    INTEGER: tl.constexpr = OPERAND == tl.int8 and W_MODE != "group" and A_MODE != "group"
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((BLOCK_M, ROWS) if TOKENS_LEFT else (ROWS, BLOCK_M), kind)
    UNITS: tl.constexpr = W_MODE == "fold" and W_CODES == "int4"
    unit = None
    back = None
    if UNITS:
        # NOTE: Triton 3.6 lays out what follows after this load. With 2048 columns of scales at
        # once the weights come as their fragment; with 512 no register spills on the right.
        PADDED: tl.constexpr = triton.next_power_of_2(SCALE_COLUMNS)
        COLUMNS: tl.constexpr = 512 if TOKENS_LEFT else 2048
        STEP: tl.constexpr = min(PADDED, max(COLUMNS // W_GROUP, 16, PADDED // 16))
        unit, back = _row_units(w_scale_ptr, w_scale_row, inside_r, SCALE_COLUMNS, STEP)
    # Scales and zero points are loaded one step ahead: too small for copies in the background.
    raw = None
    raw1 = None
    zero = None
    a_raw = None
    if BLOCKED:
        raw = tl.load(block_ptr)
        if HALVES == 2:
            raw1 = tl.load(block_ptr + SCALE_HALF)
    elif W_MODE == "fold" or W_MODE == "group":
        raw = _scales(w_scale_ptr, w_scale_row, inside_r, 0, K, W_SCALE, W_MODE, W_GROUP, BLOCK_K)
    if w_zero_ptr is not None:
        zero = tl.load(w_zero_ptr + w_scale_row, mask=inside_r, other=0)
    if A_MODE == "group":
        a_raw = load_raw_scale(a_scale_ptr + a_scale_row, inside_m, A_SCALE)
    for start in range(0, K, BLOCK_K):
        a = _activations(
            a_ptr, a_row, inside_m, a_scale_ptr, a_scale_row, start,
            K, A_CODES, A_SCALE, A_MODE, A_GROUP, BLOCK_K, OPERAND, NATIVE, FRAGMENT,
        )  # fmt: skip
        w = _weights(
            w_ptr, w_row, inside_r, zero, raw, unit, start,
            K, W_CODES, W_SCALE, W_MODE, BLOCK_K, OPERAND, NATIVE, FRAGMENT,
        )  # fmt: skip
        w_scale = None
        a_scale = None
        if BLOCKED:
            both = raw + tl.zeros((ROWS,), w_scale_ptr.dtype.element_ty)
            if HALVES == 2:
                both = tl.where(half == 0, raw, raw1)
            w_scale = decode_scale(both, W_SCALE, NATIVE)
        elif W_MODE == "group":
            w_scale = decode_scale(raw, W_SCALE, NATIVE)
        if A_MODE == "group":
            a_scale = decode_scale(a_raw, A_SCALE, NATIVE)
        acc = _accumulate(acc, w, a, w_scale, a_scale, W_MODE, A_MODE, PRECISION, TOKENS_LEFT)
        later = start + BLOCK_K
        if BLOCKED:
            raw = load_raw_scale(block_ptr + later // W_GROUP, later < K, W_SCALE)
            if HALVES == 2:
                at = block_ptr + SCALE_HALF + later // W_GROUP
                raw1 = load_raw_scale(at, later < K, W_SCALE)
        elif W_MODE == "fold" or W_MODE == "group":
            raw = _scales(
                w_scale_ptr, w_scale_row, inside_r, later, K, W_SCALE, W_MODE, W_GROUP, BLOCK_K
            )
        if w_zero_ptr is not None:
            at = w_zero_ptr + w_scale_row + later // W_GROUP
            zero = tl.load(at, mask=inside_r & (later < K), other=0)
        if A_MODE == "group":
            at = a_scale_ptr + a_scale_row + later // A_GROUP
            a_raw = load_raw_scale(at, inside_m & (later < K), A_SCALE)

    if back is not None:
        acc = acc * (back[None, :] if TOKENS_LEFT else back[:, None])
    acc0, acc1 = _part_halves(acc, HALVES, TOKENS_LEFT)
    n = first + tl.arange(0, BLOCK_N)
    inside_n = n < N
    scale_at = n * 0 if W_ROWS == 0 else n // W_ROWS
    w_scale_row = (matrix * SCALE_ROWS + scale_at) * SCALE_COLUMNS
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


@triton.jit(do_not_specialize=["max_tiles", "alpha", "beta", "limit", "rows_per_source"])
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
    TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    """One tile of up to BLOCK_M pairs of one expert by BLOCK_N rows of its matrix."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile = program // TILES_N
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    begin = tl.load(tiles_ptr + max_tiles + tile)
    end = tl.load(tiles_ptr + 2 * max_tiles + tile)
    first = (program % TILES_N) * BLOCK_N
    # What is left of an expert's pairs costs half where half a tile holds it.
    HALF: tl.constexpr = BLOCK_M // 2 if TOKENS_LEFT and BLOCK_M == 128 else BLOCK_M
    if HALF < BLOCK_M and end - begin <= HALF:
        _gemm_tile(
            w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
            pairs_ptr, begin, end, expert, first,
            bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
            alpha, beta, limit, rows_per_source,
            K, N, HALVES, ACTIVATION, LIMITED, W_CODES, W_SCALE, W_MODE, W_GROUP, W_ROWS,
            A_CODES, A_SCALE, A_MODE, A_GROUP, OPERAND, NATIVE, PRECISION,
            HALF, BLOCK_N, BLOCK_K, TOKENS_LEFT,
        )  # fmt: skip
    else:
        _gemm_tile(
            w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
            pairs_ptr, begin, end, expert, first,
            bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
            alpha, beta, limit, rows_per_source,
            K, N, HALVES, ACTIVATION, LIMITED, W_CODES, W_SCALE, W_MODE, W_GROUP, W_ROWS,
            A_CODES, A_SCALE, A_MODE, A_GROUP, OPERAND, NATIVE, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, TOKENS_LEFT,
        )  # fmt: skip
