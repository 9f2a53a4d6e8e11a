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
from moelten.kernels.triton_casts import INTERPRET, abs_bits, dot, only_if, widen
from moelten.kernels.triton_decode import (
    columns_of,
    decode_bytes,
    decode_scale,
    decode_words,
    load_raw_scale,
)
from moelten.kernels.triton_epilogue import (
    NO_EPILOGUE,
    Epilogue,
    finish,
    row_of_scales,
    store_pairs,
    token_factors,
)
from moelten.kernels.triton_ops import Rows
from moelten.kernels.triton_plan import TilePlan
from moelten.kernels.triton_problem import Problem
from moelten.kernels.triton_scaled import scaled_gemm_kernel
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
    table = epilogue.parameters if isinstance(epilogue.parameters, Tensor) else None
    alpha, beta, limit = (1.0, 0.0, 0.0) if table is not None else epilogue.parameters
    limited = table is not None or limit != float("inf")
    problem = Problem(height, columns, halves, epilogue.activation, limited, plan.block, variant)
    launch(
        scaled_gemm_kernel if variant.block_scaled else gemm_kernel,
        (plan.max_tiles * problem.row_tiles,),
        stored(matrix.data, variant, columns), as_bytes(matrix.scale), matrix.zero,
        matrix.global_scale, stored(rows.data, variant, columns), rows.scale, rows.global_scale,
        plan.pairs, plan.tiles, plan.count, plan.max_tiles,
        epilogue.bias, table, epilogue.post_scale,
        None if epilogue.router is None else epilogue.router.contiguous(), out,
        alpha, beta, limit, rows_per_source, P=problem, **({} if INTERPRET else variant.launch),
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


@triton.constexpr_function
def _per_item(kind, codes):
    """How many codes an item of a pointer's type holds."""
    if kind == tl.int32:
        return 8
    return 2 if codes in ("int4", "e2m1") else 1


@triton.constexpr_function
def _in_fragments(weights, activations, problem):
    """Whether both operands have their columns in the order of a left fragment (`triton_decode`).

    weights, activations: types of the pointers
    """
    words = weights == tl.int32 and not problem.variant.tokens_left
    either = problem.activations.codes == "float" or activations == tl.int32
    return words and either and problem.variant.block_k >= 32


# Operands -----------------------------------------------------------------------------------------


@triton.jit
def _values(
    pointer, row, inside, zero, scale, unit, start,
    SIDE: tl.constexpr, FRAGMENT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One side's values [R, BLOCK_K] from column `start`, exact in the operand type; outside the
    matrix, zeros.

    row: int64 [R], where each row's codes begin; zero: [R] or None; scale, unit: for mode "fold".
    """
    CODES: tl.constexpr = SIDE.codes
    SCALE: tl.constexpr = SIDE.scale
    OPERAND: tl.constexpr = P.operand
    NATIVE: tl.constexpr = P.variant.native_fp8
    PER_ITEM: tl.constexpr = _per_item(pointer.dtype.element_ty, CODES)
    ITEMS: tl.constexpr = P.variant.block_k // PER_ITEM
    k = start // PER_ITEM + tl.arange(0, ITEMS)
    mask = inside[:, None] & (k < P.columns // PER_ITEM)[None, :]
    if CODES == "float":
        return tl.load(pointer + row[:, None] + k[None, :], mask=mask, other=0.0)
    codes = tl.load(pointer + row[:, None] + k[None, :], mask=mask, other=0)
    factor = None
    if SIDE.mode == "fold":
        factor = decode_scale(scale, SCALE, NATIVE)
        if unit is not None:
            factor = factor * (unit if len(factor.shape) == 1 else unit[:, None])
    if PER_ITEM == 8:
        return decode_words(codes, zero, factor, CODES, OPERAND, FRAGMENT)
    else:
        return decode_bytes(codes, zero, factor, CODES, OPERAND, NATIVE)


@triton.jit
def _activations(x, tokens, start, FRAGMENT: tl.constexpr, P: tl.constexpr):
    """Activations [tokens, BLOCK_K] from column `start`, in the same order as weights."""
    a_ptr, a_scale_ptr, _ = x
    inside, row, scale_row = tokens
    A: tl.constexpr = P.activations
    if FRAGMENT and A.codes == "float":
        BLOCK_K: tl.constexpr = P.variant.block_k
        k = start + columns_of(tl.arange(0, BLOCK_K), BLOCK_K)
        mask = inside[:, None] & (k < P.columns)[None, :]
        return tl.load(a_ptr + row[:, None] + k[None, :], mask=mask, other=0.0)
    else:
        scale = None
        if A.mode == "fold":
            scale = _scales(a_scale_ptr, scale_row, inside, start, A, P)
        return _values(a_ptr, row, inside, None, scale, None, start, A, FRAGMENT, P)


# Scales -------------------------------------------------------------------------------------------


@triton.jit
def _scales(pointer, row, inside, start, SIDE: tl.constexpr, P: tl.constexpr):
    """Undecoded scales of the block at column `start`: [R, groups], or [R] for a single group."""
    KIND: tl.constexpr = SIDE.scale
    COUNT: tl.constexpr = P.variant.block_k // SIDE.group
    if SIDE.mode == "fold" and COUNT > 1:
        g = start // SIDE.group + tl.arange(0, COUNT)
        mask = inside[:, None] & (g < (P.columns + SIDE.group - 1) // SIDE.group)[None, :]
        return load_raw_scale(pointer + row[:, None] + g[None, :], mask, KIND)
    else:
        return load_raw_scale(
            pointer + row + start // SIDE.group, only_if(start < P.columns, inside), KIND
        )


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
def _parameters(weights, x, rows, tokens, start, P: tl.constexpr):
    """Undecoded scales of rows, zero points and scales of tokens of the block at column `start`.

    0 for what is not there. Where one scale serves the whole tile it is a number for each half.
    """
    _, w_scale_ptr, w_zero_ptr, _ = weights
    _, a_scale_ptr, _ = x
    _, inside_r, _, scale_row, block_ptr = rows
    inside_m, _, token_scale_row = tokens
    W: tl.constexpr = P.weights
    A: tl.constexpr = P.activations
    SCALE: tl.constexpr = W.scale
    scale = 0
    scale1 = 0
    if P.blocked:
        scale = load_raw_scale(block_ptr + start // W.group, start < P.columns, SCALE)
        if P.halves == 2:
            at = block_ptr + P.half_scales + start // W.group
            scale1 = load_raw_scale(at, start < P.columns, SCALE)
    elif W.mode == "fold" or W.mode == "group":
        scale = _scales(w_scale_ptr, scale_row, inside_r, start, W, P)
    zero = 0
    if w_zero_ptr is not None:
        at = w_zero_ptr + scale_row + start // W.group
        zero = tl.load(at, mask=only_if(start < P.columns, inside_r), other=0)
    token_scale = 0
    if A.mode == "group":
        token_scale = _scales(a_scale_ptr, token_scale_row, inside_m, start, A, P)
    return scale, scale1, zero, token_scale


# Sums ---------------------------------------------------------------------------------------------


@triton.jit
def _over_rows(numbers, P: tl.constexpr):
    """Numbers of rows beside sums."""
    return numbers[None, :] if P.variant.tokens_left else numbers[:, None]


@triton.jit
def _over_tokens(numbers, P: tl.constexpr):
    """Numbers of tokens beside sums."""
    return numbers[:, None] if P.variant.tokens_left else numbers[None, :]


@triton.jit
def _row_factors(scale, scale1, half, P: tl.constexpr):
    """What multiplies the sums of each row over a group."""
    ROWS: tl.constexpr = P.tile_rows
    SCALE: tl.constexpr = P.weights.scale
    if P.blocked:
        both = scale + tl.zeros((ROWS,), scale.dtype)
        if P.halves == 2:
            both = tl.where(half == 0, scale, scale1)
        scale = both
    return decode_scale(scale, SCALE, P.variant.native_fp8)


@triton.jit
def _add(acc, w, a, parameters, half, P: tl.constexpr):
    """acc + the product, which alone is scaled where scales belong to groups of K."""
    scale, scale1, _, token_scale = parameters
    W: tl.constexpr = P.weights
    A: tl.constexpr = P.activations
    TOKEN_SCALE: tl.constexpr = A.scale
    PRECISION: tl.constexpr = P.variant.precision
    part = acc
    if W.mode == "group":
        by_row = _row_factors(scale, scale1, half, P)
    if A.mode == "group":
        by_token = decode_scale(token_scale, TOKEN_SCALE, P.variant.native_fp8)
    if P.scales_sums:
        KIND: tl.constexpr = tl.int32 if w.dtype == tl.int8 else tl.float32
        part = tl.zeros(acc.shape, KIND)
    if P.variant.tokens_left:
        part = dot(a, tl.trans(w), part, PRECISION)
    else:
        part = dot(w, tl.trans(a), part, PRECISION)
    if W.mode == "group" and A.mode == "group":
        return acc + part.to(tl.float32) * (_over_tokens(by_token, P) * _over_rows(by_row, P))
    elif W.mode == "group":
        return acc + part.to(tl.float32) * _over_rows(by_row, P)
    elif A.mode == "group":
        return acc + part.to(tl.float32) * _over_tokens(by_token, P)
    else:
        return part


@triton.jit
def _rows(weights, expert, first, P: tl.constexpr):
    """Of each row of a tile: its half, whether there is such a row, where its codes and its scales
    begin; and a pointer to the scales of the tile, if it has its own."""
    w_ptr, w_scale_ptr, _, _ = weights
    KIND: tl.constexpr = w_ptr.dtype.element_ty
    ROWS: tl.constexpr = P.tile_rows
    RUN: tl.constexpr = P.run
    r = tl.arange(0, ROWS)
    half = r // RUN % P.halves
    n = first + (r // RUN // P.halves * RUN + r % RUN)
    inside = n < P.rows
    matrix = expert * P.halves
    row = ((matrix + half) * P.rows + n) * (P.columns // _per_item(KIND, P.weights.codes))
    scale_row = row_of_scales(matrix + half, n, P)
    block_ptr = 0
    if P.blocked:
        block_ptr = w_scale_ptr + row_of_scales(matrix, first, P)
    return half, inside, row, scale_row, block_ptr


@triton.jit
def _sums(weights, x, rows, inside, source, P: tl.constexpr):
    """Sums [rows of all halves, tokens], or [tokens, rows] if tokens are on the left.

    rows:           `_rows`
    inside, source: of each token whether it is one, and its row of activations
    """
    w_ptr, w_scale_ptr, w_zero_ptr, _ = weights
    a_ptr, _, _ = x
    W: tl.constexpr = P.weights
    W_KIND: tl.constexpr = w_ptr.dtype.element_ty
    A_KIND: tl.constexpr = a_ptr.dtype.element_ty
    FRAGMENT: tl.constexpr = _in_fragments(W_KIND, A_KIND, P)
    half, inside_r, row, scale_row, _ = rows
    a_row = source * (P.columns // _per_item(A_KIND, P.activations.codes))
    tokens = (inside, a_row, source * P.token_scales)
    ROWS: tl.constexpr = P.tile_rows
    TOKENS: tl.constexpr = source.shape[0]
    KIND: tl.constexpr = tl.int32 if P.integer else tl.float32
    acc = tl.zeros((TOKENS, ROWS) if P.variant.tokens_left else (ROWS, TOKENS), KIND)
    unit = None
    if P.in_units:
        unit, back = _row_units(w_scale_ptr, scale_row, inside_r, P.scale_columns, P.unit_step)
    # Loaded one step ahead: too small for copies in the background.
    parameters = _parameters(weights, x, rows, tokens, 0, P)
    for start in range(0, P.columns, P.variant.block_k):
        a = _activations(x, tokens, start, FRAGMENT, P)
        zero = parameters[2] if w_zero_ptr is not None else None
        w = _values(
            w_ptr, row, inside_r, zero, parameters[0], unit, start, W, FRAGMENT, P
        )  # fmt: skip
        acc = _add(acc, w, a, parameters, half, P)
        parameters = _parameters(weights, x, rows, tokens, start + P.variant.block_k, P)
    if P.in_units:
        acc = acc * _over_rows(back, P)
    return acc


# Tiles --------------------------------------------------------------------------------------------


@triton.jit
def _part_halves(acc, P: tl.constexpr):
    """Both halves [BLOCK_N, tokens] of the sums; one half twice."""
    if P.variant.tokens_left:
        acc = tl.trans(acc)
    if P.halves == 1:
        return acc, acc
    else:
        ROWS: tl.constexpr = acc.shape[0]
        COLUMNS: tl.constexpr = acc.shape[1]
        RUN: tl.constexpr = P.run
        acc = tl.reshape(acc, (ROWS // (2 * RUN), 2, RUN, COLUMNS))
        h0, h1 = tl.split(tl.permute(acc, (0, 2, 3, 1)))
        shape: tl.constexpr = (ROWS // 2, COLUMNS)
        return tl.reshape(h0, shape), tl.reshape(h1, shape)


@triton.jit
def _tile(weights, x, epilogue, tile, TOKENS: tl.constexpr, P: tl.constexpr):
    """Pairs begin .. end - 1 of one expert by BLOCK_N rows of its matrix (of both halves)."""
    pairs_ptr, rows_per_source, expert, begin, end, first = tile
    position = begin + tl.arange(0, TOKENS)
    inside = position < end
    pair = tl.load(pairs_ptr + position, mask=inside, other=0).to(tl.int64)
    rows = _rows(weights, expert, first, P)
    source = pair // rows_per_source
    acc0, acc1 = _part_halves(_sums(weights, x, rows, inside, source, P), P)
    BLOCK_N: tl.constexpr = P.variant.block_n
    n = first + tl.arange(0, BLOCK_N)
    factors = token_factors(x, source, inside, P)
    h0 = finish(acc0, weights, x, factors, epilogue, expert, 0, n, P)
    h1 = h0
    if P.halves == 2:
        h1 = finish(acc1, weights, x, factors, epilogue, expert, 1, n, P)
    store_pairs(h0, h1, epilogue, expert, pair, inside, n, P)


@triton.jit(do_not_specialize=["max_tiles", "alpha", "beta", "limit", "rows_per_source"])
def gemm_kernel(
    w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
    pairs_ptr, tiles_ptr, count_ptr, max_tiles,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    alpha, beta, limit, rows_per_source, P: tl.constexpr,
):  # fmt: skip
    """One tile of pairs of one expert by BLOCK_N rows of its matrix."""
    program = tl.program_id(0)
    index = program // P.row_tiles
    if index >= tl.load(count_ptr):
        return
    expert = tl.load(tiles_ptr + index).to(tl.int64)
    begin = tl.load(tiles_ptr + max_tiles + index)
    end = tl.load(tiles_ptr + 2 * max_tiles + index)
    weights = (w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr)
    x = (a_ptr, a_scale_ptr, a_global_ptr)
    epilogue = (bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit)
    first = program % P.row_tiles * P.variant.block_n
    tile = (pairs_ptr, rows_per_source, expert, begin, end, first)
    if P.rest < P.block and end - begin <= P.rest:
        _tile(weights, x, epilogue, tile, P.rest, P)
    else:
        _tile(weights, x, epilogue, tile, P.block, P)
