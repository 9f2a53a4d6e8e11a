"""Sums of a tile by instructions of single warps: for a few tokens of each expert, in Gluon.

A warp multiplies 16 rows of either band by 8 tokens at a time, so that a tile costs what its
tokens cost, in steps of 8. Nothing is in flight behind the code: two warps share each quarter of a
multiprocessor, and the 5 or 6 cycles of a product add to those of decoding, whichever warp it is of
(H200).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moelten.kernels.hopper_bands import (
    decode_weights,
    find_zeros,
    load_weights,
    take_scale,
    take_token_scales,
)
from moelten.kernels.hopper_fragments import halves, no_sums
from moelten.kernels.hopper_ring import X, leave, place_of, wait_until_full

WARP_SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1], [16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, WARP_SUMS.value, 2))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, WARP_SUMS.value, 2))


@gluon.jit
def _take_tokens(ring, slot, c: gl.constexpr, UNITS: gl.constexpr, P: gl.constexpr):
    """Activations of a chunk, the c-th of its stage, [64, 8] times so many."""
    b = ()
    for i in gl.static_range(UNITS):
        tokens = ring[X].index((slot * P.variant.stage + c) * P.most + i)
        b = b + (tokens.permute((1, 0)).load(_RIGHT),)
    return b


@gluon.jit
def _dot(acc, a, b, group: gl.constexpr, P: gl.constexpr):
    """acc + a band's chunk, [8 warps, 16, 64], or a group of it, @ b."""
    if P.groups == 2:
        a = halves(a)[group]
    a = gl.convert_layout(a.reshape([128, 64 // P.groups]), _LEFT, assert_trivial=True)
    out = ()
    for i in gl.static_range(len(acc)):
        right = b[i]
        if P.groups == 2:
            right = gl.split(right.reshape([2, 32, right.shape[1]]).permute((1, 2, 0)))[group]
            right = gl.convert_layout(right, _RIGHT, assert_trivial=True)
        out = out + (mma_v2(a, right, acc[i]),)
    return out


@gluon.jit
def _add(acc, part, scale, ring, slot, group: gl.constexpr, P: gl.constexpr):
    """acc + part, whose rows are times a scale, [128], and tokens times their own, if any."""
    rows = gl.convert_layout(scale, gl.SliceLayout(1, WARP_SUMS), assert_trivial=True)
    rows = rows.expand_dims(1)
    out = ()
    for i in gl.static_range(len(acc)):
        if P.variant.grouped:
            own = take_token_scales(ring, slot, group, 8 * i, WARP_SUMS, P)
            out = out + (acc[i] + part[i] * (rows * own),)
        else:
            out = out + (acc[i] + part[i] * rows,)
    return out


@gluon.jit
def _add_chunk(
    acc, part, a, b, ring, slot, band: gl.constexpr, chunk, c: gl.constexpr,
    UNITS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums of a band, and products that wait for the scales of their group, after a chunk.

    chunk: the c-th of its stage
    """
    SPAN: gl.constexpr = max(P.weights.group // 64, 1)  # chunks of a group
    GROUPS: gl.constexpr = P.groups
    if P.scaled:
        for g in gl.static_range(GROUPS):
            part = _dot(part, a, b, g, P)
            if (c + 1) % SPAN == 0:
                scale = take_scale(ring, slot, band, chunk, g, P)
                acc = _add(acc, part, scale, ring, slot, c // 2, P)
                part = no_sums(UNITS, 8, WARP_SUMS)
        return acc, part
    else:
        return _dot(acc, a, b, 0, P), part


@gluon.jit
def _stage(
    acc, none, ring, zero, slot, first, UNITS: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr
):
    """Sums of each band after a stage, which begins with a chunk.

    none: no sums of each band yet
    """
    STAGE: gl.constexpr = P.variant.stage
    OPERAND: gl.constexpr = P.operand
    part = none
    for c in gl.static_range(STAGE):
        chunk = first + c
        b = _take_tokens(ring, slot, c, UNITS, P)
        sums = ()
        rest = ()
        for t in gl.static_range(BANDS):
            a = decode_weights(load_weights(ring, slot, t, c, P), zero[t], chunk, P, OPERAND)
            own, waiting = _add_chunk(acc[t], part[t], a, b, ring, slot, t, chunk, c, UNITS, P)
            sums = sums + (own,)
            rest = rest + (waiting,)
        acc = sums
        part = rest
    leave(slot, P)
    return acc


@gluon.jit
def warp_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [128, 8] of a piece's first bands, band after band, of so many tokens."""
    UNITS: gl.constexpr = N // 8
    STAGE: gl.constexpr = P.variant.stage
    zero = find_zeros(zero_ptr, expert, row_tile, P)
    none = (no_sums(UNITS, 8, WARP_SUMS),) * BANDS
    acc = none
    for step in range(steps):
        slot = wait_until_full(ring, place_of(turn, P))
        acc = _stage(acc, none, ring, zero, slot, step * STAGE, UNITS, BANDS, P)
        turn += 1
    out = ()
    for t in gl.static_range(BANDS):
        out = out + acc[t]
    return out, turn
