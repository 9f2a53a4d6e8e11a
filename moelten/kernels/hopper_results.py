"""What follows the sums of a piece of work in the Hopper GEMM for many tokens per expert, in Gluon.

Scales of rows and tokens, bias and activation, as everywhere (`hopper_epilogue`), and rows of the
result: GEMM1's in the order of operands, for the next GEMM, GEMM2's for the sum over slots
(`hopper_sums`). 32 tokens at a time, for which little shared memory and few registers do.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_epilogue import finish, over_rows, over_tokens, token_scales
from moelten.kernels.hopper_products import TOKENS
from moelten.kernels.hopper_sums import store_sums


@gluon.jit
def _store_ordered(y, out_ptr, first, stop, n0, P: gl.constexpr):
    """[outputs n0 .. , positions first ..] to memory, 16 bytes per lane, in the order of operands:
    what the next GEMM reads."""
    OUTPUTS: gl.constexpr = y.shape[0]
    TOKENS: gl.constexpr = y.shape[1]
    WIDTH: gl.constexpr = P.width
    VECTOR: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    L: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 * VECTOR // OUTPUTS, OUTPUTS // VECTOR], [gl.num_warps(), 1], [1, 0]
    )
    y = y.to(out_ptr.dtype.element_ty)
    y = y.reshape([OUTPUTS // 32, 4, 2, 2, 2, TOKENS]).permute((5, 0, 2, 3, 1, 4))
    y = gl.convert_layout(y.reshape([TOKENS, OUTPUTS]), L)
    position = first + gl.arange(0, TOKENS, gl.SliceLayout(1, L))
    n = n0 + gl.arange(0, OUTPUTS, gl.SliceLayout(0, L))
    at = out_ptr + position.to(gl.int64)[:, None] * WIDTH + n[None, :]
    gl.store(at, y, mask=(position < stop)[:, None] & (n < WIDTH)[None, :])


@gluon.jit
def _together(sums):
    """Tensors of some tokens' sums each, [rows, tokens], as one."""
    if len(sums) == 1:
        return sums[0]
    else:
        HALF: gl.constexpr = len(sums) // 2
        low, high = _together(sums[:HALF]), _together(sums[HALF:])
        return gl.join(low, high).permute((0, 2, 1)).reshape([low.shape[0], 2 * low.shape[1]])


@gluon.jit
def _bring_nearer(pointer, at, inside):
    """Have numbers in the second-level cache, from where they come sooner."""
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2;}",
        "=r,l,r", [(pointer + at).to(gl.uint64, bitcast=True), inside.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def announce(epilogue, expert, row_tile, P: gl.constexpr):
    """What `finish_piece` will read of the rows of a piece of work, lest it wait for memory."""
    row_scale_ptr, _, _, bias_ptr, _, post_ptr, _, _, _, _ = epilogue
    COUNT: gl.constexpr = P.variant.tiles * 64
    HALVES: gl.constexpr = P.halves
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    i = gl.arange(0, COUNT, L)
    row = row_tile * 64 + i
    if row_scale_ptr is not None:
        at = expert * (P.row_tiles * 64) + row
        _bring_nearer(row_scale_ptr, at, row < P.row_tiles * 64)
    n = row_tile * (64 // HALVES) + i % (COUNT // HALVES)
    if bias_ptr is not None:
        at = expert * (HALVES * P.rows) + i // (COUNT // HALVES) * P.rows + n
        _bring_nearer(bias_ptr, at, n < P.rows)
    if post_ptr is not None:
        _bring_nearer(post_ptr, expert * P.rows + n, n < P.rows)


@gluon.jit
def _finish_band(sums, rows, tokens, epilogue, expert, row_tile, P: gl.constexpr):
    """What follows 32 tokens' sums of a band, which begins with a row tile: [outputs, 32].

    rows, tokens: what scales these sums; 0 for none
    """
    row_scale_ptr, x_scale_ptr, _, bias_ptr, table_ptr, post_ptr, _, alpha, beta, limit = epilogue
    W: gl.constexpr = P.weights
    ACTIVATION: gl.constexpr = P.activation
    sums = _together(sums)
    if row_scale_ptr is not None:
        own = rows.reshape([sums.shape[0]])
        own = gl.convert_layout(own, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)
        sums = sums * own.expand_dims(1)
    if x_scale_ptr is not None:
        sums = sums * tokens
    return finish(
        sums, bias_ptr, table_ptr, post_ptr, expert, row_tile, 0,
        alpha, beta, limit, P.rows, W, P.halves, ACTIVATION, P.limited,
    )  # fmt: skip


@gluon.jit
def _finish_part(sums, rows, tokens, epilogue, expert, first, stop, row_tile, P: gl.constexpr):
    """What follows 32 tokens' sums of each band, which begin at position `first`."""
    _, _, _, _, _, _, out_ptr, _, _, _ = epilogue
    WHOLE: gl.constexpr = P.row_tiles % P.variant.tiles == 0
    TEAMS: gl.constexpr = P.variant.teams
    # Bands that are stored together: 256 rows for the order of sums.
    SET: gl.constexpr = 1 if P.ordered else 4 // TEAMS
    SETS: gl.constexpr = P.variant.bands // SET
    for s in gl.static_range(SETS):
        tile = row_tile + TEAMS * SET * s
        if WHOLE or tile < P.row_tiles:
            bands = ()
            for b in gl.static_range(s * SET, (s + 1) * SET):
                y = _finish_band(
                    sums[b], rows[b], tokens, epilogue, expert, row_tile + TEAMS * b, P
                )
                bands = bands + (y,)
            if P.ordered:
                _store_ordered(bands[0], out_ptr, first, stop, tile * (64 // P.halves), P)
            else:
                store_sums(bands, out_ptr, first, stop, tile * 64, P.width)


@gluon.jit
def row_factors(epilogue, expert, row_tile, L: gl.constexpr, P: gl.constexpr):
    """What scales the rows of each band of a piece of work, for sums of a layout; 0 for none."""
    row_scale_ptr, _, _, _, _, _, _, _, _, _ = epilogue
    ROWS: gl.constexpr = 16 * P.variant.warps
    BANDS: gl.constexpr = P.variant.bands
    rows = ()
    for b in gl.static_range(BANDS):
        own = 0
        if row_scale_ptr is not None:
            tile = row_tile + P.variant.teams * b
            own = over_rows(row_scale_ptr, expert, tile, ROWS, P.row_tiles, L)
        rows = rows + (own,)
    return rows


@gluon.jit
def _of_part(acc, i: gl.constexpr, P: gl.constexpr):
    """The i-th 32 tokens' sums of each band."""
    COUNT: gl.constexpr = 32 // TOKENS
    BANDS: gl.constexpr = P.variant.bands
    out = ()
    for b in gl.static_range(BANDS):
        out = out + (acc[b * P.held + i * COUNT : b * P.held + (i + 1) * COUNT],)
    return out


@gluon.jit
def finish_piece(acc, rows, epilogue, expert, first, stop, row_tile, P: gl.constexpr):
    """What follows the sums of a piece of work, whose `row_factors` are given."""
    _, x_scale_ptr, sources_ptr, _, _, _, _, _, _, _ = epilogue
    PARTS: gl.constexpr = P.held * TOKENS // 32
    L: gl.constexpr = _together(_of_part(acc, 0, P)[0]).type.layout
    tokens = ()
    for i in gl.static_range(PARTS):
        own = 0
        if x_scale_ptr is not None:
            own = token_scales(x_scale_ptr, first + 32 * i, stop, sources_ptr, 1, 32)
        tokens = tokens + (own,)
    for i in gl.static_range(PARTS):
        at = first + 32 * i
        if i == 0 or at < stop:
            factors = 0
            if x_scale_ptr is not None:
                factors = over_tokens(tokens[i], L)
            sums = _of_part(acc, i, P)
            _finish_part(sums, rows, factors, epilogue, expert, at, stop, row_tile, P)
