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
from moelten.kernels.triton_epilogue import finish, store_pairs
from moelten.kernels.triton_variants import Variant


def scaled_constants(variant: Variant) -> dict[str, object]:
    """The kernel's compile-time arguments that a variant decides."""
    w, a = variant.weights, variant.activations
    return {
        "W_CODES": w.codes, "A_CODES": a.codes, "A_MODE": a.mode,
        "SCALE": w.scale, "GROUP": w.group,
        "BLOCK_N": variant.block_n, "BLOCK_K": variant.block_k,
    }  # fmt: skip


@triton.jit
def _load(pointer, row, inside, start, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Items start .. start + WIDTH - 1 of rows of LENGTH that begin at `row`; outside, zeros.

    Zero codes under a zero scale byte, which is 2**-127 or 0, add nothing.
    """
    column = start + tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < LENGTH)[None, :]
    return tl.load(pointer + row[:, None] + column[None, :], mask=mask, other=0)


@triton.jit(do_not_specialize=["max_tiles", "alpha", "beta", "limit", "rows_per_source"])
def scaled_gemm_kernel(
    w_ptr, w_scale_ptr, w_global_ptr, a_ptr, a_scale_ptr, a_global_ptr,
    pairs_ptr, tiles_ptr, count_ptr, max_tiles,
    bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    alpha, beta, limit, rows_per_source,
    K: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMITED: tl.constexpr,
    W_CODES: tl.constexpr, A_CODES: tl.constexpr, A_MODE: tl.constexpr,
    SCALE: tl.constexpr, GROUP: tl.constexpr,
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
    pair = tl.load(pairs_ptr + position, mask=inside_m, other=0)
    source = pair // rows_per_source
    a_row = source.to(tl.int64)
    matrix = expert * HALVES
    first_n = (program % TILES_N) * BLOCK_N

    # Rows of two parts in turn: of both halves, or of the first and the second half of the tile.
    # NOTE: Blackwell's accumulators hold a row a thread, and a row of 128 tokens with all that
    # scales them spills; parted, the rows move to a layout that spreads the tokens.
    PART: tl.constexpr = BLOCK_N * HALVES // 2
    r = tl.arange(0, 2 * PART)
    n = first_n + r // 2
    half = r % 2
    if HALVES == 1:
        n += half * PART
        half = half * 0
    inside_r = n < N
    w_row = (matrix + half) * N + n
    PER_W: tl.constexpr = 2 if W_CODES == "e2m1" else 1
    PER_A: tl.constexpr = 2 if A_CODES == "e2m1" else 1
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    STEP: tl.constexpr = BLOCK_K // GROUP

    acc = tl.zeros((2 * PART, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        w = _load(
            w_ptr, w_row * (K // PER_W), inside_r, start // PER_W, K // PER_W, BLOCK_K // PER_W
        )
        a = _load(
            a_ptr, a_row * (K // PER_A), inside_m, start // PER_A, K // PER_A, BLOCK_K // PER_A
        )
        w_scale = _load(w_scale_ptr, w_row * GROUPS, inside_r, start // GROUP, GROUPS, STEP)
        if A_MODE == "dot":
            a_scale = _load(a_scale_ptr, a_row * GROUPS, inside_m, start // GROUP, GROUPS, STEP)
        elif A_CODES == "bf16":
            a_scale = None
        else:
            # Ones: Blackwell's instruction cannot do without.
            a_scale = tl.full((BLOCK_M, STEP), 127, tl.uint8)
        acc = scaled_dot(w, w_scale, a, a_scale, acc, W_CODES, A_CODES, SCALE)

    token_scale = None
    if A_MODE == "row":
        token_scale = tl.load(a_scale_ptr + source, mask=inside_m, other=0.0)
    a_global = None
    if a_global_ptr is not None:
        a_global = tl.load(a_global_ptr + source, mask=inside_m, other=0.0)
    acc0, acc1 = tl.split(tl.permute(tl.reshape(acc, (PART, 2, BLOCK_M)), (0, 2, 1)))
    n0 = first_n + tl.arange(0, PART)
    n1 = n0 if HALVES == 2 else n0 + PART
    h0 = finish(
        acc0, w_scale_ptr, w_global_ptr, bias_ptr, token_scale, a_global, matrix, n0,
        n0 < N, n0, N, SCALE, "dot", A_MODE, False,
    )  # fmt: skip
    h1 = finish(
        acc1, w_scale_ptr, w_global_ptr, bias_ptr, token_scale, a_global, matrix + HALVES - 1, n1,
        n1 < N, n1, N, SCALE, "dot", A_MODE, False,
    )  # fmt: skip
    store_pairs(
        h0, h1, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit,
        expert, pair, inside_m, n0, n0 < N, N, ACTIVATION, LIMITED,
    )  # fmt: skip
    if HALVES == 1:
        store_pairs(
            h1, h1, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit,
            expert, pair, inside_m, n1, n1 < N, N, ACTIVATION, LIMITED,
        )  # fmt: skip
