"""The Hopper grouped GEMM for few tokens per expert, in Gluon: weights stream once, at full speed.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

A program owns a tile: 64 rows of one expert's matrix by up to `block` of its tokens. Its warps
split the columns, so that every byte of weights and of activations goes from memory straight to the
registers of the one warp that uses it; nothing in the loop is shared, nothing waits for another
warp. A row group's next load is issued as soon as its registers are free, and has until the loop
comes round. At the end the warps' sums meet in shared memory, are added in order, and the epilogue
follows: scales of rows, bias, activation, router weight.

A step is a chunk of 64 columns for each warp. What is read of one is a stream: where a lane's
words of the first chunk are, whose warp they are, and how far the next ones lie apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moelten.kernels.hopper_codes import Storage
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
from moelten.kernels.hopper_schedule import Gemm

_RUNTIME = ("max_tiles", "first_expert", "num_experts", "splits", "per_split", "split_stride",
            "alpha", "beta", "limit", "rows_per_source")  # fmt: skip


@dataclass(frozen=True)
class Task(Gemm):
    """What is compiled into a kernel.

    x_groups:     scales of a row of activations: one, or one for every 128 columns
    block, warps: most tokens of a tile, and what splits its columns
    first:        whether this is the first GEMM
    """

    weights: Storage
    operand: Any
    x_groups: int
    block: int
    warps: int
    first: bool

    @property
    def steps(self) -> int:
        return -(-self.chunks // self.warps)

    @property
    def scaled(self) -> bool:
        """Whether there are scales beside those of rows."""
        return self.scale_type != ""

    @property
    def shifted(self) -> bool:
        """Whether there are zero points."""
        return self.weights.zeros is not None

    @property
    def zero_blocks(self) -> int:
        """Super-blocks of zero points: one, if they serve whole rows."""
        return 1 if self.weights.group == 0 else self.super_blocks

    @property
    def loads(self) -> int:
        """Loads of 16 bytes per lane of a row group's chunk."""
        return self.weights.code.bits // 4

    @property
    def chunk_words(self) -> int:
        return self.weights.code.bits * 128

    @property
    def row_words(self) -> int:
        """Words of a row of activations."""
        return -(-self.columns // 8) * 4


# Weights ------------------------------------------------------------------------------------------


@gluon.jit
def _words(w_ptr, matrix, P: gl.constexpr):
    """The stream of codes."""
    LOAD: gl.constexpr = load_layout(P.warps, P.loads)
    warp = gl.arange(0, P.warps, gl.SliceLayout(1, gl.SliceLayout(2, LOAD)))[:, None, None]
    load = gl.arange(0, P.loads, gl.SliceLayout(0, gl.SliceLayout(2, LOAD)))[None, :, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))[None, None, :]
    return w_ptr + matrix * (P.chunks * P.chunk_words) + (load * 512 + word), warp


@gluon.jit
def _scales(scale_ptr, matrix, P: gl.constexpr):
    """The stream of scales, if there are such."""
    if not P.scaled:
        return 0, 0
    else:
        W: gl.constexpr = P.weights
        SCALE: gl.constexpr = P.scale_type
        S: gl.constexpr = parameter_strides(W, SCALE, False)
        warp, lane = scale_words(W, SCALE, P.warps)
        at = scale_ptr + matrix * (P.super_blocks * S[0]) + lane + chunk_word(warp, W, SCALE)
        return at, warp


@gluon.jit
def _zeros(zero_ptr, matrix, P: gl.constexpr):
    """The stream of zero points, if there are such; and their bit."""
    if not P.shifted:
        return 0, 0, 0
    else:
        W: gl.constexpr = P.weights
        Z: gl.constexpr = parameter_strides(W, "", True)
        warp, lane = zero_words(W, P.warps)
        word, bit = chunk_zero(warp, W)
        return zero_ptr + matrix * (P.zero_blocks * Z[0]) + lane + word, warp, bit


@gluon.jit
def _chunk(step, warp, P: gl.constexpr):
    """A warp's chunk; past the last one, that again, where activations are zeros."""
    chunk = step * P.warps + warp
    if P.chunks % P.warps != 0:
        chunk = gl.minimum(chunk, P.chunks - 1)
    return chunk


@gluon.jit
def _super_block(step, warp, COUNT: gl.constexpr, P: gl.constexpr):
    """The super-block of a warp's chunk, of so many."""
    block = step * (P.warps // 4) + warp // 4
    if P.warps > 4 or COUNT == 1:
        block = gl.minimum(block, COUNT - 1)
    return block


@gluon.jit
def _at_step(streams, step, P: gl.constexpr):
    """How far a step's words, scales and zero points lie from the first one's."""
    words, scales, zeros = streams
    W: gl.constexpr = P.weights
    w = _chunk(step, words[1], P) * P.chunk_words
    s = 0
    if P.scaled:
        S: gl.constexpr = parameter_strides(W, P.scale_type, False)
        s = _super_block(step, scales[1], P.super_blocks, P) * S[0]
    z = 0
    if P.shifted:
        Z: gl.constexpr = parameter_strides(W, "", True)
        z = _super_block(step, zeros[1], P.zero_blocks, P) * Z[0]
    return w, s, z


@gluon.jit
def _load_weights(streams, place, i: gl.constexpr, P: gl.constexpr):
    """Words, scales and zero points of the i-th row group; 0 for what is not there."""
    words, scales, zeros = streams
    w_step, s_step, z_step = place
    w = gl.load(words[0] + (w_step + i * 128), eviction_policy="evict_first")
    s = 0
    if P.scaled:
        S: gl.constexpr = parameter_strides(P.weights, P.scale_type, False)
        s = gl.load(scales[0] + (s_step + i * S[1]))
    z = 0
    if P.shifted:
        Z: gl.constexpr = parameter_strides(P.weights, "", True)
        z = gl.load(zeros[0] + (z_step + i * Z[1]))
    return w, s, z


@gluon.jit
def _add(acc, loaded, x_scale, b, zero_bit, P: gl.constexpr):
    """acc + (a row group's weights of a chunk) @ b."""
    W: gl.constexpr = P.weights
    SCALE: gl.constexpr = P.scale_type
    OPERAND: gl.constexpr = P.operand
    w, s, z = loaded
    return multiply(acc, w, s, x_scale, z >> zero_bit, b, W, SCALE, OPERAND)


# Activations --------------------------------------------------------------------------------------


@gluon.jit
def _token_words(x, first, stop, TOKENS: gl.constexpr, P: gl.constexpr):
    """The stream of activations: addresses, which tokens there are, and columns, in words."""
    x_ptr, _, pairs_ptr, rows_per_source = x
    L: gl.constexpr = token_layout(P.warps, TOKENS)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    inside = token < stop
    pair = gl.where(inside, token, 0)
    if pairs_ptr is not None:
        pair = gl.load(pairs_ptr + token, mask=inside, other=0)
    source = (pair // rows_per_source).to(gl.int64) * P.row_words
    block = gl.arange(0, 2 * P.warps, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    column = block * 16 + column
    return x_ptr + source[None, :, None] + column, inside[None, :, None], column


@gluon.jit
def _load_tokens(stream, step, P: gl.constexpr):
    at, inside, column = stream
    if P.row_words % (32 * P.warps) != 0:
        inside = inside & (step * (32 * P.warps) + column < P.row_words)
    return gl.load(at + step * (32 * P.warps), mask=inside, other=0)


@gluon.jit
def _group_scales(x, first, stop, TOKENS: gl.constexpr, MMA: gl.constexpr, P: gl.constexpr):
    """The stream of scales of groups of activations, [warps, tokens]."""
    _, x_scale_ptr, pairs_ptr, rows_per_source = x
    U: gl.constexpr = gl.SliceLayout(1, MMA)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, U))
    pair = gl.minimum(token, stop - 1)
    if pairs_ptr is not None:
        pair = gl.load(pairs_ptr + pair)
    at = x_scale_ptr + (pair // rows_per_source).to(gl.int64)[None, :] * P.x_groups
    return at, gl.arange(0, P.warps, gl.SliceLayout(1, U))[:, None]


@gluon.jit
def _load_group_scales(stream, step, P: gl.constexpr):
    at, warp = stream
    return gl.load(at + _chunk(step, warp, P) // 2)


# Tiles --------------------------------------------------------------------------------------------


@gluon.jit
def _sums(x, parts, tile, TOKENS: gl.constexpr, P: gl.constexpr):
    """Sums [row group, b, g, tokens] of one tile over one split of the columns."""
    WARPS: gl.constexpr = P.warps
    OPERAND: gl.constexpr = P.operand
    first, stop, expert, row_tile, split, per_split = tile
    w_ptr, scale_ptr, zero_ptr = parts
    # A count known only at run time, lest the loop be unrolled and its loads sink to their use.
    start = split * per_split
    end = gl.minimum(start + per_split, P.steps)
    matrix = expert * P.row_tiles + row_tile
    zeros = _zeros(zero_ptr, matrix, P)
    streams = (_words(w_ptr, matrix, P), _scales(scale_ptr, matrix, P), zeros)
    place = _at_step(streams, start, P)
    loaded = ()
    for i in gl.static_range(4):
        loaded = loaded + (_load_weights(streams, place, i, P),)
    if not P.first:
        gdc_wait()

    x_stream = _token_words(x, first, stop, TOKENS, P)
    words = _load_tokens(x_stream, start, P)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    u = None
    if P.x_groups > 1:
        u_stream = _group_scales(x, first, stop, TOKENS, MMA, P)
        u = _load_group_scales(u_stream, start, P)
    none = gl.zeros([WARPS, 16, TOKENS], gl.float32, MMA)
    acc = (none, none, none, none)
    for step in range(start + 1, end):
        place = _at_step(streams, step, P)
        b = tokens(words, WARPS, TOKENS, OPERAND)
        words = _load_tokens(x_stream, step, P)
        own = u
        if P.x_groups > 1:
            u = _load_group_scales(u_stream, step, P)
        sums = ()
        later = ()
        for i in gl.static_range(4):
            # A row group's registers are free as soon as it is decoded: load the next one's.
            sums = sums + (_add(acc[i], loaded[i], own, b, zeros[2], P),)
            later = later + (_load_weights(streams, place, i, P),)
        acc = sums
        loaded = later
    b = tokens(words, WARPS, TOKENS, OPERAND)
    sums = ()
    for i in gl.static_range(4):
        sums = sums + (_add(acc[i], loaded[i], u, b, zeros[2], P),)
    total = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))
    # Axes warp, b g, token, row group.
    total = total.permute((0, 4, 3, 1, 2)).reshape([WARPS, 4, 2, 8, TOKENS])
    return gl.sum(gl.convert_layout(total, sum_layout(WARPS, TOKENS)), 0)


@gluon.jit
def _tile(x, parts, epilogue, tile, TOKENS: gl.constexpr, P: gl.constexpr):
    """One tile, from its weights to its rows of the result."""
    _, x_scale_ptr, pairs_ptr, rows_per_source = x
    (row_scale_ptr, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
     alpha, beta, limit) = epilogue  # fmt: skip
    first, stop, expert, row_tile, split, _ = tile
    W: gl.constexpr = P.weights
    ACTIVATION: gl.constexpr = P.activation
    acc = _sums(x, parts, tile, TOKENS, P)
    acc = acc.reshape([64, acc.shape[3]])
    L: gl.constexpr = acc.type.layout
    if x_scale_ptr is not None and P.x_groups == 1:
        scale = token_scales(x_scale_ptr, first, stop, pairs_ptr, rows_per_source, TOKENS)
        acc = acc * over_tokens(scale, L)
    if row_scale_ptr is not None:
        acc = acc * over_rows(row_scale_ptr, expert, row_tile, 64, P.row_tiles, L)
    y = finish(
        acc, bias_ptr, table_ptr, post_ptr, expert, row_tile, split,
        alpha, beta, limit, P.rows, W, P.halves, ACTIVATION, P.limited,
    )  # fmt: skip
    first_row = row_tile * (64 // P.halves)
    store_pairs(y, router_ptr, out_ptr, pairs_ptr, first, stop, first_row, P.rows)


@gluon.jit(do_not_specialize=_RUNTIME)
def decode_kernel(
    x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr, row_scale_ptr, pairs_ptr, tiles_ptr, count_ptr,
    max_tiles, first_expert, num_experts, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr,
    splits, per_split, split_stride, alpha, beta, limit, rows_per_source, P: gl.constexpr,
):  # fmt: skip
    """One tile of one expert: 64 rows (of both halves) by up to `block` pairs, one split of K.

    Without count_ptr each pair is a tile, and tiles_ptr has the experts' ids.
    """
    if P.first:
        # For the plan; later kernels may read it before they wait, for weights that they prefetch.
        gdc_wait()
    gdc_launch_dependents()
    program = gl.program_id(0)
    split = program % splits
    row_tile = program // splits % P.row_tiles
    index = program // (splits * P.row_tiles)
    expert = gl.load(tiles_ptr + index).to(gl.int64)
    if count_ptr is None:
        expert -= first_expert
        first, stop = index, index + 1
        planned = (expert >= 0) & (expert < num_experts)
    else:
        # All at once; what lies past the last tile is undefined and unused.
        count = gl.load(count_ptr)
        first = gl.load(tiles_ptr + max_tiles + index)
        stop = gl.load(tiles_ptr + 2 * max_tiles + index)
        planned = index < count
    if not planned:
        return
    x = (x_ptr, x_scale_ptr, pairs_ptr, rows_per_source)
    parts = (w_ptr, scale_ptr, zero_ptr)
    epilogue = (
        row_scale_ptr, bias_ptr, table_ptr, post_ptr, router_ptr, out_ptr + split * split_stride,
        alpha, beta, limit,
    )  # fmt: skip
    tile = (first, stop, expert, row_tile, split, per_split)
    BLOCK: gl.constexpr = P.block
    if BLOCK > 8 and stop - first > 8:
        _tile(x, parts, epilogue, tile, BLOCK, P)
    else:
        # Most tiles of small experts: fewer columns than `block` cost less.
        _tile(x, parts, epilogue, tile, 8, P)
