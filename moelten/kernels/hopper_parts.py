"""Parts of a band's stage, in Gluon: some chunks, or a group of one, decoded and multiplied at once
by instructions of whole warpgroups (`hopper_products`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_bands import decode_weights, load_weights
from moelten.kernels.hopper_fragments import cut
from moelten.kernels.hopper_products import TOKENS, multiply, sums_layout
from moelten.kernels.hopper_ring import X


@gluon.jit
def ask(ring, slot, band: gl.constexpr, first: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr):
    """Some chunks of a band's stage from its first-th on, for `decode`."""
    out = ()
    for i in gl.static_range(SPAN):
        out = out + (load_weights(ring, slot, band, first + i, P),)
    return out


@gluon.jit
def decode(asked, zero, chunk, P: gl.constexpr):
    """Chunks of a band as operands: of every 16 columns, [rows, 8]."""
    ROWS: gl.constexpr = 16 * P.variant.warps
    SUMS: gl.constexpr = sums_layout(P.variant.warps)
    out = ()
    for i in gl.static_range(len(asked)):
        registers = decode_weights(asked[i], zero, chunk + i, P, gl.uint32)
        steps = cut(registers.reshape([ROWS, 2, 2, TOKENS]).permute((0, 3, 2, 1)))
        for step in gl.static_range(4):
            out = out + (gl.convert_layout(steps[step], SUMS, assert_trivial=True),)
    return out


@gluon.constexpr_function
def _halves(group, span, groups):
    """The halves of so many chunks that belong to a group, counted from the first chunk's."""
    own = [group] if groups == 2 else [0, 1]
    return [2 * chunk + half for chunk in range(span) for half in own]


@gluon.constexpr_function
def _places(first, group, span, groups, block):
    """Where the activations of those halves begin in a stage's, chunks from the first-th on."""
    halves = _halves(group, span, groups)
    return [(first + half // 2) * block * 128 + half % 2 * 64 for half in halves]


@gluon.jit
def multiply_part(
    acc, a, ring, slot, first: gl.constexpr, group: gl.constexpr,
    N: gl.constexpr, SPAN: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """acc + a part of a band's stage @ N tokens: in flight, all of it at once, since what is told
    apart is waited for apart.

    first, group: so many chunks from the first-th on, or, of two groups of one, the group-th
    """
    HALVES: gl.constexpr = _halves(group, SPAN, P.groups)
    PLACES: gl.constexpr = _places(first, group, SPAN, P.groups, P.variant.block)
    OPERAND: gl.constexpr = P.operand
    left = ()
    for i in gl.static_range(len(HALVES)):
        left = left + a[2 * HALVES[i] : 2 * HALVES[i] + 2]
    start = ring[X] + slot * (P.variant.stage * P.variant.block * 128)
    return multiply(acc, left, start, N, PLACES, OPERAND)
