"""Rows of activations on their way into the ring of GEMM1 (`hopper_ring`), in Gluon.

A tile's tokens are anywhere in memory, and bulk copies bring boxes. So two warps that nothing else
would use copy rows, 16 bytes per lane, to where a box would have put them. (Rows that another
kernel gathers first are written once more for each of a token's experts, and read again: of layers
of 8192 tokens that is 3 % of the time, H200.)

The warp that brings weights opens a slot when that is empty, and has written down the piece of
work if one begins there; a slot is full when weights and copies of all lanes have come. Products of
warpgroups read such copies as soon as the barrier that counts them is passed, as CUTLASS does where
it has `cp.async` before wgmma (a fence between proxies takes up to 0.7 % of the time, H200).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_ring import FULL_AT, GATHERERS, OPEN, X, place_of, read_work, wait_at

# Rows that all lanes copy at once, each 128 bytes by 8 lanes.
_ROWS = gl.constexpr(4 * GATHERERS.value)
_COPIED = gl.constexpr("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$1]; mov.b32 $0, $1;")


@gluon.constexpr_function
def _copies(row_bytes, chunks, chunk_bytes):
    """16 bytes of each of some chunks of a row, to so many bytes behind each other; zeros where
    there is none."""
    lines = [
        f"cp.async.cg.shared.global [$3 + {c * chunk_bytes}], [from + {c * 128}], 16, none;"
        for c in range(chunks)
    ]
    address = [
        "{.reg .b64 from; .reg .pred none; setp.lt.s32 none, $1, 0;",
        f"mad.wide.u32 from, $1, {row_bytes}, $2;",
    ]
    return "\n".join([*address, *lines, "mov.b32 $0, $1;}"])


@gluon.jit
def _copy_stage(rows, count, x, room, P: gl.constexpr):
    """Some chunks of a tile's first `count` rows, and zeros up to a multiple of 32 rows.

    rows: of the lane, every `_ROWS`-th of the tile, -1 behind its last one
    x:    where a lane's 16 bytes of row 0 are; room: where those of the tile's first go
    """
    CHUNK: gl.constexpr = P.variant.block * 128
    PTX: gl.constexpr = _copies(2 * P.x_width, P.variant.stage, CHUNK)
    TOGETHER: gl.constexpr = 32 // _ROWS
    for first in gl.static_range(0, len(rows), TOGETHER):
        if first * _ROWS < count:
            for i in gl.static_range(first, min(first + TOGETHER, len(rows))):
                gl.inline_asm_elementwise(
                    PTX, "=r,r,l,r", [rows[i][:, None], x, room + i * (_ROWS * 128)],
                    dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip


@gluon.jit
def _say_copied(ring, slot):
    """Each lane arrives at a slot's barrier when all that it copied so far has come."""
    gl.inline_asm_elementwise(
        _COPIED, "=r,r", [ring[FULL_AT] + slot * 8], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _keep(ring):
    """Read what nobody needs: else Gluon, which does not know of copies to addresses, would take
    the activations' memory for free."""
    L: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [GATHERERS, 1], [1, 0])
    bits = ring[X].index(0).slice(0, 8, 0).load(L).to(gl.int16, bitcast=True)
    gl.inline_asm_elementwise(
        "mov.b16 $0, $1;", "=h,h", [bits], dtype=gl.int16, is_pure=False, pack=1
    )


@gluon.jit
def gather_rows(ring, work, start, x_ptr, sources_ptr, steps, P: gl.constexpr):
    """Copy the rows of all pieces of work, stage after stage.

    start:       where the ring's activations begin (`hopper_products.find`)
    x_ptr:       rows [R, P.x_width], columns in the order of operands
    sources_ptr: int32, the row of each position
    """
    STAGE: gl.constexpr = P.variant.stage
    COUNT: gl.constexpr = P.variant.block // _ROWS
    L: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [GATHERERS, 1], [1, 0])
    row = gl.arange(0, _ROWS, gl.SliceLayout(1, L))
    part = gl.arange(0, 8, gl.SliceLayout(0, L))
    # Swizzled by 128 bytes, as bulk copies do it.
    room = start + row[:, None] * 128 + (part[None, :] ^ row[:, None] & 7) * 16
    x = (x_ptr + row[:, None] * 0 + part[None, :] * 8).to(gl.uint64, bitcast=True)
    turn = 0
    expert, first, stop, _ = read_work(work, wait_at(ring[FULL_AT] + OPEN, place_of(turn, P)))
    while expert >= 0:
        rows = ()
        sources = sources_ptr + (first + row)
        for i in gl.static_range(COUNT):
            inside = row < stop - first - i * _ROWS
            rows = rows + (gl.load(sources + i * _ROWS, mask=inside, other=-1),)
        at = x
        for _ in range(steps):
            slot = wait_at(ring[FULL_AT] + OPEN, place_of(turn, P))
            to = room + slot * (STAGE * P.variant.block * 128)
            _copy_stage(rows, stop - first, at, to, P)
            _say_copied(ring, slot)
            at += STAGE * 128
            turn += 1
        expert, first, stop, _ = read_work(work, wait_at(ring[FULL_AT] + OPEN, place_of(turn, P)))
    _say_copied(ring, turn % P.variant.slots)
    _keep(ring)
