"""The grouped GEMM on instructions that multiply blocks' scales in: Blackwell's and CDNA4's.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

Codes and scales reach the matrix unit as they are stored; nothing is decoded. (CDNA4 converts to
bf16 by block too, for bf16 activations.) Blackwell's unit takes 128 rows at once, so rows of both
halves take turns in one operand, gate, up, gate, up, and part again in the epilogue, which is that
of `triton_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moelten.kernels.triton_casts import scaled_dot
from moelten.kernels.triton_epilogue import finish, store_pairs, token_factors


@triton.jit
def _load(pointer, row, inside, start, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Items start .. start + WIDTH - 1 of rows of LENGTH that begin at `row`; outside, zeros.

    Zero codes under a zero scale byte, which is 2**-127 or 0, add nothing.
    """
    column = start + tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < LENGTH)[None, :]
    return tl.load(pointer + row[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def _rows(expert, first, P: tl.constexpr):
    """Of each row of a tile: which of all experts' it is, and whether there is such a row.

    Rows of two parts in turn: of both halves, or of the first and the second half of the tile.
    """
    # NOTE: Blackwell's accumulators hold a row a thread, and a row of 128 tokens with all that
    # scales them spills; parted, the rows move to a layout that spreads the tokens.
    PART: tl.constexpr = P.tile_rows // 2
    r = tl.arange(0, 2 * PART)
    n = first + r // 2
    half = r % 2
    if P.halves == 1:
        n += half * PART
        half = half * 0
    inside = n < P.rows
    return (expert * P.halves + half) * P.rows + n, inside


@triton.jit
def _sums(weights, x, expert, first, inside_m, source, P: tl.constexpr):
    """Sums [rows, tokens] of a tile, rows in the order of `_rows`."""
    w_ptr, w_scale_ptr, _, _ = weights
    a_ptr, a_scale_ptr, _ = x
    W_CODES: tl.constexpr = P.weights.codes
    A_CODES: tl.constexpr = P.activations.codes
    SCALE: tl.constexpr = P.weights.scale
    PER_W: tl.constexpr = 2 if W_CODES == "e2m1" else 1
    PER_A: tl.constexpr = 2 if A_CODES == "e2m1" else 1
    a_row = source.to(tl.int64)
    w_row, inside_r = _rows(expert, first, P)
    K: tl.constexpr = P.columns
    BLOCK_K: tl.constexpr = P.variant.block_k
    GROUP: tl.constexpr = P.weights.group
    GROUPS: tl.constexpr = P.scale_columns
    STEP: tl.constexpr = BLOCK_K // GROUP
    TOKENS: tl.constexpr = source.shape[0]
    ROWS: tl.constexpr = w_row.shape[0]
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, BLOCK_K):
        w = _load(
            w_ptr, w_row * (K // PER_W), inside_r, start // PER_W, K // PER_W, BLOCK_K // PER_W
        )
        a = _load(
            a_ptr, a_row * (K // PER_A), inside_m, start // PER_A, K // PER_A, BLOCK_K // PER_A
        )
        w_scale = _load(w_scale_ptr, w_row * GROUPS, inside_r, start // GROUP, GROUPS, STEP)
        if P.activations.mode == "dot":
            a_scale = _load(a_scale_ptr, a_row * GROUPS, inside_m, start // GROUP, GROUPS, STEP)
        elif A_CODES == "bf16":
            a_scale = None
        else:
            # Ones: Blackwell's instruction cannot do without.
            a_scale = tl.full((TOKENS, STEP), 127, tl.uint8)
        acc = scaled_dot(w, w_scale, a, a_scale, acc, W_CODES, A_CODES, SCALE)
    return acc


@triton.jit(do_not_specialize=["max_tiles", "alpha", "beta", "limit", "rows_per_source"])
def scaled_gemm_kernel(
    w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
    pairs_ptr, tiles_ptr, count_ptr, max_tiles,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    alpha, beta, limit, rows_per_source, P: tl.constexpr,
):  # fmt: skip
    """One tile of pairs of one expert by BLOCK_N rows of its matrix (of both halves)."""
    program = tl.program_id(0)
    tile = program // P.row_tiles
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    BLOCK: tl.constexpr = P.block
    position = tl.load(tiles_ptr + max_tiles + tile) + tl.arange(0, BLOCK)
    inside = position < tl.load(tiles_ptr + 2 * max_tiles + tile)
    pair = tl.load(pairs_ptr + position, mask=inside, other=0)
    source = pair // rows_per_source
    first = program % P.row_tiles * P.variant.block_n
    weights = (w_ptr, w_scale_ptr, w_zero_ptr, w_global_ptr)
    x = (a_ptr, a_scale_ptr, a_global_ptr)
    epilogue = (bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit)
    acc = _sums(weights, x, expert, first, inside, source, P)
    tokens = token_factors(x, source, inside, P)
    PART: tl.constexpr = P.tile_rows // 2
    acc0, acc1 = tl.split(tl.permute(tl.reshape(acc, (PART, 2, BLOCK)), (0, 2, 1)))
    n0 = first + tl.arange(0, PART)
    n1 = n0 if P.halves == 2 else n0 + PART
    h0 = finish(acc0, weights, x, tokens, epilogue, expert, 0, n0, P)
    h1 = finish(acc1, weights, x, tokens, epilogue, expert, P.halves - 1, n1, P)
    store_pairs(h0, h1, epilogue, expert, pair, inside, n0, P)
    if P.halves == 1:
        store_pairs(h1, h1, epilogue, expert, pair, inside, n1, P)
