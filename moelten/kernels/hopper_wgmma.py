"""Sums of a tile by instructions of whole warpgroups: for 64 tokens and more, in Gluon.

A row tile's stage is multiplied while the other's is decoded. Weights are taken from registers;
then fewer tokens than 64 cost as much as 64.

Scales of groups do not get sums of their own: sums are kept in units of the scale at hand, and
brought to the next one's before its products are added. That is one multiplication per element, as
adding up sums of groups would be, but needs no second set of registers, so tiles stay large.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from moelten.kernels.hopper_fragments import no_sums
from moelten.kernels.hopper_products import SUMS, TOKENS, multiply
from moelten.kernels.hopper_ring import (
    X,
    find_zeros,
    leave,
    place_of,
    take_scale,
    take_stage,
    take_token_scales,
    wait_until_full,
)


@gluon.jit
def _multiply(acc, a, x, slot, group: gl.constexpr, P: gl.constexpr):
    """acc + a row tile's stage, or a group of it, @ x: in flight."""
    STAGE: gl.constexpr = P.variant.stage
    HALVES: gl.constexpr = 2 // P.groups
    OPERAND: gl.constexpr = P.operand
    for c in gl.static_range(STAGE):
        at = x + (slot * STAGE + c) * (P.variant.block * 128)
        left = gl.split(a[c].reshape([64, 2, TOKENS]).permute((0, 2, 1)))
        for h in gl.static_range(group * HALVES, group * HALVES + HALVES):
            own = gl.convert_layout(left[h], SUMS, assert_trivial=True)
            acc = multiply(acc, own, at, h, OPERAND)
    return acc


@gluon.jit
def _times(acc, rows):
    """Every row of the sums times a number [64]."""
    out = ()
    for i in gl.static_range(len(acc)):
        own = gl.convert_layout(rows, gl.SliceLayout(1, SUMS), assert_trivial=True)
        out = out + (acc[i] * own.expand_dims(1),)
    return out


@gluon.jit
def _times_tokens(acc, ring, slot, valid, P: gl.constexpr):
    """Every token's sums times a number of its own, if those of the slot are valid."""
    out = ()
    for i in gl.static_range(len(acc)):
        own = take_token_scales(ring, slot, 0, i * TOKENS, SUMS, P)
        out = out + (acc[i] * gl.where(valid, own, 1.0),)
    return out


@gluon.jit
def _rescale(acc, unit, scale):
    """Sums in units of `unit`, fp32 [64], brought to units of a scale: (sums, the new unit).

    Nothing but codes of zero has a scale of 0 or below 2**-60 of another's (`hopper_layout`): there
    the unit stays, and sums stay finite.
    """
    scale = gl.where(gl.abs(scale) <= gl.abs(unit) * 8.673617379884035e-19, unit, scale)
    return _times(acc, gl.fdiv(unit, scale)), scale


@gluon.jit
def _end_block(turn):
    """The same number. It is never negative, which the compiler does not know: so a basic block
    ends here, and what was decoded before does not sink below the wait that follows."""
    return gl.inline_asm_elementwise(
        """{.reg .pred p;
        again_${:uid}: setp.ge.s32 p, $1, 0; @p bra done_${:uid};
        nanosleep.u32 20; bra again_${:uid};
        done_${:uid}: mov.b32 $0, $1;}""",
        "=r,r",
        [turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _put(items, index: gl.constexpr, item):
    """The tuple with another item at its index."""
    out = ()
    for i in gl.static_range(len(items)):
        out = out + (item if i == index else items[i],)
    return out


@gluon.jit
def warpgroup_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    group: gl.constexpr, UNITS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [64, 16] of a warpgroup's row tiles, tile after tile, of so many times 16 tokens.

    ring: with a number for the activations: where they begin (`hopper_products.find`)

    Row tiles take turns, group after group. While one multiplies, the one whose turn is next is
    decoded, and its sums are brought to its next scales.
    """
    TILES: gl.constexpr = P.variant.each
    FIRST: gl.constexpr = TILES * group
    TURNS: gl.constexpr = TILES * P.groups
    start = turn * 0
    slot = wait_until_full(ring, place_of(turn, P))
    zero = find_zeros(zero_ptr, expert, row_tile, P)
    acc = ()
    unit = ()
    for t in gl.static_range(TILES):
        acc = acc + (no_sums(UNITS, TOKENS, SUMS),)
        unit = unit + (_first_unit(ring, slot, FIRST + t, start, P),)
    first = take_stage(ring, zero[0], slot, FIRST, start, P)
    for step in range(steps):
        slot = turn % P.variant.slots
        chunk = step * P.variant.stage
        next_place = place_of(turn + 1, P)
        more = step + 1 < steps
        a = (first,)
        for i in gl.static_range(TURNS):
            now = _multiply(acc[i % TILES], a[i % TILES], ring[X], slot, i // TILES, P)
            if i + 1 < TURNS:
                if P.scaled:
                    scale = take_scale(
                        ring, slot, FIRST + (i + 1) % TILES, chunk, (i + 1) // TILES, P
                    )  # fmt: skip
                    sums, own = _rescale(acc[(i + 1) % TILES], unit[(i + 1) % TILES], scale)
                    if P.variant.grouped:
                        sums = _times_tokens(sums, ring, slot, steps > 0, P)
                    acc = _put(acc, (i + 1) % TILES, sums)
                    unit = _put(unit, (i + 1) % TILES, own)
                if i + 1 < TILES:
                    tile = take_stage(ring, zero[i + 1], slot, FIRST + i + 1, chunk, P)
                    a = a + (tile,)
                    turn = _end_block(turn)
            else:
                next_slot = wait_until_full(ring, next_place, more)
                if P.scaled:
                    after = gl.minimum(chunk + P.variant.stage, P.chunks - 1)
                    scale = take_scale(ring, next_slot, FIRST, after, 0, P)
                    # After the last stage a slot holds anything.
                    sums, own = _rescale(acc[0], unit[0], gl.where(more, scale, unit[0]))
                    if P.variant.grouped:
                        sums = _times_tokens(sums, ring, next_slot, more, P)
                    acc = _put(acc, 0, sums)
                    unit = _put(unit, 0, own)
                first = take_stage(ring, zero[0], next_slot, FIRST, chunk + P.variant.stage, P)
                turn = _end_block(turn)
            acc = _put(acc, i % TILES, warpgroup_mma_wait(0, deps=now))
        leave(ring, slot)
        turn += 1
    out = ()
    for t in gl.static_range(TILES):
        out = out + _final(acc[t], unit[t], P)
    return out, turn


@gluon.jit
def _first_unit(ring, slot, tile: gl.constexpr, chunk, P: gl.constexpr):
    """The first scales; a first group of zeros has some unit, less than any that follows."""
    if P.scaled:
        unit = take_scale(ring, slot, tile, chunk, 0, P)
        return gl.where(unit == 0, 1.1754943508222875e-38, unit)
    else:
        return 0


@gluon.jit
def _complete(acc):
    """The same sums. The compiler does not move what follows to where products are in flight."""
    out = ()
    for i in gl.static_range(len(acc)):
        own = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc[i]], dtype=gl.float32, is_pure=False, pack=1
        )
        out = out + (own,)
    return out


@gluon.jit
def _final(acc, unit, P: gl.constexpr):
    if P.scaled:
        return _times(_complete(acc), unit)
    else:
        return _complete(acc)
