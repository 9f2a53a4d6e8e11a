"""Sums of a tile of 24 to 96 tokens, by sixteen warps, in Gluon.

Four warps share each quarter of a multiprocessor. Each decodes a chunk of its rows, multiplies it
and waits for the products, in which others decode. So a warp has nothing in flight that it has to
keep registers for, and half as many as a thread of `hopper_wide` has are enough for a chunk and the
sums of up to 128 tokens and row tiles of a warpgroup; and all schemes have one code. (Layers of 64
tokens per expert take 4 to 9 % less time than with eight warps, H200.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_bands import find_zeros, take_scale
from moelten.kernels.hopper_parts import ask, decode, multiply_part, put
from moelten.kernels.hopper_products import wait_for_products
from moelten.kernels.hopper_ring import leave, place_of, wait_until_full
from moelten.kernels.hopper_units import begin, finish, in_units


@gluon.jit
def _stage(
    acc, unit, ring, zero, slot, chunk,
    N: gl.constexpr, BANDS: gl.constexpr, CHUNKS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A stage of so many chunks, which begins with a chunk: sums and their units."""
    G: gl.constexpr = P.groups
    for c in gl.static_range(CHUNKS):
        for b in gl.static_range(BANDS):
            own, its = acc[b], unit[b]
            for g in gl.static_range(G):
                if P.scaled and c % P.served == 0:
                    scale = take_scale(ring, slot, b, chunk + c, g, P)
                    own, its = in_units(own, its, scale, ring, slot, c // 2, P)
                if g == 0:
                    a = decode(ask(ring, slot, b, c, 1, P), zero[b], chunk + c, P)
                own = wait_for_products(multiply_part(own, a, ring, slot, c * G + g, N, 1, P), 0)
            acc = put(acc, b, own, BANDS)
            unit = put(unit, b, its, BANDS)
    leave(slot, P)
    return acc, unit


@gluon.jit
def narrow_sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Sums [256, 16] of a piece's first bands, band after band, of so many tokens.

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
