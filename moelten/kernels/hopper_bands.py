"""A band of weights from a slot of the ring (`hopper_ring`), in Gluon.

A band is a row tile for each warpgroup, two or four: 16 rows for each of the warps, w. Weights come
as operands of the matrix instruction, with the scales that join them, or beside those that multiply
sums.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_fragments import (
    chunk_zero,
    floats,
    load_layout,
    operands,
    pair_layout,
    powers,
    scale_layout,
    zero_words,
)
from moelten.kernels.hopper_products import TOKENS
from moelten.kernels.hopper_ring import SCALES, WORDS, X_SCALES, ZEROS


@gluon.constexpr_function
def _code_layout(loads, teams):
    """A chunk of the row tiles of a band, [teams, 16 * loads, 32]: 16 bytes per lane and load."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]] + [[0, 16 * b, 0] for b in powers(loads)],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        warp_bases=[[0, 4, 0], [0, 8, 0]] + [[b, 0, 0] for b in powers(teams)],
        block_bases=[],
        shape=[teams, 16 * loads, 32],
    )


@gluon.constexpr_function
def _quad_layout(warps):
    """Words [w, 8 g, 2 halves of a quad, 2 lanes]."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]],
        warp_bases=[[b, 0, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[warps, 8, 2, 2],
    )


@gluon.constexpr_function
def _parameter_layout(rows, spread, parts, teams):
    """A super-block's row parameters of a band, [teams * rows, 32]: row tile, part of the
    super-block, w, g, half of a quad if `spread`, own words."""
    of_g = rows // parts
    words = of_g // 2 if spread else of_g
    half = [words] if spread else [0]
    lanes = [0, *half, *(of_g * b for b in powers(8))]  # of 4 t, 8 g
    warps = [8 * of_g * b for b in powers(4)] + [32 * rows * b for b in powers(teams)]
    groups = (powers(words) + [32 * of_g * b for b in powers(parts)], lanes, warps)
    places = [[[at // 32, at % 32] for at in group] for group in groups]
    return gl.DistributedLinearLayout(*places, [], [teams * rows, 32])


@gluon.constexpr_function
def _block_layout(teams):
    """Scales of blocks, [row tiles, 4 w, 8 g, 2 b]: every lane has both."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1]],
        lane_bases=[[0] * 4, [0] * 4, [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]],
        warp_bases=[[0, 1, 0, 0], [0, 2, 0, 0]] + [[b, 0, 0, 0] for b in powers(teams)],
        block_bases=[],
        shape=[teams, 4, 8, 2],
    )


@gluon.jit
def _pick(words, bit):
    """The half of the last axis that a bit says."""
    HALF: gl.constexpr = words.shape[2] // 2
    WARPS: gl.constexpr = words.shape[0]
    low, high = gl.split(words.reshape([WARPS, words.shape[1], 2, HALF]).permute((0, 1, 3, 2)))
    return gl.where(bit != 0, high, low)


@gluon.jit
def _load(buffer, SPREAD: gl.constexpr, PARTS: gl.constexpr, TEAMS: gl.constexpr):
    """A lane's words of a super-block, [w, 8 g (times 2 halves of a quad), n].

    PARTS: of the super-block, which follow each other in a row tile
    """
    ROWS: gl.constexpr = buffer.shape[0] // TEAMS
    LANES: gl.constexpr = 16 if SPREAD else 8
    WORDS: gl.constexpr = 8 * ROWS // LANES
    words = buffer.load(_parameter_layout(ROWS, SPREAD, PARTS, TEAMS)).to(gl.uint32, bitcast=True)
    words = words.reshape([TEAMS, PARTS, 4, LANES, WORDS // PARTS]).permute((0, 2, 3, 1, 4))
    return words.reshape([4 * TEAMS, LANES, WORDS])


@gluon.jit
def _of_chunk(words, chunk, BITS: gl.constexpr):
    """Those of a chunk, by as many of the two low bits of its number as choose."""
    if BITS & 2:
        words = _pick(words, chunk & 2)
    if BITS & 1:
        words = _pick(words, chunk & 1)
    return words


@gluon.jit
def _for_quads(words, SPREAD: gl.constexpr):
    """[w, 8 g (times 2), 1] as [w, 8 g, 4 t], or two of them as [w, 8 g, 4 t, 2]."""
    WARPS: gl.constexpr = words.shape[0]
    QUAD: gl.constexpr = _quad_layout(WARPS)
    if words.shape[2] == 2:
        low, high = gl.split(words)
        low, high = low.expand_dims(2), high.expand_dims(2)
        return gl.join(_for_quads(low, SPREAD), _for_quads(high, SPREAD))
    else:
        if SPREAD:
            HALVES: gl.constexpr = gl.SliceLayout(3, QUAD)
            words = gl.convert_layout(words.reshape([WARPS, 8, 2]), HALVES, assert_trivial=True)
        else:
            WHOLE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, QUAD))
            words = gl.convert_layout(words.reshape([WARPS, 8]), WHOLE, assert_trivial=True)
            words = words.expand_dims(2)
        words, _ = gl.broadcast(words.expand_dims(3), gl.zeros([WARPS, 8, 2, 2], gl.uint32, QUAD))
        words = words.reshape([WARPS, 8, 4])
        return gl.convert_layout(words, pair_layout(WARPS), assert_trivial=True)


@gluon.jit
def load_weights(ring, slot, band: gl.constexpr, c: gl.constexpr, P: gl.constexpr):
    """What makes the operands of a band's chunk, the c-th of its stage: for `decode_weights`."""
    W: gl.constexpr = P.weights
    LOADS: gl.constexpr = W.code.bits // 4
    at = slot * P.variant.bands + band
    words = ring[WORDS].index(at).slice(c * (16 * LOADS), 16 * LOADS, 1)
    words = words.load(_code_layout(LOADS, P.variant.teams))
    scale = 0
    if W.scale == "fold":
        scale = _load(ring[SCALES].index(at), P.spread, P.parts, P.variant.teams)
    zero = 0
    if W.zeros is not None and W.group != 0:
        zero = _load(ring[ZEROS].index(at), False, 1, P.variant.teams)
    return words, scale, zero


@gluon.jit
def decode_weights(loaded, zero, chunk, P: gl.constexpr, OPERAND: gl.constexpr):
    """Operands [w, 16, 64] of a band's chunk.

    zero:    words [w, 8 g, 4 t], where one zero point serves the whole row
    OPERAND: their type; uint32 for their registers, [rows, 32]
    """
    W: gl.constexpr = P.weights
    LOADS: gl.constexpr = W.code.bits // 4
    WARPS: gl.constexpr = P.variant.warps
    w, s, z = loaded
    w = w.reshape([P.variant.teams, LOADS, 4, 128]).permute((0, 2, 1, 3))
    w = w.reshape([WARPS, LOADS, 128])
    w = gl.convert_layout(w, load_layout(WARPS, LOADS), assert_trivial=True)
    if W.scale == "fold":
        s = _for_quads(_of_chunk(s, chunk, P.choices), P.spread)
    if W.zeros is not None and W.group != 0:
        BITS: gl.constexpr = 2 if W.group == 32 else 0
        zero = _for_quads(_of_chunk(z, chunk, BITS), False) >> chunk_zero(chunk, W)[1]
    return operands(w, s, zero, W, OPERAND)


@gluon.jit
def take_token_scales(
    ring, slot, group: gl.constexpr, at: gl.constexpr, L: gl.constexpr, P: gl.constexpr
):
    """fp32 [1, 8], of tokens from the at-th of the block on, for a group of a stage.

    L: the layout of the sums [rows, tokens]
    """
    words = ring[X_SCALES].index(slot * P.variant.x_groups + group).slice(at, TOKENS, 0)
    return words.slice(0, 1, 1).permute((1, 0)).load(L)


@gluon.jit
def take_scale(ring, slot, band: gl.constexpr, chunk, group: gl.constexpr, P: gl.constexpr):
    """fp32 [rows], in the order of a band's rows: the scales of a group of a chunk."""
    W: gl.constexpr = P.weights
    TYPE: gl.constexpr = P.scale_type
    WARPS: gl.constexpr = P.variant.warps
    own = ring[SCALES].index(slot * P.variant.bands + band)
    if W.scale == "block":
        # Two groups of a super-block, two numbers each, which all lanes of a row tile have.
        TEAMS: gl.constexpr = P.variant.teams
        L: gl.constexpr = _block_layout(TEAMS)
        ALL: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
        low, high = own.slice(0, 2, 1).load(ALL), own.slice(2, 2, 1).load(ALL)
        words = gl.where(chunk & 2 != 0, high, low)
        words = words[:, None, None, :] + gl.zeros([TEAMS, 4, 8, 2], gl.int32, L)
        words = words.reshape([WARPS, 8, 2])
        words = gl.convert_layout(words, scale_layout(WARPS, 2), assert_trivial=True)
        rows = floats(words.to(gl.uint32, bitcast=True), W, TYPE)
    else:
        words = _of_chunk(_load(own, False, P.parts, P.variant.teams), chunk, P.choices)
        words = gl.convert_layout(words, scale_layout(WARPS, words.shape[2]), assert_trivial=True)
        rows = floats(words, W, TYPE)  # warps g b c
        if rows.shape[3] == 2:
            low, high = gl.split(rows)
            rows = high if group == 1 else low
    return rows.reshape([WARPS, 8, 2]).permute((0, 2, 1)).reshape([16 * WARPS])


@gluon.jit
def find_zeros(zero_ptr, expert, row_tile, P: gl.constexpr):
    """Whole rows' zero points of all bands, if there are such."""
    BANDS: gl.constexpr = P.variant.bands
    W: gl.constexpr = P.weights
    zeros = ()
    for t in gl.static_range(BANDS):
        zero = 0
        if zero_ptr is not None:
            warp, lane = zero_words(W, P.variant.warps)
            tile = gl.minimum(row_tile + P.variant.teams * t + warp // 4, P.row_tiles - 1)
            matrix = expert * P.row_tiles + tile
            zero = gl.load(zero_ptr + matrix * 32 + (warp % 4 * 8 + lane))
        zeros = zeros + (zero,)
    return zeros
