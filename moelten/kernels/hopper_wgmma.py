"""Sums of a tile by instructions of whole warpgroups: for 20 tokens and more, in Gluon.

A band's stage is multiplied while another's is decoded. Each number of tokens, in steps of 8 or 16,
has a loop of its own, as an instruction takes half a cycle for every token, from 24 on (H200).

Scales of groups do not get sums of their own: sums are kept in units of the scale at hand, and
brought to the next one's before its products are added. That is one multiplication per element, as
adding up sums of groups would be, but needs no second set of registers, so tiles stay large.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from moelten.kernels.hopper_bands import (
    decode_weights,
    find_zeros,
    load_weights,
    take_scale,
    take_token_scales,
)
from moelten.kernels.hopper_fragments import no_sums
from moelten.kernels.hopper_products import SUMS, TOKENS, multiply
from moelten.kernels.hopper_ring import X, leave, place_of, wait_until_full


@gluon.jit
def _ask(ring, slot, turn: gl.constexpr, BANDS: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr):
    """What a turn of a stage decodes, if it does: some chunks of its band, for `_decode`."""
    out = ()
    if turn // BANDS % P.groups == 0:
        FIRST: gl.constexpr = turn // BANDS // P.groups * SPAN
        for i in gl.static_range(SPAN):
            out = out + (load_weights(ring, slot, turn % BANDS, FIRST + i, P),)
    return out


@gluon.jit
def _decode(loaded, zero, chunk, P: gl.constexpr):
    """Chunks of a band as operands: 32 columns, [128, 16]."""
    out = ()
    for i in gl.static_range(len(loaded)):
        registers = decode_weights(loaded[i], zero, chunk + i, P, gl.uint32)
        low, high = gl.split(registers.reshape([128, 2, TOKENS]).permute((0, 2, 1)))
        low = gl.convert_layout(low, SUMS, assert_trivial=True)
        out = out + (low, gl.convert_layout(high, SUMS, assert_trivial=True))
    return out


@gluon.constexpr_function
def _halves(part, span, groups):
    """The halves of chunks that a part of a band's stage multiplies, counted from its first."""
    own = [part % groups] if groups == 2 else [0, 1]
    return [2 * chunk + half for chunk in range(span) for half in own]


@gluon.constexpr_function
def _places(part, span, groups, block):
    """Where the activations of those halves begin in a stage's."""
    halves = _halves(part, span, groups)
    first = part // groups * span
    return [(first + half // 2) * block * 128 + half % 2 * 64 for half in halves]


@gluon.jit
def _multiply(
    acc, a, x, slot, part: gl.constexpr, N: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr
):
    """acc + a part of a band's stage @ x: in flight, all of it at once.

    What is told apart is waited for apart: with a few products at a time, layers of 16 to 48 tokens
    per expert take 2 to 3 % longer (H200).
    """
    HALVES: gl.constexpr = _halves(part, SPAN, P.groups)
    PLACES: gl.constexpr = _places(part, SPAN, P.groups, P.variant.block)
    OPERAND: gl.constexpr = P.operand
    left = ()
    for i in gl.static_range(len(HALVES)):
        left = left + (a[HALVES[i]],)
    start = x + slot * (P.variant.stage * P.variant.block * 128)
    return multiply(acc, left, start, N, PLACES, OPERAND)


@gluon.jit
def _times(acc, rows):
    """Every row of the sums times a number [128]."""
    rows = gl.convert_layout(rows, gl.SliceLayout(1, SUMS), assert_trivial=True).expand_dims(1)
    out = ()
    for i in gl.static_range(len(acc)):
        out = out + (acc[i] * rows,)
    return out


@gluon.jit
def _times_tokens(acc, ring, slot, P: gl.constexpr):
    """Every token's sums times a number of its own."""
    out = ()
    for i in gl.static_range(len(acc)):
        out = out + (acc[i] * take_token_scales(ring, slot, 0, i * TOKENS, SUMS, P),)
    return out


@gluon.jit
def _rescale(acc, unit, scale):
    """Sums in units of `unit`, fp32 [128], brought to units of a scale: (sums, the new unit).

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
def _put(items, index: gl.constexpr, item, COUNT: gl.constexpr):
    """The tuple, of so many, with another item at its index.

    Without the count Triton takes one band of 9 tensors and another for two of 6.
    """
    out = ()
    for i in gl.static_range(COUNT):
        out = out + (item if i == index else items[i],)
    return out


@gluon.jit
def _in_units(
    acc, unit, ring, slot, x_slot, band: gl.constexpr, chunk, group: gl.constexpr, P: gl.constexpr
):
    """A band's sums in units of the scales of a group of a chunk: (sums, the rows' units).

    x_slot: where the factors of tokens are
    """
    acc, unit = _rescale(acc, unit, take_scale(ring, slot, band, chunk, group, P))
    if P.variant.grouped:
        acc = _times_tokens(acc, ring, x_slot, P)
    return acc, unit


@gluon.jit
def _prepare(
    acc, unit, a, loaded, ring, zero, slot, x_slot, chunk, turn: gl.constexpr,
    BANDS: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """What a turn of a stage, which begins with a chunk, needs: (sums, their units, operands)."""
    BAND: gl.constexpr = turn % BANDS
    PART: gl.constexpr = turn // BANDS
    GROUP: gl.constexpr = PART % P.groups
    C: gl.constexpr = PART // P.groups * SPAN
    if P.scaled and C % P.served == 0:
        sums, own = _in_units(
            acc[BAND], unit[BAND], ring, slot, x_slot, BAND, chunk + C, GROUP, P
        )  # fmt: skip
        acc = _put(acc, BAND, sums, BANDS)
        unit = _put(unit, BAND, own, BANDS)
    if GROUP == 0:
        a = _put(a, BAND, _decode(loaded, zero[BAND], chunk + C, P), BANDS)
    return acc, unit, a


@gluon.jit
def _wait(acc, band: gl.constexpr, others: gl.constexpr, BANDS: gl.constexpr):
    """Wait for a band's products, and for no more than so many later ones.

    BANDS: of acc; without them Triton takes one band of 8 tensors for two of 4
    """
    return _put(acc, band, warpgroup_mma_wait(others, deps=acc[band]), BANDS)


@gluon.jit
def _next_slot(ring, slot, turn, more, P: gl.constexpr):
    """The next stage's slot, when it is full; after the last stage its own again, whose scales make
    factors of 1 and whose operands are of no use."""
    return gl.where(more, wait_until_full(ring, place_of(turn + 1, P), more), slot)


@gluon.jit
def _stage(
    acc, unit, first, ring, zero, slot, turn, chunk, more,
    N: gl.constexpr, BANDS: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A stage, which begins with a chunk, and what of the next one is decoded before it ends.

    first: operands of its first turn

    Returns sums and their units, operands of the next stage's first turn, and its slot.
    """
    STAGE: gl.constexpr = P.variant.stage
    TURNS: gl.constexpr = BANDS * P.groups * (STAGE // SPAN)
    # Loads queue up behind products; asked for before, they are there in time. Where a band's
    # products take as long as its decoding, they only take issue slots from them (H200).
    AHEAD: gl.constexpr = P.variant.few
    a = (first,) * BANDS
    before = slot
    for i in gl.static_range(TURNS):
        if AHEAD and i + 1 == TURNS:
            slot = _next_slot(ring, slot, turn, more, P)
        if AHEAD:
            loaded = _ask(ring, slot, (i + 1) % TURNS, BANDS, SPAN, P)
        now = _multiply(acc[i % BANDS], a[i % BANDS], ring[X], before, i // BANDS, N, SPAN, P)
        acc = _put(acc, i % BANDS, now, BANDS)
        if BANDS == 1:
            acc = _wait(acc, 0, 0, BANDS)
        if i > 0:
            acc = _wait(acc, (i - 1) % BANDS, 1, BANDS)
        if not AHEAD and i + 1 == TURNS:
            slot = _next_slot(ring, slot, turn, more, P)
        if not AHEAD:
            loaded = _ask(ring, slot, (i + 1) % TURNS, BANDS, SPAN, P)
        if i + 1 < TURNS:
            acc, unit, a = _prepare(
                acc, unit, a, loaded, ring, zero, slot, slot, chunk, i + 1, BANDS, SPAN, P
            )  # fmt: skip
    x_slot = gl.where(more, slot, P.variant.slots)
    after = gl.minimum(chunk + STAGE, P.chunks - 1)
    acc, unit, a = _prepare(
        acc, unit, a, loaded, ring, zero, slot, x_slot, after, 0, BANDS, SPAN, P
    )  # fmt: skip
    turn = _end_block(turn)
    acc = _wait(acc, (TURNS - 1) % BANDS, 0, BANDS)
    leave(before)
    return acc, unit, a[0], slot, turn + 1


@gluon.jit
def warpgroup_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [128, 16] of a piece's first bands, band after band, of so many tokens.

    ring: with a number for the activations: where they begin (`hopper_products.find`)

    Bands take turns, part after part: a chunk, one of its groups, or, where sums leave registers
    for more operands, a stage. While one multiplies, the one whose turn is next is decoded, and its
    sums are brought to its next scales; within a stage it begins before the other is waited for.
    Not so at its end, as ptxas keeps nothing in flight around a loop that other registers of
    operands are written in; then the other warpgroup's products fill the gap.
    """
    STAGE: gl.constexpr = P.variant.stage
    SPAN: gl.constexpr = P.served if P.variant.few or BANDS == 1 else 1
    start = turn * 0
    slot = wait_until_full(ring, place_of(turn, P))
    zero = find_zeros(zero_ptr, expert, row_tile, P)
    acc = ()
    unit = ()
    for b in gl.static_range(BANDS):
        acc = acc + (no_sums(-(-N // TOKENS), TOKENS, SUMS),)
        unit = unit + (_first_unit(ring, slot, b, start, P),)
    first = _decode(_ask(ring, slot, 0, BANDS, SPAN, P), zero[0], start, P)
    for step in range(steps):
        acc, unit, first, slot, turn = _stage(
            acc, unit, first, ring, zero, slot, turn, step * STAGE, step + 1 < steps,
            N, BANDS, SPAN, P,
        )  # fmt: skip
    out = ()
    for b in gl.static_range(BANDS):
        out = out + _final(acc[b], unit[b], P)
    return out, turn


@gluon.jit
def _first_unit(ring, slot, band: gl.constexpr, chunk, P: gl.constexpr):
    """The first scales; a first group of zeros has some unit, less than any that follows."""
    if P.scaled:
        unit = take_scale(ring, slot, band, chunk, 0, P)
        return gl.where(unit == 0, 1.1754943508222875e-38, unit)
    else:
        return 0


@gluon.jit
def _complete(acc):
    """The same sums. The compiler does not move what follows to where products are in flight, nor
    what comes before to where they are used, for which there are no registers."""
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
        return _complete(_times(_complete(acc), unit))
    else:
        return _complete(acc)
