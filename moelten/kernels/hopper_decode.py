"""The Hopper grouped GEMM for few tokens per expert, in Gluon: weights stream once, at full speed.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

A program owns a tile: 64 rows of one expert's matrix by up to `block` of its tokens. Its warps
split the columns, so that every byte of weights and of activations goes from memory straight to the
registers of the one warp that uses it; nothing in the loop is shared, nothing waits for another
warp. A row group's next load is issued as soon as its registers are free, and has until the loop
comes round. At the end the warps' sums meet in shared memory, are added in order, and the epilogue
follows: scales of rows, bias, activation, router weight.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moelten.kernels.hopper_epilogue import (
    finish,
    over_rows,
    over_tokens,
    store_pairs,
    token_scales,
)
from moelten.kernels.hopper_fragments import (
    chunk_word,
    chunk_zero,
    load_layout,
    multiply,
    parameter_strides,
    scale_words,
    sum_layout,
    token_layout,
    tokens,
    zero_words,
)

_RUNTIME = ("max_tiles", "splits", "per_split", "split_stride", "alpha", "beta", "limit",
            "rows_per_source")  # fmt: skip


@gluon.jit
def _sums(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, first_pair, stop_pair, pairs_ptr, matrix, split,
    per_split, rows_per_source,
    K: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr, OPERAND: gl.constexpr,
    X_GROUPS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Sums [row group, b, g, tokens] of one tile over one split of the columns."""
    CHUNKS: gl.constexpr = (K + 63) // 64
    STEPS: gl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    CHUNK_WORDS: gl.constexpr = W.code.bits * 128
    SUPER_BLOCKS: gl.constexpr = (CHUNKS + 3) // 4
    # A count known only at run time, lest the loop be unrolled and its loads sink to their use.
    start = split * per_split
    stop = gl.minimum(start + per_split, STEPS)

    LOAD: gl.constexpr = load_layout(WARPS, W.code.bits // 4)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LOAD)))[:, None, None]
    load = gl.arange(0, W.code.bits // 4, gl.SliceLayout(0, gl.SliceLayout(2, LOAD)))[None, :, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))[None, None, :]
    w_at = w_ptr + matrix * (CHUNKS * CHUNK_WORDS) + (load * 512 + word)
    w_step = _chunk(start, warp, WARPS, CHUNKS) * CHUNK_WORDS
    s_at = w_at
    s_step = w_step
    s_warp = warp
    S: gl.constexpr = (0, 0, 0) if scale_ptr is None else parameter_strides(W, SCALE, False)
    if scale_ptr is not None:
        s_warp, s_lane = scale_words(W, SCALE, WARPS)
        s_at = scale_ptr + matrix * (SUPER_BLOCKS * S[0]) + s_lane + chunk_word(s_warp, W, SCALE)
        s_step = _super_block(start, s_warp, WARPS, SUPER_BLOCKS) * S[0]
    z_at = w_at
    z_step = w_step
    z_warp = warp
    z_bit = 0
    Z: gl.constexpr = (0, 0, 0) if zero_ptr is None else parameter_strides(W, SCALE, True)
    Z_BLOCKS: gl.constexpr = 1 if W.group == 0 else SUPER_BLOCKS
    if zero_ptr is not None:
        z_warp, z_lane = zero_words(W, WARPS)
        z_word, z_bit = chunk_zero(z_warp, W)
        z_at = zero_ptr + matrix * (Z_BLOCKS * Z[0]) + z_lane + z_word
        z_step = _super_block(start, z_warp, WARPS, Z_BLOCKS) * Z[0]
    w = ()
    s = ()
    z = ()
    for i in gl.static_range(4):
        w = w + (gl.load(w_at + (w_step + i * 128), eviction_policy="evict_first"),)
        if scale_ptr is not None:
            s = s + (gl.load(s_at + (s_step + i * S[1])),)
        else:
            s = s + (0,)
        if zero_ptr is not None:
            z = z + (gl.load(z_at + (z_step + i * Z[1])),)
        else:
            z = z + (0,)
    if WAIT:
        gdc_wait()

    TOKEN: gl.constexpr = token_layout(WARPS, TOKENS)
    ROW_WORDS: gl.constexpr = (K + 7) // 8 * 4
    token = first_pair + gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, TOKEN)))
    inside = token < stop_pair
    pair = gl.load(pairs_ptr + token, mask=inside, other=0)
    source = (pair // rows_per_source).to(gl.int64) * ROW_WORDS
    block = gl.arange(0, 2 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TOKEN)))[:, None, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, TOKEN)))[None, None, :]
    column = block * 16 + column
    x_at = x_ptr + source[None, :, None] + column
    inside = inside[None, :, None]
    x = _load_tokens(x_at, inside, column, start, WARPS, ROW_WORDS)

    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    U: gl.constexpr = gl.SliceLayout(1, MMA)
    u_warp = gl.arange(0, WARPS, gl.SliceLayout(1, U))[:, None]
    u_at = x_scale_ptr
    u = None
    if X_GROUPS > 1:
        token = first_pair + gl.arange(0, TOKENS, gl.SliceLayout(0, U))
        pair = gl.load(pairs_ptr + gl.minimum(token, stop_pair - 1))
        u_at = x_scale_ptr + (pair // rows_per_source).to(gl.int64)[None, :] * X_GROUPS
        u = gl.load(u_at + _chunk(start, u_warp, WARPS, CHUNKS) // 2)
    zeros = gl.zeros([WARPS, 16, TOKENS], gl.float32, MMA)
    acc = (zeros, zeros, zeros, zeros)
    for step in range(start + 1, stop):
        w_step = _chunk(step, warp, WARPS, CHUNKS) * CHUNK_WORDS
        if scale_ptr is not None:
            s_step = _super_block(step, s_warp, WARPS, SUPER_BLOCKS) * S[0]
        if zero_ptr is not None:
            z_step = _super_block(step, z_warp, WARPS, Z_BLOCKS) * Z[0]
        b = tokens(x, WARPS, TOKENS, OPERAND)
        x = _load_tokens(x_at, inside, column, step, WARPS, ROW_WORDS)
        own = u
        if X_GROUPS > 1:
            u = gl.load(u_at + _chunk(step, u_warp, WARPS, CHUNKS) // 2)
        sums = ()
        next_w = ()
        next_s = ()
        next_z = ()
        for i in gl.static_range(4):
            # A row group's registers are free as soon as it is decoded: load the next one's.
            zero = z[i] >> z_bit
            sums = sums + (multiply(acc[i], w[i], s[i], own, zero, b, W, SCALE, OPERAND),)
            loaded = gl.load(w_at + (w_step + i * 128), eviction_policy="evict_first")
            next_w = next_w + (loaded,)
            if scale_ptr is not None:
                next_s = next_s + (gl.load(s_at + (s_step + i * S[1])),)
            else:
                next_s = next_s + (0,)
            if zero_ptr is not None:
                next_z = next_z + (gl.load(z_at + (z_step + i * Z[1])),)
            else:
                next_z = next_z + (0,)
        acc = sums
        w = next_w
        s = next_s
        z = next_z
    b = tokens(x, WARPS, TOKENS, OPERAND)
    sums = ()
    for i in gl.static_range(4):
        sums = sums + (multiply(acc[i], w[i], s[i], u, z[i] >> z_bit, b, W, SCALE, OPERAND),)
    total = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))
    # Axes warp, b g, token, row group.
    total = total.permute((0, 4, 3, 1, 2)).reshape([WARPS, 4, 2, 8, TOKENS])
    return gl.sum(gl.convert_layout(total, sum_layout(WARPS, TOKENS)), 0)


@gluon.jit
def _chunk(step, warp, WARPS: gl.constexpr, CHUNKS: gl.constexpr):
    """A warp's chunk; past the last one, that again, where activations are zeros."""
    chunk = step * WARPS + warp
    if CHUNKS % WARPS != 0:
        chunk = gl.minimum(chunk, CHUNKS - 1)
    return chunk


@gluon.jit
def _super_block(step, warp, WARPS: gl.constexpr, SUPER_BLOCKS: gl.constexpr):
    block = step * (WARPS // 4) + warp // 4
    if WARPS > 4 or SUPER_BLOCKS == 1:
        block = gl.minimum(block, SUPER_BLOCKS - 1)
    return block


@gluon.jit
def _load_tokens(at, inside, column, step, WARPS: gl.constexpr, ROW_WORDS: gl.constexpr):
    if ROW_WORDS % (32 * WARPS) != 0:
        inside = inside & (step * (32 * WARPS) + column < ROW_WORDS)
    return gl.load(at + step * (32 * WARPS), mask=inside, other=0)


@gluon.jit
def _tile(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr, table_ptr,
    post_ptr, router_ptr, out_ptr, first_pair, stop_pair, expert, row_tile, split,
    per_split, matrix, rows_per_source, alpha, beta, limit,
    K: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr,
    OPERAND: gl.constexpr, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr,
    X_GROUPS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    acc = _sums(
        x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, first_pair, stop_pair, pairs_ptr, matrix,
        split, per_split, rows_per_source, K, W, SCALE, OPERAND, X_GROUPS, TOKENS, WARPS, WAIT,
    )  # fmt: skip
    acc = acc.reshape([64, acc.shape[3]])
    L: gl.constexpr = acc.type.layout
    if x_scale_ptr is not None and X_GROUPS == 1:
        tokens = token_scales(
            x_scale_ptr, first_pair, stop_pair, pairs_ptr, rows_per_source, acc.shape[1]
        )
        acc = acc * over_tokens(tokens, L)
    if row_scale_ptr is not None:
        acc = acc * over_rows(row_scale_ptr, expert, row_tile, 64, (N * HALVES + 63) // 64, L)
    y = finish(
        acc, bias_ptr, table_ptr, post_ptr, expert, row_tile, split,
        alpha, beta, limit, N, W, HALVES, ACTIVATION, LIMITED,
    )  # fmt: skip
    first_row = row_tile * (64 // HALVES)
    store_pairs(y, router_ptr, out_ptr, pairs_ptr, first_pair, stop_pair, first_row, N)


@gluon.jit(do_not_specialize=_RUNTIME)
def decode_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, tiles_ptr, count_ptr,
    max_tiles, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr, splits, per_split, split_stride,
    alpha, beta, limit, rows_per_source,
    K: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, W: gl.constexpr, SCALE: gl.constexpr,
    OPERAND: gl.constexpr, ACTIVATION: gl.constexpr, LIMITED: gl.constexpr,
    X_GROUPS: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """One tile of one expert: 64 rows (of both halves) by up to BLOCK pairs, one split of K."""
    ROW_TILES: gl.constexpr = (N * HALVES + 63) // 64
    if FIRST:
        # The plan's; later kernels may read it before they wait, for weights that they prefetch.
        gdc_wait()
    gdc_launch_dependents()
    program = gl.program_id(0)
    split = program % splits
    row_tile = program // splits % ROW_TILES
    tile = program // (splits * ROW_TILES)
    # All at once; what lies past the last tile is undefined and unused.
    count = gl.load(count_ptr)
    expert = gl.load(tiles_ptr + tile).to(gl.int64)
    first = gl.load(tiles_ptr + max_tiles + tile)
    stop = gl.load(tiles_ptr + 2 * max_tiles + tile)
    if tile >= count:
        return
    matrix = expert * ROW_TILES + row_tile
    out_ptr += split * split_stride
    if BLOCK > 8 and stop - first > 8:
        _tile(
            x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr,
            table_ptr, post_ptr, router_ptr, out_ptr, first, stop, expert, row_tile, split,
            per_split, matrix, rows_per_source, alpha, beta, limit,
            K, N, HALVES, W, SCALE, OPERAND, ACTIVATION, LIMITED, X_GROUPS, BLOCK, WARPS, not FIRST,
        )  # fmt: skip
    else:
        # Most tiles of small experts: fewer columns than BLOCK cost less.
        _tile(
            x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, bias_ptr,
            table_ptr, post_ptr, router_ptr, out_ptr, first, stop, expert, row_tile, split,
            per_split, matrix, rows_per_source, alpha, beta, limit,
            K, N, HALVES, W, SCALE, OPERAND, ACTIVATION, LIMITED, X_GROUPS, 8, WARPS, not FIRST,
        )  # fmt: skip
