"""What follows the sums of the Hopper GEMMs, in Gluon: fp32 throughout, then one rounding."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.triton_epilogue import activate


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), within 2**-21: neither step has the care of subnormal numbers that it does
    not need. (They are a third of an epilogue's instructions, 1 % of a layer, H200.)"""
    return gl.inline_asm_elementwise(
        "{.reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000;"
        "rcp.approx.ftz.f32 $0, e;}",
        "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def token_scales(scale_ptr, first, stop, pairs_ptr, rows_per_source, COUNT: gl.constexpr):
    """Scales of the rows of activations of up to so many tokens, for `over_tokens`.

    So many positions, or pairs where those are given, share a row. There is one address per lane,
    and not one for each of its tokens: registers are scarce.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    row = gl.minimum(first + gl.arange(0, COUNT, LANES), stop - 1)
    if pairs_ptr is not None:
        row = gl.load(pairs_ptr + row)
    return gl.load(scale_ptr + row // rows_per_source)


@gluon.jit
def over_tokens(scale, L: gl.constexpr):
    """Numbers of tokens, [1, tokens], for sums [rows, tokens] of a layout.

    From lane to lane, where a change of layouts has all warps wait for each other.
    """
    index = gl.arange(0, scale.shape[0], gl.SliceLayout(0, L))
    return gl.gather(scale, index, 0).expand_dims(0)


@gluon.jit
def over_rows(
    row_scale_ptr, expert, row_tile, COUNT: gl.constexpr, ROW_TILES: gl.constexpr, L: gl.constexpr
):
    """Scales of so many rows from a row tile on, [rows, 1], for sums [rows, tokens] of a layout."""
    row = row_tile * 64 + gl.arange(0, COUNT, gl.SliceLayout(1, L))
    at = row_scale_ptr + expert * (ROW_TILES * 64) + row
    return gl.load(at, mask=row < ROW_TILES * 64, other=0.0).expand_dims(1)


@gluon.jit
def finish(
    acc, bias_ptr, table_ptr, post_ptr, expert, row_tile, split, alpha, beta, limit,
    N: gl.constexpr, W: gl.constexpr, HALVES: gl.constexpr, ACTIVATION: gl.constexpr,
    LIMITED: gl.constexpr,
):  # fmt: skip
    """What follows the scaled sums [rows, tokens], in fp32: [outputs, tokens]."""
    TOKENS: gl.constexpr = acc.shape[1]
    ROWS: gl.constexpr = acc.shape[0] // HALVES
    if W.code.epilogue != 1.0:
        acc = acc * W.code.epilogue
    if HALVES == 2:
        # 16 rows of a warp: 8 of either half.
        acc = acc.reshape([acc.shape[0] // 16, 2, 8, TOKENS])
        h0, h1 = gl.split(acc.permute((0, 2, 3, 1)))
        h0 = h0.reshape([ROWS, TOKENS])
        h1 = h1.reshape([ROWS, TOKENS])
    else:
        h0 = acc
        h1 = acc
    OUT: gl.constexpr = h0.type.layout
    n = row_tile * (64 // HALVES) + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    if bias_ptr is not None:
        # The first of several splits brings the bias.
        biased = (n < N) & (split == 0)
        at = bias_ptr + expert * (HALVES * N) + n
        h0 = h0 + gl.load(at, mask=biased, other=0.0)[:, None]
        if HALVES == 2:
            h1 = h1 + gl.load(at + N, mask=biased, other=0.0)[:, None]
    if table_ptr is not None:
        alpha = gl.load(table_ptr + expert * 3)
        beta = gl.load(table_ptr + expert * 3 + 1)
        limit = gl.load(table_ptr + expert * 3 + 2)
    y = activate(h0, h1, alpha, beta, limit, ACTIVATION, LIMITED, _sigmoid)
    if post_ptr is not None:
        y = y * gl.load(post_ptr + expert * N + n, mask=n < N, other=0.0)[:, None]
    return y


@gluon.jit
def store_pairs(
    y, router_ptr, out_ptr, pairs_ptr, first_pair, stop_pair, first_row, N: gl.constexpr
):  # fmt: skip
    """Store y [outputs, tokens], times router weights, as rows of pairs, rounded once.

    Without pairs_ptr positions are pairs.
    """
    OUT: gl.constexpr = y.type.layout
    n = first_row + gl.arange(0, y.shape[0], gl.SliceLayout(1, OUT))
    token = first_pair + gl.arange(0, y.shape[1], gl.SliceLayout(0, OUT))
    inside = token < stop_pair
    pair = token
    if pairs_ptr is not None:
        pair = gl.load(pairs_ptr + token, mask=inside, other=0)
    if router_ptr is not None:
        y = y * gl.load(router_ptr + pair, mask=inside, other=0.0).to(gl.float32)[None, :]
    # Rows are padded to 16 bytes, with zeros: those are what codes past the last row decode to.
    WIDTH: gl.constexpr = (N + 7) // 8 * 8
    at = out_ptr + pair.to(gl.int64)[None, :] * WIDTH + n[:, None]
    gl.store(at, y.to(out_ptr.dtype.element_ty), mask=(n < WIDTH)[:, None] & inside[None, :])
