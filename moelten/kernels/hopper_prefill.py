"""The Hopper grouped GEMM for more than a few tokens per expert, in Gluon.

    acc[n, r] = sum over k of w[expert of r, n, k] * a[r, k]

Programs stay on their multiprocessors and walk through pieces of work: `tiles` times 64 rows of one
expert's matrix by up to `block` of its tokens. One warp brings packed weights and activations
(`hopper_ring`) while warpgroups share the rows, decode weights in registers and multiply from
there: by instructions of whole warpgroups for many tokens (`hopper_wgmma`), of single warps for few
(`hopper_mma`). Activations come sorted by expert, columns in the order of operands, so that a
tile's are one block of memory. What a tile costs grows by units of a few tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moelten.kernels.hopper_epilogue import finish, scale_tokens
from moelten.kernels.hopper_fragments import no_sums
from moelten.kernels.hopper_mma import WARP_SUMS, warp_sums
from moelten.kernels.hopper_products import SUMS, find
from moelten.kernels.hopper_ring import leave, place_of, produce, take_work, wait_until_full
from moelten.kernels.hopper_wgmma import warpgroup_sums

# Registers of a thread of the second warpgroup, and of the producer.
_REGISTERS = gl.constexpr([232, 40])


@gluon.jit
def _store(y, out_ptr, first, stop, n0, P: gl.constexpr):
    """[outputs n0 .. , positions first ..] to memory, 16 bytes per lane."""
    OUTPUTS: gl.constexpr = y.shape[0]
    TOKENS: gl.constexpr = y.shape[1]
    WIDTH: gl.constexpr = (P.rows + 31) // 32 * 32 if P.ordered else P.rows
    VECTOR: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    L: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [32 * VECTOR // OUTPUTS, OUTPUTS // VECTOR], [4, 1], [1, 0]
    )
    y = y.to(out_ptr.dtype.element_ty)
    if P.ordered:
        y = y.reshape([OUTPUTS // 32, 4, 2, 2, 2, TOKENS]).permute((5, 0, 2, 3, 1, 4))
        y = gl.convert_layout(y.reshape([TOKENS, OUTPUTS]), L)
    else:
        y = gl.convert_layout(y.permute((1, 0)), L)
    position = first + gl.arange(0, TOKENS, gl.SliceLayout(1, L))
    n = n0 + gl.arange(0, OUTPUTS, gl.SliceLayout(0, L))
    at = out_ptr + position.to(gl.int64)[:, None] * WIDTH + n[None, :]
    gl.store(at, y, mask=(position < stop)[:, None] & (n < WIDTH)[None, :])


@gluon.jit
def _opaque(number):
    """The same number; addresses that follow from it are not computed, and held, before."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _together(acc, start: gl.constexpr, COUNT: gl.constexpr):
    """Some of the sums, [64, tokens], as one tensor."""
    if COUNT == 1:
        return acc[start]
    else:
        HALF: gl.constexpr = COUNT // 2
        low, high = _together(acc, start, HALF), _together(acc, start + HALF, HALF)
        return gl.join(low, high).permute((0, 2, 1)).reshape([64, 2 * low.shape[1]])


@gluon.jit
def _finish_tile(acc, epilogue, expert, first, stop, row_tile, P: gl.constexpr):
    """What follows the sums of a row tile's block, and `_store`.

    32 tokens at a time, for which little shared memory and few registers do.
    """
    (
        row_scale_ptr, x_scale_ptr, bias_ptr, table_ptr, post_ptr, out_ptr, alpha, beta, limit
    ) = epilogue  # fmt: skip
    W: gl.constexpr = P.weights
    ACTIVATION: gl.constexpr = P.activation
    COUNT: gl.constexpr = 32 // P.variant.unit
    PARTS: gl.constexpr = P.most // COUNT
    for i in gl.static_range(PARTS):
        at = first + 32 * i
        if at < stop:
            sums = _together(acc, i * COUNT, COUNT).reshape([4, 2, 8, 32])
            if x_scale_ptr is not None:
                sums = scale_tokens(sums, x_scale_ptr, at, stop, None, 1)
            y = finish(
                sums, row_scale_ptr, bias_ptr, table_ptr, post_ptr, expert, row_tile, 0,
                alpha, beta, limit, P.rows, P.row_tiles, W, P.halves, ACTIVATION, P.limited,
            )  # fmt: skip
            _store(y, out_ptr, at, stop, row_tile * (64 // P.halves), P)


@gluon.jit
def _sums(
    ring, turn, zero_ptr, expert, row_tile, steps,
    group: gl.constexpr, UNITS: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a piece of work of so many units: a block's sums of each row tile."""
    SUMS_OF: gl.constexpr = warp_sums if P.variant.by_warp else warpgroup_sums
    acc, turn = SUMS_OF(ring, turn, zero_ptr, expert, row_tile, steps, group, UNITS, P)
    EACH: gl.constexpr = P.variant.each
    MOST: gl.constexpr = P.most
    UNIT: gl.constexpr = P.variant.unit
    LAYOUT: gl.constexpr = acc[0].type.layout
    none = no_sums(MOST - UNITS, UNIT, LAYOUT)
    out = ()
    for t in gl.static_range(EACH):
        out = out + acc[t * UNITS : (t + 1) * UNITS] + none
    return out, turn


@gluon.jit
def _multiply_piece(
    ring, turn, zero_ptr, epilogue, expert, first, stop, row_tile, steps,
    group: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """A warpgroup's half of a piece of work, from `row_tile` on: sums, and what follows them."""
    EACH: gl.constexpr = P.variant.each
    UNIT: gl.constexpr = P.variant.unit
    LEAST: gl.constexpr = P.least
    MOST: gl.constexpr = P.most
    LAYOUT: gl.constexpr = WARP_SUMS if P.variant.by_warp else SUMS
    units = gl.maximum((stop - first + UNIT - 1) // UNIT, LEAST)
    steps = _opaque(steps)
    acc = no_sums(EACH * MOST, UNIT, LAYOUT)
    for n in gl.static_range(LEAST, MOST + 1):
        if units == n:
            acc, turn = _sums(ring, turn, zero_ptr, expert, row_tile, steps, group, n, P)
    first, expert = _opaque(first), _opaque(expert).to(gl.int64)
    for t in gl.static_range(EACH):
        own = acc[t * MOST : (t + 1) * MOST]
        _finish_tile(own, epilogue, expert, first, stop, row_tile + t, P)
    return turn


@gluon.jit
def _pass(ring, turn, steps, P: gl.constexpr):
    """Let a piece of work go by."""
    for _ in range(steps):
        leave(ring, wait_until_full(ring, place_of(turn, P)))
        turn += 1
    return turn


@gluon.jit
def _consume(ring, work, zero_ptr, epilogue, steps, group: gl.constexpr, P: gl.constexpr):
    """A warpgroup's halves of all pieces of work."""
    EACH: gl.constexpr = P.variant.each
    # Whether the last row tiles of a matrix leave nothing for the second warpgroup.
    IDLE: gl.constexpr = group == 1 and P.uneven
    turn = 0
    expert, first, stop, row_tile = take_work(ring, work, turn, P)
    while expert >= 0:
        row_tile += EACH * group
        if not IDLE or row_tile < P.row_tiles:
            turn = _multiply_piece(
                ring, turn, zero_ptr, epilogue, expert, first, stop, row_tile, steps, group, P
            )
        else:
            turn = _pass(ring, turn, steps, P)
        expert, first, stop, row_tile = take_work(ring, work, turn, P)


@gluon.jit
def _room(desc, COUNT: gl.constexpr):
    """Shared memory for boxes of a descriptor."""
    if desc is None:
        return 0
    else:
        return gl.allocate_shared_memory(
            desc.dtype, [COUNT, desc.block_shape[0], desc.block_shape[1]], desc.layout
        )


@gluon.jit
def _flat(scales, P: gl.constexpr):
    """Boxes of scales of blocks as 32 words each, of which the first four count."""
    SHAPE: gl.constexpr = [P.variant.slots * P.variant.tiles, 32]
    if P.weights.scale == "block":
        return scales._reinterpret(gl.int32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        return scales


@gluon.jit
def _by_group(x_scales, P: gl.constexpr):
    """The boxes of scales of activations, in memory's order."""
    SHAPE: gl.constexpr = [P.variant.slots * P.variant.x_groups, P.variant.block, 4]
    if P.variant.grouped:
        return x_scales._reinterpret(gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    else:
        return 0


@gluon.jit(do_not_specialize=("max_tiles", "positions", "steps", "alpha", "beta", "limit"))
def prefill_kernel(
    w_desc, s_desc, z_desc, x_desc, u_desc, zero_ptr, row_scale_ptr, x_scale_ptr,
    tiles_ptr, count_ptr, max_tiles, positions, steps, bias_ptr, table_ptr, post_ptr, out_ptr,
    alpha, beta, limit, P: gl.constexpr,
):  # fmt: skip
    """All of one grouped GEMM.

    positions: rows of activations
    steps:     stages that the columns make

    The count is known at run time only, lest loops be unrolled.
    """
    words = _room(w_desc, P.variant.slots * P.variant.tiles)
    scales = _room(s_desc, P.variant.slots * P.variant.tiles)
    zeros = _room(z_desc, P.variant.slots * P.variant.tiles)
    x = gl.allocate_shared_memory(
        P.operand, [P.variant.slots * P.variant.stage, P.variant.block, 64], x_desc.layout
    )
    x_scales = _room(u_desc, P.variant.slots * P.variant.x_groups)
    there = x if P.variant.by_warp else find(x)
    work = gl.allocate_shared_memory(
        gl.int32, [P.variant.slots, 4], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [P.variant.slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [P.variant.slots, 1], mbarrier.MBarrierLayout())
    SLOTS: gl.constexpr = P.variant.slots
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    filled = (words, scales, zeros, x, x_scales, full, empty)
    taken = (words, _flat(scales, P), zeros, there, _by_group(x_scales, P), full, empty)
    boxes = (w_desc, s_desc, z_desc, x_desc, u_desc)
    epilogue = (
        row_scale_ptr, x_scale_ptr, bias_ptr, table_ptr, post_ptr, out_ptr, alpha, beta, limit
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (taken, work, zero_ptr, epilogue, steps, 0, P)),
            (_consume, (taken, work, zero_ptr, epilogue, steps, 1, P)),
            (produce, (filled, work, boxes, tiles_ptr, count_ptr, max_tiles, positions, steps, P)),
        ],
        [4, 1],
        _REGISTERS,
    )
