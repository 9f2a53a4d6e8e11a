"""Sums of a tile of 24 to 96 tokens, by sixteen warps, in Gluon.

Four warps share each quarter of a multiprocessor. Each decodes a chunk or two of its rows,
multiplies them and waits for the products, in which others decode. So a warp has nothing in flight
that it has to keep registers for, and half as many as a thread of `hopper_wide` has are enough for
that and the sums of up to 128 tokens and row tiles of a warpgroup; and all schemes have one code.
(Layers of 64 tokens per expert take 4 to 9 % less time than with eight warps, H200.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_bands import find_zeros, take_scale
from moelten.kernels.hopper_parts import ask, decode, multiply_part
from moelten.kernels.hopper_products import wait_for_products
from moelten.kernels.hopper_ring import leave, place_of, wait_until_full
from moelten.kernels.hopper_units import begin, finish, in_units

# Most tokens for which a warp multiplies two chunks at once, of either band or of one, and so waits
# half as often (H200: 2 to 3 % less time). For more, registers do not hold two beside the sums of
# two bands, and two of one take longer.
_TOGETHER = 48


@gluon.constexpr_function
def _at_once(tokens, bands, served):
    """Bands, and chunks of each that scales serve, that are decoded and multiplied together."""
    if tokens > _TOGETHER:
        return 1, 1
    return (2, 1) if bands > 1 else (1, min(2, served))


@gluon.jit
def _wait(acc, COUNT: gl.constexpr):
    """Some bands' sums when all products are complete."""
    flat = ()
    for b in gl.static_range(COUNT):
        flat = flat + acc[b]
    flat = wait_for_products(flat, 0)
    out = ()
    for b in gl.static_range(COUNT):
        out = out + (flat[b * (len(flat) // COUNT) : (b + 1) * (len(flat) // COUNT)],)
    return out


@gluon.jit
def _part(
    acc, unit, ring, zero, slot, chunk, first: gl.constexpr, start: gl.constexpr,
    N: gl.constexpr, COUNT: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """So many bands from the first-th on, and chunks from the start-th: sums and their units."""
    G: gl.constexpr = P.groups
    a = ()
    for g in gl.static_range(G):
        sums = ()
        units = ()
        for b in gl.static_range(COUNT):
            own, its = acc[b], unit[b]
            if P.scaled and start % P.served == 0:
                scale = take_scale(ring, slot, first + b, chunk + start, g, P)
                own, its = in_units(own, its, scale, ring, slot, start // 2, P)
            sums = sums + (own,)
            units = units + (its,)
            if g == 0:
                asked = ask(ring, slot, first + b, start, SPAN, P)
                a = a + (decode(asked, zero[first + b], chunk + start, P),)
        acc = ()
        unit = units
        for b in gl.static_range(COUNT):
            acc = acc + (multiply_part(sums[b], a[b], ring, slot, start, g, N, SPAN, P),)
        acc = _wait(acc, COUNT)
    return acc, unit


@gluon.jit
def _stage(
    acc, unit, ring, zero, slot, chunk,
    N: gl.constexpr, BANDS: gl.constexpr, CHUNKS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A stage of so many chunks, which begins with a chunk: sums and their units."""
    COUNT: gl.constexpr = _at_once(N, BANDS, P.served)[0]
    SPAN: gl.constexpr = _at_once(N, BANDS, P.served)[1]
    for start in gl.static_range(0, CHUNKS, SPAN):
        sums = ()
        units = ()
        for first in gl.static_range(0, BANDS, COUNT):
            own, its = _part(
                acc[first : first + COUNT], unit[first : first + COUNT], ring, zero, slot, chunk,
                first, start, N, COUNT, min(SPAN, CHUNKS - start), P,
            )  # fmt: skip
            sums = sums + own
            units = units + its
        acc = sums
        unit = units
    leave(slot, P)
    return acc, unit


@gluon.jit
def narrow_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [256, 8] of a piece's first bands, band after band, of so many tokens.

    ring: with a number for the activations: where they begin (`hopper_products.find`)
    """
    STAGE: gl.constexpr = P.variant.stage
    REST: gl.constexpr = P.chunks % STAGE  # of the last stage
    zero = find_zeros(zero_ptr, expert, row_tile, P)
    slot = wait_until_full(ring, place_of(turn, P))
    acc, unit = begin(ring, slot, turn * 0, N, BANDS, P)
    whole = steps - 1 if REST else steps
    for step in range(whole):
        slot = wait_until_full(ring, place_of(turn, P))
        acc, unit = _stage(acc, unit, ring, zero, slot, step * STAGE, N, BANDS, STAGE, P)
        turn += 1
    if REST:
        slot = wait_until_full(ring, place_of(turn, P))
        acc, unit = _stage(acc, unit, ring, zero, slot, whole * STAGE, N, BANDS, REST, P)
        turn += 1
    return finish(acc, unit, BANDS, P), turn
