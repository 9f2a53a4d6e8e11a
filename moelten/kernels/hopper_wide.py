"""Sums of a tile of many tokens, by eight warps, in Gluon.

Two warps share each quarter of a multiprocessor, and most of a thread's registers are sums, so that
weights are decoded for many tokens at once. A part of a band is multiplied while another band's is
decoded. Each number of tokens, in steps of 16, has a loop of its own, as an instruction takes half
a cycle for every token (H200).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_bands import find_zeros, take_scale
from moelten.kernels.hopper_parts import ask, decode, multiply_part
from moelten.kernels.hopper_products import wait_for_products
from moelten.kernels.hopper_ring import leave, place_of, wait_until_full
from moelten.kernels.hopper_units import begin, finish, in_units


@gluon.constexpr_function
def _first_of(turn, bands, span, groups):
    """The first chunk of a stage that a turn multiplies."""
    return turn // bands // groups * span


@gluon.constexpr_function
def _group_of(turn, bands, groups):
    return turn // bands % groups


@gluon.jit
def _ask(ring, slot, turn: gl.constexpr, BANDS: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr):
    """What a turn of a stage decodes, if it does."""
    if _group_of(turn, BANDS, P.groups) == 0:
        return ask(ring, slot, turn % BANDS, _first_of(turn, BANDS, SPAN, P.groups), SPAN, P)
    else:
        return ()


@gluon.jit
def _decode(
    loaded, a, zero, chunk, turn: gl.constexpr, BANDS: gl.constexpr, SPAN: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """Operands of a turn of a stage, which begins with a chunk: those that it asked for, or its
    band's last ones."""
    if _group_of(turn, BANDS, P.groups) == 0:
        return decode(loaded, zero[turn % BANDS], chunk + _first_of(turn, BANDS, SPAN, P.groups), P)
    else:
        return a


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
def _bring(
    acc, unit, ring, slot, x_slot, chunk, more, turn: gl.constexpr,
    BANDS: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A band's sums in units of the scales of its turn, of a stage that begins with a chunk:
    (sums, their units)."""
    C: gl.constexpr = _first_of(turn, BANDS, SPAN, P.groups)
    GROUP: gl.constexpr = _group_of(turn, BANDS, P.groups)
    if C % P.served == 0:
        scale = take_scale(ring, slot, turn % BANDS, chunk + C, GROUP, P)
        if P.groups == 2 and turn == 0:
            # The unit that sums are in after the last stage is that of a second group.
            scale = gl.where(more, scale, unit)
        acc, unit = in_units(acc, unit, scale, ring, x_slot, C // 2, P)
    return acc, unit


@gluon.jit
def _next_slot(ring, slot, turn, more, P: gl.constexpr):
    """The next stage's slot, when it is full; after the last stage its own again, whose scales
    change no unit and whose operands are of no use."""
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
    a = (first,) * BANDS
    before = slot
    x_slot = slot
    # Of bands, which are two at most, the one whose turn it is stands first and the other last.
    for i in gl.static_range(TURNS):
        now = multiply_part(
            acc[0], a[0], ring, before, _first_of(i, BANDS, SPAN, P.groups),
            _group_of(i, BANDS, P.groups), N, SPAN, P,
        )  # fmt: skip
        if BANDS == 1:
            now = wait_for_products(now, 0)
        acc, unit, a = acc[1:] + (now,), unit[1:] + unit[:1], a[1:] + a[:1]
        if i > 0:
            acc = (wait_for_products(acc[0], 1),) + acc[1:]
        if i + 1 == TURNS:
            slot = _next_slot(ring, slot, turn, more, P)
        loaded = _ask(ring, slot, (i + 1) % TURNS, BANDS, SPAN, P)
        if i + 1 == TURNS:
            x_slot = gl.where(more, slot, P.variant.slots)
            chunk = gl.minimum(chunk + STAGE, P.chunks - 1)
        if P.scaled:
            own, its = _bring(
                acc[0], unit[0], ring, slot, x_slot, chunk, more, (i + 1) % TURNS, BANDS, SPAN, P
            )
            acc, unit = (own,) + acc[1:], (its,) + unit[1:]
        a = (_decode(loaded, a[0], zero, chunk, (i + 1) % TURNS, BANDS, SPAN, P),) + a[1:]
    turn = _end_block(turn)
    acc = acc[:-1] + (wait_for_products(acc[-1], 0),)
    leave(before, P)
    return acc, unit, a[0], slot, turn + 1


@gluon.jit
def wide_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [128, 8] of a piece's first bands, band after band, of so many tokens.

    ring: with a number for the activations: where they begin (`hopper_products.find`)

    Bands take turns, part after part: a chunk, one of its groups, or, where one band's sums leave
    registers for more operands, a stage. While one multiplies, the one whose turn is next is
    decoded, and its sums are brought to its next scales; within a stage it begins before the other
    is waited for. Not so at its end, as ptxas keeps nothing in flight around a loop that other
    registers of operands are written in; then the other warpgroup's products fill the gap.
    """
    STAGE: gl.constexpr = P.variant.stage
    SPAN: gl.constexpr = P.served if BANDS == 1 else 1
    start = turn * 0
    slot = wait_until_full(ring, place_of(turn, P))
    zero = find_zeros(zero_ptr, expert, row_tile, P)
    acc, unit = begin(ring, slot, start, N, BANDS, P)
    first = decode(_ask(ring, slot, 0, BANDS, SPAN, P), zero[0], start, P)
    for step in range(steps):
        acc, unit, first, slot, turn = _stage(
            acc, unit, first, ring, zero, slot, turn, step * STAGE, step + 1 < steps,
            N, BANDS, SPAN, P,
        )  # fmt: skip
    return finish(acc, unit, BANDS, P), turn
